"""Bandwidth and transmit power together: least transmit energy of a round that ends by a deadline."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from airtune.solvers.airtime import check_band
from airtune.solvers.equal_finish import Uploads
from airtune.solvers.separable import SeparableBand
from airtune.solvers.solution import Solution, infeasible, name_clients

Array = NDArray[np.float64]

_LN2 = float(np.log(2.0))


def joint_min_energy(
    compute_seconds: ArrayLike,
    bits: ArrayLike,
    maximum_power: ArrayLike,
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
    """Minimise the transmit energy over bandwidths and powers.

    ::

        min over w, P of sum_n P_n bits_n / R_n(w_n, P_n)
        subject to compute_n + bits_n / R_n(w_n, P_n) <= deadline_n,  sum_n w_n <= W,
                   0 <= P_n <= Pmax_n,  min_n <= w_n <= max_n

    At any bandwidth, sending more slowly costs less energy, so every client sends until its deadline: its rate is
    r_n = bits_n / (deadline_n - compute_n) and its power P_n(w) = w Gamma N0 / g_n (2^(r_n / w) - 1). The energy is
    then convex and decreasing in w alone, and Pmax is a lower bound on w. With u = r ln 2 / w the Karush-Kuhn-Tucker
    condition (u - 1) e^u + 1 = price has the solution u = 1 + W_0((price - 1) / e), W_0 Lambert's function.

    Parameters
    ----------
    maximum_power : [clients], W. deadline : s; one number or [clients]. Others as in `equal_finish`.

    Returns
    -------
    Solution with value {"bandwidth": [clients] Hz, "power": [clients] W} and objective in J.
    """
    uploads = Uploads.of(compute_seconds, bits, maximum_power, gain, noise_density, snr_gap, minimum, maximum)
    check_band(total_bandwidth, resource_block)
    if uploads.size == 0:
        return Solution({"bandwidth": np.zeros(0), "power": np.zeros(0)}, "optimal", 0.0, 0)
    left = np.broadcast_to(np.asarray(deadline, dtype=np.float64), (uploads.size,)) - uploads.compute_seconds
    sends = uploads.bits > 0.0
    late = np.where(sends, left <= 0.0, left < 0.0)
    if late.any():
        return _none(uploads.size, f"{name_clients(late)}: computes until the deadline or beyond")
    power = np.broadcast_to(np.asarray(maximum_power, dtype=np.float64), (uploads.size,))
    with np.errstate(divide="ignore", invalid="ignore"):
        noise = np.where(sends, uploads.noise * power / uploads.signal, 1.0)  # Gamma N0 / g, W/Hz at the transmitter
    silent = sends & ~np.isfinite(noise)
    if silent.any():
        return _none(uploads.size, f"{name_clients(silent)}: no rate at any bandwidth (zero power or gain)")
    return _solve(uploads, left, noise, power, total_bandwidth, resource_block)


def _solve(
    uploads: Uploads, left: Array, noise: Array, most: Array, total: float, resource_block: float | None
) -> Solution:
    sends = uploads.bits > 0.0
    nats = np.where(sends, uploads.bits * _LN2 / np.where(sends, left, 1.0), 0.0)  # rate in nat/s
    scale = np.where(sends, left * noise, 1.0)

    def energy(bandwidth: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return np.where(sends, scale * bandwidth * np.expm1(nats / bandwidth), 0.0)

    def slope(bandwidth: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return np.where(sends, scale * power_slope(nats / bandwidth), 0.0)

    lower = uploads.needed(uploads.compute_seconds + left)
    upper = np.where(sends, np.minimum(uploads.maximum, total), lower)

    def for_slope(price: float) -> Array:
        return np.where(sends, nats / exponent_for_slope(price / scale), lower)

    found = SeparableBand(energy, slope, for_slope, lower, upper, total).solve(resource_block)
    if not found.ok:
        return _none(uploads.size, found.message)
    power = np.zeros(uploads.size)
    width = found.value[sends]
    power[sends] = np.minimum(noise[sends] * width * np.expm1(nats[sends] / width), most[sends])
    value = {"bandwidth": found.value, "power": power}
    return Solution(value, "optimal", found.objective, found.iterations, found.message)


def power_slope(u: ArrayLike) -> Array:
    """Return k(u) = (u - 1) e^u + 1 >= 0, by its series where the difference would cancel."""
    exponent = np.asarray(u, dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        value = np.asarray((exponent - 1.0) * np.expm1(exponent) + exponent)
    near = exponent < 0.1
    if near.any():
        small = exponent[near]
        series, term = np.zeros_like(small), small.copy()
        for n in range(2, 14):  # sum of (n - 1) u^n / n!
            term = term * small / n
            series = series + (n - 1) * term
        value[near] = series
    return value


def exponent_for_slope(y: ArrayLike) -> Array:
    """Return u > 0 with power_slope(u) = y > 0: u = 1 + W_0((y - 1) / e).

    Evaluated by Newton's method on log k over log u from the two ends' expansions, sqrt(2 y) and ln y - ln ln y, as
    scipy's `lambertw` costs complex arithmetic and loses digits near its branch point y = 0.
    """
    wanted = np.asarray(y, dtype=np.float64)
    log = np.log1p(wanted)
    u = np.where(wanted < 1.0, np.sqrt(2.0 * wanted), 1.0 + log - np.log1p(log))
    for _ in range(40):
        value = power_slope(u)
        with np.errstate(over="ignore", invalid="ignore"):
            slope = u * u * np.exp(u) / value  # d log k / d log u
        step = np.clip(np.log(value / wanted) / slope, -1.0, 1.0)
        u = u * np.exp(-step)
        if np.all(np.abs(step) < 1e-15):
            break
    return u


def _none(size: int, message: str) -> Solution:
    lost = infeasible(size, message)
    return Solution({"bandwidth": lost.value, "power": lost.value.copy()}, "infeasible", lost.objective, 0, message)
