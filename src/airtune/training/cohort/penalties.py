"""The penalties of `airtune.training.penalties` for a block of clients: a value each, gradients on their stacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from airtune.training.cohort.linear import Key
from airtune.training.cohort.members import Member
from airtune.training.cohort.stacks import Stacks
from airtune.training.penalties import TINY
from airtune.types import OrthogonalityPenalty, Penalty, ProximalPenalty, TailPenalty


@dataclass(frozen=True)
class Factors:
    """A and B of every slot of a block, trained or not.

    constants : key -> [clients, *size] of what is not trained. slots : names.
    masks : slot -> [clients, rank], whether a client has the component.
    """

    slots: tuple[str, ...]
    constants: Mapping[Key, Tensor]
    masks: Mapping[str, Tensor]

    def leaves(self, stacks: Stacks, active: int) -> dict[Key, Tensor]:
        """Return the present values of the active clients; those that are trained want gradients."""
        found: dict[Key, Tensor] = {}
        for key in [(slot, kind) for slot in self.slots for kind in ("A", "B")]:
            trained = key in stacks.layout.sizes
            found[key] = stacks.of(key)[:active].detach().requires_grad_() if trained else self.constants[key][:active]
        return found


@dataclass(frozen=True)
class StackedPenalties:
    """All penalties of a block; every client has the same kinds of them, in the same order."""

    members: Sequence[Member]
    factors: Factors
    start: Tensor | None

    def add_gradients(self, stacks: Stacks, active: int) -> Tensor:
        """Add the penalties' gradients to the stacks' and return their values, [active]."""
        total = stacks.values.new_zeros(active)
        for place, first in enumerate(self.members[0].training.penalties):
            own = [member.training.penalties[place] for member in self.members[:active]]
            weight = stacks.values.new_tensor([penalty.weight for penalty in own])
            if isinstance(first, ProximalPenalty):
                total = total + self._proximal(stacks, weight)
            else:
                total = total + self._of_factors(stacks, own, weight)
        return total

    def tail_norms(self, stacks: Stacks, active: int) -> Tensor | None:
        """Return the sum over a client's tail penalties of its tail's norm, without weight, [active]; None without."""
        places = [i for i, p in enumerate(self.members[0].training.penalties) if isinstance(p, TailPenalty)]
        if not places:
            return None
        values = {key: value.detach() for key, value in self.factors.leaves(stacks, active).items()}
        own = [[m.training.penalties[i] for m in self.members[:active]] for i in places]
        return torch.stack([self._tail(values, penalties) for penalties in own]).sum(dim=0)

    def _proximal(self, stacks: Stacks, weight: Tensor) -> Tensor:
        assert self.start is not None
        active = len(weight)
        moved = stacks.values[:active] - self.start[:active]
        stacks.gradients[:active].addcmul_(moved, weight[:, None])
        return weight * moved.square().sum(dim=1) / 2

    def _of_factors(self, stacks: Stacks, own: Sequence[Penalty], weight: Tensor) -> Tensor:
        with torch.enable_grad():
            leaves = self.factors.leaves(stacks, len(own))
            if isinstance(own[0], OrthogonalityPenalty):
                value = weight * self._orthogonality(leaves, own[0].form)
            else:
                value = weight * self._tail(leaves, own)
            trained = [key for key, leaf in leaves.items() if leaf.requires_grad]
            if trained and value.requires_grad:
                found = torch.autograd.grad(value.sum(), [leaves[key] for key in trained])
                for key, gradient in zip(trained, found, strict=True):
                    stacks.gradient(key)[: len(own)] += gradient
        return value.detach()

    def _orthogonality(self, leaves: Mapping[Key, Tensor], form: str) -> Tensor:
        on_b, on_a = ("off-diagonal", "identity") if form == "mixed" else (form, form)
        terms: list[Tensor] = []
        for slot in self.factors.slots:
            a, b = leaves[slot, "A"], leaves[slot, "B"]
            mask = self.factors.masks[slot][: len(a)]
            terms += [_gram_penalty(b.mT @ b, on_b, mask), _gram_penalty(a @ a.mT, on_a, mask)]
        return torch.stack(terms).sum(dim=0) if terms else self._zeros(leaves)

    def _tail(self, leaves: Mapping[Key, Tensor], own: Sequence[Penalty]) -> Tensor:
        terms: list[Tensor] = []
        for slot in self.factors.slots:
            a, b = leaves[slot, "A"], leaves[slot, "B"]
            tail = torch.stack([self._tail_mask(slot, k, p) for k, p in enumerate(own)]).to(a)
            rows = torch.linalg.vector_norm(a * tail[:, :, None], dim=(1, 2))
            terms.append(torch.linalg.vector_norm(b * tail[:, None, :], dim=(1, 2)) * rows)
        return torch.stack(terms).sum(dim=0) if terms else self._zeros(leaves)

    def _tail_mask(self, slot: str, member: int, penalty: Penalty) -> Tensor:
        """Return which of the slot's components, [rank], belong to a client's tail."""
        assert isinstance(penalty, TailPenalty)
        mask = torch.zeros(self.factors.masks[slot].shape[1])
        components = self.members[member].job.task.train.components.get(slot)
        if components is not None and slot in penalty.start:
            mask[: len(components)] = torch.as_tensor(components >= penalty.start[slot]).to(mask)
        return mask

    def _zeros(self, leaves: Mapping[Key, Tensor]) -> Tensor:
        return next(iter(leaves.values())).new_zeros(1) if leaves else torch.zeros(1)


def _gram_penalty(gram: Tensor, form: str, mask: Tensor) -> Tensor:
    """Return the penalty of each client's Gram matrix, [clients]; gram [clients, rank, rank], mask [clients, rank]."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    if form == "identity":
        return (gram - torch.diag_embed(mask.to(gram))).square().sum(dim=(1, 2))
    squares = (gram - torch.diag_embed(diagonal)).square()
    if form == "off-diagonal":
        return squares.sum(dim=(1, 2))
    return (squares / ((diagonal[:, :, None] + TINY) * (diagonal[:, None, :] + TINY))).sum(dim=(1, 2))
