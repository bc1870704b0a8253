"""The adapters of many clients as one matrix: a row holds everything that one client trains.

Row k of `Stacks.values` is client k's trained tensors one after the other: all A, then B, cores, gates, the head; a
slot takes as many components as the client with most of them needs, and the others have zeros there. Zeros stay: a
component whose row of A and column of B are zero gets no gradient. So an optimizer that works element by element needs
no masks, and steps on all clients and tensors in a handful of operations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from airtune.lora import Adapter, LoraFactors
from airtune.training.cohort.linear import Key

KINDS = ("A", "B", "core", "gate", "extra")


@dataclass(frozen=True)
class Layout:
    """Where each trained tensor stands in a row.

    Attributes
    ----------
    sizes : key -> the shape of the tensor, components padded to the most that any client has.
    starts : key -> its first column.
    width : number of columns.
    kinds : kind -> (first column, end) of all tensors of that kind.
    """

    sizes: Mapping[Key, tuple[int, ...]]
    starts: Mapping[Key, int]
    width: int
    kinds: Mapping[str, tuple[int, int]]

    def view(self, rows: Tensor, key: Key) -> Tensor:
        """Return one tensor of all clients, [clients, *size], as a view into [clients, width]."""
        start, size = self.starts[key], self.sizes[key]
        return rows[:, start : start + math.prod(size)].view(len(rows), *size)


def layout_of(sizes: Mapping[Key, tuple[int, ...]]) -> Layout:
    """Return the layout of tensors with these sizes, by kind and within a kind in the given order."""
    starts: dict[Key, int] = {}
    kinds: dict[str, tuple[int, int]] = {}
    column = 0
    for kind in KINDS:
        first = column
        for key in (key for key in sizes if _kind(key) == kind):
            starts[key] = column
            column += math.prod(sizes[key])
        kinds[kind] = (first, column)
    return Layout(sizes, starts, column, kinds)


def padded_sizes(adapters: Sequence[Adapter], kinds: frozenset[str]) -> dict[Key, tuple[int, ...]]:
    """Return key -> the elementwise largest shape of the tensors of some kinds, in the order of the adapters."""
    found: dict[Key, tuple[int, ...]] = {}
    for adapter in adapters:
        for owner, kind, tensor in adapter.tensors():
            if kind in kinds:
                size = tuple(tensor.shape)
                found[owner, kind] = tuple(map(max, found.get((owner, kind), size), size))
    return found


def fill(target: Tensor, tensor: Tensor) -> None:
    """Write a tensor into the leading corner of each of some clients' places, [clients, *size]."""
    corner = tuple(slice(0, n) for n in tensor.shape)
    target[(slice(None), *corner)] = tensor.detach().to(target)


def stack_of(tensors: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """Return tensors of unequal size as one, [clients, *largest], with zeros around; None is all zeros."""
    present = [tensor for tensor in tensors if tensor is not None]
    size = [max(sizes) for sizes in zip(*(tuple(tensor.shape) for tensor in present), strict=True)]
    stacked = like.new_zeros((len(tensors), *size))
    for place, tensor in enumerate(tensors):
        if tensor is not None:
            fill(stacked[place : place + 1], tensor)
    return stacked


@dataclass
class Stacks:
    """The trained tensors of a block of clients.

    values, gradients : [clients, width] in the adapter's precision, on the model's device.
    """

    layout: Layout
    values: Tensor
    gradients: Tensor

    def of(self, key: Key) -> Tensor:
        """Return the values of one tensor, [clients, *size], a view."""
        return self.layout.view(self.values, key)

    def gradient(self, key: Key) -> Tensor:
        """Return the gradients of one tensor, [clients, *size], a view."""
        return self.layout.view(self.gradients, key)

    def leaves(self, members: Tensor) -> dict[Key, Tensor]:
        """Return copies of some clients' tensors that want gradients; members [n], places in the block."""
        values = self.values.index_select(0, members)
        return {key: self.layout.view(values, key).requires_grad_() for key in self.layout.starts}

    def add_gradients(self, members: Tensor, found: Sequence[Tensor | None]) -> None:
        """Add gradients of some clients' leaves, in the order of the leaves; None counts as zeros."""
        parts: list[Tensor] = []
        for key, gradient in zip(self.layout.starts, found, strict=True):
            count = math.prod(self.layout.sizes[key])
            parts.append(self.values.new_zeros((len(members), count)) if gradient is None else gradient.flatten(1))
        self.gradients.index_add_(0, members, torch.cat(parts, dim=1))


def start_rows(layout: Layout, adapters: Sequence[Adapter], like: Tensor) -> Stacks:
    """Return the stacks of clients that start from these sub-adapters; equal objects are written once.

    like : an empty tensor of the precision and device wanted.
    """
    values = like.new_zeros((len(adapters), layout.width))
    places: dict[int, list[int]] = {}
    for place, adapter in enumerate(adapters):
        places.setdefault(id(adapter), []).append(place)
    for same in places.values():
        row = like.new_zeros((1, layout.width))
        for owner, kind, tensor in adapters[same[0]].tensors():
            if (owner, kind) in layout.sizes:
                fill(layout.view(row, (owner, kind)), tensor)
        values[torch.tensor(same, device=values.device)] = row
    return Stacks(layout, values, torch.zeros_like(values))


def adapter_of(layout: Layout, row: Tensor, start: Adapter) -> Adapter:
    """Return a client's sub-adapter after training: its row's values, [width], in place of what was trained.

    start : before training, with what is not trained.
    """
    rows = row[None]

    def value(owner: str, kind: str, before: Tensor) -> Tensor:
        if (owner, kind) not in layout.sizes:
            return before.detach().to(device="cpu", dtype=row.dtype, copy=True)
        corner = tuple(slice(0, n) for n in before.shape)
        return layout.view(rows, (owner, kind))[(0, *corner)].to("cpu", copy=True).contiguous()

    factors: dict[str, LoraFactors] = {}
    for slot, f in start.factors.items():
        core = None if f.core is None else value(slot, "core", f.core)
        factors[slot] = replace(f, A=value(slot, "A", f.A), B=value(slot, "B", f.B), core=core)
    extras = {name: value(name, "extra", tensor) for name, tensor in start.extras.items()}
    return replace(start, factors=factors, extras=extras)


def _kind(key: Key) -> str:
    return key[1]
