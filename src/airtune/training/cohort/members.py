"""The clients of a cohort, sorted into groups that can be trained together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from airtune.errors import InputError
from airtune.lora import Adapter, AdapterSlice, Indices
from airtune.optimizers import GaLore, LoraPro, LoraRite, as_optimizer
from airtune.training.beam import UNMOVABLE
from airtune.training.local import LocalTrainer
from airtune.training.model import held_only
from airtune.types import LocalTraining, OrthogonalityPenalty, ProximalPenalty, TailPenalty, TrainingJob

TWIN = 'training.engine = "twin"'


@dataclass(frozen=True)
class Member:
    """One client's work, prepared.

    Attributes
    ----------
    place : of its job among those given. job : the job. batches : the examples of each of its steps.
    trained : the sub-adapter that it trains, before training. held : what is present and frozen beside it.
    Clients with the same model and slices share these two objects.
    """

    place: int
    job: TrainingJob
    batches: Sequence[Indices]
    trained: Adapter
    held: Adapter

    @property
    def training(self) -> LocalTraining:
        """Return how it trains."""
        return self.job.task.training

    @property
    def where(self) -> tuple[int, int, int]:
        """Return the address of its random draws: round, client, cycle."""
        return self.job.round, self.job.task.client, self.job.cycle


@dataclass
class _Prepared:
    """Sub-adapters, made once for all clients with the same model and slices."""

    trained: dict[tuple[int, int], Adapter] = field(default_factory=dict[tuple[int, int], Adapter])
    held: dict[tuple[int, int, int], Adapter] = field(default_factory=dict[tuple[int, int, int], Adapter])

    def take(self, job: TrainingJob) -> tuple[Adapter, Adapter]:
        """Return what a client trains, and what it holds beside that."""
        adapter, task = job.model.adapter, job.task
        key = id(adapter), id(task.train)
        if key not in self.trained:
            self.trained[key] = task.train.take(adapter)
        wide = (*key, id(task.receive))
        if wide not in self.held:
            self.held[wide] = held_only(adapter, task.train, task.receive)
        return self.trained[key], self.held[wide]


def members_of(jobs: Sequence[TrainingJob], twin: LocalTrainer) -> list[Member]:
    """Return the work of each job, in order.

    Raises
    ------
    ValueError : a client has no examples, or its slice trains nothing.
    """
    prepared = _Prepared()
    members: list[Member] = []
    for place, job in enumerate(jobs):
        trained, held = prepared.take(job)
        if not any(True for _ in trained_kinds(trained, job.task.train)):
            raise ValueError(f"client {job.task.client}: its slice trains nothing")
        members.append(Member(place, job, twin.batches(job), trained, held))
    return members


def trained_kinds(trained: Adapter, train: AdapterSlice) -> Iterable[str]:
    """Return the kinds of tensors ("A", "B", "core", "extra") that get gradients."""
    return sorted({kind for _, kind, _ in train.payload(trained) if kind != "magnitude"})


def check_training(training: LocalTraining, *, checkpointing: bool = False, gated: bool = False) -> None:
    """Refuse what cannot be done for many clients at once.

    gated : whether components have gates (BeamLoRA).

    Raises
    ------
    InputError : base dropout, privacy of examples, an unknown penalty, the optimizer GaLore, or LoRA-RITE with gates.
    """
    if training.base_dropout:
        raise InputError(
            "training.base_dropout: the base's dropout layers draw from one generator, not one of each client, which "
            f"the cohort engine cannot follow; valid: false, or {TWIN}"
        )
    if checkpointing and training.lora_dropout:
        raise InputError("training.checkpointing: dropout would be drawn twice; valid: false, or lora_dropout = 0")
    if training.privacy is not None:
        raise InputError(
            f"training.privacy: gradients of single examples are taken one client at a time; valid: none, or {TWIN}"
        )
    for penalty in training.penalties:
        if not isinstance(penalty, TailPenalty | ProximalPenalty | OrthogonalityPenalty):
            raise InputError(f"training.penalties: the cohort engine has no {type(penalty).__name__}; valid: {TWIN}")
    if isinstance(as_optimizer(training.optimizer), GaLore):
        raise InputError(
            "training.optimizer: the cohort engine has no galore; valid: adamw, sgd, lora-plus, lora-rite, lora-pro, "
            f"or {TWIN}"
        )
    if gated and isinstance(as_optimizer(training.optimizer), LoraRite):
        raise InputError(UNMOVABLE)


def grouped(members: Sequence[Member]) -> list[list[Member]]:
    """Return the clients by what must be equal to train together, each group from the most steps to the fewest.

    Equal must be: what was merged into the base, which factors are trained and whether the head is, the lowest trained
    layer (below it nothing is kept for the backward pass), the optimizer, the kinds of penalties, whether there is
    dropout; and the ranks for optimizers that compute with the [rank, rank] matrices of the pairs. The order depends
    on the jobs alone, not on the order in which they were given.
    """
    groups: dict[tuple[Any, ...], list[Member]] = {}
    for member in sorted(members, key=lambda m: (m.job.task.client, m.where, m.place)):
        groups.setdefault(_signature(member), []).append(member)
    return [sorted(group, key=lambda m: -len(m.batches)) for group in groups.values()]


def _signature(member: Member) -> tuple[Any, ...]:
    training, train = member.training, member.job.task.train
    optimizer = as_optimizer(training.optimizer)
    paired = isinstance(optimizer, LoraRite | LoraPro)
    penalties = tuple((type(p), p.form if isinstance(p, OrthogonalityPenalty) else "") for p in training.penalties)
    return (
        tuple((name, id(update)) for name, update in member.job.model.base_update.items()),
        tuple(trained_kinds(member.trained, train)),
        min(member.trained.layer.values(), default=member.trained.num_layers),
        optimizer,
        penalties,
        training.lora_dropout > 0.0,
        tuple((slot, f.rank) for slot, f in member.trained.factors.items()) if paired else (),
    )


def step_counts(members: Sequence[Member]) -> NDArray[np.int64]:
    """Return the number of steps of each client."""
    return np.array([len(member.batches) for member in members], dtype=np.int64)
