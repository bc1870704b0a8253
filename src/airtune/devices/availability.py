"""When devices are there: on or off as a function of (seed, client, time)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from airtune.errors import InputError
from airtune.streams import uniform_field
from airtune.wireless.units import quantity

Flags = NDArray[np.bool_]
Integers = NDArray[np.int64]
Array = NDArray[np.float64]


class Availability(Protocol):
    """A law of being available."""

    def available(self, seed: int, clients: ArrayLike, time: ArrayLike) -> Flags:
        """Return whether `clients` [n] are available at `time` (s; one number or [n])."""
        ...


@dataclass(frozen=True)
class Always:
    """Every device is always available."""

    def available(self, seed: int, clients: ArrayLike, time: ArrayLike) -> Flags:
        """Return all true; see `Availability`."""
        return np.ones(np.shape(np.atleast_1d(clients)), dtype=np.bool_)


@dataclass(frozen=True)
class Bernoulli:
    """Each device is available with `probability`, drawn anew in every `period` (s)."""

    probability: float = 0.9
    period: float = quantity("5 min", "s")

    def __post_init__(self) -> None:
        check_probability("availability.probability", self.probability)
        check_positive("availability.period", self.period)

    def available(self, seed: int, clients: ArrayLike, time: ArrayLike) -> Flags:
        """Return independent draws per device and period; see `Availability`."""
        index, slot = _slots(clients, time, self.period)
        return uniform_field(seed, "availability.bernoulli", index, slot) < self.probability


@dataclass(frozen=True)
class Diurnal:
    """The probability follows the time of day: a cosine between `lowest` and `highest`.

    Parameters
    ----------
    lowest, highest : probabilities at the worst and the best time of day.
    best_time : s after midnight at which most devices are available (charging at night: 2 h).
    day : length of a day, s.
    period : s between draws.
    spread : standard deviation over devices of their local time, s (habits and time zones).
    """

    lowest: float = 0.2
    highest: float = 0.9
    best_time: float = quantity("2 h", "s")
    day: float = quantity("24 h", "s")
    period: float = quantity("10 min", "s")
    spread: float = quantity("1 h", "s")

    def __post_init__(self) -> None:
        check_probability("availability.lowest", self.lowest)
        check_probability("availability.highest", self.highest)
        check_positive("availability.day", self.day)
        check_positive("availability.period", self.period)
        if self.highest < self.lowest:
            raise InputError("availability.highest: must be at least availability.lowest")

    def available(self, seed: int, clients: ArrayLike, time: ArrayLike) -> Flags:
        """Return draws with the probability of the time of day; see `Availability`."""
        index, slot = _slots(clients, time, self.period)
        radius = np.sqrt(-2.0 * np.log(uniform_field(seed, "availability.offset.radius", index)))
        turn = np.cos(2.0 * np.pi * uniform_field(seed, "availability.offset.turn", index))
        local = slot * self.period - self.best_time + self.spread * radius * turn
        middle, swing = 0.5 * (self.highest + self.lowest), 0.5 * (self.highest - self.lowest)
        probability = middle + swing * np.cos(2.0 * np.pi * local / self.day)
        return uniform_field(seed, "availability.diurnal", index, slot) < probability


def mode_at(seed: int, clients: ArrayLike, time: ArrayLike, mode_period_s: float, num_modes: ArrayLike) -> Integers:
    """Return the power mode [n] of each client at `time`: drawn evenly in every period of `mode_period_s`.

    Parameters
    ----------
    clients : [n].
    time : s; one number or [n].
    mode_period_s : s; infinity keeps mode 0 (the nominal one) for ever.
    num_modes : [n] or one number, modes that each client's device has.
    """
    if not mode_period_s > 0.0:
        raise InputError(f"mode_period_s: must be positive, in s; got {mode_period_s:g}")
    if math.isinf(mode_period_s):
        return np.zeros(np.shape(np.atleast_1d(clients)), dtype=np.int64)
    index, slot = _slots(clients, time, mode_period_s)
    count = np.broadcast_to(np.asarray(num_modes, dtype=np.int64), index.shape)
    drawn = np.floor(uniform_field(seed, "device-mode", index, slot) * count).astype(np.int64)
    return np.minimum(drawn, count - 1)


def check_probability(name: str, value: float) -> None:
    """Raise InputError unless 0 <= value <= 1."""
    if not 0.0 <= value <= 1.0:
        raise InputError(f"{name}: must be from 0 to 1; got {value:g}")


def check_positive(name: str, value: float) -> None:
    """Raise InputError unless value is positive and finite."""
    if not (math.isfinite(value) and value > 0.0):
        raise InputError(f"{name}: must be positive and finite, in s; got {value:g}")


def _slots(clients: ArrayLike, time: ArrayLike, period: float) -> tuple[Integers, Integers]:
    index = np.atleast_1d(np.asarray(clients)).astype(np.int64)
    when = np.broadcast_to(np.asarray(time, dtype=np.float64), index.shape)
    return index, np.floor(when / period).astype(np.int64)
