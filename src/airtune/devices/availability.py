"""When devices are there: on or off as a function of (seed, client, time)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from airtune.errors import InputError, unknown_name
from airtune.streams import uniform_field
from airtune.wireless.trace import StepTable, read_steps
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


@dataclass(frozen=True)
class Markov:
    """On and off for exponential times, independently per device.

    At an anchor, every `anchor` seconds, the state starts anew from its stationary law (on with probability
    mean_on / (mean_on + mean_off)); a query replays at most one anchor. Durations have no memory, so restarting changes
    the law only in that the state before and after an anchor are independent.

    Parameters
    ----------
    mean_on, mean_off : s.
    anchor : s between anchors.
    """

    mean_on: float = quantity("30 min", "s")
    mean_off: float = quantity("10 min", "s")
    anchor: float = quantity("6 h", "s")

    def __post_init__(self) -> None:
        for name in ("mean_on", "mean_off", "anchor"):
            check_positive(f"availability.{name}", getattr(self, name))
        if self.anchor > 1e4 * min(self.mean_on, self.mean_off):
            raise InputError("availability.anchor: must be at most 10,000 times the mean durations")

    def available(self, seed: int, clients: ArrayLike, time: ArrayLike) -> Flags:
        """Return the state of the on/off process; see `Availability`."""
        index, epoch = _slots(clients, time, self.anchor)
        left = np.broadcast_to(np.asarray(time, dtype=np.float64), index.shape) - epoch * self.anchor
        start = uniform_field(seed, "availability.markov.start", epoch, index)
        on = start < self.mean_on / (self.mean_on + self.mean_off)
        rows, change = np.arange(index.size), 0
        while rows.size:
            u = uniform_field(seed, "availability.markov.duration", change, epoch[rows], index[rows])
            left[rows] += np.log(u) * np.where(on[rows], self.mean_on, self.mean_off)
            rows, change = rows[left[rows] > 0.0], change + 1
            on[rows] = ~on[rows]
        return on


@dataclass(frozen=True)
class TraceAvailability:
    """Availability from a CSV file with the columns time_s, client, available (0 or 1).

    Parameters
    ----------
    path : of the file; each client's first time is 0, a value holds until the next one.
    after_end : "repeat" or "hold", as in `airtune.wireless.trace.TraceChannel`.
    """

    path: str
    after_end: Literal["repeat", "hold"] = "repeat"

    def __post_init__(self) -> None:
        if self.after_end not in ("repeat", "hold"):
            raise unknown_name("availability.after_end", self.after_end, ("repeat", "hold"))
        values = self.table.values["available"]
        if not np.isin(values, (0.0, 1.0)).all():
            raise InputError(f"{self.path}: available: must be 0 or 1; got {values[~np.isin(values, (0.0, 1.0))][0]:g}")

    @cached_property
    def table(self) -> StepTable:
        """The file's contents."""
        return read_steps(self.path, ("available",), self.after_end == "repeat", None)

    def available(self, seed: int, clients: ArrayLike, time: ArrayLike) -> Flags:
        """Return what the file says; see `Availability`. A client without rows is an error."""
        index, _ = _slots(clients, time, 1.0)
        known = self.table.starts.shape[0]
        if ((index < 0) | (index >= known)).any():
            raise InputError(f"{self.path}: no rows for client {index.max()}; valid: 0 to {known - 1}")
        when = np.broadcast_to(np.asarray(time, dtype=np.float64), index.shape)
        return self.table.at("available", index, when) > 0.5


AVAILABILITIES: dict[str, type[Availability]] = {
    "always": Always,
    "bernoulli": Bernoulli,
    "markov": Markov,
    "diurnal": Diurnal,
    "trace": TraceAvailability,
}


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
