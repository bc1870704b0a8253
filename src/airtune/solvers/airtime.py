"""Bandwidth at fixed transmit powers: least energy under a deadline, least weighted sum of latencies."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from airtune.errors import InputError
from airtune.solvers.equal_finish import Uploads
from airtune.solvers.separable import SeparableBand
from airtune.solvers.solution import Solution, finite_array, infeasible, name_clients

Array = NDArray[np.float64]

_LN2 = float(np.log(2.0))


def min_energy(
    compute_seconds: ArrayLike,
    bits: ArrayLike,
    power: ArrayLike,
    gain: ArrayLike,
    noise_density: ArrayLike,
    total_bandwidth: float,
    deadline: ArrayLike,
    snr_gap: float = 1.0,
    *,
    minimum: ArrayLike = 0.0,
    maximum: ArrayLike = np.inf,
    resource_block: float | None = None,
) -> Solution:
    """Minimise the transmit energy of a round that ends by a deadline, powers being fixed.

    ::

        min over w of sum_n P_n bits_n / R_n(w_n)
        subject to compute_n + bits_n / R_n(w_n) <= deadline_n,  sum_n w_n <= W,  min_n <= w_n <= max_n

    1 / R_n is convex, so the Karush-Kuhn-Tucker conditions are necessary and sufficient; see
    `airtune.solvers.separable.SeparableBand`. The deadline is the lower bound at which client n just meets it.

    Parameters
    ----------
    deadline : s; one number or [clients]. Other parameters as in `airtune.solvers.equal_finish.equal_finish`.

    Returns
    -------
    Solution with value [clients] in Hz and objective in J.
    """
    uploads = Uploads.of(compute_seconds, bits, power, gain, noise_density, snr_gap, minimum, maximum)
    watt = finite_array("power", power, uploads.size)
    return _weighted(uploads, watt, total_bandwidth, deadline, resource_block)


def min_latency_sum(
    compute_seconds: ArrayLike,
    bits: ArrayLike,
    power: ArrayLike,
    gain: ArrayLike,
    noise_density: ArrayLike,
    total_bandwidth: float,
    weights: ArrayLike = 1.0,
    snr_gap: float = 1.0,
    *,
    minimum: ArrayLike = 0.0,
    maximum: ArrayLike = np.inf,
    resource_block: float | None = None,
) -> Solution:
    """Minimise the weighted sum of latencies over the split of one band.

    ::

        min over w of sum_n a_n (compute_n + bits_n / R_n(w_n))
        subject to sum_n w_n <= W,  min_n <= w_n <= max_n

    Convex, solved as in `min_energy` without a deadline.

    Parameters
    ----------
    weights : a_n > 0; one number or [clients]. Other parameters as in `equal_finish`.

    Returns
    -------
    Solution with value [clients] in Hz and objective in s.
    """
    uploads = Uploads.of(compute_seconds, bits, power, gain, noise_density, snr_gap, minimum, maximum)
    weight = finite_array("weights", weights, uploads.size, positive=True)
    found = _weighted(uploads, weight, total_bandwidth, np.inf, resource_block)
    if not found.ok:
        return found
    return replace(found, objective=found.objective + float((weight * uploads.compute_seconds).sum()))


def _weighted(
    uploads: Uploads, weight: Array, total: float, deadline: ArrayLike, resource_block: float | None
) -> Solution:
    """Minimise sum weight_n bits_n / R_n(w_n) by the deadline."""
    check_band(total, resource_block)
    if uploads.size == 0:
        return Solution(np.zeros(0), "optimal", 0.0, 0)
    load = weight * uploads.bits
    silent = (uploads.bits > 0.0) & (uploads.signal <= 0.0)
    if silent.any():
        return infeasible(uploads.size, f"{name_clients(silent)}: no rate at any bandwidth (zero power or gain)")
    by = np.broadcast_to(np.asarray(deadline, dtype=np.float64), (uploads.size,))
    late = uploads.compute_seconds > by
    if late.any():
        return infeasible(uploads.size, f"{name_clients(late)}: computes beyond the deadline")
    sends = load > 0.0
    lower = np.where(np.isinf(by), uploads.minimum, uploads.needed(by))
    upper = np.where(sends, np.minimum(uploads.maximum, total), lower)
    peak = np.where(sends, uploads.signal / uploads.noise, 1.0)  # c of the rate, Hz

    def cost(bandwidth: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(sends, load / uploads.rate(bandwidth), 0.0)

    def slope(bandwidth: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return np.where(sends, load * _LN2 / peak**2 * airtime_slope(peak / bandwidth), 0.0)

    def for_slope(price: float) -> Array:
        wanted = price * peak**2 / (_LN2 * np.where(sends, load, 1.0))
        return np.where(sends, peak / snr_for_slope(wanted), lower)

    return SeparableBand(cost, slope, for_slope, lower, upper, total).solve(resource_block)


def check_band(total: float, resource_block: float | None) -> None:
    """Raise InputError unless the band and its resource block are positive and finite."""
    if not (np.isfinite(total) and total > 0.0):
        raise InputError(f"total_bandwidth: must be positive and finite, in Hz; got {total:g}")
    if resource_block is not None and not (np.isfinite(resource_block) and resource_block > 0.0):
        raise InputError(f"resource_block: must be positive and finite, in Hz; got {resource_block:g}")


def airtime_slope(x: ArrayLike) -> Array:
    """Return h(x) = x^2 (ln(1+x) - x/(1+x)) / ln(1+x)^2: with x = c/w, R'(w) / R(w)^2 = ln 2 h(x) / c^2.

    Increasing, about x^2 / 2 for small x and x^2 / ln x for large x.
    """
    snr = np.asarray(x, dtype=np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        log = np.log1p(snr)
        series = snr * snr * (0.5 - snr * (2.0 / 3.0 - snr * (0.75 - 0.8 * snr)))
        bend = np.where(snr < 1e-3, series, log - snr / (1.0 + snr))
        return np.where(snr > 0.0, snr * snr * bend / np.where(log > 0.0, log, 1.0) ** 2, 0.0)


def snr_for_slope(y: ArrayLike) -> Array:
    """Return x > 0 with airtime_slope(x) = y > 0, by Newton's method on log h over log x, where h is nearly linear."""
    wanted = np.asarray(y, dtype=np.float64)
    x = np.sqrt(2.0 * wanted)
    for _ in range(40):
        log = np.log1p(x)
        series = x * x * (0.5 - x * (2.0 / 3.0 - x * (0.75 - 0.8 * x)))
        bend = np.where(x < 1e-3, series, log - x / (1.0 + x))
        slope = 2.0 + x / (1.0 + x) * (x / (1.0 + x) / bend - 2.0 / log)  # d log h / d log x
        step = np.clip(np.log(airtime_slope(x) / wanted) / slope, -3.0, 3.0)
        x = x * np.exp(-step)
        if np.all(np.abs(step) < 1e-15):
            break
    return x
