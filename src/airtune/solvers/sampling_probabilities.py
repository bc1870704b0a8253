"""Participation probabilities (and sketch sizes) that minimise rounds times seconds per round, for additive time.

::

    min over q, k of  Gamma(k) alpha / (beta - sum_n v_n(k_n) / q_n)  *  (theta + sum_n q_n C_n(k_n)),   0 < q_n <= 1

With Gamma = 1 (form "V" of `airtune.solvers.round_bound`) this is the ratio D / M of D = beta - sum v/q, to be made
large, and M = theta + sum q C. Dinkelbach's theorem holds for any set of choices, discrete ones included: the largest
ratio is the one root of F(price) = max (D - price M), and for a given price every client decides alone,

    q_n(k) = min(1, sqrt(v_n(k) / (price C_n(k)))),    k_n = argmin v_n(k)/q_n(k) + price q_n(k) C_n(k).

price <- D / M converges superlinearly from any feasible point, and monotonically: there is no second local optimum to
fall into. Without caps at 1 and with theta = 0 and one choice the answer is the closed form

    q_n = (2 / beta) sqrt(v_n / C_n) P,   P = sum_m sqrt(v_m C_m),   sum v/q = beta / 2,   R T = 4 alpha P^2 / beta^2.

Gamma (forms "S", "V+S") couples the clients; see `best_choices`. The split of the problem is our reading of
arXiv 2505.23555, whose abstract names no algorithm [choice].
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from airtune.errors import InputError
from airtune.solvers.solution import Solution, finite_array, infeasible, name_clients

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

_ITERATIONS = 100
LOCAL_SEARCH_CLIENTS = 20
PAIR_SEARCH_CLIENTS = 10
_EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)


@dataclass(frozen=True)
class Choices:
    """What every client can choose from.

    Parameters
    ----------
    load : [clients, choices], v >= 0; a client whose loads are 0 has no weight and is never drawn.
    cost : [clients, choices], C >= 0, s; infinite where a choice is not allowed.
    alpha, beta : of the round model.
    constant : theta, s.
    smoothness : [clients, choices], the terms of Gamma, or None for Gamma = 1.
    """

    load: Array
    cost: Array
    alpha: float
    beta: float
    constant: float = 0.0
    smoothness: Array | None = None

    def only(self, choice: Ints) -> Choices:
        """Return the problem in which the choices are made."""
        rows = np.arange(len(choice))
        gain = None if self.smoothness is None else self.smoothness[rows, choice][:, None]
        load, cost = self.load[rows, choice][:, None], self.cost[rows, choice][:, None]
        return Choices(load, cost, self.alpha, self.beta, self.constant, gain)

    def objective(self, probability: Array, choice: Ints) -> float:
        """Return the seconds to the target of a decision; infinite where the target is out of reach."""
        slack, seconds, gain = self.parts(probability, choice)
        return gain * self.alpha * seconds / slack if slack > 0.0 else float("inf")

    def parts(self, probability: Array, choice: Ints) -> tuple[float, float, float]:
        """Return D, M and Gamma of a decision."""
        rows = np.arange(len(choice))
        load, cost = self.load[rows, choice], self.cost[rows, choice]
        used = load > 0.0
        with np.errstate(divide="ignore"):
            slack = self.beta - float((load[used] / probability[used]).sum())
        seconds = self.constant + float(probability[used] @ cost[used])
        gain = 1.0 if self.smoothness is None else float(self.smoothness[rows, choice].sum())
        return slack, seconds, gain


def best_probabilities(load: ArrayLike, cost: ArrayLike, alpha: float, beta: float, constant: float = 0.0) -> Solution:
    """Minimise ``alpha (constant + sum q C) / (beta - sum v / q)`` over q; exact.

    Parameters
    ----------
    load : [clients], v_n = w_n psi_n a_n^2. cost : [clients], C_n, s. constant : s.

    Returns
    -------
    Solution with value q, [clients], and objective in s. "infeasible" where even q = 1 does not reach the target.
    """
    size = np.atleast_1d(np.asarray(load)).size
    v, c = finite_array("load", load, size), finite_array("cost", cost, size)
    found = best_choices(Choices(v[:, None], c[:, None], alpha, beta, constant))
    return Solution(found.value["probability"], found.status, found.objective, found.iterations, found.message)


def best_choices(problem: Choices, *, thorough: bool = True) -> Solution:
    """Minimise over probabilities and choices together.

    Exact for Gamma = 1. With Gamma: descent from several starts, "feasible" [choice]. Each step lets every client
    minimise ``gain_n(k) / Gamma + q C_n(k) / M + v_n(k) / (q D)``, the logarithm of the objective to first order; the
    starts are the fixed points of Gamma^e M / D for several exponents e, of which e = 0 is exact. In fleets of up to
    20 clients a local search over single choices follows (up to 10: over pairs). `thorough` off: fewer starts and no
    local search.

    Returns
    -------
    Solution with value {"probability": [clients], "choice": [clients] indices} and objective in s.
    """
    _check(problem)
    problem_text = _out_of_reach(problem)
    if problem_text is not None:
        nothing = infeasible(len(problem.load), problem_text)
        choice = np.zeros(len(problem.load), dtype=np.int64)
        return Solution({"probability": nothing.value, "choice": choice}, "infeasible", np.inf, 0, problem_text)
    start = _least_load(problem)
    if problem.smoothness is None:
        q, choice, iterations = _dinkelbach(problem, *start)
        value = {"probability": q, "choice": choice}
        return Solution(value, "optimal", problem.objective(q, choice), iterations)
    return _with_smoothness(problem, start, thorough)


def _check(problem: Choices) -> None:
    allowed = np.isfinite(problem.cost)
    if not allowed.any(axis=1).all():
        raise InputError(f"cost: {name_clients(~allowed.any(axis=1))} have no choice that is allowed")
    bad = ~np.isfinite(problem.load) | (problem.load < 0.0) | np.isnan(problem.cost) | (problem.cost < 0.0)
    if bad.any():
        raise InputError(f"load, cost: {name_clients(bad.any(axis=1))} must be numbers that are not negative")


def _out_of_reach(problem: Choices) -> str | None:
    least = np.where(np.isfinite(problem.cost), problem.load, np.inf).min(axis=1)
    if float(least.sum()) < problem.beta:
        return None
    most = least >= np.sort(least)[-min(3, len(least))]
    return (
        f"the target is out of reach: with everyone in every round the noise is {least.sum():.4g}, "
        f"beta is {problem.beta:.4g}; {name_clients(most)} add most"
    )


def _least_load(problem: Choices) -> tuple[Array, Ints]:
    """Return full participation with the choices of least load (the cheapest among equals)."""
    allowed = np.isfinite(problem.cost)
    load = np.where(allowed, problem.load, np.inf)
    tied = load <= load.min(axis=1, keepdims=True)
    choice = np.where(tied, problem.cost, np.inf).argmin(axis=1).astype(np.int64)
    return (problem.load.max(axis=1) > 0.0).astype(np.float64), choice


def _dinkelbach(problem: Choices, probability: Array, choice: Ints) -> tuple[Array, Ints, int]:
    """Return the optimum for Gamma = 1 from a feasible point."""
    if problem.load.shape[1] == 1:
        q, _, iterations = best_ratio(problem.load[:, 0], problem.cost[:, 0], problem.beta, problem.constant)
        return q, choice, iterations
    slack, seconds, _ = problem.parts(probability, choice)
    for iteration in range(1, _ITERATIONS + 1):
        if not seconds > 0.0:
            break
        price = slack / seconds
        q, k = _respond(problem, 0.0, price, 1.0)
        slack, seconds, _ = problem.parts(q, k)
        if not slack / max(seconds, 1e-300) > price * (1.0 + 1e-14):
            return probability, choice, iteration
        probability, choice = q, k
    return probability, choice, _ITERATIONS


def best_ratio(
    load: Array, cost: Array, beta: float, constant: float, price: float | None = None
) -> tuple[Array, float, int]:
    """Return q, the largest (beta - sum v / q) / (constant + sum q C), and the iterations; no choices, no checks.

    price : a first guess of the ratio, for example that of a similar problem; None: that of full participation.
    """
    used = load > 0.0
    every = bool(used.all())
    load, cost = (load, cost) if every else (load[used], cost[used])
    with np.errstate(divide="ignore"):
        root = np.sqrt(load / cost)

    def worth(q: Array) -> float:
        return (beta - float((load / q).sum())) / max(constant + float(q @ cost), 1e-300)

    best = np.ones(len(load))
    value = worth(best)
    if price is not None and price > 0.0:
        guess = np.minimum(1.0, root / price**0.5)
        best, value = max((best, value), (guess, worth(guess)), key=lambda point: point[1])
    iteration = 0
    while iteration < _ITERATIONS and 0.0 < value < 1e250:
        iteration += 1
        new = np.minimum(1.0, root / value**0.5)
        ratio, before = worth(new), value
        if ratio >= value * (1.0 - 1e-15):  # close to the optimum the value stands still before q does
            best, value = new, max(ratio, value)
        if not ratio > before * (1.0 + 1e-14):
            break
    if every:
        return best, value, iteration
    found = np.zeros(len(used))
    found[used] = best
    return found, value, iteration


def _respond(problem: Choices, gain_price: float, time_price: float, load_price: float) -> tuple[Array, Ints]:
    """Return every client's best q and choice at prices for its terms of Gamma, M and the sum of v / q."""
    load, cost = load_price * problem.load, time_price * problem.cost
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.minimum(1.0, np.sqrt(load / cost))
        q = np.where(load > 0.0, np.where(cost > 0.0, q, 1.0), 0.0)
        value = np.where(q > 0.0, load / q + cost * q, 0.0)
    value = np.where(np.isfinite(problem.cost), value, np.inf)
    if problem.smoothness is not None:
        value = value + gain_price * problem.smoothness
    choice = value.argmin(axis=1).astype(np.int64)
    return q[np.arange(len(choice)), choice], choice


# --------------------------------------------------------------------------------------------------------- with Gamma


def _with_smoothness(problem: Choices, start: tuple[Array, Ints], thorough: bool) -> Solution:
    plain = Choices(problem.load, problem.cost, problem.alpha, problem.beta, problem.constant)
    q, k, iterations = _dinkelbach(plain, *start)
    best = (problem.objective(q, k), q, k)
    points = {k.tobytes(): best}
    for exponent in _EXPONENTS[1:] if thorough else (1.0,):
        found, steps = _descend(problem, best[1], best[2], exponent)
        iterations += steps
        for p, c in (found, _descend(problem, *found, 1.0)[0]):
            points.setdefault(c.tobytes(), (problem.objective(p, c), p, c))
        best = min(points.values(), key=_value)
    if thorough and len(problem.load) <= LOCAL_SEARCH_CLIENTS:
        for choice in range(problem.load.shape[1]):
            same = np.full(len(k), choice, dtype=np.int64)
            answer = _best_q(problem, same) if np.isfinite(problem.cost[:, choice]).all() else None
            if answer is not None:
                points.setdefault(same.tobytes(), (problem.objective(*answer), *answer))
        best = min((_local_search(problem, point) for point in points.values()), key=_value)
    value, q, k = best
    return Solution({"probability": q, "choice": k}, "feasible", value, iterations)


def _value(point: tuple[float, Array, Ints]) -> float:
    return point[0]


def _local_search(problem: Choices, point: tuple[float, Array, Ints]) -> tuple[float, Array, Ints]:
    """Change the choice of one client at a time, with the exact q for each, until no change helps."""
    improved = True
    while improved:
        improved = False
        for choice in _neighbours(problem, point[2]):
            answer = _best_q(problem, choice)
            if answer is not None and problem.objective(*answer) < point[0] * (1.0 - 1e-12):
                point, improved = (problem.objective(*answer), *answer), True
    return point


def _neighbours(problem: Choices, choice: Ints) -> Iterator[Ints]:
    """Yield the allowed choices that differ in one client, then, in small fleets, those that differ in two."""
    single = [
        (client, int(other))
        for client in range(len(choice))
        for other in np.flatnonzero(np.isfinite(problem.cost[client]))
        if other != choice[client]
    ]
    pairs = itertools.combinations(single, 2) if len(choice) <= PAIR_SEARCH_CLIENTS else ()
    for moves in itertools.chain(((move,) for move in single), pairs):
        new = choice.copy()
        for client, other in moves:
            new[client] = other
        yield new


def _descend(problem: Choices, q: Array, k: Ints, exponent: float) -> tuple[tuple[Array, Ints], int]:
    """Minimise Gamma^exponent M / D from a feasible point, by first-order steps, choices and q in turn."""

    def value(point: tuple[Array, Ints]) -> float:
        slack, seconds, gain = problem.parts(*point)
        return gain**exponent * seconds / slack if slack > 0.0 else float("inf")

    point = (q, k)
    for iteration in range(1, _ITERATIONS + 1):
        slack, seconds, gain = problem.parts(*point)
        answer = _respond(problem, exponent / gain, 1.0 / seconds, 1.0 / slack)
        tried = [answer, _best_q(problem, answer[1])]
        new = min((t for t in tried if t is not None), key=value)
        if not value(new) < value(point) * (1.0 - 1e-13):
            return point, iteration
        point = new
    return point, _ITERATIONS


def _best_q(problem: Choices, choice: Ints) -> tuple[Array, Ints] | None:
    """Return the exact q for given choices, or None where they cannot reach the target."""
    fixed = problem.only(choice)
    plain = Choices(fixed.load, fixed.cost, problem.alpha, problem.beta, problem.constant)
    if _out_of_reach(plain) is not None:
        return None
    start = _least_load(plain)
    q, _, _ = _dinkelbach(plain, *start)
    return q, choice
