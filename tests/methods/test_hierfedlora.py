"""HierFedLoRA: degenerate cases, groups as federations inside a round, coverage, traffic."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from airtune.errors import InputError
from airtune.federation import Progress, Stop, begin, run
from airtune.methods.fedit import FedIT
from airtune.methods.hierfedlora import HierFedLoRA
from airtune.scheduling.capacity import Speeds
from airtune.streams import stream
from airtune.types import Observation, Pending, Plan, RoundRecord, ServerModel
from small_world import HIDDEN, LAYERS, RANK, make_cell, make_model, make_runner
from synthetic_federation import SyntheticWorld, make_adapter, make_fleet, same_adapters

LABELS = np.array([[30, 1], [1, 30], [25, 5], [5, 25], [40, 2], [2, 40], [30, 1], [1, 30]])
WORLD = SyntheticWorld(make_fleet(8, memory=1e9, labels=LABELS, examples=LABELS.sum(axis=1)))
METHOD = HierFedLoRA(groups=4, most_frequency=4)


def rounds(method: Any, world: SyntheticWorld, count: int) -> list[tuple[Progress, RoundRecord]]:
    progress = begin(method, ServerModel(make_adapter()), world)
    return list(run(method, progress, world, world, stop=Stop(count), seed=0, evaluate=lambda _: {}))


def planned(method: HierFedLoRA, world: SyntheticWorld, after: int = 0) -> tuple[Observation, Plan]:
    progress = rounds(method, world, after)[-1][0]
    seen = world.observe(after + 1, progress.time, progress.pending, progress.model)
    plan = method.plan(progress.state, seen, stream(0, "plan", after + 1))
    plan.check(seen)
    return seen, plan


def test_one_group_one_cycle_full_depth_is_fedavg_exactly() -> None:
    single = HierFedLoRA(groups=1, most_frequency=1, fixed_depth=3)
    ours, theirs = rounds(single, WORLD, 3), rounds(FedIT(), WORLD, 3)
    for (mine, record), (other, expected) in zip(ours, theirs, strict=True):
        assert same_adapters(mine.model.adapter, other.model.adapter)
        assert (record.uplink_bits, record.downlink_bits, record.time_s) == (
            expected.uplink_bits,
            expected.downlink_bits,
            expected.time_s,
        )


def test_a_group_for_every_client_averages_nothing_inside() -> None:
    alone = HierFedLoRA(groups=8, least_frequency=2, most_frequency=2, fixed_depth=3)
    _, plan = planned(alone, WORLD)
    assert [len(group.tasks) for group in plan.groups] == [1] * 8
    assert {group.cycles for group in plan.groups} == {2}
    one_cycle = replace(alone, least_frequency=1, most_frequency=1)
    pairs = zip(rounds(one_cycle, WORLD, 2), rounds(FedIT(), WORLD, 2), strict=True)
    assert all(same_adapters(mine[0].model.adapter, other[0].model.adapter) for mine, other in pairs)


def test_groups_pair_opposite_labels_and_keep_until_regrouping() -> None:
    _, plan = planned(METHOD, WORLD)
    assert plan.notes["regrouped"]
    for group in plan.groups:
        labels = LABELS[[task.client for task in group.tasks]].sum(axis=0)
        assert labels.max() / labels.sum() < 0.65
    later = [planned(replace(METHOD, regroup_rounds=3), WORLD, after)[1] for after in (1, 2, 3)]
    assert [p.notes["regrouped"] for p in later] == [False, False, True]
    members = [{frozenset(t.client for t in g.tasks) for g in p.groups} for p in (plan, later[0])]
    assert members[0] == members[1]


@pytest.mark.parametrize(("factor", "regrouped"), [(1.29, False), (1.31, True), (0.71, False), (0.69, True)])
def test_groups_are_made_anew_when_a_clients_speed_has_changed_by_more_than_30_percent(
    factor: float, regrouped: bool
) -> None:
    """The estimates of one client move to `factor` times what they were when the groups were made."""
    progress = rounds(METHOD, WORLD, 2)[-1][0]
    capacity = progress.state.capacity
    backward = progress.state.grouped_seconds.copy()
    backward[5] *= factor
    moved = replace(capacity, backward_layer=replace(capacity.backward_layer, value=backward))
    seen = WORLD.observe(3, progress.time, progress.pending, progress.model)
    plan = METHOD.plan(replace(progress.state, capacity=moved), seen, stream(0, "plan", 3))
    assert plan.notes["regrouped"] is regrouped


def test_a_device_that_slows_down_is_noticed_by_its_reports() -> None:
    """A client three times slower from round 2 on: groups are made anew within three rounds, and not before."""
    progress, seen_anew = begin(METHOD, ServerModel(make_adapter()), WORLD), []
    for index in range(1, 6):
        speeds = WORLD.fleet.flops_per_second.copy()
        speeds[3] /= 3.0 if index > 1 else 1.0
        world = replace(WORLD, fleet=replace(WORLD.fleet, flops_per_second=speeds))
        *_, (progress, record) = run(METHOD, progress, world, world, stop=Stop(index), seed=0, evaluate=lambda _: {})
        seen_anew.append(record.notes["regrouped"])
    assert seen_anew[:2] == [True, False]
    assert any(seen_anew[2:5])


def test_the_first_round_trains_everything_once_and_later_ones_choose() -> None:
    _, first = planned(METHOD, WORLD)
    assert {(note["frequency"], note["depth"]) for note in first.notes["groups"]} == {(1, 3)}
    _, third = planned(METHOD, WORLD, 2)
    assert all(1 <= note["frequency"] <= 4 for note in third.notes["groups"])
    assert max(note["frequency"] for note in third.notes["groups"]) > 1
    assert all(note["predicted_s"] <= third.notes["deadline_s"] * (1 + 1e-9) for note in third.notes["groups"])


def test_predicted_seconds_are_those_of_the_clock_in_a_static_world() -> None:
    _, plan = planned(METHOD, WORLD, 2)
    outcome, _ = WORLD.run(plan, ServerModel(make_adapter()), Pending(), round_index=3, time=0.0)
    assert outcome.end_time == pytest.approx(plan.notes["predicted_round_s"], rel=0.02)


def test_with_equal_passes_a_cycle_takes_at_least_l_plus_one_of_two_l() -> None:
    """Acceptance test 7 where it is derived: backward through one layer as long as forward through one."""
    layers = np.arange(1, 7)
    once = Speeds(forward=np.array([6.0]), backward_layer=np.ones(1), upload_bit=np.ones(1), steps=np.array([10.0]))
    seconds = once.seconds(layers, np.zeros(6))[0]
    np.testing.assert_allclose(seconds / seconds[-1], (6 + layers) / 12)
    assert seconds.min() / seconds[-1] == 7 / 12


def test_no_cycle_is_shorter_than_the_floor_with_attention_and_factors() -> None:
    """Acceptance test 7 on the clock: the compute seconds of every client, cycle and depth, with the real FLOPs."""
    cell, model, d, i, s, r = make_cell(4), make_model(), HIDDEN, 2 * HIDDEN, 12, RANK
    forward = 8 * d * d + 4 * d * i + 4 * s * d + 8 * r * d
    backward = 8 * d * d + 4 * d * i + 8 * s * d + 16 * r * d
    lowest = 2 * d * d + 4 * d * i + 6 * s * d + 12 * r * d
    cycles: dict[int, dict[int, float]] = {}
    for depth in range(1, LAYERS + 1):
        method = HierFedLoRA(groups=2, fixed_depth=depth, least_frequency=2, most_frequency=2)
        seen = cell.observe(1, 0.0, Pending(), model)
        plan = method.plan(method.init(model, cell.fleet), seen, stream(0, "plan", 1))
        outcome, _ = make_runner(cell).run(plan, model, Pending(), round_index=1, time=0.0)
        cycles[depth] = {u.task.client: u.cost.compute_seconds / 2 for u in outcome.updates}
    whole = LAYERS * forward + (LAYERS - 1) * backward + lowest
    for depth, seconds in cycles.items():
        floor = (LAYERS * forward + (depth - 1) * backward + lowest) / whole
        ratios = [seconds[client] / cycles[LAYERS][client] for client in range(4)]
        assert all(floor <= ratio < 1.05 * floor for ratio in ratios)


def test_all_uploads_of_all_cycles_count() -> None:
    """Traffic is cycles times the bits of the group's layers and the head, to the bit."""
    _, plan = planned(METHOD, WORLD, 2)
    outcome, _ = WORLD.run(plan, ServerModel(make_adapter()), Pending(), round_index=3, time=0.0)
    expected = sum(
        note["frequency"] * len(group.tasks) * 32 * (note["depth"] * 4 * (6 + 5 + 6 + 4) + 18)
        for note, group in zip(plan.notes["groups"], plan.groups, strict=True)
    )
    assert outcome.uplink_bits == expected


def test_layers_below_a_groups_depth_are_not_sent_and_unchanged_if_nobody_trains_them() -> None:
    shallow = HierFedLoRA(groups=2, fixed_depth=1, most_frequency=2)
    before, after = (progress.model.adapter for progress, _ in rounds(shallow, WORLD, 1))
    for slot in (*before.shape.in_layer(0), *before.shape.in_layer(1)):
        assert torch.equal(after.factors[slot].A, before.factors[slot].A)
        assert torch.equal(after.factors[slot].B, before.factors[slot].B)
    for slot in before.shape.in_layer(2):
        assert not torch.equal(after.factors[slot].B, before.factors[slot].B)


@pytest.mark.parametrize("memory", [1e9, 2.7e4])
def test_every_layer_that_memory_allows_is_trained_within_five_rounds(memory: float) -> None:
    """One device per group holds the group to depth 1 or 2; the largest cap of any group must be reached."""
    world = SyntheticWorld(make_fleet(8, memory=[memory, *[3.2e4] * 7], labels=LABELS), noise=0.01)
    shape = make_adapter().shape
    progress, tuned = begin(METHOD, ServerModel(make_adapter()), world), []
    for index in range(1, 13):
        seen = world.observe(index, progress.time, progress.pending, progress.model)
        plan = METHOD.plan(progress.state, seen, stream(0, "plan", index))
        tuned.append(max(task.train.depth(shape) for task in plan.tasks))
        *_, (progress, _) = run(METHOD, progress, world, world, stop=Stop(index), seed=0, evaluate=lambda _: {})
    reachable = max(tuned)
    assert reachable >= 2
    assert all(max(tuned[start : start + 5]) == reachable for start in range(8))


def test_memory_of_the_smallest_member_limits_its_group() -> None:
    world = SyntheticWorld(make_fleet(8, memory=[2.7e4] + [1e9] * 7, labels=LABELS))
    _, plan = planned(METHOD, world)
    depths = {note["group"]: note["depth"] for note in plan.notes["groups"]}
    poor = next(
        n["group"] for n, g in zip(plan.notes["groups"], plan.groups, strict=True) if 0 in [t.client for t in g.tasks]
    )
    assert depths[poor] == 1
    assert max(depths.values()) == 3


def test_a_step_budget_is_shared_by_the_cycles() -> None:
    fixed = replace(METHOD, least_frequency=3, most_frequency=3, step_budget=10)
    _, plan = planned(fixed, WORLD)
    assert {task.training.steps(30) for task in plan.tasks} == {3}


def test_normalised_weights_divide_changes_by_the_number_of_cycles() -> None:
    twice = HierFedLoRA(groups=1, least_frequency=2, most_frequency=2, fixed_depth=3)
    start = make_adapter()
    plain = rounds(twice, WORLD, 1)[-1][0].model.adapter
    halved = rounds(replace(twice, weights="normalised"), WORLD, 1)[-1][0].model.adapter
    for slot, factors in start.factors.items():
        torch.testing.assert_close(halved.factors[slot].A - factors.A, (plain.factors[slot].A - factors.A) / 2)
    torch.testing.assert_close(halved.extras["head.weight"], plain.extras["head.weight"])


def test_without_labels_groups_are_of_like_speed() -> None:
    world = SyntheticWorld(make_fleet(8, memory=1e9))
    _, plan = planned(METHOD, world)
    assert all(np.ptp([task.client for task in group.tasks]) <= 3 for group in plan.groups)
    assert plan.notes["grouped_by"] == "speed"
    assert planned(METHOD, WORLD)[1].notes["grouped_by"] == "labels and speed"


def test_bad_fields_name_themselves() -> None:
    for fields in (
        {"groups": 0},
        {"grouping": "iid"},
        {"least_frequency": 3, "most_frequency": 2},
        {"label_weight": 1.5},
        {"weights": "equal"},
        {"wait_tolerance": -1.0},
        {"step_budget": 0},
    ):
        with pytest.raises(InputError, match="method"):
            HierFedLoRA(**fields)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"method\.fixed_depth: 4 is too deep; valid: 1 to 3"):
        planned(replace(METHOD, fixed_depth=4), WORLD)
