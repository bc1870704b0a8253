"""Who takes part in a round. Every rule says with which probability each chosen client was included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from airtune.capabilities import Trait
from airtune.errors import InputError, unknown_name
from airtune.types import Floats, Ints, Observation

SharesBy = Literal["uniform", "examples"]


@dataclass(frozen=True)
class Cohort:
    """The chosen clients, increasing, and the inclusion probability of each, both [cohort]."""

    clients: Ints
    probability: Floats


@dataclass(frozen=True)
class All:
    """Every candidate, with probability 1."""

    @property
    def traits(self) -> frozenset[Trait]:
        """Return nothing: everyone takes part."""
        return frozenset()

    def sample(self, candidates: Ints, seen: Observation, rng: np.random.Generator) -> Cohort:
        """Return all candidates."""
        return Cohort(candidates, np.ones(len(candidates)))


@dataclass(frozen=True)
class Uniform:
    """`cohort_size` candidates, all subsets equally likely; all of them if there are fewer.

    The inclusion probability of each is cohort_size / number of candidates.
    """

    cohort_size: int

    @property
    def traits(self) -> frozenset[Trait]:
        """Return nothing: the inclusion probabilities are known."""
        return frozenset()

    def sample(self, candidates: Ints, seen: Observation, rng: np.random.Generator) -> Cohort:
        """Return the cohort. Raises InputError if it is larger than the fleet."""
        size = min(checked_cohort_size(self.cohort_size, seen), len(candidates))
        chosen = np.sort(rng.choice(candidates, size=size, replace=False)) if size else candidates[:0]
        return Cohort(chosen, np.full(size, size / max(len(candidates), 1)))


@dataclass(frozen=True)
class Weighted:
    """`cohort_size` candidates, each included with a probability in proportion to its examples (at most 1).

    Systematic sampling in random order (Madow 1949): the inclusion probabilities hold exactly, which sequential
    draws without replacement do not give.
    """

    cohort_size: int

    @property
    def traits(self) -> frozenset[Trait]:
        """Return nothing: the inclusion probabilities are known."""
        return frozenset()

    def sample(self, candidates: Ints, seen: Observation, rng: np.random.Generator) -> Cohort:
        """Return the cohort. Raises InputError if it is larger than the fleet."""
        size = min(checked_cohort_size(self.cohort_size, seen), len(candidates))
        if size == 0:
            return Cohort(candidates[:0], np.ones(0))
        probability = inclusion_probabilities(seen.fleet.num_examples[candidates].astype(np.float64), size)
        order = rng.permutation(len(candidates))
        ends = np.cumsum(probability[order])
        ends[-1] = size  # exact, whatever the rounding of the sum
        points = rng.random() + np.arange(size)
        chosen = np.sort(order[np.searchsorted(ends, points, side="right")])
        return Cohort(candidates[chosen], probability[chosen])


@dataclass(frozen=True)
class Independent:
    """Each candidate on its own: in the cohort with probability q_n, so its size varies and may be zero.

    Parameters
    ----------
    expected_cohort_size : sum of the q_n (at most the number of candidates).
    by : "uniform", or "examples": q_n in proportion to the examples (at most 1).
    """

    expected_cohort_size: float
    by: SharesBy = "uniform"

    def __post_init__(self) -> None:
        """Check the name."""
        if self.by not in ("uniform", "examples"):
            raise unknown_name("method.by", self.by, ("uniform", "examples"))

    @property
    def traits(self) -> frozenset[Trait]:
        """Return nothing: the inclusion probabilities are known."""
        return frozenset()

    def sample(self, candidates: Ints, seen: Observation, rng: np.random.Generator) -> Cohort:
        """Return the cohort. Raises InputError if the expected size is not within the fleet."""
        expected, size = self.expected_cohort_size, seen.fleet.size
        if not 0.0 < expected <= size:
            raise InputError(f"method.expected_cohort_size: {expected} is not possible; valid: above 0, at most {size}")
        share = seen.fleet.num_examples[candidates].astype(np.float64)
        share = share if self.by == "examples" else np.ones(len(candidates))
        probability = inclusion_probabilities(share, min(expected, len(candidates)))
        chosen = rng.random(len(candidates)) < probability
        return Cohort(candidates[chosen], probability[chosen])


def inclusion_probabilities(share: Floats, size: float) -> Floats:
    """Return min(1, c * share), [n], with c such that the sum is `size` (at most n); shares positive."""
    certain = np.zeros(len(share), dtype=np.bool_)
    probability = np.zeros(len(share))
    for _ in range(len(share) + 1):
        rest = size - certain.sum()
        if certain.all() or rest <= 0.0:
            break
        probability = np.where(certain, 1.0, share * (rest / share[~certain].sum()))
        over = (probability >= 1.0) & ~certain
        if not over.any():
            break
        certain |= over
    return np.where(certain, 1.0, probability)


def checked_cohort_size(cohort_size: int, seen: Observation) -> int:
    """Return the cohort size, or raise InputError if no cohort of the fleet has it."""
    if not 1 <= cohort_size <= seen.fleet.size:
        raise InputError(f"method.cohort_size: {cohort_size} is not possible; valid: 1 to {seen.fleet.size} clients")
    return cohort_size


def everyone_or(cohort_size: int | None) -> All | Uniform:
    """Return uniform sampling of that many clients, or everyone for None."""
    return All() if cohort_size is None else Uniform(cohort_size)
