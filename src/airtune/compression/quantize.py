"""Stochastic quantisation of the whole slice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from airtune.compression.rows import RowCoder, factor_blocks
from airtune.compression.values import Stochastic
from airtune.lora import Adapter, AdapterShape, AdapterSlice
from airtune.types import Payload

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Quantized:
    """The changes of A and B as integers of few bits, rounded at random without bias (see `Stochastic`).

    The extras (classifier head) are sent in fp32, as by every codec here.

    Parameters
    ----------
    width : bits per number, 2 to 8.
    group : numbers that share an fp32 scale.
    """

    width: int = 8
    group: int = 256

    def __post_init__(self) -> None:
        """Check the ranges."""
        Stochastic(self.width, self.group)

    def bits(self, send: AdapterSlice, shape: AdapterShape) -> int:
        """Return the bits of the payload, exactly."""
        return self._coder(send, shape).size_bits(send, shape)

    def encode(
        self,
        send: AdapterSlice,
        trained: Adapter,
        start: Adapter,
        memory: Mapping[str, Tensor],
        rng: np.random.Generator,
    ) -> tuple[Payload, Mapping[str, Tensor]]:
        """Return integers and scales; the memory stays as it is."""
        coder = self._coder(send, start.shape)
        masks = [np.ones(block.rows, dtype=np.bool_) for block in coder.blocks]
        return coder.write(send, trained, start, masks, rng), memory

    def decode(self, send: AdapterSlice, payload: Payload, start: Adapter) -> Adapter:
        """Return the start with the rounded changes."""
        return self._coder(send, start.shape).read(send, payload, start)

    def _coder(self, send: AdapterSlice, shape: AdapterShape) -> RowCoder:
        blocks = factor_blocks(send, shape)
        values = Stochastic(self.width, self.group)
        return RowCoder(blocks, [block.rows for block in blocks], "hold", values, index="none")
