"""LoRA-Pro (Wang et al., ICLR 2025, arXiv 2407.18242), efficient mode: other gradients, then AdamW.

A change (b, a) of (B, A) changes the weight by ``s (b A + B a)``, s the scaling. Of all pairs for which that comes
nearest to the weight's gradient G, LoRA-Pro takes the one nearest to the ordinary gradients gA = s B' G, gB = s G A':

    a = (B'B)^-1 gA / s^2 + X A
    b = (I - B (B'B)^-1 B') gB (A A')^-1 / s^2 - B X
    B'B X + X A A' = (gA - a0) A' + B' (b0 - gB)        (a0, b0: the terms without X)

The last line is a Sylvester equation with symmetric matrices: two eigendecompositions of [rank, rank] solve it. Nothing
of the size of the weight is formed. Where one factor is frozen, the other's best change is its first term alone,
without the projector. Where B is zero its inverse counts as zero, so that a is zero in the first step.

Departures from the public code, which has the scaling 2 written into it and clips the gradients after the change: the
scaling is the slot's own (rsLoRA, sketches), and clipping comes before. The small matrices are in double precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from airtune.optimizers import LoraPro
from airtune.training.model import ActiveAdapter
from airtune.training.optimizers.groups import Pairs, adamw_of, gradients, pairs_of, parameter_groups, stacked
from airtune.types import LocalTraining


@dataclass
class LoraProStep:
    """Replaces the gradients of the pairs, then lets AdamW step on everything."""

    active: ActiveAdapter
    training: LocalTraining
    chosen: LoraPro

    def __post_init__(self) -> None:
        """Find the pairs."""
        self.pairs = pairs_of(self.active)
        self.inner = adamw_of(parameter_groups(self.active, self.training), self.training, self.chosen)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        self.inner.zero_grad(set_to_none)

    def step(self) -> None:
        """Step once."""
        with torch.no_grad():
            for pairs in self.pairs:
                _replace_gradients(pairs, self.chosen.damping)
        self.inner.step()


def _replace_gradients(pairs: Pairs, damping: float) -> None:
    a, b = stacked(pairs.A), stacked(pairs.B)
    if pairs.trains_a and pairs.trains_b:
        new_a, new_b = pro_gradients(a, b, gradients(pairs.A), gradients(pairs.B), pairs.scaling, damping)
        _put(pairs.A, new_a)
        _put(pairs.B, new_b)
    elif pairs.trains_b:
        _put(pairs.B, _scaled(gradients(pairs.B).double() @ inverse(_gram(a.mT), damping), pairs.scaling))
    else:
        _put(pairs.A, _scaled(inverse(_gram(b), damping) @ gradients(pairs.A).double(), pairs.scaling))


def pro_gradients(
    a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, scaling: Tensor, damping: float
) -> tuple[Tensor, Tensor]:
    """Return the changed gradients of n pairs, in double precision.

    Parameters
    ----------
    a, grad_a : [n, rank, in]. b, grad_b : [n, out, rank]. scaling : [n].
    damping : added to the eigenvalues of the Gram matrices, in units of the largest.
    """
    a, b, grad_a, grad_b = a.double(), b.double(), grad_a.double(), grad_b.double()
    gram_a, gram_b = _gram(a.mT), _gram(b)
    inverse_b = inverse(gram_b, damping)
    first_a = _scaled(inverse_b @ grad_a, scaling)
    outside = grad_b - b @ (inverse_b @ (b.mT @ grad_b))
    first_b = _scaled(outside @ inverse(gram_a, damping), scaling)
    right = (grad_a - first_a) @ a.mT + b.mT @ (first_b - grad_b)
    x = sylvester(gram_b, gram_a, right, damping)
    return first_a + x @ a, first_b - b @ x


def sylvester(left: Tensor, right: Tensor, wanted: Tensor, damping: float = 0.0) -> Tensor:
    """Return X with ``left X + X right = wanted`` for symmetric, not negative matrices [n, rank, rank]."""
    l_values, l_vectors = torch.linalg.eigh(left)
    r_values, r_vectors = torch.linalg.eigh(right)
    sums = l_values.clamp(min=0.0)[:, :, None] + r_values.clamp(min=0.0)[:, None, :]
    sums = sums + damping * sums.amax(dim=(1, 2), keepdim=True)
    turned = l_vectors.mT @ wanted @ r_vectors
    return l_vectors @ torch.where(sums > 0.0, turned / sums, 0.0) @ r_vectors.mT


def inverse(gram: Tensor, damping: float) -> Tensor:
    """Return the damped inverse of symmetric, not negative matrices [n, rank, rank]; that of zero is zero."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp(min=0.0)
    values = values + damping * values.amax(dim=1, keepdim=True)
    return (vectors * torch.where(values > 0.0, 1.0 / values, 0.0)[:, None, :]) @ vectors.mT


def _gram(columns: Tensor) -> Tensor:
    return columns.double().mT @ columns.double()


def _scaled(values: Tensor, scaling: Tensor) -> Tensor:
    return values / scaling.to(values)[:, None, None] ** 2


def _put(tensors: tuple[Tensor, ...], values: Tensor) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.grad = value.to(tensor.dtype)
