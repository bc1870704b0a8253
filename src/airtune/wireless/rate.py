"""The achievable rate of a link, its derivative and its inverse: the physics that planner and simulator share.

With bandwidth w (Hz), transmit power P (W), power gain g and noise density N0 (W/Hz), and an SNR gap Gamma >= 1 to
the Shannon limit (1: none), a link carries

    R(w) = w log2(1 + c / w) bit/s,    c = P g / (Gamma N0) Hz,

which increases and is concave in w, is 0 at w = 0 and tends to c / ln 2 as w grows (Shannon 1948; the gap as in
Cioffi's lecture notes on digital communication). Arrays broadcast; the usual shape is [clients].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

_LN2 = float(np.log(2.0))


def snr_bandwidth(power: ArrayLike, gain: ArrayLike, noise_density: ArrayLike, snr_gap: float = 1.0) -> Array:
    """Return c = P g / (Gamma N0) in Hz: the bandwidth at which the signal-to-noise ratio is the SNR gap."""
    product = np.asarray(power, dtype=np.float64) * np.asarray(gain, dtype=np.float64)
    return product / (snr_gap * np.asarray(noise_density, dtype=np.float64))


def achievable_rate(
    bandwidth: ArrayLike, power: ArrayLike, gain: ArrayLike, noise_density: ArrayLike, snr_gap: float = 1.0
) -> Array:
    """Return the rate w log2(1 + P g / (Gamma w N0)) in bit/s; 0 at zero bandwidth, power or gain.

    Parameters
    ----------
    bandwidth : [clients], Hz; infinity gives the limit c / ln 2.
    power : [clients], W at the transmit antenna.
    gain : [clients], linear power gain of the channel.
    noise_density : W/Hz, noise figure and interference included.
    snr_gap : linear, at least 1.
    """
    w, c = np.broadcast_arrays(
        np.asarray(bandwidth, dtype=np.float64), snr_bandwidth(power, gain, noise_density, snr_gap)
    )
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        finite = w * np.log1p(c / w) / _LN2
    return np.where(w <= 0.0, 0.0, np.where(np.isinf(w), c / _LN2, finite))


def rate_derivative(
    bandwidth: ArrayLike, power: ArrayLike, gain: ArrayLike, noise_density: ArrayLike, snr_gap: float = 1.0
) -> Array:
    """Return dR/dw = log2(1 + c/w) - c / ((w + c) ln 2) in bit/s per Hz; infinite at w = 0 where c > 0."""
    w, c = np.broadcast_arrays(
        np.asarray(bandwidth, dtype=np.float64), snr_bandwidth(power, gain, noise_density, snr_gap)
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = _log1p_minus_ratio(c / w) / _LN2
    return np.where(c <= 0.0, 0.0, np.where(w <= 0.0, np.inf, slope))


def bandwidth_for_rate(
    rate: ArrayLike, power: ArrayLike, gain: ArrayLike, noise_density: ArrayLike, snr_gap: float = 1.0
) -> Array:
    """Return the bandwidth at which the link carries `rate`: the closed inverse of `achievable_rate`.

    With y = rate ln 2 / c the inverse is w = c / (z - 1), z = -W_{-1}(-y exp(-y)) / y, W_{-1} the lower branch of
    Lambert's W. It is infinite where y >= 1: no bandwidth carries that rate. Zero rate needs zero bandwidth.

    Shapes and units as in `achievable_rate`; rate in bit/s. Accurate to a few units in the last place divided by
    1 - y, which is the conditioning of the problem itself.
    """
    wanted, c = np.broadcast_arrays(
        np.asarray(rate, dtype=np.float64), snr_bandwidth(power, gain, noise_density, snr_gap)
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        y = np.where(wanted <= 0.0, 0.0, wanted * _LN2 / c)
        possible = (y > 0.0) & (y < 1.0)
        bandwidth = c / snr_for_efficiency(np.where(possible, y, 0.5))
    return np.where(possible, bandwidth, np.where(y <= 0.0, 0.0, np.inf))


def power_for_rate(
    rate: ArrayLike, bandwidth: ArrayLike, gain: ArrayLike, noise_density: ArrayLike, snr_gap: float = 1.0
) -> Array:
    """Return the transmit power w Gamma N0 / g (2^(rate / w) - 1) in W at which a link carries `rate`.

    Shapes and units as in `achievable_rate`. Zero rate needs no power; infinite where bandwidth or gain is zero.
    """
    wanted, w, g = np.broadcast_arrays(*(np.asarray(v, dtype=np.float64) for v in (rate, bandwidth, gain)))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        needed = w * snr_gap * np.asarray(noise_density) / g * np.expm1(wanted / w * _LN2)
    return np.where(wanted <= 0.0, 0.0, np.where((w <= 0.0) | (g <= 0.0), np.inf, needed))


def snr_for_efficiency(y: ArrayLike) -> Array:
    """Return x > 0 with ln(1 + x) = y x for y in (0, 1), which is x = -W_{-1}(-y exp(-y)) / y - 1.

    scipy's `lambertw` loses precision near the branch point y = 1 (relative error 5e-6 at 1 - 1e-5) and costs complex
    arithmetic, so W_{-1} is evaluated here by Newton's method on the concave function ln(1 + x) - y x. It starts at
    the bound -W_{-1}(-exp(-u - 1)) < 1 + sqrt(2u) + u, u = y - 1 - ln y (Chatzigeorgiou, "Bounds on the Lambert
    function and their application to the outage analysis of user cooperation", IEEE Comm. Letters 2013, theorem 1),
    to the right of the root, from where Newton descends monotonically.
    """
    efficiency = np.asarray(y, dtype=np.float64)
    rest = 1.0 - efficiency
    u = np.maximum(-np.log(efficiency) - rest, 0.5 * rest**2)
    x = (rest + np.sqrt(2.0 * u) + u) / efficiency
    for _ in range(12):
        step = (np.log1p(x) - efficiency * x) / (1.0 / (1.0 + x) - efficiency)
        x = x - step
        if np.all(np.abs(step) <= 4e-16 * x):
            break
    return x


def _log1p_minus_ratio(x: Array) -> Array:
    """Return ln(1 + x) - x / (1 + x), by its series x^2/2 - 2x^3/3 + 3x^4/4 where the difference would cancel."""
    with np.errstate(invalid="ignore", over="ignore"):
        series = x * x * (0.5 - x * (2.0 / 3.0 - x * (0.75 - 0.8 * x)))
        exact = np.log1p(x) - x / (1.0 + x)
    return np.where(x < 1e-3, series, exact)
