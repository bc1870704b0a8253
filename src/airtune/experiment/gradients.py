"""Gradient norms and mini-batch noise of every client at one model, from repeated mini-batches.

At one model X, client n draws M mini-batches of the training's size and computes the gradient of each with respect to
everything that is trained and sent (A, B and extras of all slots, without a sketch). With g_1 ... g_M the gradients and
m their mean,

::

    sigma_n^2       = sum_i ||g_i - m||^2 / (M - 1)
    ||grad f_n||^2  = ||m||^2 - sigma_n^2 / M           (0 where this is negative)

are unbiased if the mini-batches are independent. Nothing moves between them, so no drift and no step size is in the
estimate. sigma_n is the noise of a mini-batch; that of the sketch is the round model's factor psi.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from airtune.compression.dense import Dense
from airtune.experiment.build import Bench
from airtune.lora import Adapter, AdapterSlice
from airtune.scheduling.work import LocalWork, Slices
from airtune.solvers.pilot_fit import GradientNorms
from airtune.types import ClientTask, Floats, LocalTraining, Observation, Pending, ServerModel, TrainingJob

FIRST_ROUND = 1_000_000  # addresses the mini-batches: no training round has such a number


def measure_gradients(
    bench: Bench, models: Sequence[ServerModel], training: LocalTraining, batches: int = 3
) -> GradientNorms:
    """Return ||grad f_n|| and sigma_n, the largest over the models, [clients], NaN for clients without examples.

    Parameters
    ----------
    models : where to measure. training : its batch size counts. batches : M, at least 2.
    """
    size = bench.cell.fleet.size
    probe = replace(
        training,
        local_steps=1,
        learning_rate=1.0,
        head_learning_rate=None,
        optimizer="sgd",
        momentum=0.0,
        weight_decay=0.0,
        max_grad_norm=None,
        penalties=(),
    )
    norms, noises = np.full((2, len(models), size), np.nan)
    for place, model in enumerate(models):
        seen = bench.cell.observe(1, 0.0, Pending(), model)
        for client in np.flatnonzero(bench.cell.fleet.num_examples > 0).tolist():
            task = _task(client, seen, probe, bench)
            norms[place, client], noises[place, client] = _of_client(bench, model, task, batches)
    return GradientNorms(_largest(norms), _largest(noises))


def _task(client: int, seen: Observation, probe: LocalTraining, bench: Bench) -> ClientTask:
    slices = Slices.same(AdapterSlice.everything(bench.start.adapter.shape))
    return LocalWork(probe, Dense()).task(client, slices, seen)


def _of_client(bench: Bench, model: ServerModel, task: ClientTask, batches: int) -> tuple[float, float]:
    """Return ||grad f_n|| and sigma_n of one client; NaN where a mini-batch diverged."""
    start = _vector(task, task.train.take(model.adapter))
    jobs = [TrainingJob(task, model, FIRST_ROUND + index) for index in range(batches)]
    found = [start - _vector(task, trained.values) for trained in bench.runner.trainer.train(jobs)]
    mean = torch.stack(found).mean(dim=0)
    variance = sum(float(((one - mean) ** 2).sum()) for one in found) / (batches - 1)
    square = float((mean**2).sum()) - variance / batches
    return max(square, 0.0) ** 0.5, variance**0.5


def _vector(task: ClientTask, values: Adapter) -> torch.Tensor:
    return torch.cat([tensor.double().flatten() for _, _, tensor in task.send.payload(values)])


def _largest(table: Floats) -> Floats:
    known = np.isfinite(table)
    return np.where(known.any(axis=0), np.where(known, table, -np.inf).max(axis=0), np.nan)
