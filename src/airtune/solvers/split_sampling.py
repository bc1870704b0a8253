"""Probabilities and sketch sizes for the predecessor's split round count, jointly and exactly.

::

    min over q, k of  R(q, k) * M(q, k),      0 < q_n <= 1,  k_n one of a finite set
    R = (1/N) sum_n alpha g_n^x / (beta - N g_n^y w_n a_n^2 / q_n)         g_n = gamma / k_n
    M = constant + sum_n q_n c_n(k_n)

R is Jensen's upper bound of `airtune.solvers.round_bound.RoundModel` (form "V": x = 0, y = 1; "S": x = 1, y = 0; "V+S":
both 1) and, with k = gamma, that of arXiv 2402.10097; it is a sum over clients, so at a price nu of a second every
client decides alone. With the limit l = N g^y w a^2 / beta below which its term has no value, a client's best q is

    q = min(1, l + sqrt(alpha g^x l / (N beta nu c)))

For fixed k, 1 / (R M) is concave over linear in M along the frontier, so there is one local minimum in nu; with a
choice of k there can be several, hence a grid of log nu and golden section round its best points. [Derived; the finite
set of sizes and its joint search are ours.]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from airtune.errors import InputError
from airtune.solvers.round_bound import RoundModel
from airtune.solvers.solution import Solution, finite_array, infeasible, name_clients

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

_GRID = 65
_GOLDEN = (5.0**0.5 - 1.0) / 2.0
_NARROWING = 60
_WIDTH = 12.0  # of the grid: factors e^-12 to e^12 round the price of the first guess
_STARTS = 3


@dataclass(frozen=True)
class SplitChoices:
    """The problem.

    Parameters
    ----------
    model : alpha, beta and the form, which gives x and y.
    load : [clients], w_n a_n^2, positive. ratio : [choices], k / gamma.
    cost : [clients, choices], c_n(k), s, positive; infinite where a size is not allowed.
    constant : s of every round.
    """

    model: RoundModel
    load: Array
    ratio: Array
    cost: Array
    constant: float

    @classmethod
    def of(
        cls,
        model: RoundModel,
        weight: ArrayLike,
        cost: ArrayLike,
        ratio: ArrayLike,
        *,
        noise_weight: ArrayLike = 1.0,
        constant: float = 0.0,
    ) -> SplitChoices:
        """Return a checked problem; raises InputError with the field that is wrong."""
        a = np.asarray(weight, dtype=np.float64)
        a = finite_array("weight", a, len(a), positive=True)
        w = finite_array("noise_weight", noise_weight, len(a), positive=True)
        share = np.asarray(ratio, dtype=np.float64)
        c = np.broadcast_to(np.asarray(cost, dtype=np.float64), (len(a), len(share)))
        if not ((share > 0.0) & (share <= 1.0)).all():
            raise InputError(f"ratio: {share.tolist()} is not possible; valid: above 0, to 1")
        if not (c > 0.0).all() or not constant >= 0.0:
            raise InputError("cost, constant: must be positive, and not negative")
        return cls(model, w * a**2, share, c, constant)

    @property
    def limit(self) -> Array:
        """Return l, [clients, choices]; a size whose limit is 1 or more is of no use."""
        factor = self.model.variance_factor(self.ratio)
        return len(self.load) * self.load[:, None] * factor / self.model.beta

    def value(self, probability: Array, choice: Ints) -> float:
        """Return R M, s; infinite where a client's term is."""
        rows = np.arange(len(self.load))
        left = 1.0 - self.limit[rows, choice] / probability
        if not (left > 0.0).all():
            return float("inf")
        rounds = self.model.alpha / self.model.beta * self.model.smoothness_factor(self.ratio)[choice] / left
        seconds = self.constant + float(probability @ self.cost[rows, choice])
        return float(rounds.mean()) * seconds

    def respond(self, price: float) -> tuple[Array, Ints]:
        """Return what every client does at a price of rounds per second: q and the index of its size, [clients]."""
        scale = self.model.alpha * self.model.smoothness_factor(self.ratio) / (len(self.load) * self.model.beta)
        limit = self.limit
        usable = np.isfinite(self.cost) & (limit < 1.0)
        cost = np.where(usable, self.cost, 1.0)
        q = np.minimum(1.0, limit + np.sqrt(scale * limit / (price * cost)))
        with np.errstate(divide="ignore", invalid="ignore"):
            term = scale * q / (q - limit) + price * q * cost
        choice = np.where(usable, term, np.inf).argmin(axis=1).astype(np.int64)
        return q[np.arange(len(q)), choice], choice


def best_split(problem: SplitChoices) -> Solution:
    """Return the optimum: value {"probability": [clients], "choice": [clients]}, objective R M in s.

    Infeasible, naming the clients, where one has no size with a limit below 1.
    """
    usable = (np.isfinite(problem.cost) & (problem.limit < 1.0)).any(axis=1)
    if not usable.all():
        return infeasible(len(problem.load), f"{name_clients(~usable)}: N w psi a^2 / beta is not below 1 at any size")
    first = problem.model.alpha / problem.model.beta
    middle = np.log(
        first / max(problem.constant + float(np.where(usable, problem.cost.min(axis=1), 0.0).sum()), 1e-300)
    )
    grid = np.linspace(middle - _WIDTH, middle + _WIDTH, _GRID)
    worth = np.array([problem.value(*problem.respond(float(np.exp(x)))) for x in grid])
    local = [i for i in range(_GRID) if worth[i] == worth[max(i - 1, 0) : i + 2].min()]
    best: tuple[float, Array, Ints] | None = None
    for place in sorted(local, key=lambda i: float(worth[i]))[:_STARTS]:
        found = _golden(problem, float(grid[max(place - 1, 0)]), float(grid[min(place + 1, _GRID - 1)]))
        best = found if best is None or found[0] < best[0] else best
    assert best is not None, "a finite list has a least entry"
    value = {"probability": best[1], "choice": best[2]}
    return Solution(value, "optimal", best[0], _GRID + _STARTS * _NARROWING)


def _golden(problem: SplitChoices, low: float, high: float) -> tuple[float, Array, Ints]:
    def at(x: float) -> tuple[float, Array, Ints]:
        point = problem.respond(float(np.exp(x)))
        return problem.value(*point), *point

    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    one, other = at(left), at(right)
    best = min(one, other, key=lambda point: point[0])
    for _ in range(_NARROWING):
        if one[0] <= other[0]:
            high, right, other = right, left, one
            left = high - _GOLDEN * (high - low)
            one = at(left)
        else:
            low, left, one = left, right, other
            right = low + _GOLDEN * (high - low)
            other = at(right)
        best = min(best, one, other, key=lambda point: point[0])
    return best
