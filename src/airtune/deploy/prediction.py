"""A round's predicted seconds beside its measured ones, and what real devices add: a fit of a few numbers.

The one physics counts what training and the radio need. On real devices Flower starts a process for each message and
asks for messages at intervals, and TCP adds headers. `TimeModel` puts that into five numbers, fitted to the rounds of a
run: a client's seconds are

    fixed_s + overhead_flops / speed + compute * compute_s + download * download_s + upload * upload_s

with the predicted seconds of its parts. Nothing fitted: 0, 0, 1, 1, 1. The form is [our choice].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from scipy.optimize import nnls

from airtune.errors import InputError
from airtune.experiment.build import Bench
from airtune.experiment.store import RunStore
from airtune.simulation.runner import SimulatedRunner
from airtune.types import (
    ClientTask,
    Environment,
    Floats,
    Pending,
    Plan,
    RoundOutcome,
    Runner,
    ServerModel,
    TaskCost,
    Trained,
    TrainingJob,
)

FEWEST = 8  # clients' rounds that a fit of five numbers needs [our choice]
PRIOR = 0.5  # weight of "a factor is 1" against one observation [our choice]: parts that go together stay apart


@dataclass(frozen=True)
class ClientSeconds:
    """What was predicted for one client in one round.

    download_s, compute_s, upload_s : s. flops_per_second : its speed as the plan knew it.
    up_bit_s, down_bit_s : bit/s of the link that the plan gave it.
    """

    client: int
    download_s: float
    compute_s: float
    upload_s: float
    flops_per_second: float
    up_bit_s: float
    down_bit_s: float


@dataclass(frozen=True)
class MeasuredRound:
    """One round of a run: predicted and measured s, and of each client that arrived its prediction and measured s."""

    round: int
    predicted_s: float
    measured_s: float
    clients: tuple[tuple[ClientSeconds, float], ...]


@dataclass(frozen=True)
class TimeModel:
    """See the module."""

    fixed_s: float = 0.0
    overhead_flops: float = 0.0
    compute: float = 1.0
    download: float = 1.0
    upload: float = 1.0

    def seconds(self, predicted: ClientSeconds) -> float:
        """Return the seconds of one client, s."""
        return float(_features(predicted) @ np.array(list(asdict(self).values())))

    def round_seconds(self, predicted: Iterable[ClientSeconds]) -> float:
        """Return the seconds of a round that waits for all its clients, s."""
        return max((self.seconds(each) for each in predicted), default=0.0)


def fit(rounds: Sequence[MeasuredRound]) -> TimeModel:
    """Return the model with the least squared relative error over all clients of some rounds; no number is negative.

    Raises
    ------
    InputError : there are too few observations.
    """
    pairs = [pair for each in rounds for pair in each.clients if pair[1] > 0]
    if len(pairs) < FEWEST:
        raise InputError(f"--flower: {len(pairs)} clients' rounds have predictions; valid: at least {FEWEST}")
    rows = np.stack([_features(predicted) / measured for predicted, measured in pairs])
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-30)
    prior = PRIOR * np.eye(5)[2:]
    system = np.vstack([rows, prior]) / scale
    wanted = np.concatenate([np.ones(len(pairs)), np.full(3, PRIOR)])
    solution, _ = nnls(system, wanted)
    return TimeModel(*(float(value) for value in solution / scale))


def relative_errors(rounds: Sequence[MeasuredRound], model: TimeModel | None = None) -> list[float]:
    """Return ``predicted / measured - 1`` of each round: the plan's own prediction, or the model's."""
    return [
        (each.predicted_s if model is None else model.round_seconds(c for c, _ in each.clients)) / each.measured_s - 1.0
        for each in rounds
    ]


def read_rounds(folder: Path) -> list[MeasuredRound]:
    """Return the rounds of a run in which every client arrived and whose plan was predicted.

    Raises
    ------
    InputError : the folder is not a run.
    """
    store = RunStore(folder)
    store.read_head()
    return [found for line in store.rounds() if (found := _measured(line)) is not None]


def _measured(line: Mapping[str, Any]) -> MeasuredRound | None:
    notes = cast("Mapping[str, Any]", line.get("notes") or {})
    if "predicted" not in notes or not line["arrived"] or line["dropped"]:
        return None
    if any(value is None for entry in notes["predicted"] for value in entry.values()):
        return None  # a client without a link, which has no seconds
    predicted = {int(entry["client"]): ClientSeconds(**entry) for entry in notes["predicted"]}
    seconds = {c["client"]: c["download_s"] + c["compute_s"] + c["upload_s"] for c in line["clients"]}
    if set(predicted) != set(seconds):
        return None
    pairs = tuple((predicted[client], float(seconds[client])) for client in sorted(predicted))
    return MeasuredRound(int(line["round"]), float(notes["predicted_s"]), float(line["duration_s"]), pairs)


def _features(predicted: ClientSeconds) -> np.ndarray[Any, np.dtype[np.float64]]:
    slowness = 1.0 / predicted.flops_per_second
    return np.array([1.0, slowness, predicted.compute_s, predicted.download_s, predicted.upload_s])


# ---------------------------------------------------------------------------------------------------------- predicting


@dataclass(frozen=True)
class Untrained:
    """A trainer that returns what it is given: the simulator then tells the time alone."""

    def train(self, jobs: Sequence[TrainingJob]) -> Sequence[Trained]:
        """Return the start values of each job."""
        return [Trained(job.task.train.take(job.model.adapter), {"loss": 0.0}) for job in jobs]


Prediction = Callable[[Plan, ServerModel, Pending, int, float], tuple[list[ClientSeconds], float]]


@dataclass(frozen=True)
class Simulated:
    """The simulator's seconds of a plan: those of the clients, and of the round with its cut-off.

    bench : the experiment's objects.
    """

    bench: Bench

    def __call__(
        self, plan: Plan, model: ServerModel, pending: Pending, round_index: int, time: float
    ) -> tuple[list[ClientSeconds], float]:
        """Return each client's prediction and the round's seconds, s."""
        costs = replace(self.bench.cell.costs, shape=model.adapter.shape)
        simulator = SimulatedRunner(self.bench.cell, costs, Untrained(), self.bench.experiment.seed)
        outcome, _ = simulator.run(plan, model, pending, round_index=round_index, time=time)
        speeds = outcome.fleet.flops_per_second
        clients = [_client_seconds(update.task, update.cost, speeds) for update in outcome.updates]
        return clients, outcome.end_time - outcome.start_time


@dataclass(frozen=True)
class Observed:
    """The seconds that a plan takes by what planners know: measured speeds and rates, where devices have measured.

    A round is predicted to wait for its slowest client. environment : shows planners the fleet.
    """

    environment: Environment

    def __call__(
        self, plan: Plan, model: ServerModel, pending: Pending, round_index: int, time: float
    ) -> tuple[list[ClientSeconds], float]:
        """Return each client's prediction and the round's seconds, s."""
        seen = self.environment.observe(round_index, time, pending, model)
        clients: list[ClientSeconds] = []
        for task in plan.tasks:
            who = np.array([task.client])
            up_rate = seen.links.uplink_rate(who, np.array([task.bandwidth]), np.array([task.transmit_power]))
            up, down = seen.costs.uplink_bits(task), seen.costs.downlink_bits(task)
            download, upload = _over(down, seen.links.downlink_rate(who)), _over(up, up_rate)
            cost = TaskCost(download, seen.costs.compute_seconds(task), upload, up, down, 0.0)
            clients.append(_client_seconds(task, cost, seen.fleet.flops_per_second))
        return clients, TimeModel().round_seconds(clients)


@dataclass(frozen=True)
class Predicting:
    """A runner that puts the predicted seconds of each plan on record before another runner carries it out.

    Attributes
    ----------
    inner : carries the plan out. prediction : of its seconds.
    before : is told each client's prediction before the round begins.
    """

    inner: Runner
    prediction: Prediction
    before: Callable[[Sequence[ClientSeconds]], None] | None = None

    def run(
        self, plan: Plan, model: ServerModel, pending: Pending, *, round_index: int, time: float
    ) -> tuple[RoundOutcome, Pending]:
        """Run one round; its plan's notes hold ``predicted`` and ``predicted_s``."""
        predicted, seconds = self.prediction(plan, model, pending, round_index, time)
        if self.before is not None:
            self.before(predicted)
        notes = {**plan.notes, "predicted": [asdict(each) for each in predicted], "predicted_s": seconds}
        return self.inner.run(replace(plan, notes=notes), model, pending, round_index=round_index, time=time)


def _over(bits: int, rate: Floats) -> float:
    return bits / float(rate[0]) if rate[0] > 0 else float("inf")


def _client_seconds(task: ClientTask, cost: TaskCost, flops_per_second: Floats) -> ClientSeconds:
    return ClientSeconds(
        client=task.client,
        download_s=cost.download_seconds,
        compute_s=cost.compute_seconds,
        upload_s=cost.upload_seconds,
        flops_per_second=float(flops_per_second[task.client]),
        up_bit_s=cost.uplink_bits / cost.upload_seconds if cost.upload_seconds > 0 else 0.0,
        down_bit_s=cost.downlink_bits / cost.download_seconds if cost.download_seconds > 0 else 0.0,
    )
