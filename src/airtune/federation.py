"""The round loop. It exists once, and knows neither radio nor model.

Observe, plan, check, run, aggregate, evaluate, record: simulation and Flower are two `Runner`s under it, every method
is a `Method` in it. What must survive an interruption is in `Progress`, which the loop hands out after each round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

from airtune.errors import NoResultError
from airtune.lora import AdapterSlice, has_own, with_own
from airtune.streams import stream
from airtune.types import (
    ClientRecord,
    Environment,
    LostTask,
    Method,
    Pending,
    RoundOutcome,
    RoundRecord,
    Runner,
    ServerModel,
)

Evaluate = Callable[[ServerModel], Mapping[str, float]]
Diagnose = Callable[[ServerModel, RoundOutcome, ServerModel], Mapping[str, float]]


@dataclass(frozen=True)
class Stop:
    """When a run ends: whichever of the given limits comes first.

    rounds : number of rounds. fleet_seconds : virtual time. target : value of `metric` that is good enough.
    """

    rounds: int | None = 10
    fleet_seconds: float | None = None
    target: float | None = None
    metric: str = "accuracy"
    direction: Literal["max", "min"] = "max"

    def reached(self, progress: Progress, metrics: Mapping[str, float]) -> bool:
        """Return whether the run is over after a round with these metrics."""
        if self.rounds is not None and progress.round >= self.rounds:
            return True
        if self.fleet_seconds is not None and progress.time >= self.fleet_seconds:
            return True
        if self.target is None or self.metric not in metrics:
            return False
        value = metrics[self.metric]
        return value >= self.target if self.direction == "max" else value <= self.target


@dataclass(frozen=True)
class Progress:
    """Everything the loop needs to go on: what a checkpoint holds."""

    round: int
    time: float
    model: ServerModel
    state: Any
    pending: Pending = field(default_factory=Pending)


@runtime_checkable
class Prepares(Protocol):
    """A method that starts from another adapter than the model's own: orthonormal rows, a core ..."""

    def prepare(self, model: ServerModel) -> ServerModel:
        """Return the model before round 1, given the one that was built from the base model's configuration."""
        ...


def prepared(method: object, model: ServerModel) -> ServerModel:
    """Return the model that a method starts from: the given one if it does not prepare another."""
    return method.prepare(model) if isinstance(method, Prepares) else model


@runtime_checkable
class Diagnoses(Protocol):
    """A method that puts more on record than costs and metrics: what the arrived factors show, its own queues ..."""

    def diagnose(self, state: Any, outcome: RoundOutcome) -> Mapping[str, float]:
        """Return numbers by name for `RoundRecord.diagnostics`, given the state after the round."""
        ...


def begin(method: Method[Any], model: ServerModel, environment: Environment) -> Progress:
    """Return the progress before round 1: a method that wants another start prepares the model first."""
    model = prepared(method, model)
    return Progress(round=0, time=0.0, model=model, state=method.init(model, environment.fleet))


def run(
    method: Method[Any],
    progress: Progress,
    environment: Environment,
    runner: Runner,
    *,
    stop: Stop,
    seed: int,
    evaluate: Evaluate,
    evaluate_every: int = 1,
    diagnose: Diagnose | None = None,
) -> Iterator[tuple[Progress, RoundRecord]]:
    """Run rounds from `progress` until `stop`, yielding the new progress and the record after each.

    `diagnose` looks at every round, whatever the method; a method may add diagnostics of its own (`Diagnoses`).

    From round 0 the first record is the evaluation before training. The last round is always evaluated. A resumed run
    (progress from a checkpoint) yields exactly what the uninterrupted one would have.

    Raises
    ------
    PlanError : the method planned something the fleet cannot do.
    NoResultError : the model is no longer finite.
    """
    metrics: Mapping[str, float] = {}
    if progress.round == 0:
        metrics = evaluate(progress.model)
        yield progress, _zeroth_record(metrics)
    while not stop.reached(progress, metrics):
        index = progress.round + 1
        seen = environment.observe(index, progress.time, progress.pending, progress.model)
        plan = method.plan(progress.state, seen, stream(seed, "plan", index))
        plan.check(seen)
        outcome, pending = runner.run(plan, progress.model, progress.pending, round_index=index, time=progress.time)
        model, state = method.aggregate(progress.state, progress.model, outcome)
        found = dict(diagnose(progress.model, outcome, model)) if diagnose is not None else {}
        progress = Progress(index, outcome.end_time, model, state, pending)
        due = index % evaluate_every == 0 or stop.reached(progress, {})
        metrics = _evaluated(evaluate, progress) if due else {}
        found |= method.diagnose(state, outcome) if isinstance(method, Diagnoses) else {}
        yield progress, replace(_record(progress, seen.shape, outcome, metrics), diagnostics=found)
        if any(not math.isfinite(value) for value in metrics.values()):
            raise NoResultError(f"round {index}: the model diverged ({dict(metrics)}); lower training.learning_rate")


def _evaluated(evaluate: Evaluate, progress: Progress) -> Mapping[str, float]:
    """Return the metrics of the model, or the means over the clients that have a model of their own."""
    memories = [memory for _, memory in sorted(progress.pending.memory.items()) if has_own(memory)]
    if not memories:
        return evaluate(progress.model)
    adapter = progress.model.adapter
    whole = AdapterSlice.everything(adapter.shape)
    found = [evaluate(replace(progress.model, adapter=with_own(adapter, whole, memory))) for memory in memories]
    return {name: sum(metrics[name] for metrics in found) / len(found) for name in found[0]}


def _zeroth_record(metrics: Mapping[str, float]) -> RoundRecord:
    return RoundRecord(0, 0.0, 0.0, (), (), (), 0, 0, 0.0, None, metrics, (), {}, {})


def _record(progress: Progress, shape: Any, outcome: RoundOutcome, metrics: Mapping[str, float]) -> RoundRecord:
    losses = [
        (u.reports["loss"], outcome.fleet.num_examples[u.task.client]) for u in outcome.updates if "loss" in u.reports
    ]
    weight = sum(int(n) for _, n in losses)
    return RoundRecord(
        round=progress.round,
        time_s=outcome.end_time,
        duration_s=outcome.end_time - outcome.start_time,
        cohort=tuple(task.client for task in outcome.plan.tasks),
        arrived=tuple(update.task.client for update in outcome.updates),
        dropped=tuple((lost.task.client, lost.reason) for lost in outcome.lost),
        uplink_bits=outcome.uplink_bits,
        downlink_bits=outcome.downlink_bits,
        energy_j=outcome.joules,
        train_loss=sum(loss * int(n) for loss, n in losses) / weight if weight else None,
        metrics=metrics,
        clients=tuple(_client_record(part, shape, outcome) for part in (*outcome.updates, *outcome.lost)),
        notes=outcome.plan.notes,
        diagnostics={},
    )


def _client_record(part: Any, shape: Any, outcome: RoundOutcome) -> ClientRecord:
    task, cost = part.task, part.cost
    busy = cost.download_seconds + cost.compute_seconds + cost.upload_seconds
    end = outcome.end_time if isinstance(part, LostTask) else part.arrival_time
    return ClientRecord(
        client=task.client,
        components=task.train.total_components(),
        depth=task.train.depth(shape),
        bandwidth_hz=task.bandwidth,
        bits_up=cost.uplink_bits,
        bits_down=cost.downlink_bits,
        download_s=cost.download_seconds,
        compute_s=cost.compute_seconds,
        upload_s=cost.upload_seconds,
        wait_s=max(outcome.end_time - max(end, outcome.start_time), 0.0) if busy else 0.0,
        energy_j=cost.joules,
    )
