"""Linear layers with other weights for each client: what the rows of one micro-batch pass through.

The rows of a micro-batch belong to clients. They stand in segments: ``clients`` clients with the same number of rows
each, one client after the other. So the weights of a segment are a stack [clients, out, in], and one batched product
serves it. A weight that all clients share is an ordinary matrix [out, in].
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Key = tuple[str, str]  # (slot, "A" | "B" | "core" | "gate") or (name of an extra tensor, "extra")
Mask = Callable[[str, Tensor], Tensor]  # dropout of a slot: from an input [rows, ...] to the same, entries dropped


@dataclass(frozen=True)
class Segment:
    """Neighbouring clients of a micro-batch that have equally many rows each.

    Attributes
    ----------
    first_row, rows : rows of the micro-batch, `rows` for all its clients together.
    first, clients : places in the stacks of the micro-batch.
    """

    first_row: int
    rows: int
    first: int
    clients: int


@dataclass(frozen=True)
class Part:
    """One low-rank part of a layer: the keys of its weights, and whether dropout stands in front of it.

    Attributes
    ----------
    a, b, core : keys into the weights of the bound micro-batch; `core` None: there is none. A part without `b` is a
        dense matrix under `a`.
    scaling : key of the scalings; of a trained part the slot.
    dropout : whether the clients' dropout acts on its input.
    gate : key of the importances of its components, [clients, rank]; None: all are one.
    """

    a: Key
    b: Key | None
    core: Key | None
    scaling: str
    dropout: bool = False
    gate: Key | None = None


@dataclass
class Bound:
    """The micro-batch that is going through the network.

    Attributes
    ----------
    rows : of the micro-batch. segments : which clients they belong to.
    parts : module -> the low-rank parts that act there.
    weights : key -> [clients, out, in], or [out, in] where all clients share it; biases [clients, out] or [out].
    scaling : name -> one number for all, or [clients, 1, 1].
    mask : dropout, None without.
    """

    rows: int
    segments: Sequence[Segment]
    parts: Mapping[str, Sequence[Part]]
    weights: Mapping[Key, Tensor]
    scaling: Mapping[str, float | Tensor]
    mask: Mask | None = None


class Session(threading.local):
    """What the replaced layers read: the bound micro-batch of the thread that runs them."""

    bound: Bound | None = None

    def current(self) -> Bound:
        """Return the bound micro-batch."""
        assert self.bound is not None, "a layer of the cohort engine runs outside of a micro-batch"
        return self.bound


def by_client(x: Tensor, weight: Tensor, segments: Sequence[Segment], rows: int) -> Tensor:
    """Return ``x @ weight'`` with each row's own client's weight, in the shape [rows, ..., out].

    Parameters
    ----------
    x : [rows, ..., in]. weight : [clients, out, in], or [out, in] for all.
    segments : cover the rows of the micro-batch. rows : of the micro-batch; x may have a multiple of them.
    """
    if weight.ndim == 2:
        return functional.linear(x, weight)
    if len(segments) == 1:
        product = torch.bmm(x.reshape(segments[0].clients, -1, x.shape[-1]), weight.mT)
    else:
        each = x.reshape(rows, -1, x.shape[-1])
        width = weight.shape[1]
        product = torch.cat([_segment(each, weight, part).reshape(-1, width) for part in segments])
    return product.reshape(*x.shape[:-1], weight.shape[1])


def _segment(each: Tensor, weight: Tensor, part: Segment) -> Tensor:
    own = each[part.first_row : part.first_row + part.rows].reshape(part.clients, -1, each.shape[-1])
    return torch.bmm(own, weight[part.first : part.first + part.clients].mT)


def per_row(values: Tensor, segments: Sequence[Segment], like: Tensor) -> Tensor:
    """Return [clients, n] values, or [clients, 1, 1], as [rows, 1..., n], to be used beside ``like`` [rows, ..., m]."""
    counts = torch.cat(
        [torch.full((part.clients,), part.rows // part.clients, dtype=torch.int64) for part in segments]
    ).to(values.device)
    spread = values.reshape(len(values), -1).repeat_interleave(counts, dim=0)
    return spread.reshape(len(spread), *(1,) * (like.ndim - 2), -1)


def add_part(output: Tensor, x: Tensor, part: Part, bound: Bound) -> Tensor:
    """Return the output plus what one low-rank part adds."""
    weights = bound.weights
    if part.b is None:
        return output + functional.linear(x.to(weights[part.a].dtype), weights[part.a]).to(output.dtype)
    if part.dropout and bound.mask is not None:
        x = bound.mask(part.scaling, x)
    inner = by_client(x.to(weights[part.a].dtype), weights[part.a], bound.segments, bound.rows)
    if part.core is not None:
        inner = by_client(inner, weights[part.core], bound.segments, bound.rows)
    if part.gate is not None:
        each = inner.reshape(bound.rows, -1, inner.shape[-1])
        inner = (each * per_row(weights[part.gate], bound.segments, each)).to(inner.dtype).reshape(inner.shape)
    scaling = bound.scaling[part.scaling]
    if isinstance(scaling, Tensor):
        scaling = per_row(scaling, bound.segments, inner).to(inner.dtype)
    inner = inner * scaling
    return output + by_client(inner, weights[part.b], bound.segments, bound.rows)


@dataclass(frozen=True)
class AdaptedLayer:
    """The forward pass of an adapted layer: its frozen base, and the parts of this micro-batch's clients."""

    name: str
    base: nn.Module
    session: Session

    def __call__(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return [rows, ..., out]."""
        output, bound = self.base(x), self.session.current()
        for part in bound.parts.get(self.name, ()):
            output = add_part(output, x, part, bound)
        return output


@dataclass(frozen=True)
class HeadLayer:
    """The forward pass of a linear layer of the head whose weight, and bias if it has one, belong to the clients."""

    weight: Key
    bias: Key | None
    session: Session

    def __call__(self, x: Tensor) -> Tensor:
        """Return [rows, ..., out]."""
        bound = self.session.current()
        weight = bound.weights[self.weight]
        output = by_client(x.to(weight.dtype), weight, bound.segments, bound.rows)
        if self.bias is None:
            return output
        bias = bound.weights[self.bias]
        return output + (bias if bias.ndim == 1 else per_row(bias, bound.segments, output))


@dataclass
class Replaced:
    """Modules whose forward pass is another one for a while."""

    forwards: Mapping[nn.Module, Callable[..., Tensor]] = field(default_factory=dict[nn.Module, Callable[..., Tensor]])

    @contextmanager
    def inside(self) -> Generator[None]:
        """Replace them, and put them back afterwards whatever happens."""
        changed: list[Any] = []
        try:
            for module, forward in self.forwards.items():
                state: Any = module
                state.forward = forward
                changed.append(state)
            yield
        finally:
            for state in changed:
                del state.forward
