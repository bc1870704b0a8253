"""What every client sends and how the band is shared, when a round's latency has a price: drift plus penalty.

The problem of one round (SOFT + TSFA, arXiv 2505.00333; the form is our reading [choice]), with a queue Q that grows
while rounds take longer than the long-term limit:

    min over w, j, tau of   V sum_k p_k e_k(j_k) + Q tau
    subject to   compute_k + bits(j_k) / R_k(w_k) <= tau,   sum_k w_k <= W

where j_k is the number of choice (components sent) of client k. At a fixed tau each choice needs the bandwidth
w_k(j) = R_k^{-1}(bits(j) / (tau - compute_k)), which is convex in the bits, while the error is convex in j: gain per
Hz falls from choice to choice, so taking upgrades by falling gain per Hz is the best use of any band, exact up to the
one upgrade that no longer fits (whose fraction gives a lower bound). The best tau is looked for on a grid first, since
the objective need not have one minimum, then by golden section.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from airtune.errors import InputError
from airtune.solvers.airtime import min_latency_sum
from airtune.solvers.equal_finish import Uploads, equal_finish
from airtune.solvers.solution import Solution, finite_array, name_clients
from airtune.wireless.rate import rate_derivative

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

_LN2 = float(np.log(2.0))
_GRID = 16
_GOLDEN = 0.5 * (5.0**0.5 - 1.0)


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
        return Solution(_nothing(problem), "infeasible", float("inf"), 0, floor.message)
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
        order = np.argsort(-density.ravel())
        used = np.cumsum(cost.ravel()[order])
        band = p.total_bandwidth - float(width[:, 0].sum())
        count = int(np.searchsorted(used, band * (1.0 + 1e-12), side="right"))
        taken = np.zeros(density.size, dtype=np.bool_)
        taken[order[:count]] = True
        choice = taken.reshape(density.shape).sum(axis=1)
        error = p.errors[:, 0].sum() - gain.ravel()[order[:count]].sum()
        if count < order.size:
            left = max(band - (float(used[count - 1]) if count else 0.0), 0.0)
            error -= gain.ravel()[order[count]] * min(left / max(float(cost.ravel()[order[count]]), 1e-300), 1.0)
        return choice.astype(np.int64), float(error + p.queue * latency)

    def minimise(self, start: float | None) -> tuple[float, float]:
        """Return the latency of the least bound, and that bound."""
        low, high = self.lowest, self.highest
        points = np.geomspace(low, high, _GRID) if high > low else np.array([low])
        if start is not None and low < start < high:
            points = np.unique(
                np.concatenate([np.geomspace(low, high, _GRID // 2), start * np.array([0.97, 1.0, 1.03])])
            )
            points = points[(points >= low) & (points <= high)]
        values = [self.at(float(point))[1] for point in points]
        best = int(np.argmin(values))
        left, right = float(points[max(best - 1, 0)]), float(points[min(best + 1, len(points) - 1)])
        return self._golden(left, right, (float(points[best]), values[best]))

    def _golden(self, left: float, right: float, best: tuple[float, float]) -> tuple[float, float]:
        a, b = right - _GOLDEN * (right - left), left + _GOLDEN * (right - left)
        fa, fb = self.at(a)[1], self.at(b)[1]
        while right - left > 1e-3 * right:
            if fa <= fb:
                right, b, fb = b, a, fa
                a = right - _GOLDEN * (right - left)
                fa = self.at(a)[1]
            else:
                left, a, fa = a, b, fb
                b = left + _GOLDEN * (right - left)
                fb = self.at(b)[1]
        return min((best, (a, fa), (b, fb)), key=lambda pair: pair[1])


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


def _nothing(p: PricedRound) -> dict[str, object]:
    size = p.compute_seconds.size
    nan = np.full(size, np.nan)
    return {"choice": np.zeros(size, dtype=np.int64), "bandwidth": nan, "latency": float("inf"), "bound": float("inf")}


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


# ---------------------------------------------------------------------------------------------------- other constraints


def fixed_rate_choice(seconds: ArrayLike, errors: ArrayLike, queue: float) -> Solution:
    """Solve the problem where no band is shared (measured networks): exact, by sorting the finish times.

    Parameters
    ----------
    seconds : [clients, choices], finish time of each choice, increasing along the choices.
    errors : [clients, choices], weighted errors, falling. queue : price of a second.

    Returns
    -------
    Solution with value {"choice" [clients], "latency" s}.
    """
    times, table = np.asarray(seconds, dtype=np.float64), np.asarray(errors, dtype=np.float64)
    endless = ~np.isfinite(times[:, 0])
    if endless.any():
        return Solution({}, "infeasible", float("inf"), 0, f"{name_clients(endless)}: no rate")
    least = float(times[:, 0].max(initial=0.0))
    order = np.argsort(times[:, 1:].ravel(), kind="stable")
    ends = np.maximum(times[:, 1:].ravel()[order], least)
    gains = -np.diff(table, axis=1).ravel()[order]
    objective = table[:, 0].sum() + queue * least
    value = np.concatenate([[objective], objective - np.cumsum(gains) + queue * (ends - least)])
    value[~np.isfinite(value)] = np.inf
    latency = float(np.concatenate([[least], ends])[int(np.argmin(value))])
    choice = (times[:, 1:] <= latency).sum(axis=1).astype(np.int64)
    return Solution({"choice": choice, "latency": latency}, "optimal", float(value.min()), 1)


def client_queues(problem: PricedRound, queues: ArrayLike, rounds: int = 8) -> Solution:
    """Solve the variant with one latency constraint, and one queue, per client.

    ::

        min over w, j of sum_k [ V p_k e_k(j_k) + Q_k (compute_k + bits(j_k) / R_k(w_k)) ]   subject to sum_k w_k <= W

    by alternating two exact steps from the equal split: the choice at fixed rates (each client by itself), and the
    convex split at fixed choices (`min_latency_sum`). Each step lowers the objective; the result is a point from which
    neither can, not certainly the optimum. It is the sum of latencies that is weighed, not the longest one.

    Parameters
    ----------
    problem : as for `drift_plus_penalty`; its own queue is not used.
    queues : Q_k [clients], at least 0. A client whose queue is empty still needs band: it counts with 1e-3 of the mean
        queue (1e-3 if all are empty) in the split [choice].
    """
    p = problem
    price = finite_array("queues", queues, p.compute_seconds.size)
    weight = np.maximum(price, 1e-3 * (float(price.mean()) or 1.0))
    uploads = Uploads.of(p.compute_seconds, p.bits[-1], p.power, p.gain, p.noise_density, p.snr_gap)
    width = np.full(uploads.size, p.total_bandwidth / uploads.size)
    choice = np.full(uploads.size, -1, dtype=np.int64)
    split, count = Solution(width, "feasible", 0.0, 0), 0
    for _ in range(rounds):
        count += 1
        with np.errstate(divide="ignore"):
            per_bit = weight / uploads.rate(width)
        new = np.argmin(p.errors + per_bit[:, None] * p.bits[None, :], axis=1).astype(np.int64)
        new = np.where(price > 0.0, new, p.bits.size - 1)
        if np.array_equal(new, choice):
            break
        choice = new
        link = (p.compute_seconds, p.bits[choice], p.power, p.gain, p.noise_density, p.total_bandwidth)
        split = min_latency_sum(*link, weight, p.snr_gap)
        if not split.ok:
            return Solution(_nothing(p), "infeasible", float("inf"), count, split.message)
        width = np.asarray(split.value)
    seconds = p.compute_seconds + p.bits[choice] / uploads.rate(width)
    value = {"choice": choice, "bandwidth": width, "latency": float(seconds.max()), "seconds": seconds}
    return Solution(value, "feasible", p.error(choice) + float((price * seconds).sum()), count, "alternating steps")
