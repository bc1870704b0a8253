"""A small simulated world for tests: a tiny BERT's sizes, a few devices, and a trainer that needs no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from airtune.compression.dense import Dense
from airtune.devices.latency import TransformerShape
from airtune.devices.profiles import load_profile
from airtune.lora import Adapter, AdapterSlice, LoraFactors
from airtune.simulation.cell import Cell
from airtune.simulation.costs import CostModel
from airtune.simulation.fleet import fleet_of
from airtune.simulation.runner import SimulatedRunner
from airtune.types import ClientTask, LocalTraining, ServerModel, Trained, TrainingJob

LAYERS, HIDDEN, RANK = 3, 16, 4
DEVICES = ("jetson-tx2", "jetson-xavier-nx", "jetson-agx-xavier", "raspberry-pi-5")
BERT = {
    "model_type": "bert",
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 32,
}


def make_adapter(seed: int = 0, rank: int = RANK) -> Adapter:
    """Return a random adapter on query and value of every layer, with a classifier head."""
    generator = torch.Generator().manual_seed(seed)
    factors, layer = {}, {}
    for index in range(LAYERS):
        for target in ("query", "value"):
            name = f"bert.encoder.layer.{index}.attention.self.{target}"
            factors[name] = LoraFactors(
                A=torch.randn(rank, HIDDEN, generator=generator),
                B=torch.randn(HIDDEN, rank, generator=generator),
                scaling=2.0,
            )
            layer[name] = index
    head = {"classifier.weight": torch.randn(2, HIDDEN, generator=generator), "classifier.bias": torch.zeros(2)}
    return Adapter(factors, {name: (name,) for name in factors}, layer, LAYERS, head)


@dataclass
class AddOne:
    """A trainer that adds one to everything a client trains, and remembers what it was asked."""

    jobs: list[TrainingJob] = field(default_factory=list)
    diverging: frozenset[int] = frozenset()

    def train(self, jobs: Sequence[TrainingJob]) -> list[Trained]:
        self.jobs.extend(jobs)
        return [Trained(add_one(job), self._reports(job)) for job in jobs]

    def _reports(self, job: TrainingJob) -> dict[str, float]:
        return {"loss": float("nan") if job.task.client in self.diverging else 1.0 / (1 + job.task.client)}


def add_one(job: TrainingJob) -> Adapter:
    values = job.task.train.take(job.model.adapter)
    factors = {
        name: replace(
            f,
            A=f.A + 1.0 if "A" in job.task.train.tensors else f.A,
            B=f.B + 1.0 if "B" in job.task.train.tensors else f.B,
        )
        for name, f in values.factors.items()
    }
    return values.with_factors(factors, {name: tensor + 1.0 for name, tensor in values.extras.items()})


def make_cell(clients: int = 4, seed: int = 0, num_examples: Sequence[int] | None = None, **changes: Any) -> Cell:
    """Return a cell whose devices go round the list of profiles."""
    examples = np.array([20 + 10 * c for c in range(clients)] if num_examples is None else num_examples)
    fleet = fleet_of([load_profile(DEVICES[c % len(DEVICES)]) for c in range(clients)], examples)
    costs = CostModel(
        fleet=fleet,
        shape=make_adapter().shape,
        network=TransformerShape.from_config(BERT),
        tokens=np.full(clients, 12.0),
        constant_bytes=0.0,
    )
    return Cell(nominal=fleet, costs=costs, seed=seed, **changes)


def make_runner(cell: Cell, trainer: AddOne | None = None) -> SimulatedRunner:
    return SimulatedRunner(cell, cell.costs, trainer or AddOne(), cell.seed)


def make_task(client: int, adapter: Adapter, **changes: Any) -> ClientTask:
    whole = AdapterSlice.everything(adapter.shape)
    task = ClientTask(
        client=client,
        receive=whole,
        train=whole,
        send=whole,
        training=LocalTraining(local_steps=3, batch_size=4),
        compressor=Dense(),
        bandwidth=1e6,
        transmit_power=0.1,
    )
    return replace(task, **changes)


def make_model(seed: int = 0) -> ServerModel:
    return ServerModel(make_adapter(seed))
