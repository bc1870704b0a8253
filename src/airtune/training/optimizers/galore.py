"""GaLore (Zhao et al., ICML 2024, arXiv 2403.03507) with the projector of the round: AdamW on projected gradients.

The frozen factor is the projector P. With ``W + s P A`` the gradient of A is s times the projected gradient P' G, and
a step of A moves W by s P times it. So GaLore's step ``W <- W - lr * scale * P N`` with Adam's direction N of P' G is
AdamW on A with the gradient divided by s and the learning rate ``lr * scale / s``. The same with A frozen.
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
        for slot, factors in self.active.adapter.factors.items():
            if (tensor := _trained(slot, factors)) is not None:
                rate = self.training.learning_rate * self.chosen.scale / factors.scaling
                groups.append({"params": [tensor], "lr": rate})
                self.scales.append((tensor, factors.scaling))
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
        if self.inner is not None:
            self.inner.step()
        if self.rest is not None:
            self.rest.step()


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
