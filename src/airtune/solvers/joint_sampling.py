"""Who joins with which probability, and which share of the components each trains: least expected time to a target.

::

    min over q, k of  R(q, k) * E[T(q, k)],     0 < q_n <= 1,  k_n one of a finite set

R is `airtune.solvers.round_bound.RoundModel`, E[T] the expected round of `airtune.solvers.sampling_time`. The problem
is not convex and E[T] has no closed form. Three branches replace it by something that can be solved:

* "additive": ``E[T] <= sum q_n (tau_n + t_n / f)``, exactly (form "V", `airtune.solvers.sampling_probabilities`);
* "deadline": for a threshold theta only sizes with tau_n(k) <= theta, ``E[T] <= theta + sum q_n t_n / f``, exactly;
  the best of at most 64 thresholds, a coarse grid refined twice;
* "slowest": from the better of these, descent on R U2, ``U2 = E[max tau] + sum q_n t_n / f``, by its gradient, which
  has a closed form.

From each of them, and from the first two with the largest sizes for everyone, a descent on R E[T] sets out, as many of
them as can have a sweep over all clients, and goes on from where it got furthest ("polish"): E[T] has several local
minima. Decisions are judged by E[T] itself. Decisions,
bounds and branches are our reading of arXiv 2505.23555, whose abstract names the decisions and no algorithm [choice].
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from airtune.solvers.joint_problem import EXACT_CLIENTS, Array, Decision, Ints, JointProblem, Judge
from airtune.solvers.sampling_baselines import baseline_decisions, uniform_decision
from airtune.solvers.sampling_polish import polish
from airtune.solvers.sampling_probabilities import best_choices, best_ratio
from airtune.solvers.sampling_time import empty_seconds, expected_slowest
from airtune.solvers.solution import Solution

THRESHOLDS = 64
POLISH_EVALUATIONS = 4000
_COARSE = 24
_DESCENT_STEPS = 12
_STEPS = (1.0, 0.5, 0.25, 0.1)


@dataclass(frozen=True)
class JointAnswer:
    """What `solve` found.

    Parameters
    ----------
    solution : value {"probability": [clients], "choice": [clients]}, objective: expected seconds to the target.
    decision : the same with rounds and seconds a round. None where no decision reaches the target.
    branch : "additive", "deadline", "slowest", "polish", or the name of a baseline.
    lower_bound : s, no decision is faster. gap : objective / lower_bound - 1.
    candidates : branch -> expected seconds.
    uniform : uniform sampling with the largest sizes and its best expected cohort size; None where it was not asked
        for, or never reaches the target.
    measure : which expected time of a round decisions are compared by, `Judge.measure`.
    """

    solution: Solution
    decision: Decision | None
    branch: str
    lower_bound: float
    candidates: Mapping[str, float]
    uniform: Decision | None = None
    measure: str = ""

    @property
    def gain_over_uniform(self) -> float | None:
        """Return seconds of uniform sampling over those of the decision, by the same measure of time; None: unknown."""
        if self.uniform is None or self.decision is None or not np.isfinite(self.decision.total_seconds):
            return None
        return self.uniform.total_seconds / self.decision.total_seconds

    @property
    def gap(self) -> float:
        """Return the relative distance to the lower bound."""
        return self.solution.objective / self.lower_bound - 1.0 if self.lower_bound > 0.0 else float("inf")


def solve(
    problem: JointProblem,
    *,
    baselines: bool | None = None,
    polish_evaluations: int | None = None,
    scenarios: int | None = None,
    dissimilarity: Array | None = None,
    seed: int = 0,
) -> JointAnswer:
    """Return the best decision of all branches.

    Parameters
    ----------
    baselines : whether uniform, weighted, statistical, full, q-only and k-only are candidates too; None: all of them
        up to 1,000 clients, uniform alone above.
    polish_evaluations : budget of the descents on the mean time, in evaluations of E[T]; 0: none; None: 4,000, and none
        above 1,000 clients. Host time plays no role, so that equal problems have equal answers.
    scenarios : cohorts over which E[T] is taken, see `Judge.of`.
    dissimilarity : [clients], G_n, for the statistical baseline; None: 1.
    seed : of the scenarios.
    """
    judge = Judge.of(problem, scenarios, seed)
    first = additive(problem, judge)
    if first is None:
        return _infeasible(problem)
    candidates = {"additive": first, "deadline": deadline(problem, judge)}
    start = min(candidates.values(), key=_seconds)
    candidates["slowest"] = slowest(problem, judge, start)
    budget = polish_evaluations
    if budget is None:
        budget = POLISH_EVALUATIONS if problem.size <= EXACT_CLIENTS else 0
    if budget > 0:
        starts = [*candidates.values(), *_with_largest_sizes(problem, judge)]
        candidates["polish"] = _polished(problem, judge, starts, budget, seed + 1)
    theirs: dict[str, Decision] = {}
    if baselines or (baselines is None and problem.size <= EXACT_CLIENTS):
        theirs = baseline_decisions(problem, judge, dissimilarity)
    elif baselines is None:
        uniform = uniform_decision(problem, judge)
        theirs = {} if uniform is None else {"uniform": uniform}
    candidates.update(theirs)
    branch = min(candidates, key=lambda name: (candidates[name].total_seconds, list(candidates).index(name)))
    best = candidates[branch]
    bound = least_seconds(problem)
    value = {"probability": best.probability, "choice": best.choice}
    message = f"branch {branch}, lower bound {bound:.6g} s"
    solution = Solution(value, "feasible", best.total_seconds, len(candidates), message)
    worth = {name: found.total_seconds for name, found in candidates.items()}
    return JointAnswer(solution, best, branch, bound, worth, theirs.get("uniform"), judge.measure)


def additive(problem: JointProblem, judge: Judge) -> Decision | None:
    """Return the decision that is best if a round takes ``sum q (tau + t / f)``; None where none reaches the target."""
    cost = problem.compute + problem.upload / problem.bandwidth
    found = best_choices(problem.choices(cost, problem.fixed))
    if not found.ok:
        return None
    return judge.decision(found.value["probability"], found.value["choice"])


def deadline(problem: JointProblem, judge: Judge, thresholds: int = THRESHOLDS) -> Decision:
    """Return the decision that is best if a round takes ``theta + sum q t / f`` and nobody computes beyond theta."""
    solver = _Deadline(problem, problem.upload / problem.bandwidth, _largest_is_best(problem))
    usable = problem.compute[problem.allowed & (problem.weight > 0.0)[:, None]]
    fastest = np.where(problem.allowed, problem.compute, np.inf).min(axis=1)
    least = float(fastest[problem.weight > 0.0].max())
    grid = np.unique(usable[usable >= least])
    tried: dict[int, tuple[float, Array, Ints]] = {}
    low, high, price = 0, len(grid) - 1, None
    for count in (_COARSE, (thresholds - _COARSE) // 2, (thresholds - _COARSE) // 2):
        for index in np.unique(np.linspace(low, high, count).round().astype(np.int64)).tolist():
            if index not in tried:
                tried[index] = solver.at(float(grid[index]), price)
                price = problem.model.alpha / tried[index][0] if np.isfinite(tried[index][0]) else price
        best = min(tried, key=lambda index: (tried[index][0], index))
        known = sorted(tried)
        place = known.index(best)
        low, high = known[max(place - 1, 0)], known[min(place + 1, len(known) - 1)]
    best = min(tried, key=lambda index: (tried[index][0], index))
    if not solver.largest:
        tried[best] = solver.at(float(grid[best]), None, thorough=True)
    return judge.decision(*tried[best][1:])


def _with_largest_sizes(problem: JointProblem, judge: Judge) -> list[Decision]:
    """Return what the first two branches decide if everyone has the largest size; nothing if that misses the target."""
    full = problem.with_full_size()
    first = additive(full, judge)
    return [] if first is None else [first, deadline(full, judge)]


def _polished(problem: JointProblem, judge: Judge, starts: list[Decision], budget: int, seed: int) -> Decision:
    """Descend from several starts with half of the budget, then from the best end with the other half.

    As many of the best starts as can have a sweep over all clients each; where that is one, it has the whole budget.
    """
    distinct = {(start.probability.tobytes(), start.choice.tobytes()): start for start in starts}
    used = problem.weight > 0.0
    sweep = int(problem.allowed[used].sum() + used.sum())
    chosen = sorted(distinct.values(), key=_seconds)[: max(1, budget // (2 * sweep))]
    part = budget // (2 * len(chosen)) if len(chosen) > 1 else 0
    ends = [polish(problem, judge, start, part, seed) if part else start for start in chosen]
    return polish(problem, judge, min(ends, key=_seconds), budget - part * len(chosen), seed)


@dataclass(frozen=True)
class _Deadline:
    """The problem at one threshold; `largest`: the largest size within it is best for everyone."""

    problem: JointProblem
    cost: Array
    largest: bool

    def at(self, theta: float, price: float | None, thorough: bool = False) -> tuple[float, Array, Ints]:
        """Return seconds, q and choices."""
        within = self.problem.compute <= theta
        constant = theta + self.problem.fixed
        if not self.largest:
            choices = self.problem.choices(self.cost, constant, within)
            found = best_choices(choices, thorough=thorough)
            return found.objective, found.value["probability"], found.value["choice"]
        problem = self.problem
        may = within & problem.allowed
        choice = (may.shape[1] - 1 - may[:, ::-1].argmax(axis=1)).astype(np.int64)
        factor = problem.model.variance_factor(problem.ratio)[choice]
        load = problem.noise_weight * problem.weight**2 * factor
        cost = np.take_along_axis(self.cost, choice[:, None], axis=1)[:, 0]
        q, ratio, _ = best_ratio(load, cost, problem.model.beta, constant, price)
        return problem.model.alpha / ratio if ratio > 0.0 else float("inf"), q, choice


def _largest_is_best(problem: JointProblem) -> bool:
    """Return whether more components are better at any threshold: form "V" and upload per component not rising.

    With p = q k / gamma fixed R does not change, and the upload q t(k) = p (gamma / k) t(k) falls where t(k) / k does.
    """
    per_component = problem.upload / problem.ratio
    return problem.model.form == "V" and bool((np.diff(per_component, axis=1) <= 1e-12 * per_component[:, 1:]).all())


# ------------------------------------------------------------------------------------------------------------- slowest


def slowest(problem: JointProblem, judge: Judge, start: Decision) -> Decision:
    """Return where descent on R U2 from a decision ends: each step minimises with U2 replaced by its tangent."""
    point = start.probability, start.choice
    value = _bound(problem, *point)
    for _ in range(_DESCENT_STEPS):
        cost, constant = _tangent(problem, *point)
        found = best_choices(problem.choices(cost, constant), thorough=False)
        moves = [_between(problem, point, found.value, step) for step in _STEPS]
        best = min(moves, key=lambda move: _bound(problem, *move))
        if not _bound(problem, *best) < value * (1.0 - 1e-9):
            break
        point, value = best, _bound(problem, *best)
    return judge.decision(*point)


def _bound(problem: JointProblem, probability: Array, choice: Ints) -> float:
    times = problem.times(choice)
    sending = float(probability @ times.upload) / problem.bandwidth
    seconds = problem.fixed + empty_seconds(times, probability) + expected_slowest(times.compute, probability) + sending
    rounds = problem.rounds(probability, choice)
    return rounds * seconds if np.isfinite(rounds) else float("inf")


def _tangent(problem: JointProblem, probability: Array, choice: Ints) -> tuple[Array, float]:
    """Return what client n adds to U2 at each size if it joins, [clients, choices], and the constant, both s.

    With G(u) the probability that nobody in the cohort computes longer than u and H its integral from 0, joining with
    x seconds adds E[(x - max of the others)^+] = H(min(x, tau_n)) / (1 - q_n) + (H(x) - H(tau_n))^+.
    """
    times = problem.times(choice)
    q = np.minimum(probability, 1.0 - 1e-9)
    order = np.argsort(times.compute, kind="stable")
    tau = times.compute[order]
    log_faster = np.append(np.cumsum(np.log1p(-q[order])[::-1])[::-1], 0.0)  # G between tau[i - 1] and tau[i]
    height = np.exp(log_faster)
    area = np.concatenate([[0.0], np.cumsum(height[:-1] * np.diff(tau, prepend=0.0))])

    def integral(x: Array) -> Array:
        place = np.searchsorted(tau, x, side="right")
        before = np.concatenate([[0.0], tau])[place]
        return area[place] + (x - before) * height[place]

    own, wanted = integral(times.compute)[:, None], integral(problem.compute)
    inner = np.minimum(wanted, own) / (1.0 - q)[:, None]
    added = inner + np.maximum(wanted - own, 0.0) + problem.upload / problem.bandwidth
    now = added[np.arange(problem.size), choice]
    total = problem.fixed + expected_slowest(times.compute, probability)
    total += float(probability @ times.upload) / problem.bandwidth
    return added, max(total - float(probability @ now), 0.0)


def _between(
    problem: JointProblem, point: tuple[Array, Ints], target: Mapping[str, Array], step: float
) -> tuple[Array, Ints]:
    """Return a point on the way, geometrically in q; sizes change at the full step only."""
    q, choice = point
    wanted, chosen = target["probability"], target["choice"].astype(np.int64)
    if step == 1.0:
        return wanted, chosen
    used = (q > 0.0) & (wanted > 0.0)
    mixed = np.zeros_like(q)
    mixed[used] = q[used] ** (1.0 - step) * wanted[used] ** step
    return mixed, choice


# --------------------------------------------------------------------------------------------------------- lower bound


def least_seconds(problem: JointProblem) -> float:
    """Return seconds below which no decision reaches the target.

    Two lower bounds of E[T] and a mixture of them, whose product with R (with Gamma = 1) is minimised exactly:

    * ``sum q t / f + P(K not empty) min tau``, because ``T >= sum_K t / f + mean of tau over K, weighted by t``;
    * ``integral over u of P(somebody in K computes longer than u)``, with P >= 1 - exp(-Y) and, for the clients S that
      need longer than u at any size, ``Y = sum_S q >= (sum_S sqrt v)^2 / (beta - D - sum of v outside S)``.

    The second depends on D = beta - V = alpha / R, which is cut into intervals; the least over them is the bound.
    """
    choices = problem.choices(problem.upload / problem.bandwidth, 0.0)
    load = np.where(np.isfinite(choices.cost), choices.load, np.inf).min(axis=1)
    fastest = np.where(problem.allowed, problem.compute, np.inf).min(axis=1)
    used = problem.weight > 0.0
    load, fastest = load[used], fastest[used]
    widest = problem.model.beta - float(load.sum())
    joined = float(np.sqrt(load).sum()) ** 2 / problem.model.beta
    always = -float(np.expm1(-joined)) * float(fastest.min())
    intervals, mixtures = (24, (0.0, 0.3, 0.5, 0.7, 0.85)) if problem.size <= EXACT_CLIENTS else (4, (0.0, 0.5))
    edges = widest * np.linspace(0.0, 1.0, intervals + 1) ** 0.5
    bounds: list[float] = []
    for low, high in itertools.pairwise(edges.tolist()):
        slowest_least = _least_slowest(load, fastest, problem.model.beta - low)
        found = [problem.model.alpha / high * (problem.fixed + slowest_least)]
        for share in mixtures:
            constant = problem.fixed + share * slowest_least + (1.0 - share) * always
            mixed = replace(choices, cost=(1.0 - share) * choices.cost, constant=constant, smoothness=None)
            found.append(best_choices(mixed).objective)
        bounds.append(max(found))
    return min(bounds)


def _least_slowest(load: Array, fastest: Array, noise: float) -> float:
    """Return a lower bound of E[max tau], s, for every q with sum v / q <= noise."""
    order = np.argsort(fastest, kind="stable")
    tau, root, v = fastest[order], np.sqrt(load[order]), load[order]
    slower = np.cumsum(root[::-1])[::-1]  # of those that need at least tau[i]
    rest = noise - (np.cumsum(v) - v)
    joined = slower**2 / np.maximum(rest, 1e-300)
    return float((-np.expm1(-joined) * np.diff(tau, prepend=0.0)).sum())


def _infeasible(problem: JointProblem) -> JointAnswer:
    cost = problem.compute + problem.upload / problem.bandwidth
    found = best_choices(problem.choices(cost, problem.fixed))
    return JointAnswer(found, None, "none", float("inf"), {})


def _seconds(decision: Decision) -> float:
    return decision.total_seconds
