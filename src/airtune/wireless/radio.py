"""What the simulator and the planners need of a channel."""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from airtune.errors import unknown_name
from airtune.wireless.retransmission import Transfer

Array = NDArray[np.float64]
Complex = NDArray[np.complex128]
Direction = Literal["uplink", "downlink"]
DIRECTIONS: tuple[Direction, ...] = ("uplink", "downlink")


class RadioChannel(Protocol):
    """A channel; `Channel` and `TraceChannel` have it.

    Clients are indices [n]; times are s, one number or [n]; gains are linear power gains [n].
    """

    @property
    def uplink_bandwidth(self) -> float:
        """Hz, shared by all uploads."""
        ...

    @property
    def downlink_bandwidth(self) -> float:
        """Hz."""
        ...

    @property
    def base_station_power(self) -> float:
        """W."""
        ...

    @property
    def snr_gap(self) -> float:
        """Linear, at least 1."""
        ...

    @property
    def mean_log_fading(self) -> float:
        """E[ln |h|^2] of the small-scale fading."""
        ...

    def noise_density(self, direction: Direction) -> float:
        """Return W/Hz at the receiver, noise figure and interference margin included."""
        ...

    def mean_gain(self, seed: int, clients: ArrayLike, time: ArrayLike, direction: Direction = "uplink") -> Array:
        """Return the gain [n] without small-scale fading."""
        ...

    def gain(self, seed: int, clients: ArrayLike, time: ArrayLike, direction: Direction = "uplink") -> Array:
        """Return the true gain [n] at `time`."""
        ...

    def coefficient(self, seed: int, clients: ArrayLike, time: ArrayLike, direction: Direction = "uplink") -> Complex:
        """Return the small-scale coefficient [n]: gain = mean_gain |coefficient|^2."""
        ...

    def transfer_seconds(
        self,
        seed: int,
        clients: ArrayLike,
        start_times: ArrayLike,
        bits: ArrayLike,
        bandwidth: ArrayLike,
        power: ArrayLike,
        direction: Direction = "uplink",
    ) -> Array:
        """Return the seconds [n] that `bits` take from `start_times` on."""
        ...

    def transfer(
        self,
        seed: int,
        clients: ArrayLike,
        start_times: ArrayLike,
        bits: ArrayLike,
        bandwidth: ArrayLike,
        power: ArrayLike,
        direction: Direction = "uplink",
    ) -> Transfer:
        """Return what becomes of transfers, those that are given up included; arguments as in `transfer_seconds`."""
        ...

    def broadcast_seconds(
        self, seed: int, clients: ArrayLike, start_time: float, bits: float, bandwidth: float, power: float
    ) -> float:
        """Return the seconds of a downlink broadcast that the worst of `clients` can follow."""
        ...


def check_direction(direction: str) -> Direction:
    """Return the direction, or raise InputError if it is neither "uplink" nor "downlink"."""
    if direction == "uplink" or direction == "downlink":
        return direction
    raise unknown_name("direction", direction, DIRECTIONS)
