"""The aggregators by the names that an experiment file uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from airtune.aggregation.mean import FrobeniusWeighted, IndependentSampling, Mean
from airtune.capabilities import Trait
from airtune.federation import Prepares
from airtune.lora import Exchange
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


@runtime_checkable
class ChoosesFactors(Protocol):
    """An aggregator whose clients do not all download, train and upload both factors."""

    def exchange(self, round_index: int) -> Exchange:
        """Return what is exchanged in a round (from 1)."""
        ...


def exchange_of(aggregator: Aggregator, round_index: int) -> Exchange:
    """Return what an aggregator wants exchanged in a round: both factors if it does not say."""
    return aggregator.exchange(round_index) if isinstance(aggregator, ChoosesFactors) else Exchange()


def prepared(aggregator: Aggregator, model: ServerModel) -> ServerModel:
    """Return the model that an aggregator wants to start from: the given one if it does not say."""
    return aggregator.prepare(model) if isinstance(aggregator, Prepares) else model


AGGREGATORS: Mapping[str, type[DeclaringAggregator]] = {
    "mean": Mean,
    "frobenius-weighted": FrobeniusWeighted,
    "independent-sampling": IndependentSampling,
}
