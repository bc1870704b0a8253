"""`Cell`: the simulated world. Planners observe estimates of it; the runner asks it for the truth.

Everything is a function of (seed, client, time): channel, motion, power modes, availability. The cell remembers
nothing, so a method cannot change the world, and a resumed run meets the same one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from airtune.devices.availability import Always, Availability
from airtune.devices.battery import Battery
from airtune.errors import InputError, unknown_name
from airtune.simulation.costs import CostModel
from airtune.simulation.fleet import Modes
from airtune.types import Fleet, Floats, Ints, LinkState, Observation, Pending, RoundOutcome, ServerModel
from airtune.wireless.channel import Channel, RadioChannel
from airtune.wireless.knowledge import ChannelKnowledge
from airtune.wireless.retransmission import Transfer

Downlink = Literal["broadcast", "unicast"]
DOWNLINKS: tuple[Downlink, ...] = ("broadcast", "unicast")


@dataclass(frozen=True)
class UplinkStatistics:
    """The law of a cell's uplink gains at `time` (s): path loss and shadowing as they are, the fading drawn anew.

    The draws have the coefficients of other worlds (seeds), so they say nothing about the fading of this one.
    """

    channel: RadioChannel
    seed: int
    time: float
    clients: int

    def draw(self, count: int, rng: np.random.Generator) -> Floats:
        """Return gains [count, clients]; see `airtune.types.GainStatistics`."""
        everyone = np.arange(self.clients)
        seeds = rng.integers(0, 2**62, size=count)
        small = np.stack([self.channel.coefficient(int(seed), everyone, self.time, "uplink") for seed in seeds])
        return self.channel.mean_gain(self.seed, everyone, self.time, "uplink") * (small.real**2 + small.imag**2)


@dataclass(frozen=True)
class Cell:
    """A fleet in a radio cell; an `airtune.types.Environment` for planners, the truth for the runner.

    Attributes
    ----------
    nominal : the fleet with every device in its fastest power mode.
    costs : FLOPs, bits and bytes of a task on the nominal fleet.
    seed : of the experiment; the whole world follows from it.
    channel : the radio.
    knowledge : how well planners know it.
    modes : power modes that change over time (DVFS); None: the nominal ones stay.
    availability : when clients are there.
    downlink : "broadcast": what a cohort receives is sent once, at the rate of its worst member; "unicast": each client
        gets its own copy in an equal share of the downlink band.
    idle_seconds : what a round without any participant costs, s.
    battery : of each device; None: on mains. charging : when devices are plugged in, at the start of a round.
    """

    nominal: Fleet
    costs: CostModel
    seed: int
    channel: RadioChannel = field(default_factory=Channel)
    knowledge: ChannelKnowledge = field(default_factory=ChannelKnowledge)
    modes: Modes | None = None
    availability: Availability = field(default_factory=Always)
    downlink: Downlink = "broadcast"
    idle_seconds: float = 1.0
    battery: Battery | None = None
    charging: Availability = field(default_factory=Always)

    def __post_init__(self) -> None:
        """Check what the types cannot."""
        if self.nominal.size == 0:
            raise InputError("fleet: it has no client; give at least one device")
        if self.downlink not in DOWNLINKS:
            raise unknown_name("wireless.downlink", self.downlink, DOWNLINKS)
        if not (math.isfinite(self.idle_seconds) and self.idle_seconds > 0):
            raise InputError(f"fleet.idle_seconds: must be positive, in s; got {self.idle_seconds:g}")

    # -- what planners see --------------------------------------------------------------------------------------------

    @property
    def fleet(self) -> Fleet:
        """Return the fleet at time 0."""
        return self.fleet_at(0.0)

    def observe(self, round_index: int, time: float, pending: Pending, model: ServerModel) -> Observation:
        """Return what is known at the start of a round: estimated gains, current speeds, who is idle."""
        fleet = self.fleet_at(time)
        busy = np.array(sorted(flight.task.client for flight in pending.in_flight), dtype=np.int64)
        everyone = np.arange(fleet.size)
        there = np.flatnonzero(
            self.availability.available(self.seed, everyone, time) & self._charged_enough(everyone, pending)
        )
        with_data = there[fleet.num_examples[there] > 0]
        occupied = sum(flight.task.bandwidth for flight in pending.in_flight)
        return Observation(
            round=round_index,
            time=time,
            fleet=fleet,
            links=self._estimated_links(round_index, time, pending),
            shape=model.adapter.shape,
            costs=replace(self.costs, fleet=fleet, shape=model.adapter.shape),
            idle=np.setdiff1d(with_data, busy),
            in_flight=busy,
            free_bandwidth=max(self.channel.uplink_bandwidth - occupied, 0.0),
            reports=pending.reports,
            statistics=UplinkStatistics(self.channel, self.seed, time, self.nominal.size),
        )

    def _estimated_links(self, round_index: int, time: float, pending: Pending) -> LinkState:
        clients = np.arange(self.nominal.size)
        starts = pending.round_starts
        up, down = (
            self.knowledge.estimate(self.channel, self.seed, clients, time, round_index, direction, starts)
            for direction in ("uplink", "downlink")
        )
        return LinkState(
            uplink_gain=up,
            downlink_gain=down,
            noise_density=self.channel.noise_density("uplink"),
            downlink_noise_density=self.channel.noise_density("downlink"),
            uplink_bandwidth=self.channel.uplink_bandwidth,
            downlink_bandwidth=self.channel.downlink_bandwidth,
            downlink_power=self.channel.base_station_power,
            snr_gap=self.channel.snr_gap,
        )

    # -- the truth ----------------------------------------------------------------------------------------------------

    def fleet_at(self, time: float) -> Fleet:
        """Return the fleet with the speeds and energies of the power modes at `time` (s)."""
        if self.modes is None:
            return self.nominal
        speed, energy = self.modes.factors(self.seed, time)
        return replace(
            self.nominal,
            flops_per_second=self.nominal.flops_per_second * speed,
            energy_per_flop=self.nominal.energy_per_flop * energy,
        )

    def download_seconds(
        self, clients: Ints, start: float, broadcast_bits: int, unicast_bits: Ints, band_share: float
    ) -> Floats:
        """Return the seconds [n] until each client has the broadcast and its own bits.

        Parameters
        ----------
        clients : [n]. start : s.
        broadcast_bits : sent once over the band, at the worst client's rate; everyone has them at the same moment.
        unicast_bits : [n]; sent beside one another in equal shares of the band, after the broadcast.
        band_share : part of the downlink band that this cohort has.
        """
        width = self.channel.downlink_bandwidth * band_share
        power = self.channel.base_station_power * band_share
        common = self.channel.broadcast_seconds(self.seed, clients, start, broadcast_bits, width, power)
        if not unicast_bits.any():
            return np.full(len(clients), common)
        if not math.isfinite(common):
            return np.full(len(clients), np.inf)
        share = len(clients)
        return common + self.channel.transfer_seconds(
            self.seed, clients, start + common, unicast_bits, width / share, power / share, "downlink"
        )

    def upload(self, clients: Ints, start: Floats, bits: Ints, bandwidth: Floats, power: Floats) -> Transfer:
        """Return what becomes of the uploads [n] that begin at `start` [n] (infinite: the download never ended)."""
        began = np.isfinite(start)
        sent = self.channel.transfer(self.seed, clients, np.where(began, start, 0.0), bits, bandwidth, power, "uplink")
        return Transfer(np.where(began, sent.seconds, np.inf), sent.delivered & began, sent.bits_on_air * began)

    # -- batteries ----------------------------------------------------------------------------------------------------

    def charge(self, pending: Pending) -> Floats | None:
        """Return the J left in each battery [clients]; None on mains."""
        if self.battery is None:
            return None
        return (
            self.battery.initial(self.seed, np.arange(self.nominal.size)) if pending.charge is None else pending.charge
        )

    def charge_after(self, pending: Pending, outcome: RoundOutcome) -> Floats | None:
        """Return the J left in each battery [clients] after a round; None on mains."""
        charge = self.charge(pending)
        if self.battery is None or charge is None:
            return None
        used = np.zeros(self.nominal.size)
        for part in (*outcome.updates, *outcome.lost):
            used[part.task.client] += part.cost.joules
        seconds = outcome.end_time - outcome.start_time
        plugged = self.charging.available(self.seed, np.arange(self.nominal.size), outcome.start_time)
        return self.battery.after(charge, used, seconds, plugged)

    def _charged_enough(self, clients: Ints, pending: Pending) -> NDArray[np.bool_]:
        charge = self.charge(pending)
        if self.battery is None or charge is None:
            return np.ones(len(clients), dtype=np.bool_)
        return self.battery.allows(charge, 0.0)

    def stays(self, client: int, end: float) -> bool:
        """Return whether a client is there when its upload ends. A client that comes back in between has resumed."""
        return bool(self.availability.available(self.seed, np.array([client]), end)[0])
