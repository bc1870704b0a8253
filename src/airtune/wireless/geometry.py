"""Where devices are dropped, and where the base stations stand. Positions are [..., 2] in m on flat ground."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from airtune.errors import InputError
from airtune.wireless.units import quantity

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]

_SLACK = 1e-9  # rounding of positions on the edge


class Area(Protocol):
    """A region around a base station at the origin."""

    def place(self, u: Array, v: Array) -> Array:
        """Return positions [..., 2], m, for two uniforms in (0, 1) [...]: uniform over the area."""
        ...

    def contains(self, positions: Array) -> Flags:
        """Return whether positions [..., 2] lie in the area."""
        ...

    @property
    def extent(self) -> float:
        """Distance from the origin to the farthest point, m."""
        ...

    @property
    def nearest(self) -> float:
        """Distance from the origin to the nearest point, m."""
        ...


@dataclass(frozen=True)
class Disc:
    """A disc around the base station, without the points nearer than `minimum_distance` (m).

    The default minimum of 35 m is that of UMa in 3GPP TR 38.901 table 7.2-1.
    """

    radius: float = quantity("500 m", "m")
    minimum_distance: float = quantity("35 m", "m")

    def __post_init__(self) -> None:
        _check_ring(self.minimum_distance, self.radius, "minimum_distance", "radius")

    def place(self, u: Array, v: Array) -> Array:
        """Return uniform positions; see `Area`."""
        return _ring(u, v, self.minimum_distance, self.radius)

    def contains(self, positions: Array) -> Flags:
        """Return whether positions [..., 2] lie in the area."""
        return _between(positions, self.minimum_distance, self.radius)

    @property
    def extent(self) -> float:
        """The radius, m."""
        return self.radius

    @property
    def nearest(self) -> float:
        """The minimum distance, m."""
        return self.minimum_distance


@dataclass(frozen=True)
class Annulus:
    """The ring between two radii, m."""

    inner: float = quantity("50 m", "m")
    outer: float = quantity("500 m", "m")

    def __post_init__(self) -> None:
        _check_ring(self.inner, self.outer, "inner", "outer")

    def place(self, u: Array, v: Array) -> Array:
        """Return uniform positions; see `Area`."""
        return _ring(u, v, self.inner, self.outer)

    def contains(self, positions: Array) -> Flags:
        """Return whether positions [..., 2] lie in the area."""
        return _between(positions, self.inner, self.outer)

    @property
    def extent(self) -> float:
        """The outer radius, m."""
        return self.outer

    @property
    def nearest(self) -> float:
        """The inner radius, m."""
        return self.inner


@dataclass(frozen=True)
class UniformDistance:
    """Distance uniform between two radii (m), direction uniform: many papers' drop, denser near the centre."""

    inner: float = quantity("50 m", "m")
    outer: float = quantity("500 m", "m")

    def __post_init__(self) -> None:
        _check_ring(self.inner, self.outer, "inner", "outer")

    def place(self, u: Array, v: Array) -> Array:
        """Return positions uniform in distance; see `Area`."""
        return _polar(self.inner + (self.outer - self.inner) * u, v)

    def contains(self, positions: Array) -> Flags:
        """Return whether positions [..., 2] lie in the area."""
        return _between(positions, self.inner, self.outer)

    @property
    def extent(self) -> float:
        """The outer radius, m."""
        return self.outer

    @property
    def nearest(self) -> float:
        """The inner radius, m."""
        return self.inner


@dataclass(frozen=True)
class Hexagon:
    """A regular hexagon with flat sides left and right: the cell of a hexagonal grid.

    Parameters
    ----------
    inter_site_distance : between neighbouring centres, m: twice the distance from the centre to a side.
    minimum_distance : m; nearer points are moved out along their ray to this distance.
    """

    inter_site_distance: float = quantity("500 m", "m")
    minimum_distance: float = quantity("35 m", "m")

    def __post_init__(self) -> None:
        _check_ring(self.minimum_distance, self.inter_site_distance / 2.0, "minimum_distance", "inter_site_distance/2")

    def place(self, u: Array, v: Array) -> Array:
        """Return uniform positions: one of three rhombi by u, a point in it by the rest of u and v; see `Area`."""
        side = self.inter_site_distance / math.sqrt(3.0)
        rhombus = np.minimum(np.floor(3.0 * u), 2.0)
        along, across = 3.0 * u - rhombus, v
        first = math.pi / 2.0 + rhombus * 2.0 * math.pi / 3.0
        second = first + 2.0 * math.pi / 3.0
        x = side * (along * np.cos(first) + across * np.cos(second))
        y = side * (along * np.sin(first) + across * np.sin(second))
        distance = np.hypot(x, y)
        stretch = np.maximum(1.0, self.minimum_distance / np.maximum(distance, 1e-9))
        return np.stack([x * stretch, y * stretch], axis=-1)

    def contains(self, positions: Array) -> Flags:
        """Return whether positions [..., 2] lie in the area."""
        normals = np.array([[1.0, 0.0], [0.5, math.sqrt(0.75)], [-0.5, math.sqrt(0.75)]])
        within = (np.abs(positions @ normals.T) <= self.inter_site_distance / 2.0 * (1.0 + _SLACK)).all(axis=-1)
        return within & (np.hypot(positions[..., 0], positions[..., 1]) >= self.minimum_distance * (1.0 - _SLACK))

    @property
    def extent(self) -> float:
        """From the centre to a corner, m."""
        return self.inter_site_distance / math.sqrt(3.0)

    @property
    def nearest(self) -> float:
        """The minimum distance, m."""
        return self.minimum_distance


AREAS: dict[str, type[Area]] = {
    "disc": Disc,
    "annulus": Annulus,
    "uniform-distance": UniformDistance,
    "hexagon": Hexagon,
}


def hexagonal_sites(count: int, inter_site_distance: float) -> Array:
    """Return the positions [count, 2] of base stations on a hexagonal grid, nearest to the origin first.

    7 and 19 give the centre with one and two full rings. The first of the ring lies on the x axis.
    """
    if count < 1:
        raise InputError(f"cells: must be at least 1; got {count}")
    if not (math.isfinite(inter_site_distance) and inter_site_distance > 0.0):
        raise InputError(f"inter_site_distance: must be positive, in m; got {inter_site_distance:g}")
    reach = math.ceil(math.sqrt(count)) + 1
    a, b = (grid.ravel() for grid in np.meshgrid(np.arange(-reach, reach + 1), np.arange(-reach, reach + 1)))
    squared = a * a + a * b + b * b
    x, y = a + b / 2.0, b * math.sqrt(3.0) / 2.0
    angle = np.round(np.mod(np.arctan2(y, x), 2.0 * math.pi), 9)
    order = np.lexsort((angle, squared))[:count]
    return np.stack([x[order], y[order]], axis=-1) * np.float64(inter_site_distance)


def _ring(u: Array, v: Array, inner: float, outer: float) -> Array:
    return _polar(np.sqrt(inner**2 + (outer**2 - inner**2) * u), v)


def _polar(radius: Array, turn: Array) -> Array:
    angle = 2.0 * np.pi * turn
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)


def _between(positions: Array, inner: float, outer: float) -> Flags:
    distance = np.hypot(positions[..., 0], positions[..., 1])
    return (distance >= inner * (1.0 - _SLACK)) & (distance <= outer * (1.0 + _SLACK))


def _check_ring(inner: float, outer: float, inner_name: str, outer_name: str) -> None:
    if not (math.isfinite(outer) and 0.0 <= inner < outer):
        raise InputError(f"{inner_name}: must be at least 0 and below {outer_name}, in m; got {inner:g} and {outer:g}")
