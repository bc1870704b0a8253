"""What arrived is trained, coded and decoded. Nothing here knows time: that has been decided before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from airtune.compression.drop_error import drop_reports
from airtune.lora import own_tensors, with_own
from airtune.simulation.costs import CostModel
from airtune.simulation.flights import Flight
from airtune.streams import stream
from airtune.types import (
    ClientUpdate,
    Fleet,
    LostTask,
    Plan,
    RoundOutcome,
    ServerModel,
    Trained,
    Trainer,
    TrainingJob,
)

if TYPE_CHECKING:
    from torch import Tensor

Memory = Mapping[str, "Tensor"]


@dataclass(frozen=True)
class Learning:
    """Trains the clients whose updates arrive.

    Attributes
    ----------
    trainer : trains them. costs : for what a device would measure of its own work. seed : of the experiment.
    """

    trainer: Trainer
    costs: CostModel
    seed: int

    def train(
        self,
        arrived: Sequence[Flight],
        models: Mapping[int, ServerModel],
        memories: Mapping[int, Memory],
        fleet: Fleet,
    ) -> tuple[list[ClientUpdate], tuple[LostTask, ...], dict[int, Memory]]:
        """Train what arrived, code it, decode it; a client whose loss is not finite is lost and named."""
        bases = self._group_models(arrived, models, fleet)
        jobs = [_job(f, bases[id(f)], memories.get(f.task.client, {})) for f in arrived]
        updates: list[ClientUpdate] = []
        lost: list[LostTask] = []
        memory: dict[int, Memory] = {}
        for flight, job, trained in zip(arrived, jobs, self.trainer.train(jobs), strict=True):
            if not math.isfinite(trained.reports.get("loss", 0.0)):
                lost.append(LostTask(flight.task, "diverged", flight.cost))
                continue
            update, memory[flight.task.client] = self._upload(flight, job, trained, bases[id(flight)])
            updates.append(update)
        return updates, tuple(lost), memory

    def _group_models(
        self, arrived: Sequence[Flight], models: Mapping[int, ServerModel], fleet: Fleet
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

    def _inner_cycle(self, members: Sequence[Flight], model: ServerModel, cycle: int, fleet: Fleet) -> ServerModel:
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
        self, flight: Flight, job: TrainingJob, trained: Trained, base: ServerModel
    ) -> tuple[ClientUpdate, Memory]:
        """Return the decoded upload and the client's new memory; what it trained and does not send stays there."""
        task = flight.task
        local = task.train.put(base.adapter, trained.values)
        start, sent = task.send.take(base.adapter), task.send.take(local)
        rng = stream(self.seed, "compressor", job.round, task.client, job.cycle)
        payload, memory = task.compressor.encode(task.send, sent, start, job.memory, rng)
        bound = task.compressor.bits(task.send, base.adapter.shape)
        if payload.bits > bound:
            raise AssertionError(f"client {task.client}: the payload has {payload.bits} bits, its bound is {bound}")
        saved = bound - payload.bits
        cost = replace(flight.cost, uplink_bits=flight.cost.uplink_bits - saved)
        values = task.compressor.decode(task.send, payload, start)
        update = ClientUpdate(
            task=task,
            values=values,
            model_version=flight.model_version,
            started_at=flight.started_at,
            arrival_time=flight.arrival_time,
            cost=cost,
            reports={
                **trained.reports,
                **self._measured(flight),
                **drop_reports(task.compressor, sent, values),
            },
        )
        return update, {**memory, **own_tensors(task.train, task.send, trained.values)}

    def _measured(self, flight: Flight) -> dict[str, float]:
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


def _job(flight: Flight, base: ServerModel, memory: Mapping[str, Tensor]) -> TrainingJob:
    """Return the job of a flight's last cycle; a client that has tensors of its own starts from them."""
    adapter = with_own(base.adapter, flight.task.train, memory)
    model = base if adapter is base.adapter else replace(base, adapter=adapter)
    return TrainingJob(flight.task, model, flight.round, flight.group.cycles - 1, memory)
