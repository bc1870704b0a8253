"""Planners: what decides a round. `Separate` puts one together from four independent rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np

from airtune.capabilities import Trait
from airtune.errors import InputError, NoResultError
from airtune.scheduling.bandwidth import BandwidthRule, EqualSplit
from airtune.scheduling.power import FullPower, PowerRule
from airtune.scheduling.samplers import Sampler
from airtune.scheduling.sampling import All
from airtune.scheduling.slicing import FullSlice, Slicer
from airtune.scheduling.work import LocalWork, Slices, candidates
from airtune.types import ClientTask, Fleet, Group, Ints, Observation, Plan, RoundOutcome, ServerModel

State = TypeVar("State")


class Planner(Protocol[State]):
    """Decides a round and learns from its outcome. A method that decides jointly is itself a planner."""

    @property
    def traits(self) -> frozenset[Trait]:
        """Return what its plans may show."""
        ...

    def init(self, model: ServerModel, fleet: Fleet) -> State:
        """Return the state before round 1."""
        ...

    def decide(self, state: State, seen: Observation, rng: np.random.Generator, work: LocalWork) -> Plan:
        """Return the plan of one round, in which every client trains and codes as `work` says."""
        ...

    def learn(self, state: State, outcome: RoundOutcome) -> State:
        """Return the state after a round."""
        ...


@dataclass(frozen=True)
class Separate:
    """Who, what, how much band and how much power, decided one after the other.

    Clients that are not idle, have no examples, no link, or too little memory for the smallest slice are never drawn;
    those with too little memory are listed in the plan's notes.

    Parameters
    ----------
    sampler : who takes part.
    slicer : what each one holds.
    bandwidth : how the free band is shared.
    power : how strongly clients send.
    """

    sampler: Sampler = field(default_factory=All)
    slicer: Slicer = field(default_factory=FullSlice)
    bandwidth: BandwidthRule = field(default_factory=EqualSplit)
    power: PowerRule = field(default_factory=FullPower)

    @property
    def traits(self) -> frozenset[Trait]:
        """Return what sampler and slicer bring in."""
        return self.sampler.traits | self.slicer.traits

    def init(self, model: ServerModel, fleet: Fleet) -> None:
        """Return no state: every round is decided afresh."""
        return None

    def decide(self, state: None, seen: Observation, rng: np.random.Generator, work: LocalWork) -> Plan:
        """Return the plan."""
        able, notes = able_clients(seen, work, self.slicer.least(seen.shape))
        cohort = self.sampler.sample(able, seen, rng)
        slices = self.slicer.slices(cohort.clients, seen, work, rng)
        tasks = make_tasks(cohort.clients, slices, seen, work, cohort.probability.tolist())
        return Plan((Group(share_band(tasks, seen, self.bandwidth, self.power)),), notes)

    def learn(self, state: None, outcome: RoundOutcome) -> None:
        """Return no state."""
        return None


def able_clients(seen: Observation, work: LocalWork, least: Slices) -> tuple[Ints, dict[str, Any]]:
    """Return the candidates whose memory holds the smallest slices, and a note on those whose memory does not.

    Raises InputError if no device of the whole fleet has the memory.
    """
    found = candidates(seen)
    fits = work.that_fit([least], seen, found) > 0
    if not fits.any():
        _check_that_some_device_fits(seen, work, least)
    left_out = found[~fits]
    return found[fits], {"too_little_memory": left_out.tolist()} if len(left_out) else {}


def _check_that_some_device_fits(seen: Observation, work: LocalWork, least: Slices) -> None:
    """Raise InputError if nobody with examples has the memory, now or ever."""
    everyone = np.flatnonzero(seen.fleet.num_examples > 0)
    if not len(everyone) or (work.that_fit([least], seen, everyone) > 0).any():
        return
    needed = min(work.memory_bytes(least, seen, int(client)) for client in everyone)
    largest = float(seen.fleet.memory_bytes[everyone].max())
    raise InputError(
        f"fleet: training needs {needed / 1e9:.2f} GB and the largest device has {largest / 1e9:.2f} GB; "
        f"take a smaller model, batch or sequence, or larger devices"
    )


def make_tasks(
    clients: Ints,
    slices: Sequence[Slices],
    seen: Observation,
    work: LocalWork,
    probability: Sequence[float] | None = None,
) -> list[ClientTask]:
    """Return one task per client, without bandwidth yet; the inclusion probabilities default to 1."""
    probability = [1.0] * len(clients) if probability is None else probability
    return [
        work.task(int(client), part, seen, chance)
        for client, part, chance in zip(clients, slices, probability, strict=True)
    ]


def share_band(
    tasks: Sequence[ClientTask], seen: Observation, bandwidth: BandwidthRule, power: PowerRule | None = None
) -> tuple[ClientTask, ...]:
    """Return the tasks with the free uplink band shared among them, and with transmit powers (None: full power).

    On measured networks (fixed rates) neither bandwidth nor power enters the rate; equal shares at full power are
    written down.

    Raises
    ------
    NoResultError : the rules find no split (more clients than resource blocks ...).
    """
    if not tasks:
        return ()
    if seen.links.fixed_uplink_rate is not None:
        share = seen.free_bandwidth / len(tasks)
        return tuple(replace(task, bandwidth=share) for task in tasks)
    clients = np.array([task.client for task in tasks])
    solution = (FullPower() if power is None else power).choose(
        bandwidth,
        np.array([seen.costs.compute_seconds(task) for task in tasks]),
        np.array([float(seen.costs.uplink_bits(task)) for task in tasks]),
        seen.fleet.transmit_power[clients],
        seen.links.uplink_gain[clients],
        seen.links.noise_density,
        seen.free_bandwidth,
        seen.links.snr_gap,
    )
    if not solution.ok:
        raise NoResultError(f"bandwidth: {solution.status}: {solution.message}")
    chosen = zip(tasks, solution.value["bandwidth"], solution.value["power"], strict=True)
    return tuple(replace(task, bandwidth=float(w), transmit_power=float(p)) for task, w, p in chosen)
