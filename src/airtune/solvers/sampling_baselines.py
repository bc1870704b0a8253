"""What independent sampling is compared with: fixed shapes of q, one decision at a time, and the predecessor's scan."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from airtune.errors import InputError, NoResultError
from airtune.solvers.joint_problem import Array, Decision, Ints, JointProblem, Judge
from airtune.solvers.sampling_probabilities import best_choices
from airtune.solvers.solution import Solution, infeasible, name_clients
from airtune.solvers.split_sampling import SplitChoices, best_split

_GOLDEN = (5.0**0.5 - 1.0) / 2.0
_BRACKET = 17
_NARROWING = 12
_SIZES = 9
_BISECTIONS = 60
_DOUBLINGS = 30


def baseline_decisions(problem: JointProblem, judge: Judge, dissimilarity: Array | None = None) -> dict[str, Decision]:
    """Return the baselines that can reach the target, by name.

    "full": q = 1; "uniform": equal q; "weighted": q in proportion to a_n; "statistical": to a_n G_n; all with the
    largest sizes, and with the expected cohort size that is best for them (the published ones fix it). "q-only": the
    best q with the largest sizes among all of these and `best_probabilities_only`; "k-only": equal q with the best
    sizes.
    """
    weight = problem.weight
    gradients = np.ones(problem.size) if dissimilarity is None else dissimilarity
    largest = problem.with_full_size()
    sizes = largest_sizes(problem)
    ones = (weight > 0.0).astype(np.float64)
    found: dict[str, Decision | None] = {"full": judge.decision(ones, sizes)}
    found["uniform"] = uniform_decision(problem, judge)
    for name, shape in (("weighted", weight), ("statistical", weight * gradients)):
        found[name] = scaled(judge, shape, sizes)
    at_largest = [*found.values(), best_probabilities_only(largest, judge)]
    found["q-only"] = min((one for one in at_largest if one is not None), key=lambda one: one.total_seconds)
    found["k-only"] = best_sizes_only(problem, judge)
    return {name: made for name, made in found.items() if made is not None and np.isfinite(made.total_seconds)}


def uniform_decision(problem: JointProblem, judge: Judge) -> Decision | None:
    """Return equal q with the largest sizes and the best expected cohort size: what gains are measured against.

    None where no cohort size reaches the target.
    """
    return scaled(judge, (problem.weight > 0.0).astype(np.float64), largest_sizes(problem))


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
    sizes = largest_sizes(problem)
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
    made = [scaled(judge, ones, choice) for choice in size_candidates(problem)]
    return min((one for one in made if one is not None), key=lambda one: one.total_seconds, default=None)


def size_candidates(problem: JointProblem) -> list[Ints]:
    """Return sizes, [clients] each: the largest whose computation is within a threshold, else the smallest allowed.

    The thresholds are quantiles of all computation times; the last one gives everyone its largest size.
    """
    usable = problem.compute[problem.allowed & (problem.weight > 0.0)[:, None]]
    found: list[Ints] = []
    for threshold in np.quantile(usable, np.linspace(0.0, 1.0, _SIZES)):
        may = problem.allowed & (problem.compute <= threshold)
        largest = may.shape[1] - 1 - may[:, ::-1].argmax(axis=1)
        found.append(np.where(may.any(axis=1), largest, _smallest(problem)).astype(np.int64))
    return found


def largest_sizes(problem: JointProblem) -> Ints:
    """Return the largest size that every client can hold, [clients]."""
    last = problem.allowed[:, ::-1].argmax(axis=1)
    return (problem.allowed.shape[1] - 1 - last).astype(np.int64)


def _smallest(problem: JointProblem) -> Ints:
    return problem.allowed.argmax(axis=1).astype(np.int64)


# --------------------------------------------------------------------------------------------------- the predecessor's


def split_decision(problem: JointProblem, judge: Judge) -> Decision:
    """Return q and sizes that are best for the split round count and additive time (`split_sampling`).

    Raises NoResultError where its target is out of a client's reach, which it is before the unsplit one is.
    """
    used = problem.weight > 0.0
    cost = np.where(problem.allowed, problem.compute + problem.upload / problem.bandwidth, np.inf)[used]
    noise = problem.noise_weight[used]
    split = SplitChoices.of(
        problem.model, problem.weight[used], cost, problem.ratio, noise_weight=noise, constant=problem.fixed
    )
    found = best_split(split)
    if not found.ok:
        raise NoResultError(f"plan: the split form: {found.message}")
    q, choice = np.zeros(problem.size), largest_sizes(problem)
    q[used], choice[used] = found.value["probability"], found.value["choice"]
    return judge.decision(q, choice)


def published_decision(problem: JointProblem, judge: Judge) -> Decision:
    """Return what `published_scan` gives with the largest sizes. Raises NoResultError where it has no answer."""
    used, choice = problem.weight > 0.0, largest_sizes(problem)
    upload, model = problem.times(choice).upload[used], problem.model
    found = published_scan(problem.weight[used], upload, problem.bandwidth, model.alpha, model.beta)
    if not found.ok:
        raise NoResultError(f"plan: the published form: {found.message}")
    q = np.zeros(problem.size)
    q[used] = found.value
    return judge.decision(q, choice)


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
    totals = np.geomspace(low, high, values + 2)[1:-1]
    found = _surrogates(least, seconds, totals, alpha * totals)
    x, y = alpha * totals[:, None] * found, count * beta * (found - least)
    q = found[int((x * np.log(x) - np.log(y)).sum(axis=1).argmin())]
    rounds = float((alpha / (beta * (1.0 - least / q))).mean())
    return Solution(q, "feasible", rounds * float(q @ seconds), values)


def _surrogates(least: Array, seconds: Array, totals: Array, scales: Array) -> Array:
    """Return the minimisers of sum x log x - log y for some M, [values, clients], from the optimality conditions.

    ``scale (log(scale q) + 1) - 1 / (q - least) + mu t = 0`` has one root in q for each price mu, which falls in mu.
    """
    scale = scales[:, None]

    def response(price: Array) -> Array:
        low, high = np.broadcast_to(least, (len(price), len(least))), np.ones((len(price), len(least)))
        for _ in range(_BISECTIONS):
            q = 0.5 * (low + high)
            slope = scale * (np.log(scale * q) + 1.0) - 1.0 / np.maximum(q - least, 1e-300) + price[:, None] * seconds
            low, high = np.where(slope > 0.0, low, q), np.where(slope > 0.0, q, high)
        return high

    low, high = np.full(len(totals), -1.0), np.ones(len(totals))
    for _ in range(_DOUBLINGS):
        low = np.where(response(low) @ seconds < totals, 4.0 * low, low)
        high = np.where(response(high) @ seconds > totals, 4.0 * high, high)
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        over = response(middle) @ seconds > totals
        low, high = np.where(over, middle, low), np.where(over, high, middle)
    return response(high)
