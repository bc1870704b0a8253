"""From the clients of a block to its stacks, constants, layers, pairs and penalties."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from airtune.errors import InputError
from airtune.lora import Adapter
from airtune.optimizers import LoraPro, LoraRite, as_optimizer
from airtune.training.beam import ONE_FACTOR
from airtune.training.cohort.constants import Constants
from airtune.training.cohort.gates import StackedGates
from airtune.training.cohort.linear import Key, Part
from airtune.training.cohort.members import Member, trained_kinds
from airtune.training.cohort.optimizers import PairSlots
from airtune.training.cohort.penalties import Factors, StackedPenalties
from airtune.training.cohort.stacks import Stacks, layout_of, padded_sizes, start_rows


class Cohort:
    """The clients of one block, all of the same signature.

    Attributes
    ----------
    members : from the most steps to the fewest. like : an empty tensor that tells precision and device.
    kinds : of the tensors that are trained, the same for all. slots : of all clients, in the adapter's order.
    """

    def __init__(self, members: Sequence[Member], like: Tensor, *, gated: bool = False) -> None:
        """Look at what the clients train; with `gated` components have gates (BeamLoRA).

        Raises
        ------
        InputError : with gates, one of A and B is not trained.
        """
        self.members = members
        self.like = like
        self.trained = [member.trained for member in members]
        self.kinds = frozenset(trained_kinds(self.trained[0], members[0].job.task.train))
        self._different = list({id(adapter): adapter for adapter in self.trained}.values())
        held = {slot for adapter in self._different for slot in adapter.factors}
        self.slots = tuple(slot for slot in members[0].job.model.adapter.factors if slot in held)
        self._gated = gated and bool(self.slots)
        if self._gated and not self.kinds >= {"A", "B"}:
            raise InputError(ONE_FACTOR)
        self._cores = {slot for a in self._different for slot, f in a.factors.items() if f.core is not None}

    def stacks(self) -> Stacks:
        """Return the trained tensors before the first step."""
        sizes = padded_sizes(self._different, self.kinds)
        if self._gated:
            sizes |= {(slot, "gate"): sizes[slot, "A"][:1] for slot in self.slots}
        return start_rows(layout_of(sizes), self.trained, self.like)

    def gates(self) -> StackedGates | None:
        """Return the gates of the clients' components, None if they have none."""
        if not self._gated:
            return None
        temperature = self.like.new_tensor([member.training.beam.temperature for member in self.members])
        return StackedGates({slot: self._ranks(slot) for slot in self.slots}, temperature[:, None])

    def parts(self, constants: Constants) -> dict[str, list[Part]]:
        """Return module -> its parts: trained, held, merged; what of their weights is fixed goes to `constants`."""
        for slot in self.slots:
            factors = [adapter.factors.get(slot) for adapter in self.trained]
            for kind in ("A", "B", *(("core",) if slot in self._cores else ())):
                if kind not in self.kinds:
                    constants.add((slot, kind), [None if f is None else getattr(f, kind) for f in factors])
            constants.add_scaling(slot, factors)
        if "extra" not in self.kinds:
            for name in self.members[0].job.model.adapter.extras:
                constants.add((name, "extra"), [m.job.model.adapter.extras[name] for m in self.members])
        parts = self._trained_parts()
        held = constants.add_held([member.held for member in self.members])
        for more in (held, constants.add_merged(self.members[0].job.model.base_update)):
            for module, found in more.items():
                parts.setdefault(module, []).extend(found)
        return parts

    def _trained_parts(self) -> dict[str, list[Part]]:
        dropout = any(member.training.lora_dropout > 0.0 for member in self.members)
        parts: dict[str, list[Part]] = {}
        for module in dict.fromkeys(module for adapter in self._different for module in adapter.placement):
            here = {slot for adapter in self._different for slot in adapter.placement.get(module, ())}
            for slot in (slot for slot in self.slots if slot in here):
                core = (slot, "core") if slot in self._cores else None
                gate = (slot, "gate") if self._gated else None
                parts.setdefault(module, []).append(Part((slot, "A"), (slot, "B"), core, slot, dropout, gate))
        return parts

    def pairs(self, constants: Constants) -> list[PairSlots]:
        """Return the slots whose pairs an optimizer computes with, by size; all clients then have equal ranks."""
        paired = isinstance(as_optimizer(self.members[0].training.optimizer), LoraRite | LoraPro)
        if not paired or not self.kinds & {"A", "B"}:
            return []
        groups: dict[tuple[int, ...], list[str]] = {}
        for slot, f in self.trained[0].factors.items():
            groups.setdefault((f.rank, f.in_features, f.out_features), []).append(slot)
        found: list[PairSlots] = []
        for slots in groups.values():
            scaling = self.like.new_tensor([[_scaling(adapter, slot) for slot in slots] for adapter in self.trained])
            fixed = self._fixed(constants, slots)
            found.append(PairSlots(tuple(slots), scaling, "A" in self.kinds, "B" in self.kinds, fixed))
        return found

    def penalties(self, constants: Constants, stacks: Stacks) -> StackedPenalties | None:
        """Return the clients' penalties, None if they have none."""
        if not self.members[0].training.penalties:
            return None
        masks: dict[str, Tensor] = {}
        for slot in self.slots:
            ranks = self._ranks(slot)
            masks[slot] = torch.arange(int(ranks.max()), device=ranks.device)[None, :] < ranks[:, None]
        factors = Factors(self.slots, self._fixed(constants, self.slots), masks)
        return StackedPenalties(self.members, factors, stacks.values.clone())

    def _ranks(self, slot: str) -> Tensor:
        """Return how many components of a slot each client trains, [clients]."""
        return self.like.new_tensor([a.factors[slot].rank if slot in a.factors else 0 for a in self.trained])

    def _fixed(self, constants: Constants, slots: Sequence[str]) -> dict[Key, Tensor]:
        """Return A and B of these slots where they are not trained, [clients, ...]."""
        keys = [(slot, kind) for slot in slots for kind in ("A", "B") if kind not in self.kinds]
        return {key: constants.all_of(key, len(self.members)) for key in keys}


def _scaling(adapter: Adapter, slot: str) -> float:
    return adapter.factors[slot].scaling if slot in adapter.factors else 1.0
