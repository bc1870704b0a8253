"""What a codec dropped is added to the client's next upload."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from airtune.compression.quantize import Quantized
from airtune.compression.soft import Soft
from airtune.compression.topk import RandomComponents, RowTopK, TopK
from airtune.errors import InputError
from airtune.lora import Adapter, AdapterShape, AdapterSlice, Factor, Indices, LoraFactors
from airtune.types import Payload

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ErrorFeedback:
    """Code ``trained + residual`` and remember what was lost of it (arXiv 1809.07599), per client.

    The residual of A and B lives in the client's memory by component, so that it survives rounds in which the client
    sends other components; a component that is not sent in a round keeps its residual.

    Parameters
    ----------
    inner : the lossy codec, with hold fill: under zero fill what was dropped is a value, not a change to send later.
    """

    inner: TopK | RowTopK | RandomComponents | Soft | Quantized = field(default_factory=TopK)

    def __post_init__(self) -> None:
        """Refuse zero fill."""
        if getattr(self.inner, "fill", "hold") != "hold":
            raise InputError('compressor.inner.fill: "zero" has no residual; valid: hold')

    @property
    def keep_ratio(self) -> float:
        """Return the inner codec's share of what is sent (1 for quantisation)."""
        return getattr(self.inner, "keep_ratio", 1.0)

    def bits(self, send: AdapterSlice, shape: AdapterShape) -> int:
        """Return the inner codec's bits."""
        return self.inner.bits(send, shape)

    def encode(
        self,
        send: AdapterSlice,
        trained: Adapter,
        start: Adapter,
        memory: Mapping[str, Tensor],
        rng: np.random.Generator,
    ) -> tuple[Payload, Mapping[str, Tensor]]:
        """Return the payload of what should arrive, and the memory with the new residual."""
        wanted = trained.with_factors(
            {name: _with_residual(f, name, send, memory) for name, f in trained.factors.items()}
        )
        payload, memory = self.inner.encode(send, wanted, start, memory, rng)
        arrived = self.inner.decode(send, payload, start)
        residual = {
            _name(slot, kind): _remembered(
                _rows(wanted.factors[slot], kind) - _rows(arrived.factors[slot], kind),
                send.components[slot],
                memory.get(_name(slot, kind)),
            )
            for slot in wanted.factors
            for kind in sorted(send.tensors)
        }
        return payload, {**memory, **residual}

    def decode(self, send: AdapterSlice, payload: Payload, start: Adapter) -> Adapter:
        """Return what the inner codec understands."""
        return self.inner.decode(send, payload, start)


def _name(slot: str, kind: Factor) -> str:
    return f"feedback/{kind}/{slot}"


def _rows(factors: LoraFactors, kind: Factor) -> Tensor:
    """Return a factor with one component a row, in single precision."""
    return (factors.A if kind == "A" else factors.B.T).detach().cpu().float()


def _with_residual(factors: LoraFactors, slot: str, send: AdapterSlice, memory: Mapping[str, Tensor]) -> LoraFactors:
    """Return the factors plus what earlier rounds lost of these components."""
    a, b = factors.A, factors.B
    if "A" in send.tensors:
        a = a + _recalled(_rows(factors, "A"), send.components[slot], memory.get(_name(slot, "A"))).to(a)
    if "B" in send.tensors:
        b = b + _recalled(_rows(factors, "B"), send.components[slot], memory.get(_name(slot, "B"))).T.to(b)
    return replace(factors, A=a, B=b)


def _recalled(like: Tensor, components: Indices, stored: Tensor | None) -> Tensor:
    """Return the residual rows of some components, zero where nothing is stored; stored : [any number, width]."""
    import torch

    found = torch.zeros_like(like)
    if stored is not None:
        known = components < stored.shape[0]
        found[torch.from_numpy(known)] = stored[torch.from_numpy(components[known])]
    return found


def _remembered(residual: Tensor, components: Indices, stored: Tensor | None) -> Tensor:
    """Return the stored rows with those of some components replaced; row i belongs to component i of the adapter."""
    rows = max(int(components.max()) + 1, 0 if stored is None else stored.shape[0])
    new = residual.new_zeros((rows, residual.shape[1]))
    if stored is not None:
        new[: stored.shape[0]] = stored
    new[components] = residual
    return new
