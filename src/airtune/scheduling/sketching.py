"""Sketches: random components of the global adapter, one draw per client and round (arXiv 2501.19389)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from airtune.capabilities import Trait
from airtune.errors import InputError, unknown_name
from airtune.lora import AdapterShape, AdapterSlice
from airtune.scheduling.slicing import at_most
from airtune.scheduling.work import LocalWork, Slices
from airtune.streams import stream
from airtune.types import Floats, Ints, Observation

Scope = Literal["slot", "client"]
Download = Literal["slice", "all"]
Assign = Literal["speed", "memory", "random"]


@dataclass(frozen=True)
class Sketching:
    """How sketches are drawn and what travels down.

    Parameters
    ----------
    scope : "slot": every slot has a subset of its own; "client": one subset for all slots (they need equal ranks).
        A and B of a slot always share it.
    download : "slice": the client receives the sketch alone, which the server drew; "all": the whole adapter, as in
        the published code.
    """

    scope: Scope = "slot"
    download: Download = "slice"

    def __post_init__(self) -> None:
        """Check the names."""
        _one_of("scope", self.scope, ("slot", "client"))
        _one_of("download", self.download, ("slice", "all"))

    def draw(self, shape: AdapterShape, kept: int, seed: int, client: int) -> Slices:
        """Return one client's sketch of `kept` components per slot: a pure function of (seed, client).

        seed : of the round, see `round_seed`; who else takes part cannot change the subset.
        """
        part = AdapterSlice.sketch(shape, kept, stream(seed, "sketch", client))
        if self.scope == "client" and part.components:
            if len({slot.rank for slot in shape.slots.values()}) > 1:
                raise InputError('method.scope: "client" needs slots of one rank; valid here: slot')
            common = next(iter(part.components.values()))
            part = replace(part, components={name: common for name in shape.slots})
        return self.slices(shape, part)

    def slices(self, shape: AdapterShape, part: AdapterSlice) -> Slices:
        """Return what is received, trained and sent with a sketch."""
        receive = part if self.download == "slice" else AdapterSlice.everything(shape)
        return Slices(receive=receive, train=part, send=part)

    def sized(self, shape: AdapterShape, kept: int) -> Slices:
        """Return slices of a sketch's size, for cost functions: nothing is drawn."""
        return self.slices(shape, replace(AdapterSlice.truncation(shape, kept), unbiased=True))


def round_seed(rng: np.random.Generator) -> int:
    """Return the seed of one round's sketches."""
    return int(rng.integers(0, 2**62))


def kept_components(shape: AdapterShape, ratios: Sequence[float]) -> Ints:
    """Return the numbers of components that the sketching ratios keep, increasing, each once, at least 1.

    ratios : k / rank, in (0, 1]; the rank is the adapter's largest, a slot of a lower rank keeps no more than it has.
    """
    check_ratios(ratios)
    return np.unique(np.maximum(np.rint(np.asarray(ratios) * shape.max_rank), 1.0)).astype(np.int64)


def check_ratios(ratios: Sequence[float]) -> None:
    """Raise InputError unless there is a ratio and all are in (0, 1]."""
    if not ratios or not all(0.0 < ratio <= 1.0 for ratio in ratios):
        raise InputError(f"method.ratios: {list(ratios)} is not possible; valid: one or more numbers above 0, to 1")


@dataclass(frozen=True)
class SketchByRatio:
    """Every client has a sketching ratio of a list.

    Parameters
    ----------
    ratios : k / rank, in (0, 1].
    assign : "speed": the fleet is cut into equal parts by FLOP/s, the slowest have the smallest ratio; "memory": by
        memory; "random": every client draws one in every round, all equally likely.
    sketching : scope and download.

    Ratios are lowered where the memory does not hold the sketch.
    """

    ratios: tuple[float, ...] = (0.125, 0.25, 0.5)
    assign: Assign = "speed"
    sketching: Sketching = field(default_factory=Sketching)

    def __post_init__(self) -> None:
        """Check the names and the ratios."""
        _one_of("assign", self.assign, ("speed", "memory", "random"))
        check_ratios(self.ratios)

    @property
    def traits(self) -> frozenset[Trait]:
        """Return that slices are sketches of different sizes."""
        return frozenset({Trait.SKETCH, Trait.UNEQUAL_RANKS})

    def least(self, shape: AdapterShape) -> Slices:
        """Return a sketch of the smallest ratio's size."""
        return self.sketching.sized(shape, int(kept_components(shape, self.ratios)[0]))

    def slices(self, clients: Ints, seen: Observation, work: LocalWork, rng: np.random.Generator) -> Sequence[Slices]:
        """Return a fresh sketch for each client."""
        seed, shape = round_seed(rng), seen.shape
        kept = kept_components(shape, self.ratios)
        wanted = self._choice(seen, seed, len(kept))
        options = [self.sketching.sized(shape, int(k)) for k in kept]
        choice = at_most(wanted[clients] + 1, 1, work.that_fit(options, seen, clients)) - 1
        drawn = zip(clients, choice, strict=True)
        return [self.sketching.draw(shape, int(kept[j]), seed, int(client)) for client, j in drawn]

    def _choice(self, seen: Observation, seed: int, count: int) -> Ints:
        """Return the place in the list of kept components that each client of the fleet has, [clients]."""
        size = seen.fleet.size
        if self.assign == "random":
            return np.array([int(stream(seed, "ratio", c).integers(0, count)) for c in range(size)], dtype=np.int64)
        quantity = seen.fleet.flops_per_second if self.assign == "speed" else seen.fleet.memory_bytes
        return equal_parts(quantity, count)


def equal_parts(quantity: Floats, count: int) -> Ints:
    """Return the part of each entry, 0 to count - 1, when entries are cut into parts of one size by value.

    Equal entries are in one part: the place of the middle of their positions decides.
    """
    _, place, times = np.unique(quantity, return_inverse=True, return_counts=True)
    middle = np.cumsum(times) - 0.5 * times
    return np.minimum((middle[place] / len(quantity) * count).astype(np.int64), count - 1)


def _one_of(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise unknown_name(f"method.{name}", value, valid)
