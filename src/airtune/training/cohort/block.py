"""One block of clients: their stacks, and their steps from the first to the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from airtune.training.beam import Search
from airtune.training.cohort.batches import MicroBatch, Packing
from airtune.training.cohort.constants import Constants
from airtune.training.cohort.dropout import ClientDropout
from airtune.training.cohort.linear import Bound, Session
from airtune.training.cohort.members import Member, step_counts
from airtune.training.cohort.optimizers import Settings, StackedOptimizer, clip, stacked_optimizer
from airtune.training.cohort.setup import Cohort
from airtune.training.cohort.stacks import Stacks, adapter_of
from airtune.training.examples import Examples
from airtune.training.hardware import on_device
from airtune.training.losses import loss_by_example
from airtune.training.model import FederatedModel, as_factors
from airtune.training.shapes import linear_layers
from airtune.types import Trained


@dataclass
class Work:
    """What has been done: to see how much of it was padding.

    tokens : without padding. places : token places that went through the network. passes : forward passes.
    """

    tokens: int = 0
    places: int = 0
    passes: int = 0

    def add(self, other: Work) -> None:
        """Count what another has done, too."""
        self.tokens += other.tokens
        self.places += other.places
        self.passes += other.passes

    @property
    def padding_share(self) -> float:
        """Return the share of the token places that held no token."""
        return 1.0 - self.tokens / self.places if self.places else 0.0


@dataclass
class Progress:
    """Sums over the steps of each client of a block, [clients]."""

    loss: NDArray[np.float64]
    examples: NDArray[np.int64]
    tokens: NDArray[np.int64]
    steps: NDArray[np.int64]
    diverged: NDArray[np.bool_]

    @staticmethod
    def of(clients: int) -> Progress:
        """Return the sums before the first step."""
        examples, tokens, steps = (np.zeros(clients, np.int64) for _ in range(3))
        return Progress(np.zeros(clients), examples, tokens, steps, np.zeros(clients, np.bool_))

    def reports(self, member: int) -> dict[str, float]:
        """Return a client's loss (not a number if it diverged), examples, tokens and steps."""
        examples = int(self.examples[member])
        lost = bool(self.diverged[member]) or not examples
        loss = float("nan") if lost else float(self.loss[member]) / examples
        counts = {"examples": self.examples, "tokens": self.tokens, "steps": self.steps}
        return {"loss": loss, **{name: float(values[member]) for name, values in counts.items()}}


@dataclass
class Block:
    """Clients of one group, ready to train.

    Attributes
    ----------
    model : the base. tokens : all examples. members : the clients, from the most steps to the fewest.
    packing : how micro-batches are built. seed : of the experiment. session : what the replaced layers read.
    work : counts what is done.
    """

    model: FederatedModel
    tokens: Examples
    members: Sequence[Member]
    packing: Packing
    seed: int
    session: Session
    work: Work = field(default_factory=Work)

    def __post_init__(self) -> None:
        """Build stacks, constants, optimizer and penalties."""
        self.like = torch.empty(0, dtype=self.model.dtype, device=self.model.device)
        cohort = Cohort(self.members, self.like, gated=self.model.config.adapter == "beam-lora")
        self.stacks: Stacks = cohort.stacks()
        self.constants = Constants(self.like)
        self.parts = cohort.parts(self.constants)
        trainings = [member.training for member in self.members]
        self.settings = Settings.of(trainings, self.like)
        self.optimizer: StackedOptimizer = stacked_optimizer(self.stacks, cohort.pairs(self.constants), trainings)
        self.penalties = cohort.penalties(self.constants, self.stacks)
        self.gates = cohort.gates()
        self.searches: list[Search] = []
        if self.gates is not None:
            self.searches = self.gates.searches(self.stacks, self.optimizer, self.members, self.seed)
        self.dropout = ClientDropout.of(self.members, self.tokens, self.seed, self.like)
        self.compute_type = torch.bfloat16 if self.model.precision == "bf16" else self.model.dtype

    # -- training -----------------------------------------------------------------------------------------------------

    def train(self) -> list[Trained]:
        """Train all clients and return their results, in the order of the members."""
        steps, progress = step_counts(self.members), Progress.of(len(self.members))
        before = self._tail_norms()
        self._look_for_a_prefix()
        for step in range(int(steps[0])):
            active = int((steps > step).sum())
            if not self._step(step, active, progress):
                break
        finite = torch.isfinite(self.stacks.values).all(dim=1).cpu().numpy()
        progress.diverged |= ~finite
        return self._results(progress, before, self._tail_norms())

    def _look_for_a_prefix(self) -> None:
        """Tell the prefix cache, if there is one, in which lowest layers nothing acts for any client of the block."""
        prefix, updates = self.model.prefix, self.members[0].job.model.base_update
        if prefix is None:
            return
        touched = {module for member in self.members for module in member.trained.placement}
        merged = {module: as_factors(update) for module, update in updates.items()}
        depths: list[int] = []
        for held in {id(member.held): member.held for member in self.members}.values():
            prefix.look(touched, held, merged)
            depths.append(prefix.depth)
        prefix.depth = min(depths)
        places = {layer.name: layer.layer for layer in linear_layers(self.model.config_json)}
        self.parts = {module: parts for module, parts in self.parts.items() if places[module] >= prefix.depth}

    def _step(self, step: int, active: int, progress: Progress) -> bool:
        """Take one step with the first `active` clients; return whether any was left."""
        batches = [(k, self.members[k].batches[step]) for k in range(active) if not progress.diverged[k]]
        if not batches:
            return False
        self.stacks.gradients[:active].zero_()
        losses = self.like.new_zeros(active)
        lengths = self.tokens.lengths
        self.dropout.begin_step()
        for micro in self.packing.pack(batches, lengths):
            self._backward(micro, step, losses)
            self.work.places += micro.rows * micro.length
            self.work.passes += 1
        with torch.no_grad():
            total = losses
            if self.penalties is not None:
                total = losses + self.penalties.add_gradients(self.stacks, active)
            self._count(batches, losses, total, lengths, progress)
            clip(self.stacks.gradients[:active], self.settings.limit[:active])
            self.optimizer.step(active)
        if self.searches:
            for member in (k for k, _ in batches if not progress.diverged[k]):
                self.searches[member].after(step + 1)
        return True

    def _backward(self, micro: MicroBatch, step: int, losses: Tensor) -> None:
        """Add one micro-batch's gradients to the stacks and its losses to those of the step."""
        members = torch.from_numpy(micro.members).to(self.like.device)
        leaves = self.stacks.leaves(members)
        weights, scaling = self.constants.select(members, self._cast)
        weights |= {key: self._cast(leaf) for key, leaf in leaves.items()}
        if self.gates is not None:
            weights |= self.gates.importance(leaves, members)
        mask = self.dropout.mask_of(micro, self.members, step)
        self.session.bound = Bound(micro.rows, micro.segments, self.parts, weights, scaling, mask)
        batch = on_device(self.tokens.batch(micro.indices), self.like.device)
        with torch.enable_grad():
            logits = self.model.output(batch)
            each, _ = loss_by_example(logits, batch["labels"])
            shares = each * self._shares(micro, step)
            found = torch.autograd.grad(shares.sum(), list(leaves.values()), allow_unused=True)
        self.session.bound = None
        self.stacks.add_gradients(members, found)
        rows = np.repeat(micro.members, [len(chunk.rows) for chunk in micro.chunks])
        losses.index_add_(0, torch.from_numpy(rows).to(losses.device), shares.detach())

    def _shares(self, micro: MicroBatch, step: int) -> Tensor:
        """Return what one unit of an example's summed loss is worth in its client's mean, [rows]."""
        shares: list[float] = []
        for chunk in micro.chunks:
            batch = self.members[chunk.member].batches[step]
            weight = len(batch)
            if self.tokens.task == "causal-lm":
                weight = int((self.tokens.lengths[batch] - 1).sum())
            shares += [1.0 / weight] * len(chunk.rows)
        return self.like.new_tensor(shares)

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.compute_type)

    def _count(
        self,
        batches: Sequence[tuple[int, NDArray[np.int64]]],
        losses: Tensor,
        total: Tensor,
        lengths: NDArray[np.int64],
        progress: Progress,
    ) -> None:
        """Add a step to the sums of those whose loss is finite, and note whose is not."""
        values, finite = losses.double().cpu().numpy(), torch.isfinite(total).cpu().numpy()
        for member, rows in batches:
            tokens = int(lengths[rows].sum())
            self.work.tokens += tokens
            if not finite[member]:
                progress.diverged[member] = True
                continue
            progress.loss[member] += values[member] * len(rows)
            progress.examples[member] += len(rows)
            progress.tokens[member] += tokens
            progress.steps[member] += 1

    # -- results ------------------------------------------------------------------------------------------------------

    def _tail_norms(self) -> Tensor | None:
        if self.penalties is None:
            return None
        with torch.no_grad():
            return self.penalties.tail_norms(self.stacks, len(self.members))

    def _results(self, progress: Progress, before: Tensor | None, after: Tensor | None) -> list[Trained]:
        whole = self.stacks.values if self.gates is None else self.gates.folded(self.stacks)
        values = whole.cpu()
        results: list[Trained] = []
        for place, member in enumerate(self.members):
            reports = progress.reports(place)
            if self.searches and progress.steps[place]:
                reports["replaced"] = float(self.searches[place].replaced)
            for when, norms in (("before", before), ("after", after)):
                if norms is not None:
                    reports[f"tail_norm_{when}"] = float(norms[place])
            if progress.diverged[place]:
                results.append(Trained(member.job.task.train.take(member.job.model.adapter), reports))
            else:
                results.append(Trained(adapter_of(self.stacks.layout, values[place], member.trained), reports))
        return results
