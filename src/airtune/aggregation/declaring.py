"""What an aggregator may say about itself, so that it can stand under any planner, or be refused with a reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable

from airtune.capabilities import Trait
from airtune.lora import AdapterShape, Exchange
from airtune.types import Aggregator, RoundOutcome, ServerModel


@runtime_checkable
class DeclaringAggregator(Protocol):
    """An aggregator that says what it cannot take, so that it can stand under any planner that fits."""

    @property
    def refuses(self) -> Mapping[Trait, str]:
        """Return the traits of plans that it cannot take, each with the reason."""
        ...

    def __call__(self, model: ServerModel, outcome: RoundOutcome) -> ServerModel:
        """Return the next model; without updates, the model as it is."""
        ...


class _Aggregators(Mapping[str, type[DeclaringAggregator]]):
    """The aggregators by name for wrappers of aggregators; imported when asked for, as they import this module."""

    def _table(self) -> Mapping[str, type[DeclaringAggregator]]:
        from airtune.aggregation.registry import AGGREGATORS

        return AGGREGATORS

    def __getitem__(self, name: str) -> type[DeclaringAggregator]:
        return self._table()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table())

    def __len__(self) -> int:
        return len(self._table())


NAMES: Mapping[str, type[DeclaringAggregator]] = _Aggregators()


@runtime_checkable
class ChoosesFactors(Protocol):
    """An aggregator whose clients do not all download, train and upload both factors."""

    def exchange(self, round_index: int) -> Exchange:
        """Return what is exchanged in a round (from 1)."""
        ...


@runtime_checkable
class Reshapes(Protocol):
    """A method or an aggregator whose first adapter has other tensors than A and B: Fed-SB's core."""

    def reshape(self, shape: AdapterShape) -> AdapterShape:
        """Return the sizes of the prepared adapter, without any tensor: planning asks for them."""
        ...


@runtime_checkable
class DeclaresLinear(Protocol):
    """An aggregator that says whether all it needs of the clients is one weighted sum of what they send.

    Only such a sum can be formed under secure aggregation, and only to such a sum can noise be added that hides a
    client. An aggregator that does not say so counts as not linear.
    """

    @property
    def linear(self) -> bool:
        """Return whether the clients enter through one weighted sum of their uploads, with known weights."""
        ...


@runtime_checkable
class DeclaresRedraws(Protocol):
    """An aggregator that says whether the next round trains other coordinates than this one."""

    @property
    def redraws(self) -> bool:
        """Return whether the adapter's basis changes: it is drawn anew, or comes from an SVD."""
        ...


def redraws(part: object) -> bool:
    """Return whether an aggregator, or a method, says that it changes the adapter's basis."""
    return isinstance(part, DeclaresRedraws) and part.redraws


@runtime_checkable
class DeclaresStaleProducts(Protocol):
    """An aggregator that weakens stale changes itself, as products, where `RoundOutcome.stale_exponent` is set."""

    @property
    def weakens_products(self) -> bool:
        """Return whether it does."""
        ...


def weakens_products(part: object) -> bool:
    """Return whether an aggregator, or a method, says that it weakens stale changes as products."""
    return isinstance(part, DeclaresStaleProducts) and part.weakens_products


def exchange_of(aggregator: Aggregator, round_index: int) -> Exchange:
    """Return what an aggregator wants exchanged in a round: both factors if it does not say."""
    return aggregator.exchange(round_index) if isinstance(aggregator, ChoosesFactors) else Exchange()


def reshaped(part: object, shape: AdapterShape) -> AdapterShape:
    """Return the sizes of the adapter that a method or an aggregator starts from, given those of the plain one."""
    return part.reshape(shape) if isinstance(part, Reshapes) else shape


def is_linear(aggregator: Aggregator) -> bool:
    """Return whether an aggregator says that it is linear."""
    return isinstance(aggregator, DeclaresLinear) and aggregator.linear
