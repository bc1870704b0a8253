"""BeamLoRA (Gu et al., ACL 2025, arXiv 2502.13604): components compete during local training.

Every component of a slot has a gate: with logits z, [rank], the layer computes ``s B (p * (A x))``, where
``p = rank * softmax(z / temperature)`` has mean 1 and z is trained along. Every few steps the least important
components, over all slots together, are overwritten by copies of the most important ones of their slot, taken from a
snapshot half a period old so that twin and copy are not the same. Their gates meet at the mean of both. The optimizer's
moments of a copied component are the snapshot's, those of both gates start anew (the public code means to do so and
does not: it writes into a temporary).

In a federation [our choice]: the search is the client's own and begins with equal gates in every round, and at its end
p is folded into the columns of B, so that plain LoRA travels. The share that is kept rises over the client's steps of
the round. At most half of a slot's components are replaced at once, or a component could be copied onto itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from airtune.errors import InputError
from airtune.lora import LoraFactors
from airtune.types import Beam


@dataclass(frozen=True)
class Gate:
    """The gate of one slot: its logits, [rank], a leaf of the network."""

    logits: Tensor
    temperature: float

    def importance(self) -> Tensor:
        """Return p, [rank], with sum rank."""
        return len(self.logits) * torch.softmax(self.logits / self.temperature, dim=0)


class GatedRows(nn.Module):
    """``p * (A x)`` where PEFT expects A."""

    def __init__(self, rows: nn.Linear, gate: Gate) -> None:
        """Put the layer of A and its gate into the module."""
        super().__init__()
        self.rows = rows
        self.gate = gate

    @property
    def weight(self) -> Tensor:
        """Return A: PEFT reads its type."""
        return self.rows.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return A x, each component times its importance."""
        return self.rows(x) * self.gate.importance()


Saved = dict[Tensor, dict[str, Tensor]]
Memory = Callable[[Tensor], Mapping[str, Tensor]]  # what an optimizer remembers of a tensor, value by value
ONE_FACTOR = "model.adapter: beam-lora copies components of A and B, one of which is not trained"
UNMOVABLE = (
    "training.optimizer: beam-lora moves the moments of single components, which lora-rite does not have; "
    "valid: adamw, sgd, lora-plus, lora-pro"
)


@dataclass
class Search:
    """The search of one client over the steps of a round.

    factors : slot -> factors, changed in place. gates : slot -> its gate, in the same order, changed in place.
    memory : of the optimizer: returns tensors of the shape of that which is asked for, changed in place.
    steps : of the client in this round. rng : pairs pruned components with those that replace them.
    replaced : number of components so far.
    """

    beam: Beam
    factors: Mapping[str, LoraFactors]
    gates: Mapping[str, Gate]
    memory: Memory
    steps: int
    rng: np.random.Generator
    replaced: int = 0
    snapshot: Saved = field(default_factory=dict[Tensor, dict[str, Tensor]])

    @torch.no_grad()
    def after(self, step: int) -> None:
        """Do what is due after a step (from 1): take the snapshot, or prune and expand."""
        every, ahead = self.beam.every, step + self.beam.every // 2
        if ahead % every == 0 and ahead + every <= self.steps:
            self.snapshot = {t: self._state(t) for f in self.factors.values() for t in (f.A, f.B)}
        if step % every == 0 and step + every <= self.steps:
            for slot, (pruned, copied) in self._choose(step).items():
                self._expand(slot, pruned, copied)
            self.snapshot = {}

    def _state(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return copies of a tensor and of what the optimizer remembers of it, value by value."""
        moments = {key: value.clone() for key, value in self.memory(tensor).items()}
        return {"value": tensor.detach().clone(), **moments}

    def _choose(self, step: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Return slot -> (pruned, replacing) components, paired at random."""
        values = {slot: gate.importance() for slot, gate in self.gates.items()}
        kept = kept_components(values, kept_share(self.beam, step, self.steps))
        chosen: dict[str, tuple[Tensor, Tensor]] = {}
        for slot, p in values.items():
            order = torch.argsort(p, stable=True)
            count = min(int((~kept[slot]).sum()), len(p) // 2)
            pairing = torch.as_tensor(self.rng.permutation(count), device=p.device)
            if count:
                chosen[slot] = order[:count], order[len(p) - count :][pairing]
        return chosen

    def _expand(self, slot: str, pruned: Tensor, copied: Tensor) -> None:
        """Overwrite components by the snapshot's, with their moments; bring the gates of both to their mean."""
        f, logits = self.factors[slot], self.gates[slot].logits
        for tensor, by_column in ((f.A, False), (f.B, True)):
            for key, old in self.snapshot[tensor].items():
                target = tensor if key == "value" else self.memory(tensor)[key]
                if by_column:
                    target[:, pruned] = old[:, copied]
                else:
                    target[pruned] = old[copied]
        mean = (logits[pruned] + logits[copied]) / 2
        logits[pruned], logits[copied] = mean, mean
        for value in self.memory(logits).values():
            value[pruned], value[copied] = 0.0, 0.0
        self.replaced += len(pruned)


def kept_share(beam: Beam, step: int, steps: int) -> float:
    """Return P(t), the share of all importance that is kept: from `first_share` to 1 on a cosine."""
    return 1.0 - (1.0 - beam.first_share) * (1.0 + math.cos(math.pi * min(step / steps, 1.0))) / 2


def kept_components(importance: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return slot -> which components are in the smallest set that holds a share of the importance of all slots."""
    together = torch.cat(list(importance.values())).double()
    order = torch.argsort(together, descending=True, stable=True)
    before = together[order].cumsum(0) - together[order]
    kept = torch.zeros(len(together), dtype=torch.bool, device=together.device)
    kept[order] = before < share * together.sum() * (1 - 1e-12)
    parts = kept.split([len(p) for p in importance.values()])
    return dict(zip(importance, parts, strict=True))


def memory_of(optimizer: object) -> Memory:
    """Return the memory of a torch optimizer, whose moments can follow the components.

    Raises
    ------
    InputError : the optimizer keeps its moments in another basis.
    """
    inner = getattr(optimizer, "inner", optimizer)
    if not isinstance(inner, torch.optim.Optimizer):
        raise InputError(UNMOVABLE)

    def memory(tensor: Tensor) -> dict[str, Tensor]:
        found = inner.state[tensor].items()
        return {key: value for key, value in found if isinstance(value, Tensor) and value.shape == tensor.shape}

    return memory
