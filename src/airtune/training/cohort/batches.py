"""Micro-batches across clients: which rows go through the network together.

In a step every client has a batch of its own. Batches are sorted by length and put together until the token budget is
full or until the padding would cost more than a pass of its own. A batch that is larger than the budget is cut into
several chunks: its gradient is the sum of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from airtune.training.cohort.linear import Segment

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Chunk:
    """Rows of one client's batch.

    member : place of the client in its block. first : place of its first row in the batch. rows : examples.
    length : tokens of the longest of them.
    """

    member: int
    first: int
    rows: Indices
    length: int


@dataclass(frozen=True)
class MicroBatch:
    """Chunks that go through the network together, those of equal size next to one another."""

    chunks: tuple[Chunk, ...]

    @property
    def length(self) -> int:
        """Return the tokens to which every row is padded."""
        return max(chunk.length for chunk in self.chunks)

    @property
    def rows(self) -> int:
        """Return the number of rows."""
        return sum(len(chunk.rows) for chunk in self.chunks)

    @property
    def indices(self) -> Indices:
        """Return the examples, [rows]."""
        return np.concatenate([chunk.rows for chunk in self.chunks])

    @property
    def members(self) -> Indices:
        """Return the client of each chunk, [chunks]."""
        return np.array([chunk.member for chunk in self.chunks], dtype=np.int64)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Return the runs of chunks with equally many rows."""
        found: list[Segment] = []
        sizes = [len(chunk.rows) for chunk in self.chunks]
        first = row = 0
        while first < len(sizes):
            last = first
            while last < len(sizes) and sizes[last] == sizes[first]:
                last += 1
            rows = (last - first) * sizes[first]
            found.append(Segment(row, rows, first, last - first))
            first, row = last, row + rows
        return tuple(found)


@dataclass(frozen=True)
class Packing:
    """How micro-batches are built.

    tokens : most token places of a micro-batch, padding included, unless one row alone has more.
    launch : what a further micro-batch costs, in token places: more padding than that is not worth a common pass.
    """

    tokens: int
    launch: int = 64

    def pack(self, batches: Sequence[tuple[int, Indices]], lengths: NDArray[np.int64]) -> list[MicroBatch]:
        """Return micro-batches that hold every row of the batches once.

        Parameters
        ----------
        batches : (member, examples) of one step. lengths : [examples], tokens of every example.
        """
        chunks = [chunk for member, rows in batches for chunk in self._cut(member, rows, lengths)]
        chunks.sort(key=lambda chunk: (chunk.length, len(chunk.rows), chunk.member, chunk.first))
        found: list[MicroBatch] = []
        held: list[Chunk] = []
        rows = length = 0
        for chunk in chunks:
            full = (rows + len(chunk.rows)) * chunk.length > self.tokens
            if held and (full or rows * (chunk.length - length) > self.launch):
                found.append(_micro_batch(held))
                held, rows = [], 0
            held.append(chunk)
            rows, length = rows + len(chunk.rows), chunk.length
        return [*found, _micro_batch(held)] if held else found

    def _cut(self, member: int, rows: Indices, lengths: NDArray[np.int64]) -> list[Chunk]:
        own = lengths[rows]
        longest = int(own.max())
        size = max(1, self.tokens // max(longest, 1))
        if len(rows) <= size:
            return [Chunk(member, 0, rows, longest)]
        starts = range(0, len(rows), size)
        return [Chunk(member, s, rows[s : s + size], int(own[s : s + size].max())) for s in starts]


def _micro_batch(chunks: Sequence[Chunk]) -> MicroBatch:
    return MicroBatch(tuple(sorted(chunks, key=lambda chunk: (len(chunk.rows), chunk.member, chunk.first))))
