"""Wrappers of any aggregator that limit what single clients can do: clipping, trimming, medians; and age weights.

None has a paper of its own here. Each changes the updates and hands them to the wrapped aggregator, which decides which
factors are exchanged and which plans are refused.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from airtune.aggregation.changes import change_of, common_slice, consensus, moved
from airtune.aggregation.declaring import DeclaringAggregator, exchange_of, redraws, reshaped, weakens_products
from airtune.aggregation.mean import Mean, in_client_order
from airtune.aggregation.staleness import check_weakens, weaken_stale
from airtune.capabilities import Trait
from airtune.errors import InputError
from airtune.federation import prepared
from airtune.lora import AdapterShape, Exchange
from airtune.types import ClientUpdate, RoundOutcome, ServerModel

if TYPE_CHECKING:
    from torch import Tensor

SAME_SLICE = {
    Trait.UNEQUAL_RANKS: "values are compared one by one: all clients must send the same components",
    Trait.PARTIAL_DEPTH: "values are compared one by one: all clients must send the same slots",
    Trait.SKETCH: "values are compared one by one: random subsets differ",
}


class Wrapper(ABC):
    """An aggregator around another one: what it exchanges, prepares and refuses is the inner one's business."""

    @property
    @abstractmethod
    def wrapped(self) -> DeclaringAggregator:
        """Return the wrapped aggregator."""

    @property
    def refuses(self) -> Mapping[Trait, str]:
        """Return what the wrapped aggregator cannot take."""
        return self.wrapped.refuses

    @property
    def redraws(self) -> bool:
        """Return whether the wrapped aggregator changes the adapter's basis."""
        return redraws(self.wrapped)

    @property
    def weakens_products(self) -> bool:
        """Return whether the wrapped aggregator weakens stale changes as products, and sees the updates one by one."""
        return False

    def exchange(self, round_index: int) -> Exchange:
        """Return what the wrapped aggregator exchanges."""
        return exchange_of(self.wrapped, round_index)

    def prepare(self, model: ServerModel) -> ServerModel:
        """Return the model that the wrapped aggregator starts from."""
        return prepared(self.wrapped, model)

    def reshape(self, shape: AdapterShape) -> AdapterShape:
        """Return the sizes of the adapter that the wrapped aggregator starts from."""
        return reshaped(self.wrapped, shape)


@dataclass(frozen=True)
class NormClipping(Wrapper):
    """Shrinks every change to a largest Euclidean norm, over all that the client sent, before it is aggregated.

    Parameters
    ----------
    largest_norm : of a client's change.
    inner : the wrapped aggregator.
    """

    largest_norm: float = 1.0
    inner: DeclaringAggregator = field(default_factory=Mean)

    def __post_init__(self) -> None:
        """Check the norm."""
        if not (math.isfinite(self.largest_norm) and self.largest_norm > 0):
            raise InputError(f"method.largest_norm: {self.largest_norm:g} is not possible; valid: above 0")

    @property
    def wrapped(self) -> DeclaringAggregator:
        """Return the wrapped aggregator."""
        return self.inner

    @property
    def weakens_products(self) -> bool:
        """Return whether the wrapped aggregator does: it sees every update."""
        return weakens_products(self.inner)

    def __call__(self, model: ServerModel, outcome: RoundOutcome) -> ServerModel:
        """Return the next model."""
        clipped = []
        for update in outcome.updates:
            change = clip(change_of(update, outcome, model), self.largest_norm)
            clipped.append(moved(update, outcome.start_of(update, model), change))
        return self.inner(model, replace(outcome, updates=tuple(clipped)))


@dataclass(frozen=True)
class TrimmedMean(Wrapper):
    """The mean of each value without its largest and smallest ones (Yin et al., arXiv 1803.01498), unweighted.

    Parameters
    ----------
    trim : share of the clients that is left out at each end, at least 0 and below 1/2; rounded down to whole clients.
    inner : the wrapped aggregator; it sees one update, the trimmed mean.
    """

    trim: float = 0.1
    inner: DeclaringAggregator = field(default_factory=Mean)

    def __post_init__(self) -> None:
        """Check the share."""
        if not 0.0 <= self.trim < 0.5:
            raise InputError(f"method.trim: {self.trim:g} is not possible; valid: at least 0, below 0.5")

    @property
    def wrapped(self) -> DeclaringAggregator:
        """Return the wrapped aggregator."""
        return self.inner

    @property
    def refuses(self) -> Mapping[Trait, str]:
        """Return what cannot be compared value by value, and what the wrapped aggregator cannot take."""
        return {**self.inner.refuses, **SAME_SLICE}

    def __call__(self, model: ServerModel, outcome: RoundOutcome) -> ServerModel:
        """Return the next model."""
        updates = in_client_order(outcome.updates)
        if not updates:
            return model
        check_comparable(self.inner, model, updates, "trimmed mean")
        changes = _stacked([change_of(update, outcome, model) for update in updates])
        left_out = int(self.trim * len(updates) + 1e-9)
        kept = changes.sort(dim=0).values[left_out : len(updates) - left_out]
        return self.inner(model, consensus(model, outcome, updates, kept.mean(dim=0)))


@dataclass(frozen=True)
class CoordinateMedian(Wrapper):
    """The median of each value over the clients (Yin et al., arXiv 1803.01498), unweighted.

    Of an even number the mean of the two middle values.

    Parameters
    ----------
    inner : the wrapped aggregator; it sees one update, the median.
    """

    inner: DeclaringAggregator = field(default_factory=Mean)

    @property
    def wrapped(self) -> DeclaringAggregator:
        """Return the wrapped aggregator."""
        return self.inner

    @property
    def refuses(self) -> Mapping[Trait, str]:
        """Return what cannot be compared value by value, and what the wrapped aggregator cannot take."""
        return {**self.inner.refuses, **SAME_SLICE}

    def __call__(self, model: ServerModel, outcome: RoundOutcome) -> ServerModel:
        """Return the next model."""
        updates = in_client_order(outcome.updates)
        if not updates:
            return model
        check_comparable(self.inner, model, updates, "median")
        ordered = _stacked([change_of(update, outcome, model) for update in updates]).sort(dim=0).values
        middle = (ordered[(len(updates) - 1) // 2] + ordered[len(updates) // 2]) / 2
        return self.inner(model, consensus(model, outcome, updates, middle))


@dataclass(frozen=True)
class StalenessWeights(Wrapper):
    """Moves stale changes onto the current model, weakened by their age: ``(1 + age)^-exponent``.

    The age counts model versions (FedAsync, arXiv 1903.03934). Rules that average factors see moved factors; rules on
    products weaken the change of the product themselves (`airtune.aggregation.staleness`); one that changes its basis
    and does neither (a median around a rule that draws its adapter anew) is refused.

    Parameters
    ----------
    exponent : 0 only moves the change.
    inner : the wrapped aggregator.
    """

    exponent: float = 0.5
    inner: DeclaringAggregator = field(default_factory=Mean)

    def __post_init__(self) -> None:
        """Check the exponent."""
        if not (math.isfinite(self.exponent) and self.exponent >= 0):
            raise InputError(f"method.exponent: {self.exponent:g} is not possible; valid: at least 0")
        check_weakens(self.inner, "method.inner")

    @property
    def wrapped(self) -> DeclaringAggregator:
        """Return the wrapped aggregator."""
        return self.inner

    @property
    def weakens_products(self) -> bool:
        """Return whether the wrapped aggregator does."""
        return weakens_products(self.inner)

    def __call__(self, model: ServerModel, outcome: RoundOutcome) -> ServerModel:
        """Return the next model."""
        return self.inner(model, weaken_stale(model, outcome, self.exponent, self.inner))


def check_comparable(inner: DeclaringAggregator, model: ServerModel, updates: list[ClientUpdate], rule: str) -> None:
    """Raise InputError unless the updates' values mean the same: one slice, and one basis.

    Changes of earlier versions are moved onto the present factors, which means nothing if the basis is another one.
    """
    common_slice(updates, rule)
    if redraws(inner) and any(update.model_version != model.version for update in updates):
        raise InputError(
            f"method.aggregator: {rule} compares values, and {type(inner).__name__} changes the adapter's basis every "
            'round, so that late updates cannot be compared; valid: late = "drop"'
        )


def clip(change: Tensor, largest_norm: float) -> Tensor:
    """Return a change shrunk to a norm, or as it is if its norm is not larger."""
    norm = float(change.norm())
    return change if norm <= largest_norm else change * (largest_norm / norm)


def _stacked(changes: list[Tensor]) -> Tensor:
    import torch

    return torch.stack(changes)
