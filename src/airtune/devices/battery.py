"""Batteries: what is left in them after work and charging, and whether a task may still start."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from airtune.errors import InputError
from airtune.streams import uniform_field
from airtune.wireless.units import quantity

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Battery:
    """A battery per device. What is left depends on the work done, so the caller carries it: [clients], J.

    Parameters
    ----------
    capacity : J (a phone: 5 Ah at 3.85 V is about 19 Wh).
    charging_power : W into the battery while plugged in.
    reserve : share of the capacity below which no task starts.
    fullest, emptiest : shares of the capacity that devices start with, uniform between them.
    """

    capacity: float = quantity("19 Wh", "J")
    charging_power: float = quantity("10 W", "W")
    reserve: float = 0.2
    emptiest: float = 0.3
    fullest: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.capacity) and self.capacity > 0.0):
            raise InputError(f"battery.capacity: must be positive and finite, in J; got {self.capacity:g}")
        if not (math.isfinite(self.charging_power) and self.charging_power >= 0.0):
            raise InputError(f"battery.charging_power: must be at least 0, in W; got {self.charging_power:g}")
        if not 0.0 <= self.reserve < 1.0:
            raise InputError(f"battery.reserve: must be from 0 to below 1; got {self.reserve:g}")
        if not 0.0 <= self.emptiest <= self.fullest <= 1.0:
            raise InputError("battery.emptiest, battery.fullest: must be from 0 to 1, emptiest first")

    def initial(self, seed: int, clients: ArrayLike) -> Array:
        """Return the J [n] that `clients` [n] start with."""
        index = np.atleast_1d(np.asarray(clients)).astype(np.int64)
        share = self.emptiest + (self.fullest - self.emptiest) * uniform_field(seed, "battery", index)
        return self.capacity * share

    def after(self, charge: ArrayLike, used: ArrayLike, seconds: ArrayLike, plugged: ArrayLike) -> Array:
        """Return the J [n] left after `seconds` in which `used` J were drawn, plugged in or not.

        Between 0 and the capacity: an emptied battery switches the device off, a full one takes no more.
        """
        gained = np.asarray(plugged, dtype=np.float64) * self.charging_power * np.asarray(seconds, dtype=np.float64)
        left = np.asarray(charge, dtype=np.float64) - np.asarray(used, dtype=np.float64) + gained
        return np.clip(left, 0.0, self.capacity)

    def allows(self, charge: ArrayLike, needed: ArrayLike) -> Flags:
        """Return whether [n] a task that needs so many J leaves the reserve untouched."""
        return np.asarray(charge) - np.asarray(needed) >= self.reserve * self.capacity
