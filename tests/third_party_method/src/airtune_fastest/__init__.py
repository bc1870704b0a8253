"""A method for airtune in a package of its own: only the fastest devices take part."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from airtune.aggregation.mean import Mean
from airtune.compression.dense import Dense
from airtune.errors import InputError
from airtune.scheduling.bandwidth import EqualSplit
from airtune.scheduling.planner import able_clients, make_tasks, share_band
from airtune.scheduling.slicing import FullSlice
from airtune.scheduling.work import LocalWork
from airtune.types import Compressor, Fleet, Group, LocalTraining, Observation, Plan, RoundOutcome, ServerModel


@dataclass(frozen=True)
class FastestFirst:
    """Only the devices with the most FLOP/s train; the others never do.

    Paper: in the spirit of Nishio and Yonetani, "Client Selection for Federated Learning with Heterogeneous Resources
    in Mobile Edge", arXiv 1804.08333. Departure: a number of clients instead of a deadline, and no link enters.

    Parameters
    ----------
    clients : how many take part, at least 1.
    training, compressor : of every client.
    """

    clients: int = 2
    training: LocalTraining = field(default_factory=LocalTraining)
    compressor: Compressor = field(default_factory=Dense)

    arxiv: ClassVar[str] = "1804.08333"
    citation: ClassVar[str] = """@inproceedings{nishio2019client,
  title     = {Client Selection for Federated Learning with Heterogeneous Resources in Mobile Edge},
  author    = {Nishio, Takayuki and Yonetani, Ryo},
  booktitle = {IEEE International Conference on Communications},
  year      = {2019},
  note      = {arXiv:1804.08333}
}"""

    def __post_init__(self) -> None:
        """Check the number."""
        if self.clients < 1:
            raise InputError(f"method.clients: {self.clients} is not possible; valid: at least 1")

    def init(self, model: ServerModel, fleet: Fleet) -> None:
        """Return no state."""
        return None

    def plan(self, state: None, seen: Observation, rng: np.random.Generator) -> Plan:
        """Choose the fastest that can take part; equal shares of the band."""
        work = LocalWork(self.training, self.compressor)
        able, notes = able_clients(seen, work, FullSlice().least(seen.shape))
        fastest = np.argsort(-seen.fleet.flops_per_second[able], kind="stable")[: self.clients]
        chosen = np.sort(able[fastest])
        tasks = make_tasks(chosen, FullSlice().slices(chosen, seen, work, rng), seen, work)
        return Plan((Group(share_band(tasks, seen, EqualSplit())),), notes)

    def aggregate(self, state: None, model: ServerModel, outcome: RoundOutcome) -> tuple[ServerModel, None]:
        """Average by examples."""
        return Mean()(model, outcome), None
