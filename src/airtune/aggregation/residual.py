"""Rules that average the factors and make up for what the average leaves out: FedEx-LoRA and LoRA-FAIR."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Literal

import numpy as np

from airtune.aggregation.algebra import mean_residual, ridge_correction
from airtune.aggregation.contributions import Contributions, contributions
from airtune.aggregation.mean import Absent, Weights, client_weights, in_client_order, mean_adapter
from airtune.aggregation.merging import factor_bits, merged
from airtune.aggregation.stacking import SKETCH_REASON
from airtune.aggregation.staleness import arrived, moved_factors
from airtune.capabilities import Trait
from airtune.errors import InputError, unknown_name
from airtune.lora import Adapter, Indices, LoraFactors, is_half, stack
from airtune.types import ClientUpdate, RoundOutcome, ServerModel

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class ResidualMerge:
    """FedEx-LoRA's rule (arXiv 2410.09432): factors are averaged, what the average leaves out goes into the base.

    The adapter becomes (mean of A, mean of B) and goes on training; the residual ``sum_k p_k s_k B_k A_k - s B A`` is
    merged. It is sent as stacked factors, of rank (K - 1) r for equal ranks (the authors send it dense). A stale update
    counts with the product that it sent, or with what staleness weights make of it; what was merged since it started
    stays merged [choice].

    Parameters
    ----------
    weights : p_k, "examples" or "uniform".
    absent : what a client without a component counts as, in the average and in the products. Unequal ranks are exact
        too [choice; the paper has equal ranks]: components that not every client of the round has received are merged
        whole and start again with B zero, so that all start the next round from the same model. Kept, they would leave
        whoever lacks them with a base that makes up for an average which is not there, more so every round.
    rank : None: the whole residual; else its best approximation of this rank (the paper's inexact variant).
    """

    weights: Weights = "examples"
    absent: Absent = "excluded"
    rank: int | None = None

    def __post_init__(self) -> None:
        """Check the rank."""
        if self.rank is not None and self.rank < 1:
            raise InputError(f"method.residual_rank: {self.rank} is no rank; valid: 1 or more, or none")

    @property
    def weakens_products(self) -> bool:
        """Return that stale changes are weakened here, as products."""
        return True

    @property
    def refuses(self) -> Mapping[Trait, str]:
        """Return what this rule cannot take."""
        return {Trait.SKETCH: SKETCH_REASON}

    def __call__(self, model: ServerModel, outcome: RoundOutcome) -> ServerModel:
        """Return the next model."""
        updates = arrived(model, outcome)
        if not updates:
            return model
        adapter = _mean(model, outcome, self.weights, self.absent)
        found = contributions(model, updates, outcome, self.weights, self.absent)
        common = {slot: _common(slot, updates) for slot in found}
        additions = {slot: _residual(part, adapter.factors[slot], common[slot]) for slot, part in found.items()}
        restarted = {slot: _restarted(adapter.factors[slot], kept) for slot, kept in common.items()}
        adapter = adapter.with_factors({**adapter.factors, **restarted})
        if self.rank is not None:
            additions = {slot: part.truncate(self.rank) for slot, part in additions.items()}
        additions = {slot: part for slot, part in additions.items() if part.rank > 0}
        return merged(model, adapter, additions, factor_bits(additions))


Correction = Literal["closed-form", "published"]


@dataclass(frozen=True)
class RidgeCorrection:
    """LoRA-FAIR's rule (arXiv 2411.14961): A is averaged, and B is corrected so that the product comes closer.

    ``D = argmin S(sum_k p_k s_k B_k A_k, s (B + D) A) + strength ||D||^2``, B and A being the means; B + D is sent.

    Parameters
    ----------
    weights : p_k, "examples" or "uniform".
    strength : of the penalty on D.
    correction : "closed-form": S is the squared Frobenius distance [choice], a ridge regression, no dense update.
        "published": S is one minus the cosine of each column, gradient descent from D = 0 (the code of others starts
        from random values, which leaves noise in B); it forms the dense update.
    iterations, correction_rate : steps and step size of the published correction.

    Clients with fewer components are padded with zeros, in the average and in the products.
    """

    weights: Weights = "examples"
    strength: float = 0.01
    correction: Correction = "closed-form"
    iterations: int = 1000
    correction_rate: float = 0.01

    def __post_init__(self) -> None:
        """Check names and numbers."""
        if self.correction not in ("closed-form", "published"):
            raise unknown_name("method.correction", self.correction, ("closed-form", "published"))
        for name in ("strength", "iterations", "correction_rate"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InputError(f"method.{name}: {getattr(self, name):g} is not possible; valid: above 0")

    @property
    def weakens_products(self) -> bool:
        """Return that stale changes are weakened here, as products."""
        return True

    @property
    def refuses(self) -> Mapping[Trait, str]:
        """Return what this rule cannot take."""
        return {
            Trait.SKETCH: SKETCH_REASON,
            Trait.PARTIAL_DEPTH: "padding a slot that a client does not have with zeros would shrink it",
        }

    def __call__(self, model: ServerModel, outcome: RoundOutcome) -> ServerModel:
        """Return the next model."""
        updates = arrived(model, outcome)
        if not updates:
            return model
        adapter = _mean(model, outcome, self.weights, "zero")
        found = contributions(model, updates, outcome, self.weights, "zero")
        factors = dict(adapter.factors)
        for slot, part in found.items():
            mean = adapter.factors[slot]
            factors[slot] = replace(mean, B=mean.B + self._change(part, mean).to(mean.B))
        return model.updated(adapter.with_factors(factors))

    def _change(self, part: Contributions, mean: LoraFactors) -> Tensor:
        """Return D of one slot, [out_features, rank]."""
        double = mean.cast(_double())
        if self.correction == "published":
            return published_correction(part, double, self.strength, self.iterations, self.correction_rate)
        exact = replace(part, parts=tuple(p.cast(_double()) for p in part.parts))
        return ridge_correction(residual_of(exact, double), double.A, self.strength, double.scaling)


def _common(slot: str, updates: Sequence[ClientUpdate]) -> Indices:
    """Return the components of a slot that every client has received."""
    received = [update.task.receive.components.get(slot, np.empty(0, dtype=np.int64)) for update in updates]
    return reduce(np.intersect1d, received)


def _residual(part: Contributions, mean: LoraFactors, common: Indices) -> LoraFactors:
    """Return the mean of the products less what the common components of the mean keep."""
    if len(common) == mean.rank:
        return residual_of(part, mean)
    kept = [mean.select(common)] if len(common) else []
    return stack([*part.parts, *kept], [*part.weights, *([-1.0] * len(kept))])


def _restarted(mean: LoraFactors, common: Indices) -> LoraFactors:
    """Return the mean with B zero outside the common components."""
    if len(common) == mean.rank:
        return mean
    columns = np.zeros(mean.rank, dtype=bool)
    columns[common] = True
    return replace(mean, B=mean.B * mean.B.new_tensor(columns.tolist()))


def residual_of(part: Contributions, mean: LoraFactors) -> LoraFactors:
    """Return ``sum_k p_k s_k B_k A_k - delta W of the mean`` as factors: (K - 1) r of them where that is possible.

    It is not where the mean was rounded to half precision: the residual of the rounded mean has rank (K + 1) r.
    """
    if part.whole and mean.core is None and not is_half(mean.A) and abs(sum(part.weights) - 1.0) < 1e-9:
        return mean_residual(part.parts, part.weights)
    return stack([*part.parts, mean], [*part.weights, -1.0])


def published_correction(
    part: Contributions, mean: LoraFactors, strength: float, iterations: int, learning_rate: float
) -> Tensor:
    """Return D by gradient descent on ``sum_j (1 - cos(target_j, s ((B + D) A)_j)) + strength ||D||_F^2``.

    Columns j as in the public descendant of the authors' code; D starts at zero.
    """
    import torch

    target = part.stacked().cast(mean.A.dtype).product()
    change = torch.zeros_like(mean.B).requires_grad_(True)
    for _ in range(iterations):
        fitted = replace(mean, B=mean.B + change).product()
        cosine = torch.nn.functional.cosine_similarity(fitted, target, dim=0)
        loss = (1.0 - cosine).sum() + strength * change.square().sum()
        (gradient,) = torch.autograd.grad(loss, change)
        change = (change - learning_rate * gradient).detach().requires_grad_(True)
    return change.detach()


def _mean(model: ServerModel, outcome: RoundOutcome, weights: Weights, absent: Absent) -> Adapter:
    """Return the mean of the factors; stale ones moved onto the present factors where stale changes are weakened."""
    updates = in_client_order(moved_factors(model, outcome).updates)
    by_client = client_weights(updates, outcome, weights)
    return mean_adapter(model.adapter, updates, {s: by_client for s in model.adapter.factors}, by_client, absent)


def _double() -> torch.dtype:
    import torch

    return torch.float64
