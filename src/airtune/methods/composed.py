"""Any planner with any aggregator that can take its plans."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from airtune.aggregation.declaring import exchange_of, redraws, reshaped, weakens_products
from airtune.aggregation.mean import Mean
from airtune.aggregation.registry import AGGREGATORS
from airtune.capabilities import Trait, compatible
from airtune.compression.dense import Dense
from airtune.errors import InputError
from airtune.federation import prepared
from airtune.lora import AdapterShape
from airtune.methods import built_in_names, method_class
from airtune.scheduling.planner import Separate
from airtune.scheduling.work import ChoosesRanks, LocalWork
from airtune.types import Compressor, Fleet, LocalTraining, Observation, Plan, RoundOutcome, ServerModel


class AnyPlanner(Protocol):
    """A planner whatever its state: see `airtune.scheduling.planner.Planner`."""

    @property
    def traits(self) -> frozenset[Trait]:
        """Return what its plans may show."""
        ...

    def init(self, model: ServerModel, fleet: Fleet) -> Any:
        """Return the state before round 1."""
        ...

    def decide(self, state: Any, seen: Observation, rng: np.random.Generator, work: LocalWork) -> Plan:
        """Return the plan of one round."""
        ...

    def learn(self, state: Any, outcome: RoundOutcome) -> Any:
        """Return the state after a round."""
        ...


class AnyAggregator(Protocol):
    """An aggregator that says what it cannot take: see `airtune.aggregation.declaring.DeclaringAggregator`."""

    @property
    def refuses(self) -> Mapping[Trait, str]:
        """Return the traits of plans that it cannot take, each with the reason."""
        ...

    def __call__(self, model: ServerModel, outcome: RoundOutcome) -> ServerModel:
        """Return the next model."""
        ...


class _Planners(Mapping[str, "type[AnyPlanner]"]):
    """The planners by name: `Separate`, and every method that decides jointly; methods are imported when asked for."""

    def _table(self) -> dict[str, type[AnyPlanner]]:
        classes = {name: method_class(name) for name in built_in_names()}
        joint = {name: kind for name, kind in classes.items() if hasattr(kind, "decide")}
        return {"separate": Separate, **joint}

    def __getitem__(self, name: str) -> type[AnyPlanner]:
        return self._table()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table())

    def __len__(self) -> int:
        return len(self._table())


PLANNERS: Mapping[str, type[AnyPlanner]] = _Planners()
AVERAGES: Mapping[str, type[AnyAggregator]] = AGGREGATORS


@dataclass(frozen=True)
class Composed:
    """A method put together from a planner and an aggregator: LEGEND's depths with another average, and so on.

    No paper of its own: each part's docstring names where it comes from. A pair that does not fit is refused when the
    method is made, with the reason.

    Parameters
    ----------
    planner : decides the round: `Separate(sampler, slicer, bandwidth)`, or a method that decides jointly (`Legend`).
    aggregator : turns the updates into the next model.
    compressor : codes the uploads.
    training : local training.
    """

    planner: AnyPlanner = field(default_factory=Separate)
    aggregator: AnyAggregator = field(default_factory=Mean)
    compressor: Compressor = field(default_factory=Dense)
    training: LocalTraining = field(default_factory=LocalTraining)

    def __post_init__(self) -> None:
        """Refuse a pair that does not fit."""
        reason = compatible(self.planner, self.aggregator)
        if reason is not None:
            pair = f"{type(self.planner).__name__} with {type(self.aggregator).__name__}"
            raise InputError(f"method.aggregator: {pair} is refused: {reason}")

    @property
    def redraws(self) -> bool:
        """Return whether the aggregator changes the adapter's basis."""
        return redraws(self.aggregator)

    @property
    def weakens_products(self) -> bool:
        """Return whether the aggregator weakens stale changes as products."""
        return weakens_products(self.aggregator)

    def prepare(self, model: ServerModel) -> ServerModel:
        """Return the model that the aggregator wants to start from."""
        return prepared(self.aggregator, model)

    def reshape(self, shape: AdapterShape) -> AdapterShape:
        """Return the sizes of the prepared adapter."""
        return reshaped(self.aggregator, shape)

    def init(self, model: ServerModel, fleet: Fleet) -> Any:
        """Return the planner's state."""
        return self.planner.init(model, fleet)

    def plan(self, state: Any, seen: Observation, rng: np.random.Generator) -> Plan:
        """Let the planner decide."""
        exchange = exchange_of(self.aggregator, seen.round)
        return self.planner.decide(state, seen, rng, LocalWork(self.training, self.compressor, exchange))

    def aggregate(self, state: Any, model: ServerModel, outcome: RoundOutcome) -> tuple[ServerModel, Any]:
        """Let the aggregator average, and the planner learn."""
        return self.aggregator(model, outcome), self.planner.learn(state, outcome)

    def ranks(self, shape: AdapterShape) -> Mapping[str, int]:
        """Return the ranks that the planner wants, or those that are there."""
        if isinstance(self.planner, ChoosesRanks):
            return self.planner.ranks(shape)
        return {name: slot.rank for name, slot in shape.slots.items()}


class FromParts(ABC):
    """A method that is nothing but its parts: it says which, and does what `Composed` does with them."""

    @property
    @abstractmethod
    def composed(self) -> Composed:
        """Return the parts that this method is made of."""

    def __post_init__(self) -> None:
        """Make the parts once, so that wrong fields are refused when the method is made."""
        _ = self.composed

    @property
    def redraws(self) -> bool:
        """Return whether the aggregator changes the adapter's basis."""
        return redraws(self.composed)

    @property
    def weakens_products(self) -> bool:
        """Return whether the aggregator weakens stale changes as products."""
        return weakens_products(self.composed)

    def prepare(self, model: ServerModel) -> ServerModel:
        """Return the model that the aggregator wants to start from."""
        return self.composed.prepare(model)

    def reshape(self, shape: AdapterShape) -> AdapterShape:
        """Return the sizes of the prepared adapter."""
        return self.composed.reshape(shape)

    def init(self, model: ServerModel, fleet: Fleet) -> Any:
        """Return the planner's state."""
        return self.composed.init(model, fleet)

    def plan(self, state: Any, seen: Observation, rng: np.random.Generator) -> Plan:
        """Let the planner decide."""
        return self.composed.plan(state, seen, rng)

    def aggregate(self, state: Any, model: ServerModel, outcome: RoundOutcome) -> tuple[ServerModel, Any]:
        """Let the aggregator make the next model."""
        return self.composed.aggregate(state, model, outcome)
