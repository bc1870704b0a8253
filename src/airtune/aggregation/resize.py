"""Changing the ranks of a server's adapter between rounds without changing what must not change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from airtune.lora import Adapter

Shrink = Literal["truncate", "svd"]


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
