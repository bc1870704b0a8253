"""What all sparsifying codecs share: some rows of some matrices are sent, with their index counted.

A factor is seen as a matrix whose rows are its components (A as it is, B transposed). A `Block` is a set of such
matrices that share one mask over their rows: A and B of a slot (paired selection), one factor alone (separate
selection), or single elements (rows of width 1). What is coded is the difference to the *fill*: the value that the
server keeps where nothing is sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from airtune.compression.dense import Dense
from airtune.compression.values import ValueCoder, pack_integers, unpack_integers
from airtune.errors import InputError, unknown_name
from airtune.lora import NEITHER, Adapter, AdapterShape, AdapterSlice
from airtune.types import Payload

if TYPE_CHECKING:
    from torch import Tensor

Fill = Literal["hold", "zero"]
Key = tuple[str, Literal["A", "B"]]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Block:
    """Matrices that share one mask.

    Attributes
    ----------
    keys : slot and factor of each.
    rows : number of rows that the mask is over.
    width : numbers in one row, all matrices together.
    """

    keys: tuple[Key, ...]
    rows: int
    width: int


def paired_blocks(send: AdapterSlice, shape: AdapterShape) -> list[Block]:
    """Return one block per slot: its component i is row i of A and column i of B, sent or dropped together."""
    blocks: list[Block] = []
    for slot, size in shape.slots.items():
        keys = _keys(slot, send)
        width = size.in_features * ("A" in send.tensors) + size.out_features * ("B" in send.tensors)
        if keys and send.kept(slot):
            blocks.append(Block(keys, send.kept(slot), width))
    return blocks


def factor_blocks(send: AdapterSlice, shape: AdapterShape) -> list[Block]:
    """Return one block per factor: rows of A and columns of B are chosen separately."""
    blocks: list[Block] = []
    for slot, size in shape.slots.items():
        width = {"A": size.in_features, "B": size.out_features}
        blocks += [Block((key,), send.kept(slot), width[key[1]]) for key in _keys(slot, send) if send.kept(slot)]
    return blocks


def element_blocks(send: AdapterSlice, shape: AdapterShape) -> list[Block]:
    """Return one block per factor in which every element is a row of its own."""
    return [Block(block.keys, block.rows * block.width, 1) for block in factor_blocks(send, shape)]


def kept_count(rows: int, keep_ratio: float) -> int:
    """Return max(1, floor(keep_ratio * rows + 1e-6)), 0 without rows: a ratio of i / rows keeps exactly i."""
    return max(1, int(np.floor(keep_ratio * rows + 1e-6))) if rows else 0


def largest(importance: NDArray[np.floating[Any]], count: int) -> Mask:
    """Return the mask of the `count` largest entries; of equal ones the first."""
    mask = np.zeros(len(importance), dtype=np.bool_)
    mask[np.argsort(-importance, kind="stable")[:count]] = True
    return mask


def rows_of(values: Adapter, key: Key, rows: int) -> Tensor:
    """Return a factor as a matrix [rows, width], detached."""
    factors = values.factors[key[0]]
    matrix = factors.A if key[1] == "A" else factors.B.T
    return matrix.detach().cpu().reshape(rows, -1)


def coded_rows(trained: Adapter, start: Adapter, key: Key, rows: int, fill: Fill) -> Tensor:
    """Return what is coded of a factor: its change under hold, its values under zero fill, [rows, width]."""
    values = rows_of(trained, key, rows)
    return values - rows_of(start, key, rows) if fill == "hold" else values


def check_keep_ratio(keep_ratio: float) -> None:
    """Raise InputError unless 0 < keep_ratio <= 1."""
    if not 0.0 < keep_ratio <= 1.0:
        raise InputError(f"compressor.keep_ratio: {keep_ratio} is not possible; valid: above 0, at most 1")


def check_fill(fill: str) -> None:
    """Raise InputError unless the fill is known."""
    if fill not in ("hold", "zero"):
        raise unknown_name("compressor.fill", fill, ("hold", "zero"))


@dataclass(frozen=True)
class RowCoder:
    """Writes the chosen rows of some blocks, the index of what was chosen, and the rest of the slice densely.

    Attributes
    ----------
    blocks : of the slice, the same on both sides.
    counts : how many rows of each block are sent at most.
    fill : "hold": what is not sent does not change, and differences to the start are coded; "zero": what is not sent
        is zero, and the values themselves are coded.
    values : how numbers are written.
    index : "bitmap": one bit a row; "shortest": where fewer bits suffice, the positions of exactly `counts` rows;
        "none": all rows are sent.
    """

    blocks: Sequence[Block]
    counts: Sequence[int]
    fill: Fill
    values: ValueCoder
    index: Literal["bitmap", "shortest", "none"] = "bitmap"

    def size_bits(self, send: AdapterSlice, shape: AdapterShape) -> int:
        """Return the bits of a payload with `counts` rows: index, values, and extras and cores in fp32."""
        index = sum(self._index_bits(block, count) for block, count in zip(self.blocks, self.counts, strict=True))
        sent = sum(block.width * count for block, count in zip(self.blocks, self.counts, strict=True))
        return 8 * -(-index // 8) + self.values.size_bits(sent) + Dense().bits(_rest(send), shape)

    def write(
        self, send: AdapterSlice, trained: Adapter, start: Adapter, masks: Sequence[Mask], rng: np.random.Generator
    ) -> Payload:
        """Return the payload with the rows of the masks."""
        pieces: list[NDArray[Any]] = [np.zeros(0, dtype=np.float32)]
        for block, mask in zip(self.blocks, masks, strict=True):
            for key in block.keys:
                rows = coded_rows(trained, start, key, block.rows, self.fill)
                pieces.append(rows.float().numpy()[mask].ravel())
        dense, _ = Dense().encode(_rest(send), trained, start, {}, rng)
        arrays = {**self.values.pack(np.concatenate(pieces), rng), "rest": dense.arrays["values"]}
        if self.index != "none":
            arrays["index"] = self._pack_index(masks)
        return Payload(arrays, bits=8 * sum(array.nbytes for array in arrays.values()))

    def read(self, send: AdapterSlice, payload: Payload, start: Adapter) -> Adapter:
        """Return what the server understands, in the coordinates of `send`."""
        masks = self._unpack_index(payload)
        count = sum(block.width * int(mask.sum()) for block, mask in zip(self.blocks, masks, strict=True))
        values = self.values.unpack(payload.arrays, count)
        if len(values) != count:
            raise ValueError(f"{len(values)} values arrived, the index names {count}")
        found: dict[Key, Tensor] = {}
        position = 0
        for block, mask in zip(self.blocks, masks, strict=True):
            for key in block.keys:
                rows, position = self._placed(block, key, mask, start, values, position)
                found[key] = rows
        rest = Payload({"values": payload.arrays["rest"]}, bits=0)
        return with_rows(Dense().decode(_rest(send), rest, start), found)

    def _placed(
        self, block: Block, key: Key, mask: Mask, start: Adapter, values: NDArray[np.float32], position: int
    ) -> tuple[Tensor, int]:
        """Return one factor as rows [rows, width] with what was sent put into the fill, and the next position."""
        import torch

        base = rows_of(start, key, block.rows).clone()
        if self.fill == "zero":
            base.zero_()
        size = int(mask.sum()) * base.shape[1]
        piece = torch.from_numpy(values[position : position + size].copy()).reshape(-1, base.shape[1])
        chosen = torch.from_numpy(mask)
        base[chosen] = (base[chosen] + piece).to(base)  # added in single precision at least
        return base, position + size

    # -- index --------------------------------------------------------------------------------------------------------

    def _index_bits(self, block: Block, count: int) -> int:
        if self.index == "none":
            return 0
        return count * _width(block.rows) if self._by_position(block, count) else block.rows

    def _by_position(self, block: Block, count: int) -> bool:
        return self.index == "shortest" and count * _width(block.rows) < block.rows

    def _pack_index(self, masks: Sequence[Mask]) -> NDArray[np.uint8]:
        digits: list[NDArray[np.uint8]] = [np.zeros(0, dtype=np.uint8)]
        for block, count, mask in zip(self.blocks, self.counts, masks, strict=True):
            if self._by_position(block, count):
                width = _width(block.rows)
                digits.append(np.unpackbits(pack_integers(np.flatnonzero(mask), width), count=count * width))
            else:
                digits.append(mask.astype(np.uint8))
        return np.packbits(np.concatenate(digits))

    def _unpack_index(self, payload: Payload) -> list[Mask]:
        if self.index == "none":
            return [np.ones(block.rows, dtype=np.bool_) for block in self.blocks]
        total = sum(self._index_bits(block, count) for block, count in zip(self.blocks, self.counts, strict=True))
        digits = np.unpackbits(payload.arrays["index"], count=total)
        masks: list[Mask] = []
        position = 0
        for block, count in zip(self.blocks, self.counts, strict=True):
            size = self._index_bits(block, count)
            piece = digits[position : position + size]
            position += size
            if self._by_position(block, count):
                mask = np.zeros(block.rows, dtype=np.bool_)
                mask[unpack_integers(np.packbits(piece), _width(block.rows), count)] = True
                masks.append(mask)
            else:
                masks.append(piece.astype(np.bool_))
        return masks


def with_rows(values: Adapter, found: Mapping[Key, Tensor]) -> Adapter:
    """Return the adapter with some factors replaced by matrices whose rows are components (or elements)."""
    factors = dict(values.factors)
    for (slot, kind), rows in found.items():
        old = factors[slot]
        if kind == "A":
            factors[slot] = replace(old, A=rows.reshape(old.A.shape).to(old.A))
        else:
            factors[slot] = replace(old, B=rows.reshape(old.B.T.shape).T.contiguous().to(old.B))
    return values.with_factors(factors)


def _keys(slot: str, send: AdapterSlice) -> tuple[Key, ...]:
    return tuple((slot, factor) for factor in ("A", "B") if factor in send.tensors)


def _rest(send: AdapterSlice) -> AdapterSlice:
    """Return the slice without A and B: the classifier head and cores."""
    return replace(send, tensors=NEITHER)


def _width(rows: int) -> int:
    """Return the bits of a position among `rows`."""
    return max(1, (rows - 1).bit_length())
