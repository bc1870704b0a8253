"""Wrappers around any method that say who is late: a deadline, the first arrivals, weights for stale updates.

They have no paper of their own. Each changes one thing and leaves the wrapped method as it is, so they nest:
``Staleness(FirstArrivals(FedIT(cohort_size=20), updates=10, late="keep"))`` waits for ten updates, keeps the other ten
in flight, and gives them less weight when they come.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from airtune.aggregation.declaring import redraws, reshaped, weakens_products
from airtune.aggregation.staleness import check_weakens, weaken_stale
from airtune.errors import InputError
from airtune.federation import Diagnoses, prepared
from airtune.lora import AdapterShape
from airtune.scheduling.work import ChoosesRanks
from airtune.types import Cutoff, Fleet, Method, Observation, Plan, RoundOutcome, ServerModel

Late = Literal["drop", "keep"]


@dataclass(frozen=True)
class Wrapper:
    """What every wrapper passes on to the method inside: state, ranks, first model, diagnostics.

    Parameters
    ----------
    method : the wrapped method.
    """

    method: Method[Any]

    def init(self, model: ServerModel, fleet: Fleet) -> Any:
        """Return the wrapped method's state."""
        return self.method.init(model, fleet)

    def ranks(self, shape: AdapterShape) -> Mapping[str, int]:
        """Return the ranks that the wrapped method wants."""
        if isinstance(self.method, ChoosesRanks):
            return self.method.ranks(shape)
        return {name: slot.rank for name, slot in shape.slots.items()}

    @property
    def redraws(self) -> bool:
        """Return whether the wrapped method changes the adapter's basis."""
        return redraws(self.method)

    @property
    def weakens_products(self) -> bool:
        """Return whether the wrapped method weakens stale changes as products."""
        return weakens_products(self.method)

    def prepare(self, model: ServerModel) -> ServerModel:
        """Return the model that the wrapped method starts from."""
        return prepared(self.method, model)

    def reshape(self, shape: AdapterShape) -> AdapterShape:
        """Return the sizes of the adapter that the wrapped method starts from."""
        return reshaped(self.method, shape)

    def diagnose(self, state: Any, outcome: RoundOutcome) -> Mapping[str, float]:
        """Return what the wrapped method puts on record."""
        return self.method.diagnose(state, outcome) if isinstance(self.method, Diagnoses) else {}


@dataclass(frozen=True)
class Deadline(Wrapper):
    """Ends each round of a method after a number of seconds, with whatever has arrived.

    Parameters
    ----------
    method : the wrapped method.
    seconds : fleet seconds from the start of the round.
    late : "drop" what has not arrived (its seconds, bits and joules are charged), or "keep" it in flight.
    """

    seconds: float
    late: Late = "drop"

    def __post_init__(self) -> None:
        """Check the seconds."""
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise InputError(f"method.seconds: must be positive, in s; got {self.seconds:g}")

    def plan(self, state: Any, seen: Observation, rng: np.random.Generator) -> Plan:
        """Return the wrapped method's plan with the deadline."""
        plan = self.method.plan(state, seen, rng)
        return _with_cutoffs(plan, lambda old: replace(old, deadline=self.seconds, late=self.late))

    def aggregate(self, state: Any, model: ServerModel, outcome: RoundOutcome) -> tuple[ServerModel, Any]:
        """Let the wrapped method aggregate."""
        return self.method.aggregate(state, model, outcome)


@dataclass(frozen=True)
class FirstArrivals(Wrapper):
    """Ends each round of a method when a number of updates have arrived.

    Parameters
    ----------
    method : the wrapped method; it should draw more clients than `updates`.
    updates : arrivals to wait for in each group (all, if the group is smaller).
    late : "drop" or "keep" the others, as in `Deadline`.
    """

    updates: int
    late: Late = "drop"

    def __post_init__(self) -> None:
        """Check the number."""
        if self.updates < 1:
            raise InputError(f"method.updates: must be at least 1; got {self.updates}")

    def plan(self, state: Any, seen: Observation, rng: np.random.Generator) -> Plan:
        """Return the wrapped method's plan with the cut-off."""
        plan = self.method.plan(state, seen, rng)
        return _with_cutoffs(plan, lambda old: replace(old, min_updates=self.updates, late=self.late))

    def aggregate(self, state: Any, model: ServerModel, outcome: RoundOutcome) -> tuple[ServerModel, Any]:
        """Let the wrapped method aggregate."""
        return self.method.aggregate(state, model, outcome)


@dataclass(frozen=True)
class Staleness(Wrapper):
    """Gives updates that started from an earlier model less weight: ``x + (1 + age)^-exponent (x_n - start_n)``.

    The age counts model versions. A fresh update is untouched. Methods whose rule sums products (flora, flexlora,
    rac-lora ...) weaken the change of the product instead of A and B. The polynomial form is that of FedAsync (arXiv
    1903.03934), also used by FedBuff with exponent 1/2 (arXiv 2106.06639).

    Parameters
    ----------
    method : the wrapped method; where factors are averaged it sees the weakened update as if it had started from the
        current model.
    exponent : 0 only moves the stale change onto the current model.
    """

    exponent: float = 0.5

    def __post_init__(self) -> None:
        """Check the exponent."""
        if not (math.isfinite(self.exponent) and self.exponent >= 0):
            raise InputError(f"method.exponent: must be at least 0; got {self.exponent:g}")
        check_weakens(self.method, "method.method")

    def plan(self, state: Any, seen: Observation, rng: np.random.Generator) -> Plan:
        """Return the wrapped method's plan."""
        return self.method.plan(state, seen, rng)

    def aggregate(self, state: Any, model: ServerModel, outcome: RoundOutcome) -> tuple[ServerModel, Any]:
        """Weaken what is stale, then let the wrapped method aggregate."""
        return self.method.aggregate(state, model, weaken_stale(model, outcome, self.exponent, self.method))


def _with_cutoffs(plan: Plan, change: Callable[[Cutoff], Cutoff]) -> Plan:
    return replace(plan, groups=tuple(replace(group, cutoff=change(group.cutoff)) for group in plan.groups))
