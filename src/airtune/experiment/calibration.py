"""How fast this machine trains an experiment's model: counted FLOPs of real local steps over the host's seconds."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from airtune.clock import host_seconds
from airtune.compression.dense import Dense
from airtune.devices.calibrate import Calibration, measure
from airtune.errors import InputError
from airtune.experiment.build import Bench, Workshop, build
from airtune.experiment.config import Experiment
from airtune.lora import AdapterSlice
from airtune.types import ClientTask, Trained, TrainingJob

STEPS = 4  # local steps of one measurement [our choice]


@dataclass
class _Work:
    """One measurement's training; keeps what came out, for its counts of examples and tokens."""

    bench: Bench
    job: TrainingJob
    result: Trained | None = None

    def __call__(self) -> None:
        (self.result,) = self.bench.runner.trainer.train([self.job])


def calibrate(experiment: Experiment, repeats: int, workshop: Workshop) -> Calibration:
    """Return the training speed of this machine on the experiment's model, data, batch size and number of threads.

    The whole adapter is trained by the readable twin; its set-up for a client is part of what is timed, as on a
    device. FLOPs are those that the clock would charge for the tokens that were really trained.

    Raises
    ------
    InputError : no client has examples.
    """
    bench = build(experiment, workshop)
    costs, adapter = bench.cell.costs, bench.start.adapter
    client = int(np.argmax(costs.fleet.num_examples))
    if not costs.fleet.num_examples[client]:
        raise InputError("data: no client has examples to calibrate with; valid: a partition that gives some")
    whole = AdapterSlice.everything(adapter.shape)
    training = replace(experiment.training, local_steps=STEPS)
    task = ClientTask(client, whole, whole, whole, training, Dense(), bandwidth=0.0, transmit_power=0.0)
    work = _Work(bench, TrainingJob(task, bench.start, round=1))
    work()
    assert work.result is not None
    length = work.result.reports["tokens"] / work.result.reports["examples"]
    batch = int(work.result.reports["examples"] / work.result.reports["steps"])
    counted = replace(costs, tokens=np.full_like(costs.tokens, length))
    flops = sum(counted.compute_flops(replace(task, training=replace(training, batch_size=batch))))
    return measure(work, flops, host_seconds, repeats)
