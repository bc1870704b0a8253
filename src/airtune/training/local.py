"""The readable twin: trains one client after the other, as a textbook would.

Slow and plain on purpose: the engine that trains a whole cohort at once must give the same numbers. Everything a
client does is a pure function of (model, task, data, seed, round, client, cycle); torch's global generator is neither
read nor moved.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from airtune.streams import stream, torch_seed
from airtune.training.beam import Search, memory_of
from airtune.training.data import client_batches
from airtune.training.examples import Examples
from airtune.training.hardware import on_device
from airtune.training.layers import SeededDropout
from airtune.training.losses import mean_loss
from airtune.training.model import ActiveAdapter, FederatedModel
from airtune.training.optimizers import LocalOptimizer, make_optimizer
from airtune.training.penalties import penalty_value, tail_norm
from airtune.training.private_steps import PrivateGradients, poisson_batches, private_gradients
from airtune.types import LocalTraining, TailPenalty, Trained, TrainingJob

Indices = NDArray[np.int64]


@dataclass
class _Progress:
    """Sums over the steps of one client."""

    loss: float = 0.0
    examples: int = 0
    tokens: int = 0
    steps: int = 0
    diverged: bool = field(default=False)
    replaced: int | None = None

    def add(self, loss: float, lengths: NDArray[np.int64]) -> None:
        self.loss += loss * len(lengths)
        self.examples += len(lengths)
        self.tokens += int(lengths.sum())
        self.steps += 1

    def reports(self) -> dict[str, float]:
        loss = math.nan if self.diverged or not self.examples else self.loss / self.examples
        counts = {"examples": self.examples, "tokens": self.tokens, "steps": self.steps, "replaced": self.replaced}
        return {"loss": loss, **{name: float(count) for name, count in counts.items() if count is not None}}


@dataclass(frozen=True)
class LocalTrainer:
    """Trains clients one by one on the one base model.

    Attributes
    ----------
    model : the base with its LoRA layers.
    tokens : all training examples.
    clients : client -> the indices of its examples.
    seed : the experiment's seed.
    """

    model: FederatedModel
    tokens: Examples
    clients: Sequence[Indices]
    seed: int

    def train(self, jobs: Sequence[TrainingJob]) -> Sequence[Trained]:
        """Return one result per job, in order.

        The reports hold ``loss`` (mean over the examples of all steps, before each step, without penalties; NaN if the
        client diverged, which ends its training and returns what it started from), ``examples``, ``tokens`` (without
        padding) and ``steps`` done, with BeamLoRA ``replaced`` components, and with a `TailPenalty`
        ``tail_norm_before`` and ``tail_norm_after``.

        Raises
        ------
        ValueError : a client has no examples, or its slice trains nothing.
        """
        return [self._train_client(job) for job in jobs]

    def batches(self, job: TrainingJob) -> list[Indices]:
        """Return the batches of one job: the same for every trainer."""
        training = job.task.training
        indices = self.clients[job.task.client]
        if len(indices) == 0:
            raise ValueError(f"client {job.task.client} has no examples to train on")
        rng = stream(self.seed, "batches", job.round, job.task.client, job.cycle)
        steps = training.steps(len(indices))
        if training.privacy is not None:
            return poisson_batches(indices, training.batch_size, steps, rng)
        return client_batches(self.tokens, indices, training.batch_size, rng=rng, steps=steps)

    def _train_client(self, job: TrainingJob) -> Trained:
        task, training = job.task, job.task.training
        where = (job.round, task.client, job.cycle)
        dropout = self._dropout(training, where)
        active = self.model.activate(job.model, task.train, task.receive, dropout=dropout, beam=training.beam)
        if not any(True for _ in active.trained()):
            raise ValueError(f"client {task.client}: its slice trains nothing")
        tails = [penalty for penalty in training.penalties if isinstance(penalty, TailPenalty)]
        before = _tail_norms(tails, active, "before")
        dropout_seed, noise_seed = (torch_seed(self.seed, name, *where) for name in ("base-dropout", "sample-privacy"))
        with (
            _base_dropout(self.model, training.base_dropout, dropout_seed),
            private_gradients(self.model, active, training, len(self.clients[task.client]), noise_seed) as private,
        ):
            progress = self._steps(active, training, self.batches(job), stream(self.seed, "beam", *where), private)
        reports = {**progress.reports(), **before, **_tail_norms(tails, active, "after")}
        return Trained(task.train.take(job.model.adapter) if progress.diverged else active.values(), reports)

    def _steps(
        self,
        active: ActiveAdapter,
        training: LocalTraining,
        batches: Sequence[Indices],
        rng: np.random.Generator,
        private: PrivateGradients | None,
    ) -> _Progress:
        optimizer = make_optimizer(active, training)
        search = _search(active, training, optimizer, len(batches), rng)
        parameters = [tensor for _, _, tensor in active.trained()]
        progress = _Progress()
        for indices in batches:
            optimizer.zero_grad(set_to_none=True)
            if len(indices):
                self._backward(indices, active, training, progress)
            if progress.diverged:
                return progress
            if private is not None:
                private.apply(len(indices))
            if training.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(parameters, training.max_grad_norm, foreach=False)
            optimizer.step()
            if search is not None:
                search.after(progress.steps)
                progress.replaced = search.replaced
        progress.diverged = not all(bool(torch.isfinite(parameter).all()) for parameter in parameters)
        return progress

    def _backward(self, indices: Indices, active: ActiveAdapter, training: LocalTraining, progress: _Progress) -> None:
        """Compute the gradients of one batch, and note its loss."""
        batch = self.tokens.batch(indices)
        loss = self._loss(batch)
        penalty = penalty_value(training.penalties, active)
        total = loss if penalty is None else loss + penalty
        progress.diverged = not math.isfinite(total.item())
        if not progress.diverged:
            progress.add(loss.item(), self.tokens.lengths[indices])
            total.backward()

    def _loss(self, batch: Mapping[str, NDArray[Any]]) -> Tensor:
        tensors = on_device(batch, self.model.device)
        return mean_loss(self.model.output(tensors), tensors["labels"])

    def _dropout(self, training: LocalTraining, where: tuple[int, ...]) -> nn.Module | None:
        if training.lora_dropout == 0:
            return None
        generator = torch.Generator(device=self.model.device)
        generator.manual_seed(torch_seed(self.seed, "lora-dropout", *where))
        return SeededDropout(training.lora_dropout, generator)


def _search(
    active: ActiveAdapter,
    training: LocalTraining,
    optimizer: LocalOptimizer,
    steps: int,
    rng: np.random.Generator,
) -> Search | None:
    """Return the search over components, None if they do not compete."""
    if not active.gates:
        return None
    return Search(training.beam, active.adapter.factors, active.gates, memory_of(optimizer), steps, rng)


def _tail_norms(tails: Sequence[TailPenalty], active: ActiveAdapter, when: str) -> dict[str, float]:
    with torch.no_grad():
        return {f"tail_norm_{when}": sum(float(tail_norm(tail, active)) for tail in tails)} if tails else {}


@contextmanager
def _base_dropout(model: FederatedModel, wanted: bool, seed: int) -> Generator[None]:
    """Switch the base's own dropout on, with a generator of its own, and leave everything as it was.

    The base's dropout layers can draw from torch's global generator only; it is seeded here and put back afterwards.
    """
    if not wanted:
        yield
        return
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.random.manual_seed(seed)
        model.network.train()
        try:
            yield
        finally:
            model.network.eval()
