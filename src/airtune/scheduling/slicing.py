"""What each client of a cohort holds of the adapter: everything, a rank, a depth, or a random sketch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from airtune.capabilities import Trait
from airtune.errors import InputError, unknown_name
from airtune.lora import AdapterShape, AdapterSlice
from airtune.scheduling.work import LocalWork, Slices
from airtune.types import Floats, Ints, Observation


class Slicer(Protocol):
    """Gives each client of a cohort its slices."""

    @property
    def traits(self) -> frozenset[Trait]:
        """Return what its slices may show."""
        ...

    def least(self, shape: AdapterShape) -> Slices:
        """Return the smallest slices that it gives: a device without memory for them cannot take part."""
        ...

    def slices(self, clients: Ints, seen: Observation, work: LocalWork, rng: np.random.Generator) -> Sequence[Slices]:
        """Return one set of slices per client, within each device's memory if `least` is."""
        ...


@dataclass(frozen=True)
class FullSlice:
    """Everyone holds the whole adapter."""

    @property
    def traits(self) -> frozenset[Trait]:
        """Return nothing: all clients hold the same."""
        return frozenset()

    def least(self, shape: AdapterShape) -> Slices:
        """Return the whole adapter."""
        return Slices.same(AdapterSlice.everything(shape))

    def slices(self, clients: Ints, seen: Observation, work: LocalWork, rng: np.random.Generator) -> Sequence[Slices]:
        """Return the whole adapter for each client."""
        return [self.least(seen.shape)] * len(clients)


@dataclass(frozen=True)
class RankByMemory:
    """Each client holds the first r components of every slot, with r between two ranks by its device's memory.

    Parameters
    ----------
    lowest, highest : ranks of the fleet's smallest and largest device; `highest` None: the adapter's largest rank.

    Between them r is linear in the logarithm of the memory, rounded down, then lowered until training fits [choice].
    """

    lowest: int = 1
    highest: int | None = None

    @property
    def traits(self) -> frozenset[Trait]:
        """Return that ranks differ."""
        return frozenset({Trait.UNEQUAL_RANKS})

    def least(self, shape: AdapterShape) -> Slices:
        """Return the lowest rank."""
        lowest, _ = self.bounds(shape)
        return Slices.same(AdapterSlice.truncation(shape, lowest))

    def bounds(self, shape: AdapterShape) -> tuple[int, int]:
        """Return the lowest and the highest rank, checked against the adapter."""
        highest = shape.max_rank if self.highest is None else self.highest
        if not 1 <= self.lowest <= highest <= shape.max_rank:
            raise InputError(
                f"method.lowest_rank, method.highest_rank: {self.lowest} and {highest} are not possible; "
                f"valid: 1 <= lowest <= highest <= {shape.max_rank}, the adapter's rank"
            )
        return self.lowest, highest

    def ranks(self, clients: Ints, seen: Observation, work: LocalWork) -> Ints:
        """Return the rank of some clients, [clients]; 0 where even the lowest does not fit."""
        lowest, highest = self.bounds(seen.shape)
        options = [Slices.same(AdapterSlice.truncation(seen.shape, r)) for r in range(lowest, highest + 1)]
        wanted = ranks_by_memory(seen.fleet.memory_bytes, lowest, highest)[clients]
        return at_most(wanted, lowest, work.that_fit(options, seen, clients))

    def slices(self, clients: Ints, seen: Observation, work: LocalWork, rng: np.random.Generator) -> Sequence[Slices]:
        """Return a truncation for each client."""
        return truncations(self.ranks(clients, seen, work), seen.shape)


@dataclass(frozen=True)
class Depth:
    """Each client holds the last layers of the adapter, those next to the output.

    Parameters
    ----------
    depth : number of layers; None: random for each client and round, uniform between 1 and what its memory allows
        (like FedRA's random allocation, arXiv 2311.11227, but of consecutive layers).
    outside : "frozen": the global adapter stays below, fixed, and is downloaded; "absent": there is none below.
    """

    depth: int | None = None
    outside: Literal["frozen", "absent"] = "frozen"

    def __post_init__(self) -> None:
        """Check the name."""
        if self.outside not in ("frozen", "absent"):
            raise unknown_name("method.outside", self.outside, ("frozen", "absent"))

    @property
    def traits(self) -> frozenset[Trait]:
        """Return that some clients hold nothing of the lower slots."""
        return frozenset({Trait.PARTIAL_DEPTH})

    def least(self, shape: AdapterShape) -> Slices:
        """Return the fixed depth, or depth 1."""
        depth = 1 if self.depth is None else self.depth
        if not 1 <= depth <= len(shape.layers):
            raise InputError(f"method.depth: {depth} is not possible; valid: 1 to {len(shape.layers)} adapted layers")
        return depth_slices(shape, depth, self.outside)

    def slices(self, clients: Ints, seen: Observation, work: LocalWork, rng: np.random.Generator) -> Sequence[Slices]:
        """Return the last layers for each client."""
        shape = seen.shape
        if self.depth is not None:
            return [self.least(shape)] * len(clients)
        by_depth = [depth_slices(shape, depth, self.outside) for depth in range(1, len(shape.layers) + 1)]
        largest = work.that_fit(by_depth, seen, clients)
        return [by_depth[int(rng.integers(0, max(int(limit), 1)))] for limit in largest]


@dataclass(frozen=True)
class RandomLayers:
    """Each client holds randomly chosen layers, drawn afresh in every round (FedRA, arXiv 2311.11227).

    Parameters
    ----------
    least_layers : number of layers of the fleet's smallest device; the largest holds all adapted layers. Between them
        the number is linear in the logarithm of the memory [choice].
    outside : "frozen": the global adapter acts in the other layers, fixed, and is downloaded; "absent": nothing there.

    Layers are drawn among the last ones, as many as training them all together fits the device's memory.
    """

    least_layers: int = 1
    outside: Literal["frozen", "absent"] = "frozen"

    def __post_init__(self) -> None:
        """Check the name."""
        if self.outside not in ("frozen", "absent"):
            raise unknown_name("method.outside", self.outside, ("frozen", "absent"))

    @property
    def traits(self) -> frozenset[Trait]:
        """Return that some clients hold nothing of some slots."""
        return frozenset({Trait.PARTIAL_DEPTH})

    def least(self, shape: AdapterShape) -> Slices:
        """Return the last `least_layers` layers."""
        if not 1 <= self.least_layers <= len(shape.layers):
            valid = f"valid: 1 to {len(shape.layers)} adapted layers"
            raise InputError(f"method.least_layers: {self.least_layers} is not possible; {valid}")
        return depth_slices(shape, self.least_layers, self.outside)

    def slices(self, clients: Ints, seen: Observation, work: LocalWork, rng: np.random.Generator) -> Sequence[Slices]:
        """Return a fresh draw for each client."""
        shape, layers = seen.shape, np.array(seen.shape.layers)
        depths = range(self.least_layers, len(layers) + 1)
        options = [depth_slices(shape, depth, self.outside) for depth in depths]
        fitting = self.least_layers - 1 + work.that_fit(options, seen, clients)
        wanted = ranks_by_memory(seen.fleet.memory_bytes, self.least_layers, len(layers))[clients]
        drawn: list[Slices] = []
        for fits, want in zip(fitting, wanted, strict=True):
            among = layers[len(layers) - max(int(fits), self.least_layers) :]
            count = min(int(want), len(among))
            drawn.append(self._of(shape, set(rng.choice(among, size=count, replace=False).tolist())))
        return drawn

    def _of(self, shape: AdapterShape, layers: set[int]) -> Slices:
        whole = replace(AdapterSlice.everything(shape), outside=self.outside)
        kept = {name: part for name, part in whole.components.items() if shape.slots[name].layer in layers}
        train = replace(whole, components=kept)
        return Slices(receive=whole if self.outside == "frozen" else train, train=train, send=train)


@dataclass(frozen=True)
class Sketch:
    """Each client holds a random subset of the components of every slot, rescaled by rank / kept (arXiv 2501.19389).

    Parameters
    ----------
    kept : components of each slot, the same for everyone.
    """

    kept: int

    @property
    def traits(self) -> frozenset[Trait]:
        """Return that slices are sketches."""
        return frozenset({Trait.SKETCH, Trait.UNEQUAL_RANKS})

    def least(self, shape: AdapterShape) -> Slices:
        """Return one such subset: all are of the same size."""
        if not 1 <= self.kept <= shape.max_rank:
            raise InputError(f"method.kept: {self.kept} is not possible; valid: 1 to {shape.max_rank} components")
        part = AdapterSlice.truncation(shape, self.kept)
        return Slices.same(replace(part, unbiased=True))

    def slices(self, clients: Ints, seen: Observation, work: LocalWork, rng: np.random.Generator) -> Sequence[Slices]:
        """Return a fresh subset for each client."""
        self.least(seen.shape)
        return [Slices.same(AdapterSlice.sketch(seen.shape, self.kept, rng)) for _ in clients]


def everything_or_ranks(lowest: int | None, highest: int | None) -> FullSlice | RankByMemory:
    """Return ranks by memory between two limits, or the whole adapter for everyone if no lowest rank is given."""
    if lowest is None:
        if highest is not None:
            raise InputError("method.highest_rank: needs method.lowest_rank too, the rank of the smallest device")
        return FullSlice()
    return RankByMemory(lowest, highest)


def depth_slices(
    shape: AdapterShape,
    depth: int,
    outside: Literal["frozen", "absent"],
    ranks: Mapping[str, int] | None = None,
) -> Slices:
    """Return the slices of the last `depth` adapted layers, with the first `ranks[slot]` components of each slot.

    With "frozen" the client also receives the layers below: its forward pass is that of the global model.
    """
    whole = AdapterSlice.everything(shape) if ranks is None else AdapterSlice.truncation(shape, ranks)
    lowest = shape.layers[len(shape.layers) - depth]
    kept = {name: part for name, part in whole.components.items() if shape.slots[name].layer >= lowest}
    train = AdapterSlice(kept, outside=outside)
    receive = replace(whole, outside=outside) if outside == "frozen" else train
    return Slices(receive=receive, train=train, send=train)


def truncations(ranks: Ints, shape: AdapterShape) -> list[Slices]:
    """Return the truncation to each rank; equal ranks share one object."""
    by_rank = {int(r): Slices.same(AdapterSlice.truncation(shape, int(r))) for r in np.unique(ranks)}
    return [by_rank[int(r)] for r in ranks]


def ranks_by_memory(memory_bytes: Floats, lowest: int, highest: int) -> Ints:
    """Return a rank per client, [clients]: linear in log(memory) from the smallest to the largest device."""
    size = np.log(np.maximum(memory_bytes, 1.0))
    span = float(size.max() - size.min())
    position = (size - size.min()) / span if span > 0.0 else np.ones(len(size))
    return (lowest + np.floor(position * (highest - lowest) + 1e-9)).astype(np.int64)


def at_most(wanted: Ints, lowest: int, options: Ints) -> Ints:
    """Return the wanted sizes, lowered to what fits: `options` of lowest, lowest + 1, ... do; 0 where none does."""
    fitting = np.minimum(wanted, lowest - 1 + options)
    return np.where(fitting >= lowest, fitting, 0).astype(np.int64)


SLICERS: Mapping[str, type[Slicer]] = {
    "full": FullSlice,
    "rank-by-memory": RankByMemory,
    "depth": Depth,
    "random-layers": RandomLayers,
    "sketch": Sketch,
}
