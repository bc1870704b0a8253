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

from airtune.clock import VirtualClock
from airtune.lora import own_tensors, with_own
from airtune.simulation.cell import Cell
from airtune.simulation.costs import CostModel
from airtune.streams import stream
from airtune.types import (
    ClientTask,
    ClientUpdate,
    Cutoff,
    Fleet,
    Group,
    InFlight,
    LostTask,
    Pending,
    Plan,
    RoundOutcome,
    ServerModel,
    TaskCost,
    Trained,
    Trainer,
    TrainingJob,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class _Flight:
    """One task on its way; `lost_because` is set if its update will never be usable."""

    task: ClientTask
    group: Group
    model_version: int
    started_at: float
    arrival_time: float
    round: int
    cost: TaskCost
    lost_because: str | None = None


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
        earlier = [_resume(flight) for flight in pending.in_flight]
        arrived, late, end = _step_to_cutoff([*earlier, *flights], plan.groups, time, self.cell.idle_seconds)
        models = {**pending.models, model.version: model}
        updates, diverged, memory = self._train(arrived, models, pending, costs.fleet)
        kept = tuple(_keep(f) for f in late if f.group.cutoff.late == "keep" and f.lost_because is None)
        dropped = tuple(_lose(f) for f in late if f.group.cutoff.late == "drop" or f.lost_because is not None)
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

    def _dispatch(self, group: Group, round_: _Round) -> Iterator[_Flight]:
        """Yield the flights of a group: every cycle but the last waits for the whole group."""
        start, spent = round_.time, {task.client: _NOTHING for task in group.tasks}
        failed: set[int] = set()
        for number in range(group.cycles - 1):
            cycle = self._times(group.tasks, round_, start, first=number == 0)
            start += max((_busy(leg.cost) for leg in cycle.values()), default=0.0)
            spent = {client: _plus(spent[client], leg.cost) for client, leg in cycle.items()}
            failed |= {client for client, leg in cycle.items() if not leg.delivered}
        last = self._times(group.tasks, round_, start, first=group.cycles == 1)
        for task in group.tasks:
            leg = last[task.client]
            arrival = start + _busy(leg.cost)
            cost = _plus(spent[task.client], leg.cost)
            delivered = leg.delivered and task.client not in failed
            yield _Flight(
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
        return None if self.cell.stays(task.client, round_.time, arrival) else "vanished"

    # -- learning -----------------------------------------------------------------------------------------------------

    def _train(
        self, arrived: Sequence[_Flight], models: Mapping[int, ServerModel], pending: Pending, fleet: Fleet
    ) -> tuple[list[ClientUpdate], tuple[LostTask, ...], dict[int, Mapping[str, object]]]:
        """Train what arrived, code it, decode it; a client whose loss is not finite is lost and named."""
        bases = self._group_models(arrived, models, fleet)
        jobs = [_job(f, bases[id(f)], pending.memory.get(f.task.client, {})) for f in arrived]
        updates: list[ClientUpdate] = []
        lost: list[LostTask] = []
        memory: dict[int, Mapping[str, object]] = {}
        for flight, job, trained in zip(arrived, jobs, self.trainer.train(jobs), strict=True):
            if not math.isfinite(trained.reports.get("loss", 0.0)):
                lost.append(LostTask(flight.task, "diverged", flight.cost))
                continue
            update, memory[flight.task.client] = self._upload(flight, job, trained, bases[id(flight)])
            updates.append(update)
        return updates, tuple(lost), memory

    def _group_models(
        self, arrived: Sequence[_Flight], models: Mapping[int, ServerModel], fleet: Fleet
    ) -> dict[int, ServerModel]:
        """Return the model from which each flight's last cycle starts, running the inner cycles of its group."""
        bases: dict[int, ServerModel] = {}
        for flight in arrived:
            bases[id(flight)] = models[flight.model_version]
        for group in {id(f.group): f.group for f in arrived if f.group.cycles > 1}.values():
            members = [f for f in arrived if f.group is group]
            model = models[members[0].model_version]
            for cycle in range(group.cycles - 1):
                model = self._inner_cycle(members, model, cycle, fleet)
            bases.update({id(f): model for f in members})
        return bases

    def _inner_cycle(self, members: Sequence[_Flight], model: ServerModel, cycle: int, fleet: Fleet) -> ServerModel:
        jobs = [TrainingJob(f.task, model, f.round, cycle) for f in members]
        results = zip(members, jobs, self.trainer.train(jobs), strict=True)
        updates = tuple(
            self._upload(flight, job, trained, model)[0]
            for flight, job, trained in results
            if math.isfinite(trained.reports.get("loss", 0.0))
        )
        first = members[0]
        inner = RoundOutcome(Plan((first.group,)), fleet, updates, (), first.started_at, first.arrival_time)
        assert first.group.combine is not None, (
            "Plan.check lets no group with cycles pass without a way to combine them"
        )
        return first.group.combine(model, inner)

    def _upload(
        self, flight: _Flight, job: TrainingJob, trained: Trained, base: ServerModel
    ) -> tuple[ClientUpdate, Mapping[str, object]]:
        """Return the decoded upload and the client's new memory; what it trained and does not send stays there."""
        task = flight.task
        local = task.train.put(base.adapter, trained.values)
        start = task.send.take(base.adapter)
        rng = stream(self.seed, "compressor", job.round, task.client, job.cycle)
        payload, memory = task.compressor.encode(task.send, task.send.take(local), start, job.memory, rng)
        bound = task.compressor.bits(task.send, base.adapter.shape)
        if payload.bits > bound:
            raise AssertionError(f"client {task.client}: the payload has {payload.bits} bits, its bound is {bound}")
        saved = bound - payload.bits
        cost = replace(flight.cost, uplink_bits=flight.cost.uplink_bits - saved)
        update = ClientUpdate(
            task=task,
            values=task.compressor.decode(task.send, payload, start),
            model_version=flight.model_version,
            started_at=flight.started_at,
            arrival_time=flight.arrival_time,
            cost=cost,
            reports={**trained.reports, **self._measured(flight)},
        )
        return update, {**memory, **own_tensors(task.train, task.send, trained.values)}

    def _measured(self, flight: _Flight) -> dict[str, float]:
        """Return what a device would measure of its own work: the seconds that the clock charged."""
        forward, backward = self.costs.compute_flops(flight.task)
        share = forward / (forward + backward) if forward + backward else 0.0
        cycles = flight.group.cycles
        return {
            "forward_seconds": flight.cost.compute_seconds * share / cycles,
            "backward_seconds": flight.cost.compute_seconds * (1 - share) / cycles,
            "upload_seconds": flight.cost.upload_seconds / cycles,
            "download_seconds": flight.cost.download_seconds / cycles,
        }


# ------------------------------------------------------------------------------------------------------------- cut-off


def _step_to_cutoff(
    flights: Sequence[_Flight], groups: Sequence[Group], start: float, idle_seconds: float
) -> tuple[list[_Flight], list[_Flight], float]:
    """Step the clock to the end of the round: return arrivals in order, everything else, and the end in seconds.

    Each group waits for its own cut-off; the round ends with the last of them. What was in flight before counts
    towards the first group. A task that is lost holds up its group until the moment its update was due.
    """
    ends = [_group_end(_members(flights, groups, index), group, start) for index, group in enumerate(groups)]
    if not groups:
        ends = [_group_end(flights, Group(()), start)]
    end = max(ends)
    if end <= start:  # nobody took part
        end = start + idle_seconds
    clock: VirtualClock[_Flight] = VirtualClock(start)
    for flight in flights:
        if math.isfinite(flight.arrival_time):
            clock.schedule(max(flight.arrival_time, start), flight)
    limits = {id(group): limit for group, limit in zip(groups, ends, strict=False)}
    arrived: list[_Flight] = []
    while (due := clock.peek()) is not None and due <= end:
        flight = clock.step()
        if flight.lost_because is None and due <= limits.get(id(flight.group), end):
            arrived.append(flight)
    taken = {id(flight) for flight in arrived}
    return arrived, [flight for flight in flights if id(flight) not in taken], end


def _members(flights: Sequence[_Flight], groups: Sequence[Group], index: int) -> list[_Flight]:
    ours = {id(group) for group in groups}
    return [f for f in flights if f.group is groups[index] or (index == 0 and id(f.group) not in ours)]


def _group_end(flights: Sequence[_Flight], group: Group, start: float) -> float:
    cutoff = group.cutoff
    good = sorted(max(f.arrival_time, start) for f in flights if f.lost_because is None)
    due = [f.arrival_time if math.isfinite(f.arrival_time) else start + _busy_before_upload(f) for f in flights]
    end = max(due, default=start)
    if cutoff.min_updates is not None and len(good) >= cutoff.min_updates:
        end = good[max(cutoff.min_updates, 1) - 1]
    if cutoff.deadline is not None:
        end = min(end, start + cutoff.deadline)
    return max(end, start)


# ----------------------------------------------------------------------------------------------------------- small ones

_NOTHING = TaskCost(0.0, 0.0, 0.0, 0, 0, 0.0)
_EARLIER = Group((), Cutoff(late="keep"))  # the group of what was in flight before this round


def _job(flight: _Flight, base: ServerModel, memory: Mapping[str, Tensor]) -> TrainingJob:
    """Return the job of a flight's last cycle; a client that has tensors of its own starts from them."""
    adapter = with_own(base.adapter, flight.task.train, memory)
    model = base if adapter is base.adapter else replace(base, adapter=adapter)
    return TrainingJob(flight.task, model, flight.round, flight.group.cycles - 1, memory)


def _busy(cost: TaskCost) -> float:
    return cost.download_seconds + cost.compute_seconds + cost.upload_seconds


def _busy_before_upload(flight: _Flight) -> float:
    return flight.cost.download_seconds + flight.cost.compute_seconds


def _plus(a: TaskCost, b: TaskCost) -> TaskCost:
    return TaskCost(
        a.download_seconds + b.download_seconds,
        a.compute_seconds + b.compute_seconds,
        a.upload_seconds + b.upload_seconds,
        a.uplink_bits + b.uplink_bits,
        a.downlink_bits + b.downlink_bits,
        a.joules + b.joules,
    )


def _resume(flight: InFlight) -> _Flight:
    return _Flight(
        task=flight.task,
        group=_EARLIER,
        model_version=flight.model_version,
        started_at=flight.started_at,
        arrival_time=flight.arrival_time,
        round=flight.round,
        cost=flight.cost,
    )


def _keep(flight: _Flight) -> InFlight:
    return InFlight(
        task=flight.task,
        model_version=flight.model_version,
        started_at=flight.started_at,
        arrival_time=flight.arrival_time,
        round=flight.round,
        cost=flight.cost,
    )


def _lose(flight: _Flight) -> LostTask:
    return LostTask(flight.task, flight.lost_because or "late", _finite(flight.cost))


def _finite(cost: TaskCost) -> TaskCost:
    return cost if math.isfinite(cost.upload_seconds) else replace(cost, upload_seconds=0.0, uplink_bits=0)


def _next_pending(
    pending: Pending,
    outcome: RoundOutcome,
    kept: tuple[InFlight, ...],
    models: Mapping[int, ServerModel],
    memory: Mapping[int, Mapping[str, object]],
) -> Pending:
    reports = {update.task.client: update.reports for update in outcome.updates}
    versions = {flight.model_version for flight in kept}
    held = {task.client: max(models) for task in outcome.plan.tasks}
    return Pending(
        in_flight=kept,
        models={version: model for version, model in models.items() if version in versions},
        held_version={**pending.held_version, **held},
        memory={**pending.memory, **{client: m for client, m in memory.items() if m}},  # pyright: ignore[reportArgumentType]
        reports={**pending.reports, **reports},
        round_starts=(*pending.round_starts, outcome.start_time),
    )
