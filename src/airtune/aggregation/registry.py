"""The aggregators by the names that an experiment file uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from airtune.aggregation.mean import FrobeniusWeighted, IndependentSampling, Mean
from airtune.capabilities import Trait
from airtune.types import RoundOutcome, ServerModel


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


AGGREGATORS: Mapping[str, type[DeclaringAggregator]] = {
    "mean": Mean,
    "frobenius-weighted": FrobeniusWeighted,
    "independent-sampling": IndependentSampling,
}
