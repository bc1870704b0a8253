"""LoRA-RITE (Yen et al., ICLR 2025, arXiv 2410.20625): a step on B A that does not depend on its factorisation.

The gradient of a factor is first freed of the size of its partner: with the QR decomposition B = U_B R_B,
``gA' R_B^-1 = scaling * G' U_B`` where G is the gradient of the weight. Its moments are kept in the basis U_B and move
along when the basis turns: with P = U_B(t)' U_B(t-1) the second moment V, [rank, rank], becomes P V P', the first M,
[in, rank], becomes M P'. The step is then put back: A' <- A' - lr M R_B^-T. The same for B with the basis of A'.

All pairs of one size are computed together. Small matrices, QR and eigenvalues are taken in the adapter's precision.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from airtune.optimizers import LoraRite
from airtune.training.model import ActiveAdapter
from airtune.training.optimizers.groups import Pairs, gradients, pairs_of, rest_of, stacked
from airtune.types import LocalTraining


@dataclass
class Side:
    """The moments of one factor of n pairs, in the basis of its partner.

    basis : [n, partner length, rank]. first : [n, length, rank]. second : [n, rank, rank]. escaped : [n].
    """

    basis: Tensor
    first: Tensor
    second: Tensor
    escaped: Tensor


@dataclass(frozen=True)
class _Factor:
    """One factor of a stack of pairs, as columns: A' is [n, in, rank], B is [n, out, rank]."""

    tensors: tuple[Tensor, ...]
    partners: tuple[Tensor, ...]
    transposed: bool

    def columns(self) -> Tensor:
        return self._oriented(stacked(self.tensors))

    def partner_columns(self) -> Tensor:
        values = stacked(self.partners)
        return values if self.transposed else values.mT

    def gradient(self) -> Tensor:
        return self._oriented(gradients(self.tensors))

    def add(self, change: Tensor) -> None:
        for tensor, part in zip(self.tensors, self._oriented(change), strict=True):
            tensor.add_(part)

    def _oriented(self, values: Tensor) -> Tensor:
        return values.mT if self.transposed else values


@dataclass
class _Step:
    """What one factor needs within a step: the gradient in its partner's basis, and the way back."""

    factor: _Factor
    gradient: Tensor
    basis: Tensor
    inverse: Tensor


@dataclass
class LoraRiteStep:
    """LoRA-RITE on the pairs, AdamW on cores and head."""

    active: ActiveAdapter
    training: LocalTraining
    chosen: LoraRite
    sides: dict[int, Side] = field(default_factory=dict[int, Side])
    steps: int = 0

    def __post_init__(self) -> None:
        """Find the pairs, and what is left for AdamW."""
        self.factors = [factor for pairs in pairs_of(self.active) for factor in _factors(pairs)]
        self.rest = rest_of(self.active, self.training)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for _, _, tensor in self.active.trained():
            tensor.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Step once."""
        parts = [self._part(factor) for factor in self.factors]
        total = torch.sqrt(sum((part.gradient.square().sum() for part in parts), start=torch.zeros(()).double()))
        shrink = min(1.0, self.chosen.clip / float(total)) if float(total) > 0.0 else 1.0
        changes = [self._change(index, part, shrink) for index, part in enumerate(parts)]
        for part, change in zip(parts, changes, strict=True):
            part.factor.add(change)
        self.steps += 1
        if self.rest is not None:
            self.rest.step()

    def _part(self, factor: _Factor) -> _Step:
        basis, triangle = torch.linalg.qr(factor.partner_columns())
        inverse = torch.linalg.pinv(triangle)
        gradient = factor.gradient() @ inverse
        size = gradient.square().mean(dim=(1, 2), keepdim=True).sqrt()
        return _Step(factor, torch.where(size > self.chosen.skip_above, 0.0, gradient), basis, inverse)

    def _change(self, index: int, part: _Step, shrink: float) -> Tensor:
        side = self.sides.get(index) or _empty(part)
        change, self.sides[index] = rite_update(part.gradient * shrink, part.basis, side, self.steps, self.chosen)
        back = change @ part.inverse.mT
        if self.training.weight_decay:
            back = back + self.training.weight_decay * part.factor.columns()
        return -self.training.learning_rate * back


def rite_update(gradient: Tensor, basis: Tensor, side: Side, step: int, chosen: LoraRite) -> tuple[Tensor, Side]:
    """Return the direction in the partner's basis, [n, length, rank], and the new moments.

    Parameters
    ----------
    gradient : [n, length, rank], free of the partner's size. basis : [n, partner length, rank], orthonormal columns.
    step : number of steps before this one.
    """
    turn = basis.mT @ side.basis
    second = _symmetric(turn @ side.second @ turn.mT)
    keep = _decay(chosen.beta2, step)
    escaped = side.escaped
    if chosen.escape:
        escaped = keep * (escaped + _lost(side.second, second))
    second = keep * second + (1.0 - keep) * _symmetric(gradient.mT @ gradient) / gradient.shape[1]
    values, vectors = torch.linalg.eigh(second)
    roots = (values.clamp(min=0.0) + escaped[:, None] + chosen.epsilon**2).sqrt() + chosen.epsilon
    direction = gradient @ ((vectors / roots[:, None, :]) @ vectors.mT)
    keep = _decay(chosen.beta1, step)
    first = keep * (side.first @ turn.mT) + (1.0 - keep) * direction
    return first, Side(basis, first, second, escaped)


def _lost(before: Tensor, after: Tensor) -> Tensor:
    """Return the mass that a turn of the basis loses, [n]: the smaller of the drops of eigenvalues and of the trace."""
    drop = (torch.linalg.eigvalsh(before) - torch.linalg.eigvalsh(after)).amax(dim=1).clamp(min=0.0)
    trace = (before - after).diagonal(dim1=1, dim2=2).sum(dim=1).clamp(min=0.0)
    return torch.minimum(drop, trace)


def _decay(beta: float, step: int) -> float:
    """Return the decay rate with which the moment is unbiased at every step (as in Adafactor)."""
    return beta * (1.0 - beta**step) / (1.0 - beta ** (step + 1))


def _symmetric(matrices: Tensor) -> Tensor:
    return (matrices + matrices.mT) / 2


def _empty(part: _Step) -> Side:
    n, _, rank = part.gradient.shape
    square = part.gradient.new_zeros((n, rank, rank))
    return Side(torch.zeros_like(part.basis), torch.zeros_like(part.gradient), square, square.new_zeros(n))


def _factors(pairs: Pairs) -> list[_Factor]:
    found = [_Factor(pairs.A, pairs.B, True)] if pairs.trains_a else []
    return found + ([_Factor(pairs.B, pairs.A, False)] if pairs.trains_b else [])
