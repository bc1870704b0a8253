"""Merging into the base: the side accumulator, what a merge costs to download, and starting over from a seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from airtune.aggregation.algebra import RowLaw, random_rows
from airtune.errors import unknown_name
from airtune.lora import Adapter, LoraFactors, MergedUpdate, merge
from airtune.streams import torch_seed
from airtune.types import ServerModel

BITS_PER_VALUE = 32  # merges travel in single precision


@dataclass(frozen=True)
class Redraw:
    """How a factor is drawn anew, by the server and by every client alike, so that nothing has to be sent.

    Attributes
    ----------
    law : of the rows of A, see `airtune.aggregation.algebra.random_rows`.
    seed : with the model's version and the slot's place it addresses the draw; clients know all three.
    """

    law: RowLaw = "kaiming"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the name."""
        if self.law not in get_args(RowLaw):
            raise unknown_name("method.rows", self.law, get_args(RowLaw))

    def rows(self, like: LoraFactors, version: int, place: int) -> LoraFactors:
        """Return `like` with A drawn for a version of the model, and B zero: its product is zero."""
        a = random_rows(like.rank, like.in_features, torch_seed(self.seed, "redraw", version, place), self.law)
        return replace(like, A=a.to(like.A), B=like.B.new_zeros(like.B.shape))

    def columns(self, like: LoraFactors, version: int, place: int) -> LoraFactors:
        """Return `like` with B drawn for a version of the model, and A zero: the mirrored start."""
        b = random_rows(like.rank, like.out_features, torch_seed(self.seed, "redraw", version, place), self.law).T
        return replace(like, B=b.to(like.B).contiguous(), A=like.A.new_zeros(like.A.shape))


def restarted(
    adapter: Adapter, slots: Iterable[str], redraw: Redraw, version: int, *, mirrored: bool = False
) -> dict[str, LoraFactors]:
    """Return the adapter's factors with those of some slots drawn anew for a version; the others are untouched."""
    wanted = set(slots)
    draw = redraw.columns if mirrored else redraw.rows
    return {
        name: draw(factors, version, place) if name in wanted else factors
        for place, (name, factors) in enumerate(adapter.factors.items())
    }


def merged(model: ServerModel, adapter: Adapter, additions: Mapping[str, LoraFactors], bits: int) -> ServerModel:
    """Return the next version: another adapter, and additions merged into the base.

    Parameters
    ----------
    additions : slot -> factors to merge into every module where the slot acts; empty ones are skipped.
    bits : what a client has to download to make this merge itself; it is charged once to each client that takes part
        later, however many versions it missed (`ServerModel.catch_up_bits`).
    """
    base: dict[str, MergedUpdate] = dict(model.base_update)
    for module, slots in adapter.placement.items():
        for slot in slots:
            if slot in additions and additions[slot].rank > 0:
                base[module] = merge(base.get(module), additions[slot])
    version = model.version + 1
    charged = {**model.merged_bits, version: bits} if bits else model.merged_bits
    return replace(model, adapter=adapter, base_update=base, version=version, merged_bits=charged)


def factor_bits(additions: Mapping[str, LoraFactors]) -> int:
    """Return the bits of sending both factors of each addition, or the dense update where that is less."""
    return BITS_PER_VALUE * sum(
        min(f.rank * (f.in_features + f.out_features), f.in_features * f.out_features) for f in additions.values()
    )


def column_bits(additions: Mapping[str, LoraFactors]) -> int:
    """Return the bits of sending B alone: A is known from a seed."""
    return BITS_PER_VALUE * sum(f.rank * f.out_features for f in additions.values())


def row_bits(additions: Mapping[str, LoraFactors]) -> int:
    """Return the bits of sending A alone: B is known from a seed."""
    return BITS_PER_VALUE * sum(f.rank * f.in_features for f in additions.values())


Rows = Literal["model", "kaiming", "gaussian", "orthonormal"]


def first_rows(rows: Rows, seed: int) -> Redraw | None:
    """Return how the first A is drawn, None for the model's own.

    Raises
    ------
    InputError : no such law.
    """
    return None if rows == "model" else Redraw(rows, seed)
