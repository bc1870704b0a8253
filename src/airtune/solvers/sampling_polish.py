"""Descent on the expected time itself: one client at a time, with the exact minimum in its probability."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from airtune.solvers.joint_problem import Array, Decision, Ints, JointProblem, Judge
from airtune.solvers.sampling_time import RoundTimes, Scenarios

MOST_SCENARIOS, FEWEST_SCENARIOS = 512, 32
MEMBERS = 12_000
_POWERS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.1, 1.25)


def polish(problem: JointProblem, judge: Judge, start: Decision, evaluations: int, seed: int = 1) -> Decision:
    """Return a decision that is at least as good as `start` in the eyes of the judge.

    E[T] is linear in every single q_n: ``(1 - q) A + q B``, A the mean without client n and B with it. With
    D = beta - (the others' V) and c = v_n the best q of one client minimises (A + q (B - A)) / (D - c / q), that is

        q = c / D + sqrt((c / D)^2 + A c / ((B - A) D)),  at most 1.

    For every size A and B are means over scenarios of their own (other than the judge's), the same for all clients.
    Sweeps go on until one gains less than 1e-4, or until the budget is used up.

    Parameters
    ----------
    evaluations : budget, in means over all scenarios; one client costs one more than it has sizes.
    """
    descent = _Descent(problem, _scenarios(start.probability, seed))
    q, choice = start.probability.copy(), start.choice.copy()
    order = np.argsort(-problem.weight, kind="stable")
    best = start
    while True:
        before = q.copy()
        for client in order[problem.weight[order] > 0.0].tolist():
            sizes = np.flatnonzero(problem.allowed[client])
            if evaluations < len(sizes) + 1:
                return _together(judge, _better(best, judge.decision(q, choice)))
            evaluations -= len(sizes) + 1
            q[client], choice[client] = descent.best(client, sizes, q, choice)
        found = judge.decision(q, choice)
        gained = 1.0 - found.total_seconds / best.total_seconds
        best = _better(best, found)
        if gained < 1e-4 or bool(np.array_equal(before, q)):
            return _together(judge, best)


def _together(judge: Judge, decision: Decision) -> Decision:
    """Return the best of q^t for some t from 0 (everyone joins) to above 1: what single clients do not try."""
    tried = [judge.decision(_power(decision.probability, t), decision.choice) for t in _POWERS]
    return min([decision, *tried], key=lambda one: one.total_seconds)


def _power(probability: Array, exponent: float) -> Array:
    return np.where(probability > 0.0, np.maximum(probability, 1e-300) ** exponent, 0.0)


def _scenarios(probability: Array, seed: int) -> Scenarios:
    """Return scenarios with about 12,000 members in all: large cohorts vary less, and cost more."""
    size = len(probability)
    if size <= 8:
        return Scenarios()
    count = int(np.clip(MEMBERS / max(float(probability.sum()), 1.0), FEWEST_SCENARIOS, MOST_SCENARIOS))
    return Scenarios.draw(count, size, seed)


def _better(one: Decision, other: Decision) -> Decision:
    return other if other.total_seconds < one.total_seconds else one


@dataclass(frozen=True)
class _Descent:
    problem: JointProblem
    scenarios: Scenarios

    def best(self, client: int, sizes: Ints, probability: Array, choice: Ints) -> tuple[float, int]:
        """Return the best probability and size of one client, the others as they are."""
        problem, model = self.problem, self.problem.model
        others = probability.copy()
        others[client] = 0.0
        cohorts, weight = self.scenarios.cohorts(others)
        times = problem.times(choice)
        without = float(weight @ times.of_cohorts(cohorts))
        joined = cohorts.copy()
        joined[:, client] = True
        ratio, weights = problem.ratio[choice], problem.weight.copy()
        weights[client] = 0.0
        slack = model.beta - model.variance(weights, problem.noise_weight, others, ratio)
        gain = float(weights @ model.smoothness_factor(ratio))
        own = problem.weight[client]
        square = problem.noise_weight[client] * own**2
        found = (np.inf, float(probability[client]), int(choice[client]))
        for size in sizes.tolist():
            share = problem.ratio[size]
            added = float(weight @ _at(times, problem, client, size).of_cohorts(joined)) - without
            load = square * float(model.variance_factor(share))
            q = _least(without, added, slack, load)
            if q is not None:
                value = (
                    (gain + own * float(model.smoothness_factor(share))) * (without + q * added) / (slack - load / q)
                )
                found = min(found, (value, q, size))
        return found[1], found[2]


def _at(times: RoundTimes, problem: JointProblem, client: int, size: int) -> RoundTimes:
    compute, upload = times.compute.copy(), times.upload.copy()
    compute[client], upload[client] = problem.compute[client, size], problem.upload[client, size]
    return RoundTimes(compute, upload, times.bandwidth, times.fixed, times.idle, times.split)


def _least(without: float, added: float, slack: float, load: float) -> float | None:
    """Return q in (0, 1] that minimises (without + q added) / (slack - load / q); None where slack never suffices."""
    if not slack > load:
        return None
    if added <= 0.0:
        return 1.0
    centre = load / slack
    return min(1.0, centre + (centre**2 + without * load / (added * slack)) ** 0.5)
