"""BeamLoRA for many clients at once: the gates of the stacked components, and each client's own search.

The search is the readable twin's (`airtune.training.beam`): it works on views of the client's row of the stacks and of
what the optimizer remembers, so that values, moments and random draws are those of the client alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from airtune.lora import LoraFactors
from airtune.streams import stream
from airtune.training.beam import Gate, Search
from airtune.training.cohort.linear import Key
from airtune.training.cohort.members import Member
from airtune.training.cohort.optimizers import StackedOptimizer, moments_of
from airtune.training.cohort.stacks import Layout, Stacks


@dataclass(frozen=True)
class StackedGates:
    """The gates of a block's clients.

    ranks : slot -> [clients], components of each client; 0 where it does not train the slot.
    temperature : [clients, 1].
    """

    ranks: Mapping[str, Tensor]
    temperature: Tensor

    def importance(self, values: Mapping[Key, Tensor], members: Tensor) -> dict[Key, Tensor]:
        """Return the importances of some clients' components, (slot, "gate") -> [n, rank]; padding has zero.

        values : key -> [n, *size]; of these the logits are read. members : [n], places in the block.
        """
        temperature = self.temperature.index_select(0, members)
        found: dict[Key, Tensor] = {}
        for slot, of_all in self.ranks.items():
            ranks, logits = of_all.index_select(0, members)[:, None], values[slot, "gate"]
            padding = torch.arange(logits.shape[1], device=logits.device) >= ranks
            scores = (logits / temperature).masked_fill(padding, torch.finfo(logits.dtype).min)
            found[slot, "gate"] = ranks * torch.softmax(scores, dim=1)
        return found

    def folded(self, stacks: Stacks) -> Tensor:
        """Return the values with the importances in the columns of B, [clients, width]."""
        everyone = torch.arange(len(stacks.values), device=stacks.values.device)
        logits = {(slot, "gate"): stacks.of((slot, "gate")) for slot in self.ranks}
        values = stacks.values.clone()
        for (slot, _), importance in self.importance(logits, everyone).items():
            stacks.layout.view(values, (slot, "B")).mul_(importance[:, None, :])
        return values

    def searches(
        self, stacks: Stacks, optimizer: StackedOptimizer, members: Sequence[Member], seed: int
    ) -> list[Search]:
        """Return each client's search, which changes its row of the stacks and of the optimizer's moments.

        Raises
        ------
        InputError : the optimizer's moments cannot follow the components.
        """
        moments = moments_of(optimizer)
        return [_search(place, member, stacks, moments, seed) for place, member in enumerate(members)]


def _search(place: int, member: Member, stacks: Stacks, moments: Mapping[str, Tensor], seed: int) -> Search:
    """Return the search of the client whose row is `place`."""
    remembered: dict[Tensor, dict[str, Tensor]] = {}

    def view(key: Key, rank: int) -> Tensor:
        own = _components(stacks.layout, stacks.values[place], key, rank)
        remembered[own] = {name: _components(stacks.layout, rows[place], key, rank) for name, rows in moments.items()}
        return own

    factors: dict[str, LoraFactors] = {}
    gates: dict[str, Gate] = {}
    beam = member.training.beam
    for slot, f in member.trained.factors.items():
        factors[slot] = LoraFactors(A=view((slot, "A"), f.rank), B=view((slot, "B"), f.rank), scaling=f.scaling)
        gates[slot] = Gate(view((slot, "gate"), f.rank), beam.temperature)
    rng = stream(seed, "beam", *member.where)
    return Search(beam, factors, gates, remembered.__getitem__, len(member.batches), rng)


def _components(layout: Layout, row: Tensor, key: Key, rank: int) -> Tensor:
    """Return a client's components of one tensor, without the padding, as a view of its row, [columns]."""
    whole = layout.view(row[None], key)[0]
    return whole[:, :rank] if key[1] == "B" else whole[:rank]
