"""Path loss of simple laws: log-distance, free space, a fixed table. The 3GPP models are in `tr38901`."""

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

SPEED_OF_LIGHT = 299_792_458.0


class PathLoss(Protocol):
    """A law of path loss. All distances are along the ground, m; losses in dB, the usual unit of these laws."""

    def loss_db(self, distance: Array, frequency: float, line_of_sight: Flags) -> Array:
        """Return the path loss [...], dB, of links [...] of `distance` m at a carrier of `frequency` Hz."""
        ...

    def line_of_sight_probability(self, distance: Array) -> Array:
        """Return the probability [...] of line of sight; 1 where the law does not tell the two apart."""
        ...

    def shadowing_deviation_db(self, distance: Array, frequency: float, line_of_sight: Flags) -> Array:
        """Return the standard deviation [...] of log-normal shadowing that belongs to the law, dB."""
        ...

    def correlation_distance(self, line_of_sight: bool) -> float:
        """Return the distance over which shadowing falls to 1/e, m; 0: independent from device to device."""
        ...

    @property
    def line_of_sight_distance(self) -> float:
        """Return the distance over which the line-of-sight state is correlated, m; 0: drawn per device."""
        ...


@dataclass(frozen=True)
class LogDistance:
    """PL = reference_loss + 10 exponent log10(d / reference_distance) dB.

    The default, 128.1 + 37.6 log10(d / 1 km), is the macro cell of 3GPP TR 36.814 table A.2.1.1.2-3 (case 1, 2 GHz),
    with its shadowing of 8 dB and correlation distance of 50 m.

    Parameters
    ----------
    reference_loss_db : dB at the reference distance.
    exponent : decades of power per decade of distance.
    reference_distance : m.
    shadowing_db : standard deviation, dB; 0 for none.
    shadowing_distance : correlation distance, m; 0 for independent devices.
    """

    reference_loss_db: float = 128.1
    exponent: float = 3.76
    reference_distance: float = quantity("1 km", "m")
    shadowing_db: float = 8.0
    shadowing_distance: float = quantity("50 m", "m")

    def __post_init__(self) -> None:
        if not (self.reference_distance > 0.0 and self.shadowing_db >= 0.0 and self.shadowing_distance >= 0.0):
            raise InputError("path_loss: reference_distance must be positive, shadowing at least 0")

    def loss_db(self, distance: Array, frequency: float, line_of_sight: Flags) -> Array:
        """Return the loss; frequency and line of sight play no part. See `PathLoss`."""
        check_distance(distance)
        return self.reference_loss_db + 10.0 * self.exponent * np.log10(distance / self.reference_distance)

    def line_of_sight_probability(self, distance: Array) -> Array:
        """Return 1: no distinction is made."""
        return np.ones_like(distance)

    def shadowing_deviation_db(self, distance: Array, frequency: float, line_of_sight: Flags) -> Array:
        """Return `shadowing_db` everywhere."""
        return np.full_like(distance, self.shadowing_db)

    def correlation_distance(self, line_of_sight: bool) -> float:
        """Return `shadowing_distance`, m."""
        return self.shadowing_distance

    @property
    def line_of_sight_distance(self) -> float:
        """0: no distinction is made."""
        return 0.0


@dataclass(frozen=True)
class FreeSpace:
    """Friis: PL = 20 log10(4 pi d f / c) dB, d the distance between antennas at the given heights (m).

    Parameters
    ----------
    base_height, user_height : m.
    shadowing_db : standard deviation, dB.
    """

    base_height: float = quantity("25 m", "m")
    user_height: float = quantity("1.5 m", "m")
    shadowing_db: float = 0.0

    def __post_init__(self) -> None:
        check_height("base_height", self.base_height)
        check_height("user_height", self.user_height)

    def loss_db(self, distance: Array, frequency: float, line_of_sight: Flags) -> Array:
        """Return the free-space loss; see `PathLoss`."""
        check_distance(distance)
        direct = np.hypot(distance, self.base_height - self.user_height)
        return free_space_db(direct, frequency)

    def line_of_sight_probability(self, distance: Array) -> Array:
        """Return 1: free space."""
        return np.ones_like(distance)

    def shadowing_deviation_db(self, distance: Array, frequency: float, line_of_sight: Flags) -> Array:
        """Return `shadowing_db` everywhere."""
        return np.full_like(distance, self.shadowing_db)

    def correlation_distance(self, line_of_sight: bool) -> float:
        """Return 0: independent devices."""
        return 0.0

    @property
    def line_of_sight_distance(self) -> float:
        """0: always line of sight."""
        return 0.0


@dataclass(frozen=True)
class Table:
    """Measured loss: linear interpolation in log10 of the distance between (distance m, loss dB) rows.

    Distances outside the table are an error, not an extrapolation.
    """

    distances: tuple[float, ...]
    losses_db: tuple[float, ...]
    shadowing_db: float = 0.0
    shadowing_distance: float = 0.0

    def __post_init__(self) -> None:
        steps = np.diff(self.distances)
        if len(self.distances) != len(self.losses_db) or len(self.distances) < 2:
            raise InputError("path_loss.losses_db: needs one loss per distance and at least two rows")
        if self.distances[0] <= 0.0 or not (steps > 0.0).all() or not np.isfinite(self.losses_db).all():
            raise InputError("path_loss.distances: must be positive and increasing, in m, with finite losses")

    def loss_db(self, distance: Array, frequency: float, line_of_sight: Flags) -> Array:
        """Return the interpolated loss; see `PathLoss`."""
        low, high = self.distances[0], self.distances[-1]
        if distance.size and (distance.min() < low or distance.max() > high):
            raise InputError(f"distance: outside the path-loss table; valid: {low:g} to {high:g} m")
        return np.interp(np.log10(distance), np.log10(self.distances), self.losses_db)

    def line_of_sight_probability(self, distance: Array) -> Array:
        """Return 1: no distinction is made."""
        return np.ones_like(distance)

    def shadowing_deviation_db(self, distance: Array, frequency: float, line_of_sight: Flags) -> Array:
        """Return `shadowing_db` everywhere."""
        return np.full_like(distance, self.shadowing_db)

    def correlation_distance(self, line_of_sight: bool) -> float:
        """Return `shadowing_distance`, m."""
        return self.shadowing_distance

    @property
    def line_of_sight_distance(self) -> float:
        """0: no distinction is made."""
        return 0.0


def free_space_db(distance: Array, frequency: float) -> Array:
    """Return 20 log10(4 pi d f / c) dB for the distance between antennas d (m) and a carrier of f (Hz)."""
    if not (math.isfinite(frequency) and frequency > 0.0):
        raise InputError(f"carrier_frequency: must be positive, in Hz; got {frequency:g}")
    return 20.0 * np.log10(4.0 * math.pi * distance * frequency / SPEED_OF_LIGHT)


def check_distance(distance: Array) -> None:
    """Raise InputError unless every distance is positive and finite."""
    bad = ~(np.isfinite(distance) & (distance > 0.0))
    if bad.any():
        raise InputError(f"distance: must be positive and finite, in m; got {distance[bad].ravel()[0]:g}")


def check_height(name: str, height: float) -> None:
    """Raise InputError unless an antenna's height is positive and finite."""
    if not (math.isfinite(height) and height > 0.0):
        raise InputError(f"{name}: must be positive, in m; got {height:g}")
