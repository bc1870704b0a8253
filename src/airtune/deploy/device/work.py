"""What a device does with a question: it trains a job, takes a client's turn, or says what it is."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from airtune.clock import host_seconds
from airtune.deploy.device.frames import Frame
from airtune.deploy.jobs import pack_trained, pack_turn, unpack_job
from airtune.deploy.turn import take_turn
from airtune.errors import InputError
from airtune.experiment.build import Bench
from airtune.experiment.config import Experiment
from airtune.types import TrainingJob
from airtune.version import __version__

SLACK = 64 << 20


def fingerprint(experiment: Experiment) -> str:
    """Return what two processes must agree on so that a job gives the same result in both."""
    plain = experiment.plain()
    sections = {
        "seed": experiment.seed,
        "model": plain["model"],
        "data": plain["data"],
        "clients": experiment.fleet.clients,
        "precision": experiment.engine.precision,
    }
    return hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class Work:
    """Answers questions with the objects of one experiment.

    bench : base model, data, trainer. done : jobs so far.
    more : questions of other kinds that it answers, by name (Flower's messages).
    """

    bench: Bench
    done: int = field(default=0)
    more: dict[str, Callable[[Frame], Frame]] = field(default_factory=dict[str, Callable[[Frame], Frame]])

    @property
    def largest_job(self) -> int:
        """Return the bytes that a job can have: every adapted weight merged densely in fp64, twice, and some room."""
        slots = self.bench.federated.shape.slots.values()
        return 2 * sum(8 * slot.in_features * slot.out_features * len(slot.modules) for slot in slots) + SLACK

    def answer(self, question: Frame) -> Frame:
        """Return the answer; InputError says that the question is wrong."""
        questions: Mapping[str, Callable[[Frame], Frame]] = {
            "about": self._about,
            "train": self._train,
            "turn": self._turn,
            **self.more,
        }
        asked, wanted = str(question.head.get("ask")), question.head.get("experiment")
        if asked not in questions:
            raise InputError(f"ask: unknown question {asked!r}; valid: {', '.join(questions)}")
        own = fingerprint(self.bench.experiment)
        if wanted is not None and wanted != own:
            raise InputError(f"experiment: runs {own}, not {wanted!r}: model, data, clients, seed or precision differ")
        return questions[asked](question)

    def _about(self, _question: Frame) -> Frame:
        experiment, fleet = self.bench.experiment, self.bench.cell.costs.fleet
        return Frame(
            {
                "airtune": __version__,
                "experiment": fingerprint(experiment),
                "clients": fleet.size,
                "examples": int(fleet.num_examples.sum()),
                "precision": experiment.engine.precision,
                "threads": experiment.engine.threads,
                "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
                "jobs": self.done,
            }
        )

    def _train(self, question: Frame) -> Frame:
        job = self._job(question.body)
        begun = host_seconds()
        (trained,) = self.bench.runner.trainer.train([job])
        return self._timed(begun, pack_trained(trained))

    def _turn(self, question: Frame) -> Frame:
        job = self._job(question.body)
        begun = host_seconds()
        turn = take_turn(self.bench.runner.trainer, job, self.bench.experiment.seed)
        return self._timed(begun, pack_turn(turn))

    def _timed(self, begun: float, body: bytes) -> Frame:
        self.done += 1
        return Frame({"seconds": host_seconds() - begun}, body)

    def _job(self, body: bytes) -> TrainingJob:
        job = unpack_job(body)
        if not 0 <= job.task.client < len(self.bench.clients):
            raise InputError(f"job.task.client: {job.task.client}; valid: 0 to {len(self.bench.clients) - 1}")
        known = self.bench.federated.shape.slots
        for name, factors in job.model.adapter.factors.items():
            sizes = (factors.in_features, factors.out_features)
            if name not in known or sizes != (known[name].in_features, known[name].out_features):
                raise InputError(f"job.adapter: slot {name!r} with sizes {sizes} is none of this model's")
        return job
