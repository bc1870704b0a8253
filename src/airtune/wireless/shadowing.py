"""Normal random fields over the ground with exponential correlation: shadowing and line-of-sight state.

A field is a periodic map drawn once per (seed, purpose): its value is a function of the position, so a device that
moves or is asked again meets the same shadows, and neighbours share them.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from airtune.streams import stream

Array = NDArray[np.float64]

_SIDE = 512  # grid points along one side of the periodic map
_POINTS = 8  # grid points per correlation distance: the map repeats after 64 correlation distances [our choice]


def correlated_normal(seed: int, purpose: str, where: tuple[int, ...], positions: Array, distance: float) -> Array:
    """Return standard normals [...] at positions [..., 2] (m) with correlation exp(-d / distance).

    3GPP TR 38.901 clause 7.4.4, equation 7.4-5. Values between the points of the map are interpolated bilinearly and
    scaled back to variance 1, which makes the correlation over less than 1/8 of the correlation distance up to 0.05 too
    high. The map repeats after 64 correlation distances.

    Parameters
    ----------
    seed, purpose, where : address of the map, as in `airtune.streams.stream`.
    positions : [..., 2], m.
    distance : over which the correlation falls to 1/e, m; positive.
    """
    grid = _normal_map(seed, purpose, where)
    scaled = positions * (_POINTS / distance)
    corner = np.floor(scaled)
    fx, fy = np.moveaxis(scaled - corner, -1, 0)
    ix, iy = np.moveaxis(corner.astype(np.int64) % _SIDE, -1, 0)
    jx, jy = (ix + 1) % _SIDE, (iy + 1) % _SIDE
    gx, gy = 1.0 - fx, 1.0 - fy
    value = gx * gy * grid[ix, iy] + fx * gy * grid[jx, iy] + gx * fy * grid[ix, jy] + fx * fy * grid[jx, jy]
    side, diagonal = np.exp(-1.0 / _POINTS), np.exp(-np.sqrt(2.0) / _POINTS)
    squares_x, squares_y = gx * gx + fx * fx, gy * gy + fy * fy
    cross_x, cross_y = 2.0 * gx * fx, 2.0 * gy * fy
    variance = squares_x * squares_y + side * (cross_x * squares_y + squares_x * cross_y) + diagonal * cross_x * cross_y
    return value / np.sqrt(variance)


@lru_cache(maxsize=64)
def _normal_map(seed: int, purpose: str, where: tuple[int, ...]) -> Array:
    """Return a periodic standard normal map [side, side], correlation exp(-steps / points), by circulant embedding.

    A pure function of its arguments, kept because drawing it takes some 20 ms.
    """
    white = stream(seed, purpose, *where).standard_normal((_SIDE, _SIDE))
    values = np.fft.irfft2(np.fft.rfft2(white) * np.sqrt(_spectrum()), s=(_SIDE, _SIDE))
    values.setflags(write=False)
    return values


@lru_cache(maxsize=1)
def _spectrum() -> Array:
    """Return the eigenvalues of the periodic correlation: the transform of exp(-d), d around the torus; never < 0."""
    steps = np.minimum(np.arange(_SIDE), _SIDE - np.arange(_SIDE)) / _POINTS
    correlation = np.exp(-np.hypot(steps[:, None], steps[None, :]))
    return np.maximum(np.fft.rfft2(correlation).real, 0.0)
