"""What each client holds, within its memory; and the band that it gets."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from airtune.compression.dense import Dense
from airtune.errors import InputError, NoResultError
from airtune.scheduling.bandwidth import EqualFinish, EqualSplit
from airtune.scheduling.planner import Separate, make_tasks, share_band
from airtune.scheduling.power import LeastPower
from airtune.scheduling.sampling import Uniform
from airtune.scheduling.slicing import (
    Depth,
    FullSlice,
    RandomLayers,
    RankByMemory,
    Sketch,
    Slicer,
    depth_slices,
    ranks_by_memory,
)
from airtune.scheduling.work import LocalWork
from airtune.streams import stream
from airtune.types import LocalTraining, Observation, Pending, ServerModel
from synthetic_federation import SyntheticCosts, SyntheticWorld, make_adapter, make_fleet

WORK = LocalWork(LocalTraining(), Dense())
MODEL = ServerModel(make_adapter())
SHAPE = MODEL.adapter.shape


def observed(memory: object = 1e9, size: int = 5) -> Observation:
    return SyntheticWorld(make_fleet(size, memory=memory)).observe(1, 0.0, Pending(), MODEL)


@pytest.mark.parametrize(
    "slicer",
    [
        FullSlice(),
        RankByMemory(),
        Depth(),
        Depth(2),
        Depth(outside="absent"),
        RandomLayers(),
        RandomLayers(2, "absent"),
        Sketch(2),
    ],
)
def test_slices_fit_the_memory_of_every_client_that_has_room_for_the_least(slicer: Slicer) -> None:
    seen = observed([2.4e4, 2.8e4, 3.0e4, 3.3e4, 1e9])
    least = WORK.memory_bytes(slicer.least(SHAPE), seen)
    clients = np.flatnonzero(seen.fleet.memory_bytes >= least)
    for draw in range(10):
        slices = slicer.slices(clients, seen, WORK, stream(0, "test", draw))
        for client, part in zip(clients, slices, strict=True):
            assert part.train.violations(SHAPE) == []
            assert WORK.memory_bytes(part, seen) <= seen.fleet.memory_bytes[client]
            assert WORK.memory_bytes(part, seen) >= least


@given(needed=st.lists(st.floats(1.0, 100.0), min_size=1, max_size=9).map(sorted), room=st.floats(0.5, 120.0))
def test_the_options_that_fit_are_those_that_a_plain_count_finds(needed: list[float], room: float) -> None:
    """Depths that fit grow with the memory, and the number of questions to the cost model stays small (T7)."""
    asked: list[float] = []

    class Table(LocalWork):
        def memory_bytes(self, slices, seen, client=0):  # type: ignore[no-untyped-def]
            asked.append(slices)
            return slices

    seen = observed(room, size=1)
    found = Table(LocalTraining(), Dense()).that_fit(needed, seen, np.array([0]))  # type: ignore[arg-type]
    assert found.tolist() == [sum(value <= room for value in needed)]
    assert len(asked) <= 5


def test_memory_is_asked_for_client_by_client() -> None:
    """Long texts need more: two equal devices may hold different depths."""

    class Texts(SyntheticCosts):
        def memory_bytes(self, task):  # type: ignore[no-untyped-def]
            return super().memory_bytes(task) * (1.0 + task.client)

    seen = observed(7.5e4, size=2)
    seen = replace(seen, costs=Texts(seen.fleet, SHAPE))
    options = [depth_slices(SHAPE, depth, "frozen") for depth in (1, 2, 3)]
    assert WORK.that_fit(options, seen, np.array([0, 1])).tolist() == [3, 3]
    seen = replace(seen, fleet=replace(seen.fleet, memory_bytes=np.full(2, 5.5e4)))
    assert WORK.that_fit(options, seen, np.array([0, 1])).tolist() == [3, 1]


def test_ranks_by_memory_rise_from_lowest_to_highest() -> None:
    ranks = ranks_by_memory(np.array([1e9, 2e9, 4e9, 8e9, 16e9]), 2, 10)
    assert ranks.tolist() == [2, 4, 6, 8, 10]
    assert ranks_by_memory(np.full(3, 4e9), 2, 10).tolist() == [10, 10, 10]


def test_a_random_depth_uses_all_depths_and_the_same_stream_gives_the_same() -> None:
    seen = observed()
    clients = np.arange(5)
    drawn = [
        tuple(s.train.depth(SHAPE) for s in Depth().slices(clients, seen, WORK, stream(0, "test", draw)))
        for draw in range(20)
    ]
    assert {depth for cohort in drawn for depth in cohort} == {1, 2, 3}
    again = tuple(s.train.depth(SHAPE) for s in Depth().slices(clients, seen, WORK, stream(0, "test", 0)))
    assert again == drawn[0]


def test_random_layers_come_in_the_number_that_memory_gives_and_change_from_draw_to_draw() -> None:
    seen = observed([2.8e4, 3.3e4, 5e4, 1e5, 1e9])
    draws = [RandomLayers().slices(np.arange(5), seen, WORK, stream(0, "test", draw)) for draw in range(20)]
    counts = [[len({SHAPE.slots[n].layer for n in part.train.components}) for part in draw] for draw in draws]
    assert all(row == counts[0] for row in counts)
    assert counts[0][0] == 1
    assert counts[0][-1] == 3
    chosen = {tuple(sorted(draw[1].train.components)) for draw in draws}
    assert len(chosen) > 1
    assert all(part.receive.depth(SHAPE) == 3 for part in draws[0])


@pytest.mark.parametrize(
    ("slicer", "field"),
    [(Depth(0), "depth"), (Depth(4), "depth"), (Sketch(5), "kept"), (RankByMemory(3, 2), "lowest_rank")],
)
def test_impossible_slices_name_the_field(slicer: Slicer, field: str) -> None:
    with pytest.raises(InputError, match=field):
        slicer.least(SHAPE)


def test_clients_without_memory_are_left_out_and_noted_and_a_fleet_without_is_an_error() -> None:
    seen = observed([1e4, 1e9, 1e9, 1e4, 1e9])
    plan = Separate(Uniform(5)).decide(None, seen, stream(0, "plan", 1), WORK)
    plan.check(seen)
    assert [task.client for task in plan.tasks] == [1, 2, 4]
    assert plan.notes["too_little_memory"] == [0, 3]
    with pytest.raises(InputError, match=r"largest device has 0\.00 GB"):
        Separate().decide(None, observed(1e4), stream(0, "plan", 1), WORK)


def test_the_band_is_shared_in_full_and_equal_finish_ends_together() -> None:
    seen = observed()
    tasks = make_tasks(np.arange(5), [FullSlice().least(SHAPE)] * 5, seen, WORK)
    equal = share_band(tasks, seen, EqualSplit())
    assert [task.bandwidth for task in equal] == pytest.approx([2e5] * 5)
    finish = share_band(tasks, seen, EqualFinish())
    assert sum(task.bandwidth for task in finish) <= seen.free_bandwidth * (1 + 1e-9)
    rate = seen.links.uplink_rate(np.arange(5), np.array([t.bandwidth for t in finish]), np.full(5, 0.2))
    bits = np.array([seen.costs.uplink_bits(t) for t in finish])
    ends = np.array([seen.costs.compute_seconds(t) for t in finish]) + bits / rate
    assert ends.max() - ends.min() <= 1e-3 * ends.max()


def test_less_power_where_the_round_waits_anyway() -> None:
    seen = observed()
    tasks = make_tasks(np.arange(5), [FullSlice().least(SHAPE)] * 5, seen, WORK)
    full = share_band(tasks, seen, EqualSplit())
    least = share_band(tasks, seen, EqualSplit(), LeastPower())
    assert all(a.transmit_power <= b.transmit_power * (1 + 1e-9) for a, b in zip(least, full, strict=True))
    assert sum(t.transmit_power for t in least) < 0.9 * sum(t.transmit_power for t in full)


def test_a_rule_without_an_answer_is_no_result() -> None:
    seen = observed()
    tasks = make_tasks(np.arange(5), [FullSlice().least(SHAPE)] * 5, seen, WORK)
    with pytest.raises(NoResultError, match="more clients than resource blocks"):
        share_band(tasks, seen, EqualSplit(resource_block=4e5))


def test_measured_networks_need_no_gains() -> None:
    seen = observed()
    links = replace(seen.links, uplink_gain=np.zeros(5), fixed_uplink_rate=np.full(5, 1e6))
    plan = Separate().decide(None, replace(seen, links=links), stream(0, "plan", 1), WORK)
    plan.check(replace(seen, links=links))
    assert len(plan.tasks) == 5
