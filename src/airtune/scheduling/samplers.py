"""The samplers by the names that an experiment file uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from airtune.capabilities import Trait
from airtune.scheduling.sampling import All, Cohort, Independent, Uniform, Weighted
from airtune.scheduling.utility import Utility
from airtune.types import Ints, Observation


class Sampler(Protocol):
    """Chooses a cohort from candidates (idle, with data, a link and enough memory)."""

    @property
    def traits(self) -> frozenset[Trait]:
        """Return what its cohorts may show."""
        ...

    def sample(self, candidates: Ints, seen: Observation, rng: np.random.Generator) -> Cohort:
        """Return the cohort."""
        ...


SAMPLERS: Mapping[str, type[Sampler]] = {
    "all": All,
    "uniform": Uniform,
    "weighted": Weighted,
    "independent": Independent,
    "utility": Utility,
}
