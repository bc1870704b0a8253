"""What clients changed, as one vector each: the coordinates in which robust rules and privacy work.

A change is what was sent minus what it started from, over exactly the tensors that travel. Rules that replace all
updates by one consensus hand it to the wrapped aggregator as a single update, so that they fit under any of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from airtune.errors import InputError
from airtune.lora import Adapter, AdapterSlice, LoraFactors
from airtune.types import ClientUpdate, RoundOutcome, ServerModel

if TYPE_CHECKING:
    from torch import Tensor


def change_of(update: ClientUpdate, outcome: RoundOutcome, model: ServerModel) -> Tensor:
    """Return everything that an update sent minus what it started from, [values], double precision."""
    import torch

    start = outcome.start_of(update, model)
    send = update.task.send
    pairs = zip(send.payload(update.values), send.payload(start), strict=True)
    parts = [(new.double() - old.double()).reshape(-1) for (_, _, new), (_, _, old) in pairs]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def moved(update: ClientUpdate, start: Adapter, change: Tensor) -> ClientUpdate:
    """Return the update whose values are `start` plus a change of the tensors that its slice sends."""
    send = update.task.send
    found: dict[tuple[str, str], Tensor] = {}
    position = 0
    for owner, kind, tensor in send.payload(start):
        piece = change[position : position + tensor.numel()].reshape(tensor.shape)
        found[owner, kind] = (tensor.double() + piece).to(tensor.dtype)
        position += tensor.numel()
    factors = {
        slot: LoraFactors(
            A=found.get((slot, "A"), f.A),
            B=found.get((slot, "B"), f.B),
            scaling=f.scaling,
            core=None if f.core is None else found.get((slot, "core"), f.core),
        )
        for slot, f in start.factors.items()
    }
    extras = {name: found.get((name, "extra"), tensor) for name, tensor in start.extras.items()}
    return replace(update, values=start.with_factors(factors, extras))


def common_slice(updates: Sequence[ClientUpdate], rule: str) -> AdapterSlice:
    """Return the slice that all updates sent.

    Raises
    ------
    InputError : the slices differ, so that the clients' values have no common coordinates.
    """
    first = updates[0].task.send
    for update in updates[1:]:
        if not _same(first, update.task.send):
            raise InputError(f"method.aggregator: {rule} compares values: all clients must send the same slice")
    return first


def consensus(
    model: ServerModel, outcome: RoundOutcome, updates: Sequence[ClientUpdate], change: Tensor
) -> RoundOutcome:
    """Return the outcome with one update in place of all: the current model plus a change."""
    leader = replace(updates[0], model_version=model.version)
    start = leader.task.send.take(model.adapter)
    return replace(outcome, updates=(moved(leader, start, change),))


def _same(one: AdapterSlice, other: AdapterSlice) -> bool:
    return (
        one.tensors == other.tensors
        and one.extras == other.extras
        and one.unbiased == other.unbiased
        and one.components.keys() == other.components.keys()
        and all(list(one.components[slot]) == list(other.components[slot]) for slot in one.components)
    )
