"""GaLore (Zhao et al., ICML 2024, arXiv 2403.03507) with the projector of the round: AdamW on projected gradients.

The frozen factor is the projector P. With ``W + s P A`` the gradient of A is s times the projected gradient P' G, and
a step of A moves W by s P times it. So GaLore's step ``W <- W - lr * scale * P N`` with Adam's direction N of P' G is
AdamW on A with the gradient divided by s and the learning rate ``lr * scale / s``. The same with A frozen.

With a rank of its own (`GaLore.rank`) it projects what it trains once more, as the paper does with the dense weight: at
the layer's full rank P is a rotation, and the step is that of dense GaLore.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from airtune.errors import InputError
from airtune.lora import LoraFactors
from airtune.optimizers import AdamW, GaLore
from airtune.training.model import ActiveAdapter
from airtune.training.optimizers.groups import adamw_of, rest_of
from airtune.types import LocalTraining

_ROUNDING = 1e-4  # how far P'P may be from the identity, in single precision and at any width


@dataclass
class GaLoreStep:
    """GaLore on the one trained factor of each slot, AdamW on the head."""

    active: ActiveAdapter
    training: LocalTraining
    chosen: GaLore

    def __post_init__(self) -> None:
        """Check that there is a projector, and make the optimizers.

        Raises
        ------
        InputError : both factors of a slot are trained, or the frozen one has no orthonormal columns.
        """
        if self.active.gains:
            raise InputError(
                "training.optimizer: galore descends the weight itself, dora its parts; valid: model.adapter lora"
            )
        groups: list[dict[str, Any]] = []
        self.scales: list[tuple[Tensor, float]] = []
        self.dense: list[_Projected] = []
        for slot, factors in self.active.adapter.factors.items():
            if (tensor := _trained(slot, factors)) is not None:
                rate = self.training.learning_rate * self.chosen.scale / factors.scaling
                self.scales.append((tensor, factors.scaling))
                if self.chosen.rank is not None:
                    self.dense.append(_Projected(tensor, self.chosen.rank, self.chosen.gap))
                groups.append({"params": [self.dense[-1].moved if self.dense else tensor], "lr": rate})
        moments = AdamW(self.chosen.beta1, self.chosen.beta2, self.chosen.epsilon)
        self.inner = adamw_of(groups, self.training, moments) if groups else None
        self.rest = rest_of(self.active, self.training)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for _, _, tensor in self.active.trained():
            tensor.grad = None

    def step(self) -> None:
        """Step once."""
        for tensor, scaling in self.scales:
            if tensor.grad is not None:
                tensor.grad.div_(scaling)
        for projected in self.dense:
            projected.project()
        if self.inner is not None:
            self.inner.step()
        for projected in self.dense:
            projected.lift()
        if self.rest is not None:
            self.rest.step()


@dataclass
class _Projected:
    """A tensor whose gradient is projected on its leading singular directions: rows, or columns if they are fewer.

    moved : what the optimizer sees in its place, of which only the steps matter.
    """

    tensor: Tensor
    rank: int
    gap: int

    def __post_init__(self) -> None:
        """Begin at zero steps, without a projector."""
        rows, columns = self.tensor.shape
        self.by_rows = rows <= columns
        rank = min(self.rank, rows, columns)
        self.moved = self.tensor.detach().new_zeros((rank, columns) if self.by_rows else (rows, rank))
        self.moved.requires_grad_(True)
        self.steps = 0

    def project(self) -> None:
        """Project the gradient, with new directions every `gap` steps."""
        gradient = self.tensor.grad
        assert gradient is not None, "every trained factor takes part in the loss"
        if self.steps % self.gap == 0:
            left, right = leading_directions(gradient, min(self.moved.shape))
            self.projector = left if self.by_rows else right.T
        self.steps += 1
        self.moved.grad = self.projector.T @ gradient if self.by_rows else gradient @ self.projector
        self.before = self.moved.detach().clone()

    def lift(self) -> None:
        """Move the tensor by the optimizer's step, lifted back."""
        change = self.moved.detach() - self.before
        with torch.no_grad():
            self.tensor += self.projector @ change if self.by_rows else change @ self.projector.T


def leading_directions(gradient: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the leading singular directions, [rows, rank] and [rank, columns].

    Signs are such that the largest value of every right one is positive: moments that stay when the projector changes
    do not depend on what sign a library chose.
    """
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    left, right = left[:, :rank], right[:rank]
    sign = torch.sign(right.gather(1, right.abs().argmax(dim=1, keepdim=True)))
    return left * sign.T, right * sign


def _trained(slot: str, factors: LoraFactors) -> Tensor | None:
    """Return the factor that is trained against the projector, None if none is."""
    if factors.A.requires_grad and factors.B.requires_grad:
        raise InputError(
            f"training.optimizer: galore needs a fixed projector, and {slot!r} trains A and B; valid: a method that "
            "fixes one factor with orthonormal components (galore-avg, rac-lora)"
        )
    if not (factors.A.requires_grad or factors.B.requires_grad):
        return None
    projector = factors.A.T if factors.B.requires_grad else factors.B
    gram = projector.detach().T.double() @ projector.detach().double()
    if float((gram - torch.eye(len(gram)).to(gram)).abs().max()) > _ROUNDING:
        raise InputError(
            f"training.optimizer: galore needs a projector with orthonormal columns, and the frozen factor of {slot!r} "
            "has none; valid: a method that draws such (galore-avg, rac-lora)"
        )
    return factors.A if factors.A.requires_grad else factors.B
