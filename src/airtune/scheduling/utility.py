"""Guided sampling: clients whose data still teach something, unless they are too slow (Oort-like)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from airtune.capabilities import Trait
from airtune.errors import InputError
from airtune.scheduling.sampling import Cohort, checked_cohort_size
from airtune.types import Floats, Ints, Observation


@dataclass(frozen=True)
class Utility:
    """Draws most of the cohort by utility, the rest at random among clients never tried.

    After Lai et al., "Oort", OSDI 2021 (arXiv 2010.06081). Utility of client n: ``examples_n * loss_n`` of its last
    report, times ``(T / t_n)^penalty`` if its last round took t_n seconds, more than T, the `quantile` of all known
    durations. Departures: Oort uses the root mean square of the losses of single examples and adapts T by a pacer; a
    report here carries the mean loss, and T follows the fleet [choice].

    Parameters
    ----------
    cohort_size : clients per round.
    exploration : share of the cohort that is drawn among clients without a report.
    penalty : exponent on the slowness.
    quantile : of the known durations, from 0 to 1.
    """

    cohort_size: int
    exploration: float = 0.3
    penalty: float = 2.0
    quantile: float = 0.8

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not (0.0 <= self.exploration <= 1.0 and 0.0 <= self.quantile <= 1.0 and self.penalty >= 0.0):
            raise InputError("sampler.exploration, sampler.quantile: must be from 0 to 1; sampler.penalty: at least 0")

    @property
    def traits(self) -> frozenset[Trait]:
        """Return that nobody knows the inclusion probabilities."""
        return frozenset({Trait.UNKNOWN_PROBABILITY})

    def sample(self, candidates: Ints, seen: Observation, rng: np.random.Generator) -> Cohort:
        """Return the cohort. Raises InputError if it is larger than the fleet."""
        size = min(checked_cohort_size(self.cohort_size, seen), len(candidates))
        known = np.array([c for c in candidates.tolist() if "loss" in seen.reports.get(c, {})], dtype=np.int64)
        fresh = np.setdiff1d(candidates, known)
        explored = min(max(math.ceil(self.exploration * size), size - len(known)), len(fresh))
        new = rng.choice(fresh, size=explored, replace=False) if explored else fresh[:0]
        best = known[np.argsort(-self._utility(known, seen), kind="stable")][: size - explored]
        chosen = np.sort(np.concatenate([new, best]))
        return Cohort(chosen, np.ones(len(chosen)))

    def _utility(self, clients: Ints, seen: Observation) -> Floats:
        reports = [seen.reports[c] for c in clients.tolist()]
        loss = np.array([report["loss"] for report in reports])
        seconds = np.array([_duration(report) for report in reports])
        limit = np.quantile(seconds, self.quantile) if len(seconds) else 0.0
        slowness = np.where(seconds > limit, (limit / np.maximum(seconds, 1e-12)) ** self.penalty, 1.0)
        return np.asarray(seen.fleet.num_examples[clients] * loss * slowness, dtype=np.float64)


def _duration(report: Mapping[str, float]) -> float:
    parts = ("download_seconds", "forward_seconds", "backward_seconds", "upload_seconds")
    return sum(report.get(part, 0.0) for part in parts)
