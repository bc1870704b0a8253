"""The fleet and the cell of an experiment. Imports no torch: `airtune plan` stands on it."""

from __future__ import annotations

from dataclasses import replace

from airtune.experiment.config import Experiment
from airtune.experiment.sections import FleetConfig
from airtune.simulation.cell import Cell
from airtune.simulation.costs import CostModel
from airtune.simulation.fleet import fleet_of, modes_of
from airtune.types import Fleet, Ints
from airtune.wireless.radio import RadioChannel
from airtune.wireless.trace import TraceChannel


def nominal_fleet(config: FleetConfig, num_examples: Ints, label_counts: Ints | None = None) -> Fleet:
    """Return the fleet with every device in its first power mode.

    num_examples : [clients]. label_counts : [clients, classes] or None.
    """
    return fleet_of(config.profiles(), num_examples, label_counts, config.memory_share)


def cell_of(experiment: Experiment, costs: CostModel) -> Cell:
    """Return the world of an experiment; every draw in it follows from the experiment's seed."""
    fleet, wireless = experiment.fleet, experiment.wireless
    return Cell(
        nominal=costs.fleet,
        costs=costs,
        seed=experiment.seed,
        channel=_for_fleet(wireless.channel, fleet.clients),
        knowledge=wireless.options.knowledge,
        modes=modes_of(fleet.profiles(), fleet.mode_period),
        availability=fleet.availability,
        downlink=wireless.options.downlink,
        idle_seconds=fleet.idle_seconds,
        battery=fleet.battery,
        charging=fleet.charging,
    )


def _for_fleet(channel: RadioChannel, clients: int) -> RadioChannel:
    """Return the channel; a trace must have rows for exactly the fleet's clients, else InputError names the file."""
    if isinstance(channel, TraceChannel) and channel.clients is None:
        return replace(channel, clients=clients)
    return channel
