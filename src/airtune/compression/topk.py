"""Sparsifiers to compare SOFT with: single elements, rows and columns chosen separately, components at random."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from airtune.compression.rows import (
    Block,
    Fill,
    Mask,
    RowCoder,
    check_fill,
    check_keep_ratio,
    coded_rows,
    element_blocks,
    factor_blocks,
    kept_count,
    largest,
    paired_blocks,
)
from airtune.compression.values import FloatingPoint, ValueCoder
from airtune.lora import Adapter, AdapterShape, AdapterSlice
from airtune.types import Payload

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RowCodec(ABC):
    """What the sparsifiers of this file share: they differ in what a row is, and in which rows are chosen.

    Parameters
    ----------
    keep_ratio : share of the rows that is sent, in (0, 1]; at least one.
    fill : "hold": changes are sent, the rest does not change; "zero": values are sent, the rest is zero.
    values : how the numbers are written.
    """

    keep_ratio: float = 0.5
    fill: Fill = "hold"
    values: ValueCoder = field(default_factory=FloatingPoint)

    def __post_init__(self) -> None:
        """Check ranges and names."""
        check_keep_ratio(self.keep_ratio)
        check_fill(self.fill)

    def bits(self, send: AdapterSlice, shape: AdapterShape) -> int:
        """Return the bits of the payload, exactly."""
        return self.coder(send, shape).size_bits(send, shape)

    def encode(
        self,
        send: AdapterSlice,
        trained: Adapter,
        start: Adapter,
        memory: Mapping[str, Tensor],
        rng: np.random.Generator,
    ) -> tuple[Payload, Mapping[str, Tensor]]:
        """Return the chosen rows; the memory stays as it is."""
        coder = self.coder(send, start.shape)
        return coder.write(send, trained, start, self.choose(coder, trained, start, rng), rng), memory

    def decode(self, send: AdapterSlice, payload: Payload, start: Adapter) -> Adapter:
        """Return the fill with the rows that were sent."""
        return self.coder(send, start.shape).read(send, payload, start)

    def counts(self, blocks: Sequence[Block]) -> list[int]:
        """Return how many rows of each block are sent."""
        return [kept_count(block.rows, self.keep_ratio) for block in blocks]

    @abstractmethod
    def coder(self, send: AdapterSlice, shape: AdapterShape) -> RowCoder:
        """Return what writes and reads the rows of a slice."""

    @abstractmethod
    def choose(self, coder: RowCoder, trained: Adapter, start: Adapter, rng: np.random.Generator) -> list[Mask]:
        """Return the mask of the rows that are sent, one for each block."""


@dataclass(frozen=True)
class TopK(RowCodec):
    """Keep the elements of largest magnitude of each factor, A and B separately.

    The index of each factor is a bitmap or a list of positions, whichever takes fewer bits.

    Parameters
    ----------
    keep_ratio : share of the elements of each factor that is sent, in (0, 1]; at least one element.
    fill : "hold": the largest changes are sent, the rest does not change; "zero": the largest values, the rest is zero.
    values : how the numbers are written.
    """

    def coder(self, send: AdapterSlice, shape: AdapterShape) -> RowCoder:
        """Return the coder of single elements."""
        blocks = element_blocks(send, shape)
        return RowCoder(blocks, self.counts(blocks), self.fill, self.values, index="shortest")

    def choose(self, coder: RowCoder, trained: Adapter, start: Adapter, rng: np.random.Generator) -> list[Mask]:
        """Return the elements of largest magnitude of each factor."""
        return _largest_rows(coder, trained, start)


@dataclass(frozen=True)
class RowTopK(RowCodec):
    """Keep the rows of A and the columns of B of largest norm, chosen *separately*: the ablation of pairing.

    With zero fill only components in both masks survive in the product B A.

    Parameters
    ----------
    keep_ratio : share of the rows of A and of the columns of B, in (0, 1]; at least one.
    fill : "hold": by the norms of the changes, which are sent; "zero": by the norms of the values.
    values : how the numbers are written.
    """

    def coder(self, send: AdapterSlice, shape: AdapterShape) -> RowCoder:
        """Return the coder of rows of A and columns of B."""
        blocks = factor_blocks(send, shape)
        return RowCoder(blocks, self.counts(blocks), self.fill, self.values)

    def choose(self, coder: RowCoder, trained: Adapter, start: Adapter, rng: np.random.Generator) -> list[Mask]:
        """Return the rows of largest norm of each factor."""
        return _largest_rows(coder, trained, start)


@dataclass(frozen=True)
class RandomComponents(RowCodec):
    """Keep components drawn uniformly without replacement, paired as in SOFT: what importance is worth.

    Parameters
    ----------
    keep_ratio : share of the components of each slot, in (0, 1]; at least one.
    fill : "hold": changes are sent, the rest does not change; "zero": values are sent, the rest is zero.
    values : how the numbers are written.
    """

    def coder(self, send: AdapterSlice, shape: AdapterShape) -> RowCoder:
        """Return the coder of components."""
        blocks = paired_blocks(send, shape)
        return RowCoder(blocks, self.counts(blocks), self.fill, self.values)

    def choose(self, coder: RowCoder, trained: Adapter, start: Adapter, rng: np.random.Generator) -> list[Mask]:
        """Return components drawn at random."""
        drawn = [rng.random(block.rows) for block in coder.blocks]
        return [largest(score, count) for score, count in zip(drawn, coder.counts, strict=True)]


def _largest_rows(coder: RowCoder, trained: Adapter, start: Adapter) -> list[Mask]:
    """Return the rows of largest norm of what is coded, each factor by itself."""
    masks: list[Mask] = []
    for block, count in zip(coder.blocks, coder.counts, strict=True):
        (key,) = block.keys
        rows = coded_rows(trained, start, key, block.rows, coder.fill)
        masks.append(largest(rows.float().norm(dim=1).numpy(), count))
    return masks
