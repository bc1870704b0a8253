"""How devices move: a position for every (seed, client, time)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from airtune.streams import uniform_field
from airtune.wireless.geometry import Area

Array = NDArray[np.float64]
Integers = NDArray[np.int64]


class Mobility(Protocol):
    """A law of motion inside an area."""

    def positions(self, seed: int, clients: Integers, time: Array, area: Area) -> Array:
        """Return positions [..., 2], m from the area's centre, of `clients` [...] at `time` [...], s."""
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


MOBILITIES: dict[str, type[Mobility]] = {"static": Static}


def dropped(seed: int, clients: Integers, area: Area) -> Array:
    """Return where `clients` [...] are dropped in the area: [..., 2], m."""
    return area.place(uniform_field(seed, "drop.u", clients), uniform_field(seed, "drop.v", clients))
