"""The cohort engine: the clients of a round trained together on the one frozen base.

What goes through the network is a micro-batch with rows of many clients. Every adapted layer applies its base once to
all rows and a stack of adapters to each client's own. The losses are added up over clients, so each client's gradient
is what it would be alone, and one optimizer steps on all of them. The results equal those of the readable twin
(`airtune.training.local`) up to rounding.

Clients are grouped by what must be equal (`members.grouped`), and a group is cut into blocks whose stacks fit the
memory budget. Within a step the clients' batches are packed by length into micro-batches (`batches.Packing`). All this
depends on the jobs and on the engine's two numbers alone, so equal runs give equal bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from airtune.errors import InputError
from airtune.training.cohort.batches import Indices, Packing
from airtune.training.cohort.block import Block, Work
from airtune.training.cohort.linear import Replaced, Session
from airtune.training.cohort.members import Member, check_training, grouped, members_of
from airtune.training.cohort.memory import (
    ROWS_OF_SNAPSHOT,
    ROWS_OF_STATE,
    STATE_SHARE,
    automatic_budget,
    block_clients,
    bytes_per_token,
)
from airtune.training.cohort.network import check_model, checkpointed, replacements
from airtune.training.examples import Examples
from airtune.training.local import LocalTrainer
from airtune.training.model import FederatedModel
from airtune.types import LocalTraining, Trained, TrainingJob

CPU_TOKENS = 2048  # of a micro-batch: beyond that a CPU gains nothing
LAUNCH_TOKENS = {"cpu": 64, "cuda": 2048}  # what a pass costs beside its work, in token places


@dataclass(frozen=True)
class CohortTrainer:
    """Trains clients together on the one base model.

    Attributes
    ----------
    model : the base with its LoRA layers. tokens : all training examples. clients : client -> its examples.
    seed : the experiment's seed.
    memory_budget : bytes for activations and stacks; None: half of what is free when the engine is made.
    micro_batch_tokens : most token places of a micro-batch; None: what the budget allows, on a CPU at most 2048.
    threads : blocks that are trained side by side, each on one core; they share the base. Groups are cut into as many
        blocks at least, so the number has its part in how sums are grouped. With a prefix cache blocks take turns.
    checkpointing : whether layers keep their input alone for the backward pass and run a second time: a third more
        arithmetic for a part of the memory.
    work : counts what was done, among others the share of padding.
    """

    model: FederatedModel
    tokens: Examples
    clients: Sequence[Indices]
    seed: int
    memory_budget: int | None = None
    micro_batch_tokens: int | None = None
    threads: int = 1
    checkpointing: bool = False
    work: Work = field(default_factory=Work, compare=False)

    def __post_init__(self) -> None:
        """Check the model and settle the automatic choices.

        Raises
        ------
        InputError : the engine cannot serve the model, or the budget does not hold a single example.
        """
        check_model(self.model)
        if self.memory_budget is None:
            object.__setattr__(self, "memory_budget", automatic_budget(self.model.device))
        most = self._affordable_tokens()
        if self.micro_batch_tokens is None:
            wanted = most if self.model.device.type == "cuda" else min(most, CPU_TOKENS)
            object.__setattr__(self, "micro_batch_tokens", wanted)
        elif self.micro_batch_tokens > most:
            raise InputError(
                f"training.micro_batch_tokens: {self.micro_batch_tokens} do not fit training.memory_budget "
                f"{self.budget}; valid: at most {most}"
            )

    @property
    def budget(self) -> int:
        """Return the memory budget, bytes."""
        assert self.memory_budget is not None
        return self.memory_budget

    def check(self, training: LocalTraining) -> None:
        """Raise InputError if the engine cannot train so."""
        check_training(training, checkpointing=self.checkpointing, gated=self._gated)
        if self.checkpointing and self.model.prefix is not None:
            raise InputError("training.checkpointing: does not go with training.prefix_cache; valid: one of them")

    @property
    def _gated(self) -> bool:
        """Return whether components have gates."""
        return self.model.config.adapter == "beam-lora"

    @property
    def packing(self) -> Packing:
        """Return how micro-batches are built."""
        assert self.micro_batch_tokens is not None
        return Packing(self.micro_batch_tokens, LAUNCH_TOKENS[self.model.device.type])

    def train(self, jobs: Sequence[TrainingJob]) -> Sequence[Trained]:
        """Return one result per job, in order; reports are those of `LocalTrainer.train`.

        Raises
        ------
        InputError : a job asks for something that the engine has not.
        ValueError : a client has no examples, or its slice trains nothing.
        """
        for job in jobs:
            self.check(job.task.training)
        twin = LocalTrainer(self.model, self.tokens, self.clients, self.seed)
        blocks = [block for group in grouped(members_of(jobs, twin)) for block in self._blocks(group)]
        session = Session()
        layers = checkpointed(self.model) if self.checkpointing else Replaced()
        with replacements(self.model, session).inside(), layers.inside():
            found = self._side_by_side(blocks, session)
        results: dict[int, Trained] = {}
        for members, (trained, work) in zip(blocks, found, strict=True):
            results.update({member.place: result for member, result in zip(members, trained, strict=True)})
            self.work.add(work)
        return [results[place] for place in range(len(jobs))]

    def _side_by_side(
        self, blocks: Sequence[Sequence[Member]], session: Session
    ) -> list[tuple[Sequence[Trained], Work]]:
        """Train the blocks, several at a time where there are threads for it; the results do not depend on that."""

        def one(members: Sequence[Member]) -> tuple[Sequence[Trained], Work]:
            block = Block(self.model, self.tokens, members, self.packing, self.seed, session)
            return block.train(), block.work

        threads = min(self.threads, len(blocks))
        if threads < 2 or self.model.prefix is not None:
            return [one(members) for members in blocks]
        whole = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                return list(pool.map(one, blocks))
        finally:
            torch.set_num_threads(whole)

    def _blocks(self, group: Sequence[Member]) -> list[Sequence[Member]]:
        """Cut a group into blocks that fit the budget, as many as there are threads where it has the clients."""
        width = max(_values(member) for member in {id(m.trained): m for m in group}.values())
        rows = ROWS_OF_STATE + (ROWS_OF_SNAPSHOT if self._gated else 0)
        value_bytes, device = self.model.dtype.itemsize, self.model.device.type
        size = block_clients(self.budget // self.threads, width, value_bytes, device, rows=rows)
        count = min(len(group), max(self.threads, -(-len(group) // size)))
        return [group[start::count] for start in range(count)]

    def _affordable_tokens(self) -> int:
        length = max(int(self.tokens.lengths.max(initial=1)), 1)
        each = bytes_per_token(
            self.model.config_json,
            length,
            value_bytes=2 if self.model.precision == "bf16" else self.model.dtype.itemsize,
            causal=self.tokens.task == "causal-lm",
            checkpointing=self.checkpointing,
        )
        most = int((1.0 - STATE_SHARE) * self.budget / self.threads / each)
        if most < length:
            raise InputError(
                f"training.memory_budget: {self.budget} bytes do not hold one example of {length} tokens, which "
                f"takes about {self.threads * length * each / (1.0 - STATE_SHARE):.0f}"
            )
        return most


def _values(member: Member) -> int:
    return sum(tensor.numel() for _, _, tensor in member.trained.tensors())
