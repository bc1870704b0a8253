"""A client's turn: it trains, codes what it sends, and keeps what is its own. The same bits as in simulation."""

from __future__ import annotations

import math
from dataclasses import replace

from airtune.compression.drop_error import drop_reports, drops_components
from airtune.deploy.jobs import Turn
from airtune.errors import NoResultError
from airtune.lora import own_tensors, with_own
from airtune.streams import stream
from airtune.types import Trainer, TrainingJob


def take_turn(trainer: Trainer, job: TrainingJob, seed: int) -> Turn:
    """Return what a client sends and keeps after one job.

    Parameters
    ----------
    trainer : trains it. seed : of the experiment: the compressor's draws are addressed by it.
    job : with the client's memory; tensors of its own in there take the place of the model's.

    Raises
    ------
    NoResultError : the training diverged.
    """
    task, base = job.task, job.model.adapter
    start_model = replace(job.model, adapter=with_own(base, task.train, job.memory))
    (trained,) = trainer.train([replace(job, model=start_model)])
    if not math.isfinite(trained.reports.get("loss", 0.0)):
        raise NoResultError(f"client {task.client}: diverged")
    local = task.train.put(base, trained.values)
    rng = stream(seed, "compressor", job.round, task.client, job.cycle)
    sent, start = task.send.take(local), task.send.take(base)
    payload, memory = task.compressor.encode(task.send, sent, start, job.memory, rng)
    reports = dict(trained.reports)
    if drops_components(task.compressor):  # only then a device has to know what arrives
        reports |= drop_reports(task.compressor, sent, task.compressor.decode(task.send, payload, start))
    return Turn(payload, {**memory, **own_tensors(task.train, task.send, trained.values)}, reports)
