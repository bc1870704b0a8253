"""What plans may contain and what aggregators can take: the facts that decide whether two parts fit together.

A planner declares its `traits`: what its plans may show. An aggregator declares what it `refuses`, with the reason.
Nothing is decided by a name, so a third-party planner or aggregator takes part by declaring the same facts.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Protocol


class Trait(Enum):
    """A fact about the plans that a planner makes."""

    UNEQUAL_RANKS = "clients hold different numbers of components of the same slot"
    PARTIAL_DEPTH = "some clients hold no component of some slots"
    SKETCH = "clients hold random subsets of components, rescaled"
    FIXED_FACTOR = "one of the factors A and B is not trained"
    UNKNOWN_PROBABILITY = "clients are chosen by a rule without a known inclusion probability"


class Declares(Protocol):
    """A planner, as far as fitting is concerned."""

    @property
    def traits(self) -> frozenset[Trait]:
        """Return what its plans may show."""
        ...


class Refuses(Protocol):
    """An aggregator, as far as fitting is concerned."""

    @property
    def refuses(self) -> Mapping[Trait, str]:
        """Return the traits that it cannot take, each with the reason."""
        ...


def compatible(planner: Declares, aggregator: Refuses) -> str | None:
    """Return None if the aggregator can take every plan of the planner, else the reason why not."""
    reasons = [reason for trait, reason in aggregator.refuses.items() if trait in planner.traits]
    return "; ".join(reasons) or None
