"""`SimulatedRunner`: a plan becomes arrivals on the virtual clock, and only what arrives is trained.

The time of a task (download, compute, upload) follows from plan, fleet and link before any gradient is computed. So the
runner first steps the clock to the cut-off, then trains the arrivals; an update that would come too late is never
trained, but the seconds, bits and joules that its device spends are charged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from airtune.simulation.cell import Cell
from airtune.simulation.costs import CostModel
from airtune.simulation.flights import NOTHING, Flight, busy, keep, lose, plus, resume, step_to_cutoff
from airtune.simulation.learning import Learning
from airtune.types import (
    ClientTask,
    Group,
    InFlight,
    Pending,
    Plan,
    RoundOutcome,
    ServerModel,
    TaskCost,
    Trainer,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class _Leg:
    """One cycle of one client: what it costs, and whether its upload was delivered."""

    cost: TaskCost
    delivered: bool


@dataclass(frozen=True)
class _Round:
    """What all tasks of a round share; `band_share` is the part of the downlink that each concurrent group gets."""

    index: int
    time: float
    costs: CostModel
    model: ServerModel
    pending: Pending
    band_share: float

    def missed_bits(self, task: ClientTask) -> int:
        """Return the bits of the merges that a client has not made yet."""
        return self.model.catch_up_bits(self.pending.held_version.get(task.client, 0))


@dataclass(frozen=True)
class SimulatedRunner:
    """Runs plans in a simulated cell with real training.

    Attributes
    ----------
    cell : the true world: channel, speeds, availability.
    costs : FLOPs, bits, bytes and joules of a task.
    trainer : trains the clients whose updates arrive.
    seed : of the experiment.
    """

    cell: Cell
    costs: CostModel
    trainer: Trainer
    seed: int

    def run(
        self, plan: Plan, model: ServerModel, pending: Pending, *, round_index: int, time: float
    ) -> tuple[RoundOutcome, Pending]:
        """Run one round from `time` fleet seconds; see `airtune.types.Runner`."""
        costs = self.costs.at(self.cell.fleet_at(time))
        round_ = _Round(round_index, time, costs, model, pending, band_share=1 / max(len(plan.groups), 1))
        flights = [flight for group in plan.groups for flight in self._dispatch(group, round_)]
        earlier = [resume(flight) for flight in pending.in_flight]
        arrived, late, end = step_to_cutoff([*earlier, *flights], plan.groups, time, self.cell.idle_seconds)
        models = {**pending.models, model.version: model}
        learning = Learning(self.trainer, self.costs, self.seed)
        updates, diverged, memory = learning.train(arrived, models, pending.memory, costs.fleet)
        kept = tuple(keep(f) for f in late if f.group.cutoff.late == "keep" and f.lost_because is None)
        dropped = tuple(lose(f) for f in late if f.group.cutoff.late == "drop" or f.lost_because is not None)
        outcome = RoundOutcome(
            plan=plan,
            fleet=costs.fleet,
            updates=tuple(updates),
            lost=(*diverged, *dropped),
            start_time=time,
            end_time=end,
            broadcast_bits=sum(
                self._broadcast_bits(group.tasks, round_, first=cycle == 0)
                for group in plan.groups
                for cycle in range(group.cycles)
            ),
            past_models=pending.models,
        )
        following = _next_pending(pending, outcome, kept, models, memory)
        return outcome, replace(following, charge=self.cell.charge_after(pending, outcome))

    # -- times --------------------------------------------------------------------------------------------------------

    def _dispatch(self, group: Group, round_: _Round) -> Iterator[Flight]:
        """Yield the flights of a group: every cycle but the last waits for the whole group."""
        start, spent = round_.time, {task.client: NOTHING for task in group.tasks}
        failed: set[int] = set()
        for number in range(group.cycles - 1):
            cycle = self._times(group.tasks, round_, start, first=number == 0)
            start += max((busy(leg.cost) for leg in cycle.values()), default=0.0)
            spent = {client: plus(spent[client], leg.cost) for client, leg in cycle.items()}
            failed |= {client for client, leg in cycle.items() if not leg.delivered}
        last = self._times(group.tasks, round_, start, first=group.cycles == 1)
        for task in group.tasks:
            leg = last[task.client]
            arrival = start + busy(leg.cost)
            cost = plus(spent[task.client], leg.cost)
            delivered = leg.delivered and task.client not in failed
            yield Flight(
                task=task,
                group=group,
                model_version=round_.model.version,
                started_at=round_.time,
                arrival_time=arrival,
                round=round_.index,
                cost=cost,
                lost_because=self._why_lost(task, round_, arrival, cost, delivered=delivered),
            )

    def _times(self, tasks: Sequence[ClientTask], round_: _Round, start: float, *, first: bool) -> Mapping[int, _Leg]:
        """Return what one cycle that starts at `start` costs each client: seconds, bits, joules.

        first : whether it is the round's first cycle, in which missed merges are downloaded.
        """
        if not tasks:
            return {}
        costs = round_.costs
        clients = np.array([task.client for task in tasks])
        power = np.array([task.transmit_power for task in tasks])
        bandwidth = np.array([task.bandwidth for task in tasks])
        down_bits = np.zeros(len(tasks), dtype=np.int64)
        if self.cell.downlink == "unicast":
            missed = [round_.missed_bits(task) if first else 0 for task in tasks]
            down_bits += np.array([costs.downlink_bits(task) for task in tasks]) + np.array(missed)
        shared = self._broadcast_bits(tasks, round_, first=first)
        download = self.cell.download_seconds(clients, start, shared, down_bits, round_.band_share)
        compute = np.array([costs.compute_seconds(task) for task in tasks])
        up_bits = np.array([costs.uplink_bits(task) for task in tasks])
        sent = self.cell.upload(clients, start + download + compute, up_bits, bandwidth, power)
        on_air = np.where(np.isfinite(sent.seconds), sent.seconds, 0.0)
        listening = np.where(np.isfinite(download), download, 0.0) * costs.fleet.receive_power[clients]
        joules = np.array([costs.compute_joules(task) for task in tasks]) + on_air * power + listening
        repeated = sent.bits_on_air.astype(np.int64)
        columns = zip(tasks, download, compute, sent.seconds, repeated, down_bits, joules, sent.delivered, strict=True)
        return {
            task.client: _Leg(TaskCost(float(d), float(c), float(u), int(up), int(down), float(j)), bool(delivered))
            for task, d, c, u, up, down, j, delivered in columns
        }

    def _broadcast_bits(self, tasks: Sequence[ClientTask], round_: _Round, *, first: bool) -> int:
        """Return the bits of the broadcast to a group: what any of its tasks receives, and the merges of the client
        that has missed most (the others have missed a part of the same)."""
        if self.cell.downlink != "broadcast":
            return 0
        missed = max((round_.missed_bits(task) for task in tasks), default=0) if first else 0
        return round_.costs.broadcast_bits(tasks) + missed

    def _why_lost(
        self, task: ClientTask, round_: _Round, arrival: float, cost: TaskCost, *, delivered: bool
    ) -> str | None:
        if not math.isfinite(arrival):
            return "no link"
        if not delivered:
            return "transfer given up"
        charge = self.cell.charge(round_.pending)
        if charge is not None and cost.joules > charge[task.client]:
            return "battery empty"
        return None if self.cell.stays(task.client, arrival) else "vanished"


def _next_pending(
    pending: Pending,
    outcome: RoundOutcome,
    kept: tuple[InFlight, ...],
    models: Mapping[int, ServerModel],
    memory: Mapping[int, Mapping[str, Tensor]],
) -> Pending:
    reports = {update.task.client: update.reports for update in outcome.updates}
    versions = {flight.model_version for flight in kept}
    held = {task.client: max(models) for task in outcome.plan.tasks}
    return Pending(
        in_flight=kept,
        models={version: model for version, model in models.items() if version in versions},
        held_version={**pending.held_version, **held},
        memory={**pending.memory, **{client: m for client, m in memory.items() if m}},
        reports={**pending.reports, **reports},
        round_starts=(*pending.round_starts, outcome.start_time),
    )
