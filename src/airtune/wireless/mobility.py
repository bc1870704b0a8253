"""How devices move: a position for every (seed, client, time).

The moving laws are random processes that cannot be evaluated at a time directly. They start anew from their
stationary law at *anchors*, every `anchor` seconds, and a query replays at most one anchor. So a device jumps at an
anchor; choose the anchor longer than what must stay continuous.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from airtune.errors import InputError
from airtune.streams import uniform_field
from airtune.wireless.fading import complex_normal
from airtune.wireless.geometry import Area
from airtune.wireless.units import quantity

Array = NDArray[np.float64]
Integers = NDArray[np.int64]

_TRIES = 40  # a rejection sampler that accepts at least one try in three fails after 40 with probability 1e-7
_PAIRS = 20_000


class Mobility(Protocol):
    """A law of motion inside an area."""

    def positions(self, seed: int, clients: Integers, time: Array, area: Area) -> Array:
        """Return positions [n, 2], m from the area's centre, of `clients` [n] at `time` [n], s."""
        ...

    @property
    def moves(self) -> bool:
        """Whether positions change with time."""
        ...


@dataclass(frozen=True)
class Static:
    """Devices stay where they were dropped, uniformly over the area."""

    def positions(self, seed: int, clients: Integers, time: Array, area: Area) -> Array:
        """Return the drop; see `Mobility`."""
        return dropped(seed, clients, area)

    @property
    def moves(self) -> bool:
        """False."""
        return False


@dataclass(frozen=True)
class RandomWaypoint:
    """Random waypoint: walk straight to a point drawn in the area, pause, draw the next.

    At an anchor the state is drawn from the stationary law (Navidi and Camp, "Stationary distributions for the random
    waypoint mobility model", IEEE Trans. Mobile Computing 2004): paused with probability pause / (pause + mean travel
    time), else on a leg whose end points have a density proportional to their distance, with speed density ~ 1 / v.

    Parameters
    ----------
    slowest, fastest : speed of a leg, uniform between them, m/s.
    pause : s at each point.
    anchor : s between anchors.
    """

    slowest: float = quantity("0.5 m/s", "m/s")
    fastest: float = quantity("1.5 m/s", "m/s")
    pause: float = quantity("30 s", "s")
    anchor: float = quantity("1 h", "s")

    def __post_init__(self) -> None:
        if not 0.0 < self.slowest <= self.fastest < math.inf:
            raise InputError("mobility.slowest, mobility.fastest: must be positive, slowest first, in m/s")
        if not (0.0 <= self.pause < math.inf):
            raise InputError(f"mobility.pause: must be at least 0 and finite, in s; got {self.pause:g}")
        _check_anchor(self.anchor)

    @property
    def moves(self) -> bool:
        """True."""
        return True

    def positions(self, seed: int, clients: Integers, time: Array, area: Area) -> Array:
        """Return where the walk is; see `Mobility`."""
        epoch = np.floor(time / self.anchor).astype(np.int64)
        left = time - epoch * self.anchor
        here, target, speed, wait = self._start(seed, clients, epoch, area)
        leg = 0
        active = np.arange(clients.size)
        while active.size:
            rows = active
            pausing = np.minimum(wait[rows], left[rows])
            left[rows] -= pausing
            way = target[rows] - here[rows]
            length = np.hypot(way[:, 0], way[:, 1])
            walked = np.minimum(speed[rows] * left[rows], length)
            here[rows] += way * (walked / np.maximum(length, 1e-12))[:, None]
            left[rows] -= walked / speed[rows]
            active = rows[(walked >= length) & (left[rows] > 0.0)]
            leg += 1
            if active.size:
                here[active] = target[active]
                target[active] = self._point(seed, clients[active], epoch[active], leg, area)
                speed[active] = self._speed(seed, clients[active], epoch[active], leg)
                wait[active] = self.pause
        return here

    def _start(self, seed: int, clients: Integers, epoch: Integers, area: Area) -> tuple[Array, Array, Array, Array]:
        """Return position, target, speed and remaining pause at the anchor, from the stationary law."""
        begin, end = _length_biased_pair(seed, clients, epoch, area)
        along = uniform_field(seed, "waypoint.along", epoch, clients)[:, None]
        u = uniform_field(seed, "waypoint.first-speed", epoch, clients)
        speed = self.slowest * (self.fastest / self.slowest) ** u
        inverse = 1.0 / self.slowest
        if self.fastest > self.slowest:
            inverse = math.log(self.fastest / self.slowest) / (self.fastest - self.slowest)
        travel = mean_distance(area) * inverse
        pausing = uniform_field(seed, "waypoint.pausing", epoch, clients) < self.pause / (self.pause + travel)
        wait = np.where(pausing, self.pause * uniform_field(seed, "waypoint.pause", epoch, clients), 0.0)
        here = np.where(pausing[:, None], self._point(seed, clients, epoch, 0, area), begin + along * (end - begin))
        target = np.where(pausing[:, None], self._point(seed, clients, epoch, -1, area), end)
        return here, target, np.where(pausing, self._speed(seed, clients, epoch, 0), speed), wait

    def _point(self, seed: int, clients: Integers, epoch: Integers, leg: int, area: Area) -> Array:
        u = uniform_field(seed, "waypoint.u", leg, epoch, clients)
        return area.place(u, uniform_field(seed, "waypoint.v", leg, epoch, clients))

    def _speed(self, seed: int, clients: Integers, epoch: Integers, leg: int) -> Array:
        u = uniform_field(seed, "waypoint.speed", leg, epoch, clients)
        return self.slowest + (self.fastest - self.slowest) * u


@dataclass(frozen=True)
class GaussMarkov:
    """Gauss-Markov motion: each velocity component is a first-order Gauss-Markov process with mean 0.

    v_{k+1} = a v_k + s sqrt(1 - a^2) e_k (Liang and Haas, "Predictive distance-based mobility management for PCS
    networks", INFOCOM 1999). A device that would leave the area turns round instead [our choice]. At an anchor the
    position is uniform over the area and the velocity stationary.

    Parameters
    ----------
    speed : mean speed, m/s; the components' standard deviation is speed / sqrt(pi / 2).
    memory : a in [0, 1), from one step to the next.
    step : s.
    anchor : s between anchors, a multiple of `step`.
    """

    speed: float = quantity("1 m/s", "m/s")
    memory: float = 0.9
    step: float = quantity("5 s", "s")
    anchor: float = quantity("10 min", "s")

    def __post_init__(self) -> None:
        if not 0.0 < self.speed < math.inf:
            raise InputError(f"mobility.speed: must be positive, in m/s; got {self.speed:g}")
        if not 0.0 <= self.memory < 1.0:
            raise InputError(f"mobility.memory: must be at least 0 and below 1; got {self.memory:g}")
        _check_anchor(self.anchor)
        if not 0.0 < self.step <= self.anchor:
            raise InputError(f"mobility.step: must be positive and at most the anchor, in s; got {self.step:g}")

    @property
    def moves(self) -> bool:
        """True."""
        return True

    def positions(self, seed: int, clients: Integers, time: Array, area: Area) -> Array:
        """Return where the motion is; see `Mobility`."""
        epoch = np.floor(time / self.anchor).astype(np.int64)
        left = time - epoch * self.anchor
        deviation = self.speed / math.sqrt(math.pi / 2.0)
        u = uniform_field(seed, "gauss-markov.u", epoch, clients)
        here = area.place(u, uniform_field(seed, "gauss-markov.v", epoch, clients))
        velocity = deviation * self._noise(seed, clients, epoch, 0)
        for k in range(1, int(np.ceil(left.max(initial=0.0) / self.step)) + 1):
            there = here + velocity * np.clip(left, 0.0, self.step)[:, None]
            inside = area.contains(there)[:, None]
            here, velocity = np.where(inside, there, here), np.where(inside, velocity, -velocity)
            left = left - self.step
            innovation = deviation * math.sqrt(1.0 - self.memory**2)
            velocity = self.memory * velocity + innovation * self._noise(seed, clients, epoch, k)
        return here

    def _noise(self, seed: int, clients: Integers, epoch: Integers, step: int) -> Array:
        """Return two independent standard normals [n, 2]."""
        both = math.sqrt(2.0) * complex_normal(seed, "gauss-markov.step", step, epoch, clients)
        return np.stack([both.real, both.imag], axis=-1)


MOBILITIES: dict[str, type[Mobility]] = {
    "static": Static,
    "random-waypoint": RandomWaypoint,
    "gauss-markov": GaussMarkov,
}


def dropped(seed: int, clients: Integers, area: Area) -> Array:
    """Return where `clients` [n] are dropped in the area: [n, 2], m."""
    return area.place(uniform_field(seed, "drop.u", clients), uniform_field(seed, "drop.v", clients))


@lru_cache(maxsize=32)
def mean_distance(area: Area) -> float:
    """Return the mean distance of two uniform points of the area, m, over 20,000 fixed pairs (within 1 %)."""
    pair = np.arange(_PAIRS)
    begin, end = (
        area.place(uniform_field(0, "mean-distance.u", which, pair), uniform_field(0, "mean-distance.v", which, pair))
        for which in (0, 1)
    )
    return float(np.hypot(*(end - begin).T).mean())


def _length_biased_pair(seed: int, clients: Integers, epoch: Integers, area: Area) -> tuple[Array, Array]:
    """Return two points [n, 2] each with a joint density proportional to their distance, by rejection."""
    begin, end = np.empty((clients.size, 2)), np.empty((clients.size, 2))
    open_rows = np.arange(clients.size)
    for attempt in range(_TRIES):
        where = (attempt, epoch[open_rows], clients[open_rows])
        first, second = (
            area.place(uniform_field(seed, f"waypoint.{p}.u", *where), uniform_field(seed, f"waypoint.{p}.v", *where))
            for p in ("begin", "end")
        )
        begin[open_rows], end[open_rows] = first, second
        share = np.hypot(*(second - first).T) / (2.0 * area.extent)
        open_rows = open_rows[uniform_field(seed, "waypoint.accept", *where) >= share]
        if not open_rows.size:
            break
    return begin, end


def _check_anchor(anchor: float) -> None:
    if not 0.0 < anchor < math.inf:
        raise InputError(f"mobility.anchor: must be positive and finite, in s; got {anchor:g}")
