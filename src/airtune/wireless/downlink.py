"""How the server's model reaches the cohort: one broadcast for all, or a unicast for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from airtune.errors import unknown_name
from airtune.wireless.radio import RadioChannel

Array = NDArray[np.float64]


class Downlink(Protocol):
    """A way to deliver bits to a cohort."""

    def seconds(self, channel: RadioChannel, seed: int, clients: ArrayLike, start: float, bits: ArrayLike) -> Array:
        """Return the seconds [n] until each of `clients` [n] has its `bits` (one number or [n]) from `start` (s) on."""
        ...


@dataclass(frozen=True)
class Broadcast:
    """One transmission over the whole band at full power, at the rate of the worst client of the cohort.

    It carries the longest payload asked for; all clients have it at the same time.
    """

    def seconds(self, channel: RadioChannel, seed: int, clients: ArrayLike, start: float, bits: ArrayLike) -> Array:
        """Return equal seconds [n]; see `Downlink`."""
        index = np.atleast_1d(np.asarray(clients)).astype(np.int64)
        load = float(np.max(np.asarray(bits, dtype=np.float64), initial=0.0))
        if index.size == 0:
            return np.zeros(0)
        width, power = channel.downlink_bandwidth, channel.base_station_power
        return np.full(index.shape, channel.broadcast_seconds(seed, index, start, load, width, power))


@dataclass(frozen=True)
class Unicast:
    """Band and power are split evenly over those who receive something; each gets its own bits."""

    def seconds(self, channel: RadioChannel, seed: int, clients: ArrayLike, start: float, bits: ArrayLike) -> Array:
        """Return the seconds [n]; see `Downlink`."""
        index = np.atleast_1d(np.asarray(clients)).astype(np.int64)
        load = np.broadcast_to(np.asarray(bits, dtype=np.float64), index.shape)
        share = 1.0 / max(int((load > 0.0).sum()), 1)
        width, power = share * channel.downlink_bandwidth, share * channel.base_station_power
        return channel.transfer_seconds(seed, index, start, load, width, power, "downlink")


DOWNLINKS: dict[str, type[Downlink]] = {"broadcast": Broadcast, "unicast": Unicast}


def downlink(name: str) -> Downlink:
    """Return the downlink of that name; an unknown name raises InputError."""
    if name not in DOWNLINKS:
        raise unknown_name("downlink", name, DOWNLINKS)
    return DOWNLINKS[name]()
