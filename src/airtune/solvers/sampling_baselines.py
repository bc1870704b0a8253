"""What independent sampling is compared with: fixed shapes of q, one decision at a time, and the predecessor's scan."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from airtune.errors import InputError
from airtune.solvers.joint_problem import Array, Decision, Ints, JointProblem, Judge
from airtune.solvers.sampling_probabilities import best_choices
from airtune.solvers.solution import Solution, infeasible, name_clients

_GOLDEN = (5.0**0.5 - 1.0) / 2.0
_BRACKET = 17
_NARROWING = 12
_SIZES = 9
_BISECTIONS = 80


def baseline_decisions(problem: JointProblem, judge: Judge, dissimilarity: Array | None = None) -> dict[str, Decision]:
    """Return the baselines that can reach the target, by name.

    "full": q = 1; "uniform": equal q; "weighted": q in proportion to a_n; "statistical": to a_n G_n; all with the
    largest sizes, and with the expected cohort size that is best for them (the published ones fix it). "q-only": the
    best q with the largest sizes; "k-only": equal q with the best sizes.
    """
    weight = problem.weight
    gradients = np.ones(problem.size) if dissimilarity is None else dissimilarity
    largest = problem.with_full_size()
    sizes = _largest(problem)
    ones = (weight > 0.0).astype(np.float64)
    found: dict[str, Decision | None] = {"full": judge.decision(ones, sizes)}
    for name, shape in (("uniform", ones), ("weighted", weight), ("statistical", weight * gradients)):
        found[name] = scaled(judge, shape, sizes)
    found["q-only"] = best_probabilities_only(largest, judge)
    found["k-only"] = best_sizes_only(problem, judge)
    return {name: made for name, made in found.items() if made is not None and np.isfinite(made.total_seconds)}


def probabilities_of_shape(shape: Array, scale: float) -> Array:
    """Return min(1, scale * shape), [clients]."""
    return np.minimum(1.0, scale * shape)


def scaled(judge: Judge, shape: Array, choice: Ints) -> Decision | None:
    """Return the best decision with q = min(1, s shape): a grid of log s, then golden section round the best point.

    None where no scale reaches the target.
    """
    positive = shape[shape > 0.0]
    if not positive.size:
        return None
    low, high = -np.log(positive.max()) - np.log(4.0 * len(shape)), -np.log(positive.min())

    def at(log_scale: float) -> Decision:
        return judge.decision(probabilities_of_shape(shape, float(np.exp(log_scale))), choice)

    return _golden(at, low, high)


def _golden(at: Callable[[float], Decision], low: float, high: float) -> Decision | None:
    grid = np.linspace(low, high, _BRACKET)
    tried = [at(float(x)) for x in grid]
    place = int(np.argmin([made.total_seconds for made in tried]))
    best = tried[place]
    if not np.isfinite(best.total_seconds):
        return None
    low, high = float(grid[max(place - 1, 0)]), float(grid[min(place + 1, _BRACKET - 1)])
    for _ in range(_NARROWING):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        one, other = at(left), at(right)
        best = min(best, one, other, key=lambda made: made.total_seconds)
        low, high = (low, right) if one.total_seconds <= other.total_seconds else (left, high)
    return best


def best_probabilities_only(problem: JointProblem, judge: Judge) -> Decision | None:
    """Return the better of the additive and the deadline answer (of its largest threshold) for given sizes."""
    sizes = _largest(problem)
    upload = problem.upload / problem.bandwidth
    within = problem.allowed & (problem.weight > 0.0)[:, None]
    longest = float(problem.compute[within].max())
    made: list[Decision] = []
    for cost, constant in ((problem.compute + upload, 0.0), (upload, longest)):
        found = best_choices(problem.choices(cost, problem.fixed + constant))
        if found.ok:
            made.append(judge.decision(found.value["probability"], sizes))
    return min(made, key=lambda one: one.total_seconds, default=None)


def best_sizes_only(problem: JointProblem, judge: Judge) -> Decision | None:
    """Return equal q with sizes by a threshold on the computation: the best of a few thresholds and scales."""
    ones = (problem.weight > 0.0).astype(np.float64)
    usable = problem.compute[problem.allowed & (problem.weight > 0.0)[:, None]]
    made: list[Decision] = []
    for threshold in np.quantile(usable, np.linspace(0.0, 1.0, _SIZES)):
        may = problem.allowed & (problem.compute <= threshold)
        least = _smallest(problem)
        largest = may.shape[1] - 1 - may[:, ::-1].argmax(axis=1)
        choice = np.where(may.any(axis=1), largest, least).astype(np.int64)
        found = scaled(judge, ones, choice)
        if found is not None:
            made.append(found)
    return min(made, key=lambda one: one.total_seconds, default=None)


def _largest(problem: JointProblem) -> Ints:
    last = problem.allowed[:, ::-1].argmax(axis=1)
    return (problem.allowed.shape[1] - 1 - last).astype(np.int64)


def _smallest(problem: JointProblem) -> Ints:
    return problem.allowed.argmax(axis=1).astype(np.int64)


# --------------------------------------------------------------------------------------------------- the predecessor's


def published_scan(
    weight: Array, upload: Array, bandwidth: float, alpha: float, beta: float, values: int = 40
) -> Solution:
    """Solve the predecessor's problem as its code does: scan the expected round time, a surrogate program for each.

    For M on a logarithmic grid of `values` points between the least and the largest ``sum q t``: minimise
    ``sum_n x_n log x_n - log y_n``, x_n = alpha q_n M, y_n = N beta q_n - a_n^2 N^2, over N a_n^2 / beta < q_n <= 1
    with ``sum q_n t_n = M``; keep the M of least surrogate. The surrogate stands for sum x / y, which it is not: it is
    here as a baseline. Code of arXiv 2402.10097: BESTTOOLBOX, "Adaptive-Federated-Learning-in-Heterogeneous-Wireless-
    Networks-with-Independent-Sampling", which scans M linearly and has neither compute time nor sketches.

    Parameters
    ----------
    weight : [clients], a_n > 0. upload : [clients], Hz s, > 0. bandwidth : Hz.
    alpha, beta : of the split form, `airtune.solvers.round_bound.split_rounds`.

    Returns
    -------
    Solution with value q, [clients], and objective R M in s, R the split form.
    """
    if bool((weight <= 0.0).any() or (upload <= 0.0).any()):
        raise InputError("weight, upload: must be positive for every client")
    count, seconds = len(weight), upload / bandwidth
    least = count * weight**2 / beta
    if bool((least >= 1.0).any()):
        return infeasible(count, f"{name_clients(least >= 1.0)}: N a^2 / beta is not below 1")
    low, high = float(least @ seconds), float(seconds.sum())
    best: tuple[float, Array] | None = None
    for time in np.geomspace(low, high, values + 2)[1:-1]:
        q = _surrogate(least, seconds, float(time), alpha * float(time), count * beta)
        x, y = alpha * q * time, count * beta * (q - least)
        value = float((x * np.log(x) - np.log(y)).sum())
        if best is None or value < best[0]:
            best = (value, q)
    assert best is not None, "the grid has at least one point"
    q = best[1]
    rounds = float((alpha / (beta * (1.0 - least / q))).mean())
    return Solution(q, "feasible", rounds * float(q @ seconds), values)


def _surrogate(least: Array, seconds: Array, total: float, scale: float, slope: float) -> Array:
    """Return the minimiser of sum x log x - log y at one M, from its optimality conditions.

    ``scale (log(scale q) + 1) - 1 / (q - least) + mu t = 0`` has one root in q for each price mu, which falls in mu.
    """

    def response(price: float) -> Array:
        low, high = least.copy(), np.ones_like(least)
        for _ in range(_BISECTIONS):
            q = 0.5 * (low + high)
            rising = scale * (np.log(scale * q) + 1.0) - 1.0 / np.maximum(q - least, 1e-300) + price * seconds > 0.0
            low, high = np.where(rising, low, q), np.where(rising, q, high)
        return high

    low, high = -1.0, 1.0
    while float(response(low) @ seconds) < total and low > -1e30:
        low *= 4.0
    while float(response(high) @ seconds) > total and high < 1e30:
        high *= 4.0
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if float(response(middle) @ seconds) > total else (low, middle)
    return response(high)
