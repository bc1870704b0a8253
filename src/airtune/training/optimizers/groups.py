"""What optimizers share: which tensors are trained at which rate, and the pairs (A, B) of equal size as stacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from airtune.optimizers import AdamW, Moments
from airtune.training.model import ActiveAdapter
from airtune.types import LocalTraining


class LocalOptimizer(Protocol):
    """What local training asks of an optimizer; those of torch fit."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        ...

    def step(self) -> object:
        """Change the trained tensors by their gradients."""
        ...


def head_rate(training: LocalTraining) -> float:
    """Return the learning rate of the extras."""
    return training.learning_rate if training.head_learning_rate is None else training.head_learning_rate


def parameter_groups(
    active: ActiveAdapter, training: LocalTraining, rates: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Return the trained tensors in groups with their learning rates: LoRA factors, and the head.

    rates : kind ("A", "B", "core") -> its own rate; kinds that are not named have `training.learning_rate`.
    """
    by_rate: dict[tuple[bool, float], list[Tensor]] = {}
    for _, kind, tensor in active.trained():
        rate = head_rate(training) if kind == "extra" else (rates or {}).get(kind, training.learning_rate)
        by_rate.setdefault((kind == "extra", rate), []).append(tensor)
    return [{"params": by_rate[key], "lr": key[1]} for key in sorted(by_rate)]


@dataclass(frozen=True)
class Pairs:
    """The slots of one size: n pairs of [rank, in] and [out, rank], whose steps are computed together.

    A, B : n tensors each. scaling : [n]. trains_a, trains_b : whether they get gradients, for all n alike.
    """

    A: tuple[Tensor, ...]
    B: tuple[Tensor, ...]
    scaling: Tensor
    trains_a: bool
    trains_b: bool


def pairs_of(active: ActiveAdapter) -> list[Pairs]:
    """Return the trained pairs, grouped by size and by which factors are trained; slots without such are left out."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for slot, f in active.adapter.factors.items():
        if f.A.requires_grad or f.B.requires_grad:
            key = (tuple(f.A.shape), tuple(f.B.shape), f.A.requires_grad, f.B.requires_grad)
            groups.setdefault(key, []).append(slot)
    found: list[Pairs] = []
    for (_, _, trains_a, trains_b), slots in groups.items():
        factors = [active.adapter.factors[slot] for slot in slots]
        scaling = factors[0].A.new_tensor([f.scaling for f in factors])
        found.append(
            Pairs(tuple(f.A for f in factors), tuple(f.B for f in factors), scaling, bool(trains_a), bool(trains_b))
        )
    return found


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Return the present values as one tensor, [n, ...]."""
    return torch.stack([tensor.detach() for tensor in tensors])


def gradients(tensors: Sequence[Tensor]) -> Tensor:
    """Return the gradients as one tensor, [n, ...]; a tensor without one counts as zero."""
    return torch.stack([torch.zeros_like(t) if t.grad is None else t.grad for t in tensors])


def unpaired(active: ActiveAdapter) -> list[tuple[str, Tensor]]:
    """Return (kind, tensor) of everything trained that is neither A nor B: cores and the head."""
    return [(kind, tensor) for _, kind, tensor in active.trained() if kind not in ("A", "B")]


def adamw_of(groups: Sequence[Mapping[str, Any]], training: LocalTraining, moments: Moments) -> torch.optim.AdamW:
    """Return torch's AdamW on groups that bring their learning rates."""
    return torch.optim.AdamW(
        [dict(group) for group in groups],
        lr=training.learning_rate,
        betas=(moments.beta1, moments.beta2),
        eps=moments.epsilon,
        weight_decay=training.weight_decay,
        foreach=False,
    )


def rest_of(active: ActiveAdapter, training: LocalTraining) -> torch.optim.AdamW | None:
    """Return AdamW with its usual numbers for what has no pair, None if there is nothing of that kind."""
    groups: list[dict[str, Any]] = []
    for kind, tensor in unpaired(active):
        rate = head_rate(training) if kind == "extra" else training.learning_rate
        groups.append({"params": [tensor], "lr": rate})
    return adamw_of(groups, training, AdamW()) if groups else None
