"""The rank that is fixed before training: how much of each rank fits the mean latency, and what it is worth.

SOFT + TSFA's offline stage (arXiv 2505.00333 says that it fixes the rank; objective and algorithm are ours [choice]):

    min over r of   Psi(r) = residual(r) + covariance(r) + dropped(r, s_r)

the three terms of the convergence bound that depend on the rank, in one unit (squared Frobenius norms; the bound's
common factor 4 / eta^2 does not move the minimum). residual: energy of the aggregated update beyond its r leading
singular components; covariance: ||C||_F^2 of the factors averaged separately; dropped: mean energy of the components
beyond the s_r r most important of r. s_r is the largest common keep ratio whose mean round latency meets the limit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq

from airtune.errors import InputError
from airtune.solvers.equal_finish import equal_finish
from airtune.solvers.solution import Solution

Array = NDArray[np.float64]


def largest_keep_ratio(
    compute_seconds: ArrayLike,
    full_bits: float,
    constant_bits: float,
    rank: int,
    power: ArrayLike,
    gain: ArrayLike,
    noise_density: float,
    total_bandwidth: float,
    limit: float,
    snr_gap: float = 1.0,
    *,
    tolerance: float = 1e-6,
) -> Solution:
    """Return the largest s in [1 / rank, 1] with which the mean of the least round latency is at most `limit`.

    The latency of one channel draw is that of the equal-finish split with s full_bits + constant_bits for everybody; it
    rises in s, nearly in proportion, so Brent's method finds s in a few means.

    Parameters
    ----------
    compute_seconds, power : [clients], s and W. full_bits : D at s = 1, without `constant_bits` (D_0).
    rank : r. gain : [clients], the mean channel, or [draws, clients], over which latencies are averaged.
    noise_density : W/Hz. total_bandwidth : Hz. limit : s. tolerance : of s.

    Returns
    -------
    Solution with value s and objective the mean latency in s; "infeasible" if one component is too much, with the
    clients that need more than their share of the band at the limit.
    """
    draws = np.atleast_2d(np.asarray(gain, dtype=np.float64))

    def latency(ratio: float) -> float:
        bits = ratio * full_bits + constant_bits
        link = (compute_seconds, bits, power)
        found = [equal_finish(*link, row, noise_density, total_bandwidth, snr_gap) for row in draws]
        return float(np.mean([part.objective for part in found]))

    low, high, count = 1.0 / rank, 1.0, 2
    at_low, at_high = latency(low), latency(high)
    if at_low > limit:
        return Solution(float("nan"), "infeasible", at_low, count, f"one component takes {at_low:.4g} s in the mean")
    if at_high <= limit:
        return Solution(1.0, "optimal", at_high, count)
    root = float(brentq(lambda ratio: latency(float(ratio)) - limit, low, high, xtol=0.5 * tolerance))
    ratio = max(low, root - tolerance)  # on the side that meets the limit
    return Solution(ratio, "optimal", latency(ratio), count)


def components_sent(rank: int, keep_ratio: float) -> int:
    """Return max(1, floor(s r + 1e-6))."""
    return max(1, int(np.floor(keep_ratio * rank + 1e-6)))


def structural_rank(
    ranks: Sequence[int], keep_ratios: ArrayLike, residual: ArrayLike, covariance: ArrayLike, energies: ArrayLike
) -> Solution:
    """Return the rank of least bound among those that meet the limit.

    Parameters
    ----------
    ranks : candidates, increasing. keep_ratios : [candidates], s_r; NaN where the limit cannot be met.
    residual, covariance : [candidates], energies. energies : [largest rank], mean over clients of the squared component
        norms, largest first.

    Returns
    -------
    Solution with value {"rank", "bound" [candidates]: Psi, infinite where the limit cannot be met}; "infeasible" if no
    rank can.
    """
    ratio = np.asarray(keep_ratios, dtype=np.float64)
    energy = np.asarray(energies, dtype=np.float64)
    terms = np.asarray(residual, dtype=np.float64) + np.asarray(covariance, dtype=np.float64)
    if not ratio.size == terms.size == len(ranks) or max(ranks, default=0) > energy.size:
        raise InputError(f"ranks: {list(ranks)} do not fit {ratio.size} keep ratios and {energy.size} energies")
    dropped = [
        np.inf if np.isnan(s) else float(energy[components_sent(rank, float(s)) : rank].sum())
        for rank, s in zip(ranks, ratio, strict=True)
    ]
    bound = terms + np.array(dropped)
    if not np.isfinite(bound).any():
        return Solution({"rank": 0, "bound": bound}, "infeasible", float("inf"), 1, "no rank meets the latency limit")
    best = int(np.argmin(bound))
    return Solution({"rank": int(ranks[best]), "bound": bound}, "optimal", float(bound[best]), 1)
