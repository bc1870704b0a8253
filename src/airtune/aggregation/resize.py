"""Changing the ranks of a server's adapter between rounds without changing what must not change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from airtune.lora import Adapter, LoraFactors

if TYPE_CHECKING:
    from torch import Tensor

Shrink = Literal["truncate", "svd"]


def resized(factors: LoraFactors, rank: int, new_rows: Tensor, shrink: Shrink = "truncate") -> LoraFactors:
    """Return factors of another rank.

    Growing keeps the product: `new_rows` [at least rank - present rank, in_features] go below A, zero columns into B.
    Shrinking keeps the first components ("truncate"), or the best approximation of the product by QR and the SVD of a
    small core ("svd").
    """
    if rank >= factors.rank:
        return factors.grow(rank, new_rows[: rank - factors.rank]) if rank > factors.rank else factors
    if shrink == "svd":
        return factors.truncate(rank)
    return replace(factors, A=factors.A[:rank], B=factors.B[:, :rank])


def sorted_by_energy(adapter: Adapter) -> Adapter:
    """Return the same products with each slot's components in falling order of singular value.

    After this the first r components are the best approximation of rank r, so truncating is what an SVD would do.
    """
    return adapter.with_factors({name: f.truncate(f.rank) for name, f in adapter.factors.items()})


def emptied_beyond(adapter: Adapter, ranks: Mapping[str, int]) -> Adapter:
    """Return the adapter in which only the first ``ranks[slot]`` components act: the other columns of B are zero.

    The other rows of A stay, so the components can grow again. A slot that is not named stays as it is.
    """
    factors = dict(adapter.factors)
    for name, rank in ranks.items():
        columns = factors[name].B.clone()
        columns[:, rank:] = 0.0
        factors[name] = replace(factors[name], B=columns)
    return adapter.with_factors(factors)
