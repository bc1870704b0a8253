"""FedBuff: buffered asynchronous aggregation. Nobody waits for the slowest."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from airtune.aggregation.mean import add_changes, in_client_order
from airtune.aggregation.staleness import weaken_stale
from airtune.compression.dense import Dense
from airtune.errors import InputError
from airtune.scheduling.planner import able_clients, make_tasks
from airtune.scheduling.slicing import FullSlice
from airtune.scheduling.work import LocalWork
from airtune.types import Compressor, Cutoff, Fleet, Group, LocalTraining, Observation, Plan, RoundOutcome, ServerModel


@dataclass(frozen=True)
class FedBuff:
    """Keeps a number of clients at work and updates the model whenever a buffer of updates is full.

    Paper: Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022, arXiv 2106.06639.

    Each round (one server step) it fills the free places with clients drawn uniformly from the idle ones, gives each a
    fixed share of the uplink, and waits for `buffer_size` arrivals; the others stay in flight.

    ======================  ============================================
    paper                   here
    ======================  ============================================
    concurrency             `concurrency`
    K, buffer size          `buffer_size`
    eta_g                   `server_learning_rate`
    s(tau) = 1/sqrt(1+tau)  `staleness_exponent` = 1/2
    Delta_i                 the update's values minus those it started from
    ======================  ============================================

    Departures: the paper adds the mean of the buffered changes of one model vector; here A, B and the head each
    change by it. A client's share of the band is ``W / concurrency``, also while some places are empty, so that a
    transfer under way never changes its rate [choice].

    Parameters
    ----------
    concurrency : clients at work at any time, 1 to the size of the fleet.
    buffer_size : updates per server step, at most `concurrency`.
    staleness_exponent : a change that is tau versions old counts (1 + tau) to the minus this.
    server_learning_rate : factor on the mean change.
    training, compressor : of every client.
    """

    concurrency: int = 8
    buffer_size: int = 4
    staleness_exponent: float = 0.5
    server_learning_rate: float = 1.0
    training: LocalTraining = field(default_factory=LocalTraining)
    compressor: Compressor = field(default_factory=Dense)

    arxiv: ClassVar[str] = "2106.06639"
    citation: ClassVar[str] = """@inproceedings{nguyen2022fedbuff,
  title     = {Federated Learning with Buffered Asynchronous Aggregation},
  author    = {Nguyen, John and Malik, Kshitiz and Zhan, Hongyuan and Yousefpour, Ashkan and Rabbat, Michael and
               Malek, Mani and Huba, Dzmitry},
  booktitle = {International Conference on Artificial Intelligence and Statistics},
  year      = {2022},
  note      = {arXiv:2106.06639}
}"""

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 1 <= self.buffer_size <= self.concurrency:
            raise InputError(
                f"method.buffer_size: must be from 1 to method.concurrency ({self.concurrency}); got {self.buffer_size}"
            )
        if not self.staleness_exponent >= 0 or not self.server_learning_rate > 0:
            raise InputError(
                "method.staleness_exponent, method.server_learning_rate: must not be negative (rate: not 0)"
            )

    def init(self, model: ServerModel, fleet: Fleet) -> None:
        """Return no state: what is in flight is the loop's. Raises InputError if the fleet is too small."""
        if self.concurrency > fleet.size:
            raise InputError(f"method.concurrency: must be at most the fleet's {fleet.size}; got {self.concurrency}")

    def plan(self, state: None, seen: Observation, rng: np.random.Generator) -> Plan:
        """Fill the free places."""
        work = LocalWork(self.training, self.compressor)
        slicer = FullSlice()
        able, notes = able_clients(seen, work, slicer.least(seen.shape))
        places = min(max(self.concurrency - len(seen.in_flight), 0), len(able))
        chosen = np.sort(rng.choice(able, size=places, replace=False)) if places else able[:0]
        slices = slicer.slices(chosen, seen, work, rng)
        tasks = make_tasks(chosen, slices, seen, work)
        share = seen.links.uplink_bandwidth / self.concurrency
        shared = tuple(replace(task, bandwidth=share) for task in tasks)
        cutoff = Cutoff(min_updates=self.buffer_size, late="keep")
        return Plan((Group(shared, cutoff),), {**notes, "in_flight": len(seen.in_flight)})

    def aggregate(self, state: None, model: ServerModel, outcome: RoundOutcome) -> tuple[ServerModel, None]:
        """Add the mean of the buffered changes, each weighted by its age."""
        updates = in_client_order(weaken_stale(model, outcome, self.staleness_exponent).updates)
        if not updates:
            return model, None
        share = self.server_learning_rate / len(updates)
        return model.updated(add_changes(model.adapter, updates, [share] * len(updates))), None
