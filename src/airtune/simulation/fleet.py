"""From device profiles to a `Fleet`, and the power modes that its devices change into over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from airtune.devices.availability import mode_at
from airtune.devices.profiles import DeviceProfile
from airtune.types import Fleet, Floats, Ints


@dataclass(frozen=True)
class Modes:
    """Power modes (DVFS), a function of (seed, client, time).

    Attributes
    ----------
    speed, energy : [clients, modes], factors on the nominal FLOP/s and J/FLOP; padded with ones.
    count : [clients], modes that a client's device has.
    period : s, how often a device changes its mode; infinite: it stays in the first one.
    """

    speed: Floats
    energy: Floats
    count: Ints
    period: float = math.inf

    def factors(self, seed: int, time: float) -> tuple[Floats, Floats]:
        """Return the factors on speed and on energy per FLOP at `time` (s), [clients] each."""
        clients = np.arange(len(self.count))
        mode = mode_at(seed, clients, time, self.period, self.count)
        return self.speed[clients, mode], self.energy[clients, mode]


def modes_of(profiles: Sequence[DeviceProfile], period: float = math.inf) -> Modes:
    """Return the modes of one profile per client."""
    most = max((len(profile.modes) for profile in profiles), default=1)
    speed, energy = np.ones((len(profiles), most)), np.ones((len(profiles), most))
    for row, profile in enumerate(profiles):
        for column, mode in enumerate(profile.modes):
            speed[row, column] = mode.speed
            energy[row, column] = mode.power / mode.speed / profile.modes[0].power
    count = np.array([len(profile.modes) for profile in profiles], dtype=np.int64)
    return Modes(speed, energy, count, period)


def fleet_of(
    profiles: Sequence[DeviceProfile],
    num_examples: Ints,
    label_counts: Ints | None = None,
    memory_share: float = 0.5,
) -> Fleet:
    """Return the fleet of one profile per client, every device in its first mode.

    memory_share : part of a device's memory that training may use [our choice: half].
    """

    def column(values: list[float]) -> Floats:
        return np.array(values, dtype=np.float64)

    return Fleet(
        device=tuple(profile.name for profile in profiles),
        flops_per_second=column([p.flops_per_second for p in profiles]),
        memory_bytes=column([p.memory_bytes * memory_share for p in profiles]),
        transmit_power=column([p.transmit_power for p in profiles]),
        energy_per_flop=column([p.energy_per_flop for p in profiles]),
        receive_power=column([p.receive_power for p in profiles]),
        num_examples=np.asarray(num_examples, dtype=np.int64),
        label_counts=label_counts,
    )
