"""From a configuration to the objects of a run: data, base model, fleet, cell, runner. This is where torch comes in.

`Workshop` keeps what several runs share, so that a comparison loads the base model and reads the data once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from airtune.devices.latency import TransformerShape
from airtune.errors import InputError
from airtune.experiment.config import Experiment, read_experiment
from airtune.experiment.hints import Plain
from airtune.experiment.sections import Engine
from airtune.experiment.world import cell_of, nominal_fleet
from airtune.federation import Stop, prepared
from airtune.lora import AdapterShape
from airtune.scheduling.work import ChoosesRanks
from airtune.simulation.cell import Cell
from airtune.simulation.costs import CostModel
from airtune.simulation.grouped import GroupedTrainer
from airtune.simulation.ray_runner import RayTrainer
from airtune.simulation.runner import SimulatedRunner
from airtune.training.data import DataConfig
from airtune.training.evaluation import evaluate
from airtune.training.examples import Examples
from airtune.training.loading import load_model
from airtune.training.local import LocalTrainer
from airtune.training.model import FederatedModel
from airtune.training.partition import Indices, label_counts
from airtune.training.shapes import LINEAR_BYTES, ModelConfig
from airtune.training.token_store import token_splits
from airtune.training.topics import with_topics
from airtune.types import ServerModel, Trainer

WORKER_GROUP = 8  # clients that a Ray worker trains together, where nothing is said [our choice]


@dataclass(frozen=True)
class Tokens:
    """The rows of one task as numbers (tokens, or pixels); `validation` is None where none was asked for."""

    train: Examples
    test: Examples
    validation: Examples | None

    def split(self, name: str) -> Examples:
        """Return the rows that a run is measured on: "test" or "validation"."""
        if name == "test":
            return self.test
        if self.validation is None:
            raise InputError("evaluation.split: there are no validation rows; valid: test, or set data.validation_rows")
        return self.validation


@dataclass
class Workshop:
    """What runs share: base models and tokens, made when first needed."""

    models: dict[Any, FederatedModel] = field(default_factory=dict[Any, FederatedModel])
    rows: dict[Any, Tokens] = field(default_factory=dict[Any, Tokens])

    def tokens(self, data: DataConfig, model: ModelConfig) -> Tokens:
        """Return the rows of a task as numbers."""
        key = (data, model.name, model.task)
        if key not in self.rows:
            splits = token_splits(data, model.name, task=model.task)
            train = with_topics(splits["train"], data.topics, data.split_seed)
            self.rows[key] = Tokens(train, splits["test"], splits.get("validation"))
        return self.rows[key]

    def model(self, config: ModelConfig, engine: Engine, num_labels: int | None) -> FederatedModel:
        """Return the base model; only one is kept in memory."""
        key = (config, num_labels, engine.precision, engine.device, engine.prefix_cache)
        if key not in self.models:
            self.models.clear()
            self.models[key] = load_model(
                config, num_labels=num_labels, precision=engine.precision, device=engine.device
            )
            self.models[key].cache_prefix(engine.prefix_cache)
        return self.models[key]


@dataclass(frozen=True)
class Bench:
    """Everything a run needs, ready to start.

    Attributes
    ----------
    experiment : with every automatic choice made.
    federated : the base model. start : the federation's model before the method prepares it for round 1.
    tokens : the rows. clients : client -> its training rows.
    cell, runner : the world, and what acts in it.
    metric, direction : what the run is judged by.
    """

    experiment: Experiment
    federated: FederatedModel
    start: ServerModel
    tokens: Tokens
    clients: list[Indices]
    cell: Cell
    runner: SimulatedRunner
    metric: str
    direction: str

    @property
    def stop(self) -> Stop:
        """Return the limits of the round loop."""
        limits = self.experiment.stop
        direction = "max" if self.direction == "max" else "min"
        return Stop(limits.rounds, limits.fleet_seconds, limits.target, self.metric, direction)

    def evaluate(self, model: ServerModel) -> Mapping[str, float]:
        """Return the metrics of a model on the run's evaluation rows."""
        chosen = self.experiment.evaluation
        return evaluate(self.federated, model, self.tokens.split(chosen.split), batch_size=chosen.batch_size)


def resolved(experiment: Experiment) -> Experiment:
    """Return the experiment with every automatic choice made, as run.json stores it."""
    engine = experiment.engine
    threads = engine.threads or (1 if engine.workers else len(os.sched_getaffinity(0)))
    group_size = engine.group_size or (WORKER_GROUP if engine.workers else None)
    return replace(experiment, engine=replace(engine, threads=threads, group_size=group_size))


def build(experiment: Experiment, workshop: Workshop) -> Bench:
    """Return the objects of a run.

    Raises
    ------
    InputError : a name, file or size that does not fit; one line naming the field.
    """
    import torch

    experiment = resolved(experiment)
    torch.set_num_threads(experiment.engine.threads or 1)
    tokens = workshop.tokens(experiment.data, experiment.model)
    tokens.split(experiment.evaluation.split)
    clients = _partition(experiment, tokens.train)
    federated = workshop.model(experiment.model, experiment.engine, _num_labels(experiment.model, tokens))
    start = ServerModel(federated.initial_adapter(experiment.seed, _ranks(experiment, federated)))
    sizes = prepared(experiment.method, start).adapter.shape
    cell = cell_of(experiment, _costs(experiment, federated, sizes, tokens.train, clients))
    experiment, local = _trainer(experiment, federated, tokens.train, clients)
    trainer = _spread(experiment, local)
    causal = experiment.model.task == "causal-lm"
    return Bench(
        experiment=experiment,
        federated=federated,
        start=start,
        tokens=tokens,
        clients=clients,
        cell=cell,
        runner=SimulatedRunner(cell, cell.costs, trainer, experiment.seed),
        metric="loss" if causal else "accuracy",
        direction="min" if causal else "max",
    )


def worker_trainer(plain: Plain, label: str) -> Trainer:
    """Return the trainer of one worker process, which reads model and rows for itself.

    plain, label : of a resolved experiment, whatever it says of workers and groups.
    """
    experiment = read_experiment(plain, label)
    alone = replace(experiment, engine=replace(experiment.engine, workers=None, group_size=None))
    return build(alone, Workshop()).runner.trainer


def _spread(experiment: Experiment, trainer: Trainer) -> Trainer:
    """Return what trains whole cohorts: `trainer` in this process, group by group, or workers that have one each."""
    engine = experiment.engine
    if engine.workers is not None:
        make = partial(worker_trainer, experiment.plain(), experiment.label)
        return RayTrainer(make, engine.workers, engine.group_size)
    return trainer if engine.group_size is None else GroupedTrainer(trainer, engine.group_size)


def _trainer(
    experiment: Experiment, federated: FederatedModel, train: Examples, clients: list[Indices]
) -> tuple[Experiment, Trainer]:
    """Return what trains the clients, and the experiment with the choices that it made."""
    engine = experiment.engine
    if engine.engine == "twin":
        return experiment, LocalTrainer(federated, train, clients, experiment.seed)
    from airtune.training.cohort.memory import automatic_budget
    from airtune.training.cohort.trainer import CohortTrainer

    budget = None if engine.memory_budget is None else int(engine.memory_budget)
    if budget is None and engine.workers is not None:  # the workers of this machine share what is free
        budget = automatic_budget(federated.device) // engine.workers
    threads = (engine.threads or 1) if federated.device.type == "cpu" else 1
    limits = budget, engine.micro_batch_tokens, threads, engine.checkpointing
    made = CohortTrainer(federated, train, clients, experiment.seed, *limits)
    made.check(experiment.training)
    chosen = replace(engine, memory_budget=float(made.budget), micro_batch_tokens=made.micro_batch_tokens)
    return replace(experiment, engine=chosen), made


def _partition(experiment: Experiment, train: Examples) -> list[Indices]:
    try:
        return experiment.partition(train.labels, experiment.fleet.clients, seed=experiment.seed)
    except InputError as error:
        text = str(error).replace("partition.name:", "partition.type:", 1)
        if "cannot deal" in text:
            text = f"{text}; valid: fewer clients, more rows, or another type"
        raise InputError(f"data.{text}" if text.startswith("partition") else text) from error


def _num_labels(model: ModelConfig, tokens: Tokens) -> int | None:
    return None if model.task == "causal-lm" else tokens.train.num_labels


def _ranks(experiment: Experiment, federated: FederatedModel) -> Mapping[str, int] | None:
    method = experiment.method
    return method.ranks(federated.shape) if isinstance(method, ChoosesRanks) else None


def _costs(
    experiment: Experiment,
    federated: FederatedModel,
    adapter: AdapterShape,
    train: Examples,
    clients: list[Indices],
) -> CostModel:
    counts = label_counts(train.labels, clients, train.num_labels) if train.label_names else None
    sizes = np.array([len(rows) for rows in clients], dtype=np.int64)
    overall = float(train.lengths.mean())
    lengths = [float(train.lengths[rows].mean()) if len(rows) else overall for rows in clients]
    return CostModel(
        fleet=nominal_fleet(experiment.fleet, sizes, counts),
        shape=adapter,
        network=TransformerShape.from_config(federated.config_json),
        tokens=np.array(lengths),
        head="causal" if experiment.model.task == "causal-lm" else "classification",
        classes=max(train.num_labels, 2),
        value_bytes=2 if experiment.engine.precision == "bf16" else 4,
        linear_bytes=LINEAR_BYTES[experiment.model.base_weights],
    )
