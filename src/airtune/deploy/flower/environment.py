"""`FlowerEnvironment`: what planners see of a real fleet, in the same `Observation` as in simulation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from airtune.deploy.flower.nodes import Nodes
from airtune.simulation.costs import CostModel
from airtune.types import Environment, Fleet, Floats, LinkState, Observation, Pending, ServerModel


@dataclass
class FlowerEnvironment:
    """The fleet as it is: who is connected and not at work, speeds and rates that the devices measured.

    What nobody has measured is the experiment's: speed, memory, transmit power and energy of the device profiles, the
    rates of the simulated channel.

    Attributes
    ----------
    nodes : who is there. cell : the experiment's simulated cell. costs : its costs.
    measured : False: plans are made from the cell's own observation, only who is idle is real.
    smallest_fleet : clients that must be there before round 1. poll_seconds : between two looks.
    met : whether that many have been there.
    """

    nodes: Nodes
    cell: Environment
    costs: CostModel
    measured: bool = True
    smallest_fleet: int = 1
    poll_seconds: float = 0.5
    met: bool = False

    @property
    def fleet(self) -> Fleet:
        """Return the fleet once enough devices have reported.

        Raises
        ------
        NoResultError : they have not within the time that `nodes` allows.
        """
        self.nodes.wait(self.smallest_fleet, self.poll_seconds)
        return self._fleet() if self.measured else self.cell.fleet

    def observe(self, round_index: int, time: float, pending: Pending, model: ServerModel) -> Observation:
        """Return what is known at the start of a round; waits while no device at all is there.

        The first call waits for the whole fleet: devices come back one by one to a server that was killed. In a resumed
        run those who have not come back in time are left out; in a new one their absence is an error.
        """
        if not self.met:
            self.nodes.wait(self.smallest_fleet, self.poll_seconds, at_least=None if round_index == 1 else 1)
            self.met = True
        self.nodes.wait(1, self.poll_seconds)
        there = np.array(sorted(self.nodes.facts()), dtype=np.int64)
        estimated = self.cell.observe(round_index, time, pending, model)
        if not self.measured:
            return replace(estimated, idle=np.intersect1d(estimated.idle, there))
        fleet = self._fleet()
        return replace(
            estimated,
            fleet=fleet,
            links=self._links(estimated.links, fleet),
            costs=self.costs_now(model),
            idle=np.setdiff1d(there[fleet.num_examples[there] > 0], estimated.in_flight),
        )

    def costs_now(self, model: ServerModel) -> CostModel:
        """Return the costs on the fleet as it is."""
        costs = replace(self.costs, shape=model.adapter.shape)
        return replace(costs, fleet=self._fleet(), tokens=self._tokens()) if self.measured else costs

    def rates(self) -> tuple[Floats, Floats]:
        """Return the measured rates up and down, [clients], bit/s; 0 where nobody has measured."""
        facts, nothing = self.nodes.facts(), np.zeros(self.costs.fleet.size)
        up = _known(nothing, {c: f.uplink_rate for c, f in facts.items()})
        return up, _known(nothing, {c: f.downlink_rate for c, f in facts.items()})

    def _fleet(self) -> Fleet:
        nominal, facts = self.costs.fleet, self.nodes.facts()
        return replace(
            nominal,
            device=tuple(facts[c].device if c in facts else name for c, name in enumerate(nominal.device)),
            flops_per_second=_known(nominal.flops_per_second, {c: f.flops_per_second for c, f in facts.items()}),
            memory_bytes=_known(nominal.memory_bytes, {c: f.memory_bytes for c, f in facts.items()}),
            num_examples=_known(nominal.num_examples, {c: f.examples for c, f in facts.items()}).astype(np.int64),
        )

    def _tokens(self) -> Floats:
        return _known(self.costs.tokens, {c: f.tokens for c, f in self.nodes.facts().items()})

    def _links(self, cell: LinkState, fleet: Fleet) -> LinkState:
        """Return links of fixed rates: measured, or where nobody has measured that of the cell in an equal share.

        The gains are those at which an equal share of the band would carry these rates: some planners look at gains.
        """
        up, down = self.rates()
        if not up.any() and not down.any():
            return cell
        everyone, share = np.arange(fleet.size), cell.uplink_bandwidth / fleet.size
        up = np.where(up > 0, up, cell.uplink_rate(everyone, np.full(fleet.size, share), fleet.transmit_power))
        down = np.where(down > 0, down, cell.downlink_rate(everyone) / fleet.size)
        snr = np.expm1(np.minimum(up / share, 60.0) * np.log(2.0))
        gain = snr * (cell.snr_gap * cell.noise_density * share) / fleet.transmit_power
        return replace(cell, uplink_gain=gain, fixed_uplink_rate=up, fixed_downlink_rate=down)


def _known(nominal: NDArray[Any], measured: Mapping[int, float]) -> Floats:
    """Return an array of the fleet with measured values in their places; 0 is not measured."""
    values = np.array(nominal, dtype=np.float64)
    for client, value in measured.items():
        if value > 0:
            values[client] = value
    return values
