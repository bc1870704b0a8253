"""How long a transfer takes: bits against a rate that is constant within each coherence block."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Integers = NDArray[np.int64]
Rates = Callable[[Integers, Integers, int], Array]
"""(rows [n], first block [n], count) -> bit/s [n, count] of those rows of the query."""

_FEWEST, _MOST = 8, 1024  # blocks of a client looked at in one step
_ENTRIES = 2**20  # at most so many numbers in one work array


def seconds_at(rate: Array, bits: Array) -> Array:
    """Return bits / rate in s; 0 for no bits, infinite where bits meet no rate."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(bits > 0.0, bits / np.maximum(rate, 0.0), 0.0)


def integrate_blocks(rates: Rates, start: Array, bits: Array, block: float, limit: float) -> Array:
    """Return the seconds [n] from `start` until the integral of the rate reaches `bits`.

    The rate is constant in each block [b block, (b + 1) block); the first one is entered at `start`.

    Parameters
    ----------
    rates : gives the rate of some rows in consecutive blocks.
    start : [n], s.
    bits : [n].
    block : s.
    limit : s; a transfer that is not done after it counts as infinite.
    """
    seconds = np.where(bits > 0.0, np.inf, 0.0)
    rows = np.flatnonzero(bits > 0.0)
    first = np.floor(start / block).astype(np.int64)
    left, elapsed = np.array(bits, dtype=np.float64), np.zeros(bits.shape)
    count = max(1, min(_FEWEST, _ENTRIES // max(rows.size, 1)))
    while rows.size:
        begin = np.maximum(start[rows], first[rows] * block)
        length = np.full((rows.size, count), block)
        length[:, 0] = (first[rows] + 1) * block - begin
        rate = rates(rows, first[rows], count)
        total = np.cumsum(rate * length, axis=1)
        done = total[:, -1] >= left[rows]
        seconds[rows[done]] = elapsed[rows[done]] + _inside(total[done], rate[done], length[done], left[rows[done]])
        left[rows] -= total[:, -1]
        elapsed[rows] += length.sum(axis=1)
        first[rows] += count
        rows = rows[~done & (elapsed[rows] < limit)]
        count = max(1, min(2 * count, _MOST, _ENTRIES // max(rows.size, 1)))
    return np.where(seconds > limit, np.inf, seconds)


def _inside(total: Array, rate: Array, length: Array, bits: Array) -> Array:
    """Return the seconds [n] until the running totals [n, count] reach `bits` [n]."""
    last = np.argmax(total >= bits[:, None], axis=1)
    pick = np.arange(bits.size), last
    before = np.where(last > 0, total[pick[0], np.maximum(last - 1, 0)], 0.0)
    waited = np.cumsum(length, axis=1)[pick] - length[pick]
    return waited + (bits - before) / rate[pick]
