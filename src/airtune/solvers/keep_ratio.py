"""The per-round problem with continuous keep ratios: Karush-Kuhn-Tucker inside, a search on the latency outside.

    min over w, s, tau of   V sum_k p_k e_k(s_k) + Q tau
    subject to   compute_k + (s_k D + D_0) / R_k(w_k) <= tau,   sum_k w_k <= W,   s_min <= s_k <= 1

is not jointly convex. At a fixed tau it is: s_k = ((tau - compute_k) R_k(w_k) - D_0) / D is concave in w_k, so the
error is convex and falling in w_k, and one price per Hz equalises the marginal gains -V p_k e_k'(s_k) s_k'(w_k) of all
clients off their bounds. What is really sent is a whole number of components: see
`airtune.solvers.drift_plus_penalty`, whose relaxation this is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq

from airtune.errors import InputError
from airtune.solvers.equal_finish import equal_finish
from airtune.solvers.solution import Solution, finite_array, infeasible
from airtune.wireless.rate import achievable_rate, bandwidth_for_rate, rate_derivative

Array = NDArray[np.float64]

_LN2 = float(np.log(2.0))
_GOLDEN = 0.5 * (5.0**0.5 - 1.0)


class ErrorModel(Protocol):
    """What dropping costs, as a function of the keep ratio s; all arrays [clients]."""

    def error(self, s: Array) -> Array:
        """Return e_k(s_k), convex and falling, 0 at s = 1."""
        ...

    def slope(self, s: Array) -> Array:
        """Return -de_k/ds to the right of s_k."""
        ...

    def bandwidth(self, price: Array, band: RateBand, lower: Array, upper: Array) -> Array:
        """Return w in [lower, upper] at which -de/dw falls to `price` (per Hz, [clients])."""
        ...


@dataclass(frozen=True)
class RateBand:
    """The keep ratio as a function of bandwidth at a fixed latency: s(w) = (u R(w) - D_0) / D; arrays [clients].

    Attributes
    ----------
    left : u = tau - compute, s. peak : c of the rate, Hz. bits : D. constant_bits : D_0.
    """

    left: Array
    peak: Array
    bits: float
    constant_bits: float

    def ratio(self, bandwidth: Array) -> Array:
        """Return s at a bandwidth."""
        return (self.left * achievable_rate(bandwidth, self.peak, 1.0, 1.0) - self.constant_bits) / self.bits

    def ratio_slope(self, bandwidth: Array) -> Array:
        """Return ds/dw."""
        return self.left * rate_derivative(bandwidth, self.peak, 1.0, 1.0) / self.bits

    def needed(self, s: ArrayLike) -> Array:
        """Return w at which a ratio is reached, infinite if none is; s : broadcast against [clients]."""
        with np.errstate(divide="ignore"):
            rate = (np.asarray(s) * self.bits + self.constant_bits) / np.maximum(self.left, 0.0)
        return bandwidth_for_rate(rate, self.peak, 1.0, 1.0)

    def for_rate_slope(self, slope: Array) -> Array:
        """Return w with R'(w) = slope, 0 where it is infinite; broadcasts."""
        with np.errstate(divide="ignore"):
            return self.peak / snr_for_rate_slope(slope * _LN2)


@dataclass(frozen=True)
class PowerError:
    """e_k(s) = E_k (1 - s)^exponent, exponent 1 (the worst case) or above (2: the default without a measurement)."""

    scale: Array
    exponent: float = 2.0

    def error(self, s: Array) -> Array:
        """Return E (1 - s)^q."""
        return self.scale * np.maximum(1.0 - s, 0.0) ** self.exponent

    def slope(self, s: Array) -> Array:
        """Return E q (1 - s)^(q - 1)."""
        return self.scale * self.exponent * np.maximum(1.0 - s, 0.0) ** (self.exponent - 1.0)

    def bandwidth(self, price: Array, band: RateBand, lower: Array, upper: Array) -> Array:
        """Return w by Newton's method on the logarithm of the marginal gain, inside a bracket."""
        if self.exponent == 1.0:
            return np.clip(band.for_rate_slope(price * band.bits / (self.scale * band.left)), lower, upper)
        low, high = np.maximum(lower, 1e-12 * upper), upper.copy()
        stays = self._log_gain(low, band) <= np.log(price)  # not worth more than the least
        fills = self._log_gain(high, band) >= np.log(price)
        w = np.where(stays, lower, np.where(fills, upper, np.sqrt(low * high)))
        active = ~(stays | fills)
        for _ in range(60):
            value = self._log_gain(w, band) - np.log(price)
            low, high = np.where(value > 0.0, w, low), np.where(value > 0.0, high, w)
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                new = w * np.exp(-value / (w * self._log_gain_slope(w, band)))
            new = np.where((new >= low) & (new <= high), new, np.sqrt(low * high))
            moved = np.abs(new - w) > 1e-12 * w
            w = np.where(active, new, w)
            if not (moved & active).any():
                break
        return np.clip(w, lower, upper)

    def _log_gain(self, w: Array, band: RateBand) -> Array:
        """Return the logarithm of -de/dw."""
        with np.errstate(divide="ignore"):
            return np.log(self.slope(band.ratio(w))) + np.log(band.ratio_slope(w))

    def _log_gain_slope(self, w: Array, band: RateBand) -> Array:
        """Return the derivative of that, negative: with s' the slope of the ratio and s'' its bend."""
        slope = band.ratio_slope(w)
        bend = -band.left * band.peak**2 / (_LN2 * band.bits * w * (w + band.peak) ** 2)
        return -(self.exponent - 1.0) * slope / np.maximum(1.0 - band.ratio(w), 1e-300) + bend / slope


@dataclass(frozen=True)
class ProfileError:
    """The measured profile: e_k(i / r) = sum of the squares beyond the i largest, linear in between.

    tail : [clients, r + 1], e at 0, 1 / r ... 1; convex and falling, 0 at the end.
    """

    tail: Array

    @property
    def rank(self) -> int:
        """Return r."""
        return self.tail.shape[1] - 1

    def error(self, s: Array) -> Array:
        """Return the interpolated tail."""
        place = np.clip(s, 0.0, 1.0) * self.rank
        i = np.minimum(place.astype(np.int64), self.rank - 1)
        rows = np.arange(len(place))
        return self.tail[rows, i] + (place - i) * (self.tail[rows, i + 1] - self.tail[rows, i])

    def slope(self, s: Array) -> Array:
        """Return r times the square of the next component, 0 at s = 1."""
        i = np.floor(np.clip(s, 0.0, 1.0) * self.rank + 1e-9).astype(np.int64)
        padded = np.concatenate([-np.diff(self.tail, axis=1), np.zeros((len(s), 1))], axis=1)
        return self.rank * padded[np.arange(len(s)), i]

    def bandwidth(self, price: Array, band: RateBand, lower: Array, upper: Array) -> Array:
        """Return w: along each linear piece R'(w) falls to a constant, or the piece is taken whole or not at all."""
        knots = np.arange(self.rank + 1) / self.rank
        table = np.column_stack([band.needed(np.full(len(lower), s)) for s in knots])
        table = np.clip(table, lower[:, None], upper[:, None])
        gains = self.rank * -np.diff(self.tail, axis=1)
        with np.errstate(divide="ignore"):
            wanted = (price * band.bits / band.left)[:, None] / gains
        column = RateBand(band.left[:, None], band.peak[:, None], band.bits, band.constant_bits)
        inside = np.where(gains > 0.0, column.for_rate_slope(np.where(gains > 0.0, wanted, 1.0)), 0.0)
        return lower + (np.clip(inside, table[:, :-1], table[:, 1:]) - table[:, :-1]).sum(axis=1)


@dataclass(frozen=True)
class RatioProblem:
    """The data; arrays [clients].

    Attributes
    ----------
    compute_seconds : s. power : W. gain : linear. noise_density : W/Hz, SNR gap included. total_bandwidth : Hz.
    bits : D, at s = 1, without D_0. constant_bits : D_0. least_ratio : s_min.
    weights : V p_k. error : e_k. queue : Q.
    """

    compute_seconds: Array
    power: Array
    gain: Array
    noise_density: float
    total_bandwidth: float
    bits: float
    constant_bits: float
    least_ratio: float
    weights: Array
    error: ErrorModel
    queue: float

    def band(self, latency: float) -> RateBand:
        """Return the ratio as a function of bandwidth at a latency."""
        left = np.maximum(latency - self.compute_seconds, 0.0)
        return RateBand(left, self.power * self.gain / self.noise_density, self.bits, self.constant_bits)

    def finish(self, ratio: float) -> Solution:
        """Return the equal-finish split if everybody sends `ratio`."""
        bits = ratio * self.bits + self.constant_bits
        link = (self.compute_seconds, bits, self.power, self.gain, self.noise_density)
        return equal_finish(*link, self.total_bandwidth)

    def inner(self, latency: float) -> Solution:
        """Return the best split at a fixed latency: value [clients] in Hz, objective V sum p e."""
        band = self.band(latency)
        total = self.total_bandwidth
        lower = np.minimum(band.needed(self.least_ratio), total)
        if (excess := float(lower.sum()) / total) > 1.0:  # rounding at the least latency
            lower = lower / excess
        upper = np.maximum(np.minimum(band.needed(1.0), total), lower)

        wanted = float(upper.sum()) / total
        width = upper / max(wanted, 1.0) if wanted <= 1.0 + 1e-9 else self._at_price(band, lower, upper)
        ratio = np.clip(band.ratio(width), self.least_ratio, 1.0)
        return Solution(width, "optimal", float((self.weights * self.error.error(ratio)).sum()), 1)

    def _at_price(self, band: RateBand, lower: Array, upper: Array) -> Array:
        """Return the bandwidths at the price per Hz at which demand equals the band, found by Brent's method."""

        def demand(log_price: float) -> Array:
            return self.error.bandwidth(np.exp(log_price) / self.weights, band, lower, upper)

        def excess(log_price: float) -> float:
            return float(np.log(demand(log_price).sum() / self.total_bandwidth))

        low = high = float(np.log(1.0 / self.total_bandwidth))
        while excess(low) < 0.0 and low > -700.0:
            low -= 4.0
        while excess(high) > 0.0 and high < 700.0:
            high += 4.0
        price = high if low == high else float(brentq(excess, low, high, xtol=1e-13, rtol=1e-14))
        width = demand(price)
        free = width * ((width > lower) & (width < upper))
        if free.sum() > 0.0:  # what rounding left of the band
            width = width + free / free.sum() * (self.total_bandwidth - width.sum())
        return np.clip(width, lower, upper)


def best_keep_ratios(problem: RatioProblem, grid: int = 40) -> Solution:
    """Solve the problem.

    Parameters
    ----------
    problem : the round.
    grid : latencies tried, geometrically spaced, before the golden section around the best of them.

    Returns
    -------
    Solution with value {"keep_ratio" [clients], "bandwidth" [clients] in Hz, "latency" in s}. The inner problem is
    solved exactly; over the latency the answer is the best of the grid's basin.
    """
    size = problem.compute_seconds.size
    finite_array("weights", problem.weights, size, positive=True)
    if not (np.isfinite(problem.queue) and problem.queue >= 0.0):
        raise InputError(f"queue: must be at least 0; got {problem.queue:g}")
    least, most = problem.finish(problem.least_ratio), problem.finish(1.0)
    if not least.ok:
        return infeasible(size, least.message)
    if problem.queue == 0.0:
        return _ratio_answer(problem, most.objective, 0)
    points = np.geomspace(least.objective, most.objective, grid)
    values = [_at(problem, float(point)) for point in points]
    best = int(np.argmin(values))
    left, right = float(points[max(best - 1, 0)]), float(points[min(best + 1, grid - 1)])
    tried = [(values[best], float(points[best]))]
    a, b = right - _GOLDEN * (right - left), left + _GOLDEN * (right - left)
    fa, fb = _at(problem, a), _at(problem, b)
    count = grid
    while right - left > 1e-7 * right:
        count += 1
        tried += [(fa, a), (fb, b)]
        if fa <= fb:
            right, b, fb = b, a, fa
            a = right - _GOLDEN * (right - left)
            fa = _at(problem, a)
        else:
            left, a, fa = a, b, fb
            b = left + _GOLDEN * (right - left)
            fb = _at(problem, b)
    return _ratio_answer(problem, min([*tried, (fa, a), (fb, b)])[1], count)


def _at(problem: RatioProblem, latency: float) -> float:
    return problem.inner(latency).objective + problem.queue * latency


def _ratio_answer(problem: RatioProblem, latency: float, iterations: int) -> Solution:
    found = problem.inner(latency)
    width = np.asarray(found.value)
    ratio = np.clip(problem.band(latency).ratio(width), problem.least_ratio, 1.0)
    value = {"keep_ratio": ratio, "bandwidth": width, "latency": latency}
    return Solution(value, "feasible", found.objective + problem.queue * latency, iterations)


def snr_for_rate_slope(y: ArrayLike) -> Array:
    """Return x with ln(1 + x) - x / (1 + x) = y: R'(w) ln 2 = y at w = c / x. Newton over log x; 0 at y = 0."""
    wanted = np.asarray(y, dtype=np.float64)
    positive = np.where(wanted > 0.0, np.minimum(wanted, 300.0), 1.0)  # beyond, w = c / x is 0 for every purpose
    x = np.where(positive < 1.0, np.sqrt(2.0 * positive) * (1.0 + positive), np.expm1(positive + 1.0))
    for _ in range(50):
        inverse = x / (1.0 + x)
        small = np.minimum(x, 1e-3)
        series = small * small * (0.5 - small * (2.0 / 3.0 - small * (0.75 - 0.8 * small)))
        value = np.where(x < 1e-3, series, np.log1p(x) - inverse)
        step = np.clip(np.log(value / positive) * value / (inverse * inverse), -2.0, 2.0)
        x = x * np.exp(-step)
        if np.all(np.abs(step) < 1e-13):
            break
    return np.where(wanted > 0.0, x, 0.0)
