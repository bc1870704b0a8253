"""The fleet and the cell of an experiment. Imports no torch: `airtune plan` stands on it."""

from __future__ import annotations

from airtune.experiment.config import Experiment
from airtune.experiment.sections import FleetConfig
from airtune.simulation.cell import Cell
from airtune.simulation.costs import CostModel
from airtune.simulation.fleet import fleet_of, modes_of
from airtune.types import Fleet, Ints


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
        channel=wireless.channel,
        knowledge=wireless.options.knowledge,
        modes=modes_of(fleet.profiles(), fleet.mode_period),
        availability=fleet.availability,
        downlink=wireless.options.downlink,
        idle_seconds=fleet.idle_seconds,
        battery=fleet.battery,
        charging=fleet.charging,
    )
