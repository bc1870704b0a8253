"""Share one band so that the last upload ends as early as possible: all who share it finish together."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from airtune.errors import InputError
from airtune.solvers.solution import Solution, finite_array, infeasible, name_clients
from airtune.wireless.rate import achievable_rate, bandwidth_for_rate, rate_derivative

Array = NDArray[np.float64]

_ITERATIONS = 200


@dataclass(frozen=True)
class Uploads:
    """The uploads that share one band; arrays [clients].

    Parameters
    ----------
    compute_seconds : s before the upload starts.
    bits : to send.
    signal : P g, W received.
    noise : Gamma N0, W/Hz, the SNR gap included.
    minimum, maximum : bandwidth of a client, Hz.
    """

    compute_seconds: Array
    bits: Array
    signal: Array
    noise: Array
    minimum: Array
    maximum: Array

    @classmethod
    def of(
        cls,
        compute_seconds: ArrayLike,
        bits: ArrayLike,
        power: ArrayLike,
        gain: ArrayLike,
        noise_density: ArrayLike,
        snr_gap: float = 1.0,
        minimum: ArrayLike = 0.0,
        maximum: ArrayLike = np.inf,
    ) -> Uploads:
        """Return checked uploads; every argument is [clients] or one number. Raises InputError for bad numbers."""
        size = np.broadcast(np.atleast_1d(compute_seconds), bits, power, gain, noise_density, minimum, maximum).size
        if snr_gap < 1.0:
            raise InputError(f"snr_gap: must be at least 1 (linear); got {snr_gap:g}")
        low = finite_array("minimum bandwidth", minimum, size)
        high = np.broadcast_to(np.asarray(maximum, dtype=np.float64), (size,))
        bad = ~(high > 0.0) | (high < low)
        if bad.any():
            raise InputError(f"maximum bandwidth: {name_clients(bad)} must be positive and at least the minimum")
        return cls(
            compute_seconds=finite_array("compute_seconds", compute_seconds, size),
            bits=finite_array("bits", bits, size),
            signal=finite_array("power", power, size) * finite_array("gain", gain, size),
            noise=snr_gap * finite_array("noise_density", noise_density, size, positive=True),
            minimum=low,
            maximum=high,
        )

    @property
    def size(self) -> int:
        """Number of clients."""
        return self.bits.size

    def rate(self, bandwidth: ArrayLike) -> Array:
        """Return bit/s [clients] at `bandwidth`, Hz."""
        return achievable_rate(bandwidth, self.signal, 1.0, self.noise)

    def finish(self, bandwidth: ArrayLike) -> Array:
        """Return the finish times [clients], s: compute_seconds + bits / rate; infinite where bits meet no rate."""
        return self.compute_seconds + self.upload_seconds(bandwidth)

    def needed(self, deadline: ArrayLike) -> Array:
        """Return the bandwidth [clients], Hz, with which each just ends by `deadline` (s); infinite if none does."""
        return self.needed_within(np.asarray(deadline, dtype=np.float64) - self.compute_seconds)

    def needed_within(self, left: Array) -> Array:
        """Return the bandwidth [clients], Hz, with which each upload takes `left` s; infinite if none does."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            rate = np.where(self.bits > 0.0, self.bits / np.maximum(left, 0.0), np.where(left >= 0.0, 0.0, np.inf))
        return np.maximum(self.minimum, bandwidth_for_rate(rate, self.signal, 1.0, self.noise))

    def upload_seconds(self, bandwidth: ArrayLike) -> Array:
        """Return bits / rate [clients], s; infinite where bits meet no rate."""
        rate = self.rate(bandwidth)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return np.where(self.bits > 0.0, self.bits / rate, 0.0)

    @property
    def wait(self) -> Array:
        """How much earlier than the last client each one ends computing, [clients], s.

        The solvers count time from the end of the last computation: uploads may be much shorter than computations,
        and the digits of a short upload would be lost in a sum of the two.
        """
        return self.compute_seconds.max(initial=0.0) - self.compute_seconds


def equal_finish(
    compute_seconds: ArrayLike,
    bits: ArrayLike,
    power: ArrayLike,
    gain: ArrayLike,
    noise_density: ArrayLike,
    total_bandwidth: float,
    snr_gap: float = 1.0,
    *,
    minimum: ArrayLike = 0.0,
    maximum: ArrayLike = np.inf,
    resource_block: float | None = None,
) -> Solution:
    """Minimise the latest finish of compute + upload over the split of one band.

    ::

        min over w, T of T   subject to   compute_n + bits_n / R_n(w_n) <= T,   sum_n w_n <= W,   min_n <= w_n <= max_n

    For a given T each client needs w_n(T) = max(min_n, inverse of R_n at bits_n / (T - compute_n)); the sum falls in
    T and is convex, so T is a root in one dimension, found by Newton's method on log(sum w) - log W inside a bracket
    that bisection keeps. Where the optimum leaves no client bound by `minimum` or `maximum`, all finish at T.
    If a client's own maximum decides T, band may be left unused.

    With `resource_block` (Hz) each w_n is a whole number of blocks, floor(W / block) in all, and T is the least time
    at which the rounded-up needs fit: optimal among whole numbers, up to the last digits of T.

    Parameters
    ----------
    compute_seconds : [clients], s.
    bits : [clients]; 0 needs no band beyond the minimum.
    power : [clients], W.
    gain : [clients], linear.
    noise_density : W/Hz.
    total_bandwidth : W in Hz.
    snr_gap : linear, at least 1.
    minimum, maximum : [clients], Hz.
    resource_block : Hz, for example 180e3; None for continuous bandwidth.

    Returns
    -------
    Solution with value [clients] in Hz and objective T in s.
    """
    uploads = Uploads.of(compute_seconds, bits, power, gain, noise_density, snr_gap, minimum, maximum)
    if not (np.isfinite(total_bandwidth) and total_bandwidth > 0.0):
        raise InputError(f"total_bandwidth: must be positive and finite, in Hz; got {total_bandwidth:g}")
    if uploads.size == 0:
        return Solution(np.zeros(0), "optimal", 0.0, 0)
    if resource_block is not None:
        return _whole_blocks(uploads, total_bandwidth, resource_block)
    return _continuous(uploads, total_bandwidth)


def why_infeasible(uploads: Uploads, total: float) -> str | None:
    """Return why no split serves everybody in finite time, naming the clients, or None."""
    silent = (uploads.bits > 0.0) & (uploads.signal <= 0.0)
    if silent.any():
        return f"{name_clients(silent)}: no rate at any bandwidth (zero power or gain)"
    if uploads.minimum.sum() > total * (1.0 + 1e-12):
        above = uploads.minimum > total / uploads.size
        return f"the minimum bandwidths exceed the band of {total:g} Hz; {name_clients(above)} ask most"
    return None


def _continuous(uploads: Uploads, total: float) -> Solution:
    problem = why_infeasible(uploads, total)
    if problem is not None:
        return infeasible(uploads.size, problem)
    earliest = float((uploads.upload_seconds(np.minimum(uploads.maximum, total)) - uploads.wait).max())
    need = uploads.needed_within(uploads.wait + earliest)
    need = np.minimum(need, uploads.maximum)  # the last digit of the client that decides
    last = float(uploads.compute_seconds.max())
    if need.sum() <= total:
        return Solution(need, "optimal", last + earliest, 0, "limited by a client's own maximum, not by the band")
    low, offset, iterations = _root(uploads, total, earliest)
    bandwidth = _spread_rest(uploads, np.minimum(uploads.needed_within(uploads.wait + offset), uploads.maximum), total)
    closed = offset - low <= 1e-12 * abs(offset) or abs(bandwidth.sum() / total - 1.0) < 1e-9
    return Solution(bandwidth, "optimal" if closed else "stalled", last + offset, iterations)


def _spread_rest(uploads: Uploads, bandwidth: Array, total: float) -> Array:
    """Return the split with what rounding left of the band (or took too much) spread over those off their bounds.

    Where the signal is far below the noise over the band, bandwidth hardly changes the rate, and the last digit of the
    time is many Hz.
    """
    free = bandwidth * ((bandwidth > uploads.minimum) & (bandwidth < uploads.maximum))
    if not free.any():
        return bandwidth
    adjusted = bandwidth + free / free.sum() * (total - bandwidth.sum())
    return np.clip(adjusted, uploads.minimum, uploads.maximum)


def _root(uploads: Uploads, total: float, low: float) -> tuple[float, float, int]:
    """Return a bracket of the time after the last computation at which the needs add up to `total`, and iterations."""
    spread = np.maximum(uploads.minimum, np.minimum(uploads.maximum, _shares(uploads, total)))
    wait = uploads.wait
    high = float((uploads.upload_seconds(spread) - wait).max())
    time, iteration = high, 0
    while iteration < _ITERATIONS:
        iteration += 1
        need = uploads.needed_within(wait + time)
        with np.errstate(over="ignore"):
            excess = float(np.log(need.sum() / total))
        if excess <= 0.0:
            high = time
        else:
            low = time
        if -1e-13 <= excess <= 0.0:
            return high, high, iteration
        if high - low <= 4e-16 * abs(high):
            break
        time = _newton(uploads, need, wait + time, time, excess)
        if not low < time < high:
            time = 0.5 * (low + high)
    return low, high, iteration


def _shares(uploads: Uploads, total: float) -> Array:
    """Return a feasible split: the minima, and the rest in equal parts to those with something to send."""
    active = uploads.bits > 0.0
    return uploads.minimum + active * (total - uploads.minimum.sum()) / max(int(active.sum()), 1)


def _newton(uploads: Uploads, need: Array, left: Array, time: float, excess: float) -> float:
    """Return the Newton step for log(sum w(T)) = log W: dw/dT = -bits / ((T - compute)^2 R'(w)), 0 at the minimum."""
    if not np.isfinite(excess):
        return float("nan")
    moving = (need > uploads.minimum) & (uploads.bits > 0.0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        slope = uploads.bits / (left**2 * rate_derivative(need, uploads.signal, 1.0, uploads.noise))
    total_slope = float(slope[moving].sum())
    return time + excess * float(need.sum()) / total_slope if total_slope > 0.0 else float("nan")


def _whole_blocks(uploads: Uploads, total: float, block: float) -> Solution:
    """Solve with whole resource blocks: bisection on T for the least T whose rounded-up needs fit."""
    if not (np.isfinite(block) and block > 0.0):
        raise InputError(f"resource_block: must be positive, in Hz; got {block:g}")
    available = int(np.floor(total / block * (1.0 + 1e-12)))
    most = np.floor(np.minimum(uploads.maximum, total) / block * (1.0 + 1e-12))
    least = np.maximum(np.ceil(uploads.minimum / block * (1.0 - 1e-12)), uploads.bits > 0.0)
    problem = why_infeasible(uploads, total)
    if problem is None and (least > most).any():
        problem = f"{name_clients(least > most)}: the maximum bandwidth is below one resource block or the minimum"
    if problem is None and least.sum() > available:
        problem = f"{least.sum():g} resource blocks needed at least, {available} in the band; {name_clients(least > 0)}"
    if problem is not None:
        return infeasible(uploads.size, problem)
    bounded = replace(uploads, minimum=least * block, maximum=most * block)
    low = _continuous(bounded, total).objective - float(uploads.compute_seconds.max())
    return _bisect_blocks(uploads, low, least, most, available, block)


def _bisect_blocks(uploads: Uploads, low: float, least: Array, most: Array, available: int, block: float) -> Solution:
    wait = uploads.wait

    def blocks(offset: float) -> Array:
        return np.maximum(least, np.ceil(uploads.needed_within(wait + offset) / block * (1.0 - 1e-12)))

    def fits(count: Array) -> bool:
        return bool(count.sum() <= available and (count <= most).all())

    def ends(count: Array) -> float:
        return float((uploads.upload_seconds(count * block) - wait).max())

    best, high = least, ends(least)
    if fits(blocks(low)):
        best, high = blocks(low), low
    iteration = 0
    while iteration < _ITERATIONS:
        iteration += 1
        middle = 0.5 * (low + high)
        if high - low <= 1e-14 * abs(high) or not low < middle < high:
            break
        count = blocks(middle)
        if fits(count):
            best, high = count, min(middle, ends(count))
        else:
            low = middle
    bandwidth = best * block
    return Solution(bandwidth, "optimal", float(uploads.finish(bandwidth).max()), iteration, f"{best.sum():g} blocks")
