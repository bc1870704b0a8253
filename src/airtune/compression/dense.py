"""Every value of the slice, one after the other, as floating-point numbers of fixed width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from airtune.errors import InputError, NoResultError
from airtune.lora import Adapter, AdapterShape, AdapterSlice, LoraFactors
from airtune.types import Payload

if TYPE_CHECKING:
    from torch import Tensor

_BITS = {"fp32": 32, "fp16": 16, "bf16": 16}


@dataclass(frozen=True)
class Dense:
    """Flat packing: exact in fp32, rounded to nearest in fp16 and bf16.

    The order is that of `AdapterSlice.payload`; both sides know the slice, so no index is sent. bf16 travels as the
    upper 16 bits of fp32.

    Attributes
    ----------
    precision : "fp32", "fp16" or "bf16".
    """

    precision: Literal["fp32", "fp16", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        """Refuse unknown precisions.

        Raises
        ------
        InputError : the precision is not known.
        """
        if self.precision not in _BITS:
            raise InputError(f"compressor.precision: unknown {self.precision!r}; valid: {', '.join(_BITS)}")

    def bits(self, send: AdapterSlice, shape: AdapterShape) -> int:
        """Return the bits of the payload; here the bound is exact."""
        return send.num_values(shape) * _BITS[self.precision]

    def encode(
        self,
        send: AdapterSlice,
        trained: Adapter,
        start: Adapter,
        memory: Mapping[str, Tensor],
        rng: np.random.Generator,
    ) -> tuple[Payload, Mapping[str, Tensor]]:
        """Return all values of the slice as one array; `start`, `memory` and `rng` are not needed.

        Raises
        ------
        NoResultError : a finite value is too large for fp16.
        """
        import torch

        parts = [tensor.detach().cpu().float().reshape(-1) for _, _, tensor in send.payload(trained)]
        values = self._pack(torch.cat(parts) if parts else torch.zeros(0))
        return Payload({"values": values}, bits=values.nbytes * 8), memory

    def decode(self, send: AdapterSlice, payload: Payload, start: Adapter) -> Adapter:
        """Return `start` with the slice's values replaced by those of the payload; what was not sent stays.

        Raises
        ------
        ValueError : the payload does not have the number of values of the slice.
        """
        template = [(owner, kind, tensor) for owner, kind, tensor in send.payload(start)]
        values = self._unpack(payload.arrays["values"])
        if len(values) != sum(tensor.numel() for _, _, tensor in template):
            raise ValueError(f"{len(values)} values arrived, which is not the size of the slice")
        found: dict[tuple[str, str], Tensor] = {}
        position = 0
        for owner, kind, tensor in template:
            piece = values[position : position + tensor.numel()]
            found[owner, kind] = piece.reshape(tensor.shape).to(tensor.dtype)
            position += tensor.numel()
        return replace(
            start,
            factors={name: _replaced(name, factors, found) for name, factors in start.factors.items()},
            extras={name: found.get((name, "extra"), tensor) for name, tensor in start.extras.items()},
        )

    def _pack(self, values: Tensor) -> NDArray[Any]:
        import torch

        if self.precision == "fp32":
            return values.numpy().copy()
        if self.precision == "bf16":
            return values.bfloat16().view(torch.int16).numpy().view(np.uint16).copy()
        halves = values.half()
        if bool((halves.isinf() & values.isfinite()).any()):
            raise NoResultError("compressor: a value exceeds the range of fp16 (65504); use bf16 or fp32")
        return halves.numpy().copy()

    def _unpack(self, values: NDArray[Any]) -> Tensor:
        import torch

        if self.precision == "bf16":
            return torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16).float()
        return torch.from_numpy(values.copy()).float()


def _replaced(name: str, factors: LoraFactors, found: Mapping[tuple[str, str], Tensor]) -> LoraFactors:
    """Return the factors of a slot with those of its tensors replaced that were found."""
    return LoraFactors(
        A=found.get((name, "A"), factors.A),
        B=found.get((name, "B"), factors.B),
        scaling=factors.scaling,
        core=found.get((name, "core"), factors.core) if factors.core is not None else None,
    )
