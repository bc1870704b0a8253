"""What every client sends and how the band is shared, when a round's latency has a price: drift plus penalty.

The problem of one round (SOFT + TSFA, arXiv 2505.00333; the form is our reading [choice]), with a queue Q that grows
while rounds take longer than the long-term limit:

    min over w, j, tau of   V sum_k p_k e_k(j_k) + Q tau
    subject to   compute_k + bits(j_k) / R_k(w_k) <= tau,   sum_k w_k <= W

where j_k is the number of choice (components sent) of client k. At a fixed tau each choice needs the bandwidth
w_k(j) = R_k^{-1}(bits(j) / (tau - compute_k)), which is convex in the bits, while the error is convex in j: gain per
Hz falls from choice to choice, so taking upgrades by falling gain per Hz is the best use of any band, exact up to the
one upgrade that no longer fits (whose fraction gives a lower bound). The best tau is looked for on a grid first, since
the objective need not have one minimum, with few of the choices; then, with all, downhill and by Brent's method.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import OptimizeResult, minimize_scalar

from airtune.errors import InputError
from airtune.solvers.equal_finish import equal_finish
from airtune.solvers.solution import Solution, finite_array
from airtune.wireless.rate import rate_derivative

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

_LN2 = float(np.log(2.0))
_GRID = 16
_COARSE = 8  # choices of which the grid is computed [choice]
_SORTED_AT_ONCE = 4096  # upgrades; of more, a sample says which to sort [choice]
_SAMPLE = 2048
_GOLDEN = 0.5 * (5.0**0.5 - 1.0)  # whose multiples, modulo 1, are spread evenly
_RESOLUTION = 1e-3  # of the latency searched for, relative [choice]


@dataclass(frozen=True)
class PricedRound:
    """The data of one round; arrays [clients] unless said otherwise.

    Attributes
    ----------
    compute_seconds : s before the upload starts.
    bits : [choices], increasing: what each choice sends.
    power : W. gain : linear. noise_density : W/Hz, one number. snr_gap : linear.
    total_bandwidth : W in Hz.
    errors : [clients, choices], weighted errors V p_k e_k(j), falling and convex along the choices.
    queue : Q, price of a second of latency, at least 0.
    """

    compute_seconds: Array
    bits: Array
    power: Array
    gain: Array
    noise_density: float
    snr_gap: float
    total_bandwidth: float
    errors: Array
    queue: float

    @staticmethod
    def of(
        compute_seconds: ArrayLike,
        bits: ArrayLike,
        power: ArrayLike,
        gain: ArrayLike,
        noise_density: float,
        total_bandwidth: float,
        errors: ArrayLike,
        queue: float,
        snr_gap: float = 1.0,
    ) -> PricedRound:
        """Return checked data. Raises InputError naming the field."""
        table = np.atleast_2d(np.asarray(errors, dtype=np.float64))
        size = table.shape[0]
        sizes = np.atleast_1d(np.asarray(bits, dtype=np.float64))
        if table.shape[1] != sizes.size or not np.isfinite(table).all():
            raise InputError(f"errors: must be finite, [clients, {sizes.size} choices]; got {table.shape}")
        if not (np.isfinite(sizes).all() and (sizes >= 0.0).all() and (np.diff(sizes) > 0.0).all()):
            raise InputError("bits: must be finite, at least 0 and increasing over the choices")
        if not (np.isfinite(queue) and queue >= 0.0):
            raise InputError(f"queue: must be at least 0; got {queue:g}")
        return PricedRound(
            compute_seconds=finite_array("compute_seconds", compute_seconds, size),
            bits=sizes,
            power=finite_array("power", power, size),
            gain=finite_array("gain", gain, size),
            noise_density=noise_density,
            snr_gap=snr_gap,
            total_bandwidth=total_bandwidth,
            errors=table,
            queue=float(queue),
        )

    def finish(self, choice: Ints | int) -> Solution:
        """Return the split that ends the latest upload earliest when client k sends ``bits[choice[k]]``."""
        bits = np.broadcast_to(self.bits[choice], self.compute_seconds.shape)
        link = (self.compute_seconds, bits, self.power, self.gain, self.noise_density)
        return equal_finish(*link, self.total_bandwidth, self.snr_gap)

    def error(self, choice: Ints) -> float:
        """Return the weighted error of a choice [clients]."""
        return float(self.errors[np.arange(choice.size), choice].sum())

    def nothing_sent(self) -> dict[str, object]:
        """Return the value of a solution where there is none."""
        size = self.compute_seconds.size
        nan = np.full(size, np.nan)
        choice = np.zeros(size, dtype=np.int64)
        return {"choice": choice, "bandwidth": nan, "latency": float("inf"), "bound": float("inf")}

    def needed(self, latency: float) -> Array:
        """Return the bandwidth [clients, choices], Hz, with which each choice just ends by `latency`."""
        left = np.maximum(latency - self.compute_seconds, 0.0)
        peak = self.power * self.gain / (self.snr_gap * self.noise_density)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            y = (_LN2 * self.bits) / (left * peak)[:, None]
            bandwidth = peak[:, None] / _snr_for_efficiency(np.where(y < 1.0, np.maximum(y, 1e-300), 0.5))
            return np.where(self.bits == 0.0, 0.0, np.where(y < 1.0, bandwidth, np.inf))


def drift_plus_penalty(problem: PricedRound, start: float | None = None) -> Solution:
    """Choose what every client sends and split the band; see the module's docstring.

    Parameters
    ----------
    problem : the round.
    start : s, a latency near which the optimum is expected (last round's): a finer grid is laid around it.

    Returns
    -------
    Solution with value {"choice" [clients], "bandwidth" [clients] in Hz, "latency" in s, "bound": a lower bound of the
    objective, up to the resolution of the search over tau}, objective V sum p e + Q tau. At Q = 0 everybody sends all.
    Status "feasible": optimal up to the gap to the bound, which the message gives.
    """
    floor = problem.finish(0)
    if not floor.ok:
        return Solution(problem.nothing_sent(), "infeasible", float("inf"), 0, floor.message)
    full = problem.finish(problem.bits.size - 1)
    if problem.queue == 0.0 or problem.bits.size == 1:
        choice = np.full(problem.compute_seconds.size, problem.bits.size - 1, dtype=np.int64)
        return _answer(problem, choice, full, problem.error(choice) + problem.queue * full.objective, 0)
    search = _Search(problem, floor.objective, full.objective)
    latency, bound = search.minimise(start)
    choice, _ = search.at(latency)
    choice, finish = _polished(problem, choice)
    return _answer(problem, choice, finish, min(bound, _objective(problem, choice, finish)), search.evaluations)


@dataclass
class _Search:
    """The objective as a function of the latency alone, between the least and the largest that is of use."""

    problem: PricedRound
    lowest: float
    highest: float
    evaluations: int = 0

    def at(self, latency: float) -> tuple[Ints, float]:
        """Return the choices [clients] that are best at a latency, and the bound on the objective there."""
        self.evaluations += 1
        p = self.problem
        width = p.needed(latency)
        gain = -np.diff(p.errors, axis=1)
        with np.errstate(invalid="ignore"):
            cost = np.where(np.isfinite(width[:, 1:]), np.diff(width, axis=1), np.inf)
        density = np.minimum.accumulate(gain / np.maximum(cost, 1e-300), axis=1)  # falling, up to rounding
        density *= 1.0 - 1e-12 * np.arange(density.shape[1])  # of equal ones a client's first upgrade first
        band = p.total_bandwidth - float(width[:, 0].sum())
        flat, left, following = _taken_first(density.ravel(), cost.ravel(), band)
        taken = flat.reshape(density.shape)
        choice = taken.sum(axis=1)
        error = p.errors[:, 0].sum() - gain[taken].sum()
        if following is not None:
            error -= gain.ravel()[following] * min(left / max(float(cost.ravel()[following]), 1e-300), 1.0)
        return choice.astype(np.int64), float(error + p.queue * latency)

    def minimise(self, start: float | None) -> tuple[float, float]:
        """Return the latency of the least bound, and that bound: a coarse grid, then downhill with all choices."""
        low, high = self.lowest, self.highest
        points = np.geomspace(low, high, _GRID) if high > low else np.array([low])
        if start is not None and low < start < high:
            points = np.unique(
                np.concatenate([np.geomspace(low, high, _GRID // 2), start * np.array([0.97, 1.0, 1.03])])
            )
            points = points[(points >= low) & (points <= high)]
        coarse = _Search(_with_fewer_choices(self.problem), low, high)
        best = int(np.argmin([coarse.at(float(point))[1] for point in points]))
        self.evaluations += coarse.evaluations
        values = {i: self.at(float(points[i]))[1] for i in (best - 1, best, best + 1) if 0 <= i < len(points)}
        while (lowest := min(values, key=lambda i: values[i])) != best:  # the fewer choices misled by a point
            best, following = lowest, 2 * lowest - best
            if 0 <= following < len(points) and following not in values:
                values[following] = self.at(float(points[following]))[1]
        left, right = float(points[max(best - 1, 0)]), float(points[min(best + 1, len(points) - 1)])
        return self._refined(left, right, (float(points[best]), values[best]))

    def _refined(self, left: float, right: float, best: tuple[float, float]) -> tuple[float, float]:
        """Return the better of `best` and what Brent's method finds between two latencies."""
        if not left < right:
            return best
        found: OptimizeResult = minimize_scalar(
            lambda latency: self.at(float(latency))[1],
            bounds=(left, right),
            method="bounded",
            options={"xatol": _RESOLUTION * best[0]},
        )
        return min((best, (float(found.x), float(found.fun))), key=lambda pair: pair[1])


def _taken_first(
    density: Array, cost: Array, band: float, *, sample: bool = True
) -> tuple[NDArray[np.bool_], float, int | None]:
    """Return which upgrades fit the band (Hz) if those of most gain per Hz come first.

    Only those near the cut are sorted: where it lies is guessed from a sample, and everything is sorted if the guess
    was wrong.

    Parameters
    ----------
    density, cost : [upgrades], gain per Hz, and Hz.

    Returns
    -------
    Which are taken, the band that is left, and the index of the first that does not fit (None if all do).
    """
    high, low = _window(density, cost, band) if sample and density.size > _SORTED_AT_ONCE else (np.inf, -np.inf)
    taken = density > high
    used = float(cost[taken].sum())
    inside = np.flatnonzero(~taken & (density >= low))
    order = inside[np.argsort(-density[inside])]
    summed = used + np.cumsum(cost[order])
    count = int(np.searchsorted(summed, band * (1.0 + 1e-12), side="right"))
    if (used > band and high < np.inf) or (count == order.size and low > -np.inf):
        return _taken_first(density, cost, band, sample=False)
    taken[order[:count]] = True
    left = max(band - (float(summed[count - 1]) if count else used), 0.0)
    return taken, left, int(order[count]) if count < order.size else None


def _window(density: Array, cost: Array, band: float) -> tuple[float, float]:
    """Return densities above and below the one at which the band is probably used up, from an even sample."""
    picked = (np.arange(_SAMPLE) * _GOLDEN % 1.0 * density.size).astype(np.int64)
    order = picked[np.argsort(-density[picked])]
    place = int(np.searchsorted(np.cumsum(cost[order]) * (density.size / _SAMPLE), band))
    first, last = place - _SAMPLE // 12, place + _SAMPLE // 12
    high = float(density[order[first]]) if first >= 0 else np.inf
    return high, float(density[order[last]]) if last < _SAMPLE else -np.inf


def _with_fewer_choices(p: PricedRound) -> PricedRound:
    """Return the round with at most `_COARSE` of its choices, the first and the last among them."""
    kept = np.unique(np.linspace(0, p.bits.size - 1, _COARSE).round().astype(np.int64))
    return replace(p, bits=p.bits[kept], errors=p.errors[:, kept])


def _polished(p: PricedRound, choice: Ints) -> tuple[Ints, Solution]:
    """Return the choice after single steps and exchanges of one component that help, and its equal-finish split."""
    finish = p.finish(choice)
    best = _objective(p, choice, finish)
    for _ in range(12 if choice.size <= 50 else 1):
        better = False
        for candidate in _steps(p, choice, finish):
            other = p.finish(candidate)
            value = _objective(p, candidate, other)
            if value < best * (1.0 - 1e-12):
                choice, finish, best, better = candidate, other, value, True
                break
        if not better:
            break
    return choice, finish


def _steps(p: PricedRound, choice: Ints, finish: Solution) -> list[Ints]:
    """Return the most promising neighbours of a choice: one component more, one less, and one moved."""
    rows, last = np.arange(choice.size), p.bits.size - 1
    latency, width = finish.objective, np.asarray(finish.value)
    price = p.queue / max(_band_per_second(p, choice, latency, width), 1e-300)  # of a Hz
    table = p.needed(latency)
    up, down = np.minimum(choice + 1, last), np.maximum(choice - 1, 0)
    with np.errstate(invalid="ignore"):
        more = p.errors[rows, choice] - p.errors[rows, up] - price * (table[rows, up] - table[rows, choice])
        less = p.errors[rows, choice] - p.errors[rows, down] + price * (table[rows, choice] - table[rows, down])
    more, less = np.where((choice < last) & np.isfinite(more), more, -np.inf), np.where(choice > 0, less, -np.inf)
    i, j = int(np.argmax(more)), int(np.argmax(less))
    candidates = [(more[i], _moved(choice, {i: 1})), (less[j], _moved(choice, {j: -1}))]
    if choice.size > 1:
        pairs = {(i, int(k)) for k in np.argsort(-less)[:2]} | {(int(k), j) for k in np.argsort(-more)[:2]}
        candidates += [(more[a] + less[b], _moved(choice, {a: 1, b: -1})) for a, b in sorted(pairs) if a != b]
    return [moved for value, moved in sorted(candidates, key=lambda c: -c[0]) if np.isfinite(value)]


def _band_per_second(p: PricedRound, choice: Ints, latency: float, width: Array) -> float:
    """Return how much band a second less of latency costs, Hz/s: the sum of -dw_k/dtau at fixed choices."""
    bits = p.bits[choice]
    slope = rate_derivative(width, p.power, p.gain, p.noise_density, p.snr_gap)
    with np.errstate(divide="ignore", invalid="ignore"):
        each = bits / ((latency - p.compute_seconds) ** 2 * slope)
    return float(each[(bits > 0.0) & np.isfinite(each)].sum())


def _moved(choice: Ints, by: dict[int, int]) -> Ints:
    moved = choice.copy()
    for client, step in by.items():
        moved[client] += step
    return moved


def _objective(p: PricedRound, choice: Ints, finish: Solution) -> float:
    return p.error(choice) + p.queue * finish.objective


def _answer(p: PricedRound, choice: Ints, finish: Solution, bound: float, iterations: int) -> Solution:
    value = {"choice": choice, "bandwidth": np.asarray(finish.value), "latency": finish.objective, "bound": bound}
    objective = _objective(p, choice, finish)
    gap = (objective - bound) / objective if objective > 0.0 else 0.0
    return Solution(
        value, "feasible" if gap > 0.0 else "optimal", objective, iterations, f"within {gap:.2%} of the bound"
    )


def _snr_for_efficiency(y: Array) -> Array:
    """Return x > 0 with ln(1 + x) = y x, as `airtune.wireless.rate.snr_for_efficiency` but in two passes.

    The same starting bound, then Halley's iteration: of third order, so that two steps reach 1e-9 or better.
    """
    rest = 1.0 - y
    u = np.maximum(-np.log(y) - rest, 0.5 * rest * rest)
    x = (rest + np.sqrt(2.0 * u) + u) / y
    for _ in range(2):
        inverse = 1.0 / (1.0 + x)
        f, slope = np.log1p(x) - y * x, inverse - y
        x = x - 2.0 * f * slope / (2.0 * slope * slope + f * inverse * inverse)
    return x
