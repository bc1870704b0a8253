"""Bits in both directions at unequal ranks, exactly, for the methods that take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from airtune.aggregation.one_factor import MergeAndRedraw
from airtune.aggregation.residual import ResidualMerge
from airtune.aggregation.stacking import EnergyThreshold, Stacking
from airtune.aggregation.truncation import Truncation
from airtune.capabilities import Trait
from airtune.federation import Stop, begin, run
from airtune.lora import AdapterShape, AdapterSlice
from airtune.methods import method_class
from airtune.methods.composed import Composed
from airtune.scheduling.planner import Separate
from airtune.scheduling.work import LocalWork, Slices
from airtune.types import Ints, Observation, ServerModel
from small_world import HIDDEN, AddOne, make_adapter, make_cell, make_runner

RANKS, RANK = (1, 2, 1), 2  # of the clients, of the server's adapter
SLOTS, HEAD = 6, 2 * HIDDEN + 2
ROW = SLOTS * HIDDEN  # values of one component's A, or B, in all slots
DENSE = SLOTS * HIDDEN**2


@dataclass(frozen=True)
class Given:
    """A slicer with the ranks above."""

    @property
    def traits(self) -> frozenset[Trait]:
        """Return that ranks differ."""
        return frozenset({Trait.UNEQUAL_RANKS})

    def least(self, shape: AdapterShape) -> Slices:
        """Return rank 1."""
        return Slices.same(AdapterSlice.truncation(shape, 1))

    def slices(self, clients: Ints, seen: Observation, work: LocalWork, rng: np.random.Generator) -> Sequence[Slices]:
        """Return each client's own rank."""
        return [Slices.same(AdapterSlice.truncation(seen.shape, RANKS[client])) for client in clients]


OWN = tuple(2 * ROW * rank for rank in RANKS)  # both factors of each client's components
HALF = tuple(ROW * rank for rank in RANKS)
NONE = (0, 0, 0)
STACK = sum(OWN)
TABLE = {  # upload in every round; download in round 1; what a client downloads besides, after each merge
    "flora": (Stacking(), OWN, NONE, STACK),
    "flexlora": (Truncation(), OWN, OWN, 0),
    "fedex-lora": (ResidualMerge(), OWN, OWN, STACK + 2 * ROW * min(RANKS)),  # less the common component's mean
    "rac-lora": (MergeAndRedraw(), HALF, NONE, ROW * RANK),  # the mean of B; A is drawn from the seed
    "galore-avg": (MergeAndRedraw(drawn="B"), HALF, NONE, ROW * RANK),
    "florist": (EnergyThreshold(0.9), OWN, NONE, None),
}


def played(rule: Any) -> list[tuple[ServerModel, Any]]:
    method = Composed(Separate(slicer=Given()), rule)
    cell = make_cell(clients=3, downlink="unicast")
    cell = replace(cell, costs=replace(cell.costs, shape=make_adapter(rank=RANK).shape))
    start = begin(method, ServerModel(make_adapter(rank=RANK)), cell)
    runner = make_runner(cell, AddOne())
    steps = run(method, start, cell, runner, stop=Stop(rounds=3), seed=0, evaluate=lambda _: {})
    return [(progress.model, record) for progress, record in steps][1:]


@pytest.mark.parametrize("name", TABLE)
def test_uploads_and_downloads_are_those_of_each_clients_own_rank(name: str) -> None:
    rule, up, first, merge = TABLE[name]
    assert isinstance(method_class(name)().composed.aggregator, type(rule))
    rounds = played(rule)
    for number, (_, record) in enumerate(rounds):
        more = 0
        if number:  # florist downloads what the singular values kept
            more = rounds[number - 1][0].merged_bits[number] // 32 if merge is None else merge
        assert more <= DENSE
        found = sorted(record.clients, key=lambda entry: entry.client)
        assert [entry.bits_up for entry in found] == [32 * (values + HEAD) for values in up]
        assert [entry.bits_down for entry in found] == [32 * (values + HEAD + more) for values in first]
    if name == "florist":
        kept = sum(part.rank * 2 * HIDDEN for part in rounds[0][0].base_update.values())
        assert 0 < kept <= STACK and rounds[0][0].merged_bits == {1: 32 * kept}
