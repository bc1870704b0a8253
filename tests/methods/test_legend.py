"""LEGEND: acceptance tests of the specification that need no training (T2, T6, T7 are in scheduling/test_depth.py)."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from airtune.aggregation.resize import emptied_beyond, sorted_by_energy
from airtune.errors import InputError
from airtune.federation import Progress, Stop, begin, run
from airtune.methods.fedit import FedIT
from airtune.methods.legend import Legend
from airtune.scheduling.depth import rank_profile
from airtune.streams import stream
from airtune.types import Pending, Plan, ServerModel
from synthetic_federation import SyntheticCosts, SyntheticWorld, make_adapter, make_fleet, same_adapters

LEGEND = Legend(reference_rank=2)
DEEP = SyntheticWorld(make_fleet(7, memory=1e9))


def model_for(method: Legend, layers: int = 3) -> ServerModel:
    return ServerModel(make_adapter(layers, method.ranks(make_adapter(layers).shape)))


def plan_once(method: Legend, world: SyntheticWorld, layers: int = 3) -> Plan:
    model = model_for(method, layers)
    seen = world.observe(1, 0.0, Pending(), model)
    plan = method.plan(method.init(model, world.fleet), seen, stream(0, "plan", 1))
    plan.check(seen)
    return plan


def depths(plan: Plan, layers: int = 3) -> dict[int, int]:
    shape = model_for(LEGEND, layers).adapter.shape
    return {task.client: task.train.depth(shape) for task in plan.tasks}


def last(method: Legend, world: SyntheticWorld, rounds: int, layers: int = 3) -> Progress:
    progress = begin(method, model_for(method, layers), world)
    return [p for p, _ in run(method, progress, world, world, stop=Stop(rounds), seed=0, evaluate=lambda _: {})][-1]


def test_ranks_rise_towards_the_output_within_the_budget() -> None:
    assert set(LEGEND.ranks(make_adapter().shape).values()) == {1, 2, 3}
    shape = model_for(LEGEND).adapter.shape
    assert [shape.slots[shape.in_layer(layer)[0]].rank for layer in range(3)] == [1, 2, 3]
    reference_from_model = Legend().ranks(make_adapter(ranks=2).shape)
    assert reference_from_model == LEGEND.ranks(make_adapter().shape)


def test_faster_clients_train_at_least_as_deep_and_slow_ones_are_not_waited_for() -> None:
    plan = plan_once(LEGEND, DEEP)
    chosen = depths(plan)
    assert len(chosen) == 7
    fastest = sorted(chosen, key=lambda c: DEEP.fleet.flops_per_second[c])
    assert chosen[fastest[-1]] == 3
    assert chosen[fastest[0]] == 1
    everyone_full = plan_once(replace(LEGEND, fixed_depth=3), DEEP)
    assert plan.notes["predicted_round_s"] < everyone_full.notes["predicted_round_s"]
    assert plan.notes["predicted_mean_wait_s"] < everyone_full.notes["predicted_mean_wait_s"]


def test_the_prediction_of_the_first_round_is_the_clock_of_a_static_world() -> None:
    plan = plan_once(LEGEND, DEEP)
    outcome, _ = DEEP.run(plan, model_for(LEGEND), Pending(), round_index=1, time=0.0)
    assert outcome.end_time == pytest.approx(plan.notes["predicted_round_s"], rel=1e-3)


def test_uplink_bits_are_those_of_the_owned_layers_and_the_head() -> None:
    """T4: 32 bits times (in + out) per rank of every owned slot, plus the head."""
    plan = plan_once(LEGEND, DEEP)
    shape = model_for(LEGEND).adapter.shape
    costs = SyntheticCosts(DEEP.fleet, shape)
    ranks = rank_profile(3, 2)
    for task in plan.tasks:
        depth = task.train.depth(shape)
        values = sum(ranks[3 - j] * (6 + 5 + 6 + 4) for j in range(1, depth + 1)) + 3 * 6
        assert costs.uplink_bits(task) == 32 * values


def test_memory_limits_the_depth_and_ignoring_it_is_an_error_of_the_plan() -> None:
    """T7, also after the coverage guard."""
    poor = SyntheticWorld(make_fleet(3, memory=[2.5e4, 3.0e4, 1e9]))
    plan = plan_once(LEGEND, poor)
    shape = model_for(LEGEND).adapter.shape
    costs = SyntheticCosts(poor.fleet, shape)
    assert all(costs.memory_bytes(task) <= poor.fleet.memory_bytes[task.client] for task in plan.tasks)
    assert plan.notes["layers_with_too_few_owners"] == [0]
    with pytest.raises(InputError, match="training needs"):
        plan_once(replace(LEGEND, memory_limit=False), poor)


def test_a_device_without_memory_for_one_layer_sits_out_and_is_noted() -> None:
    plan = plan_once(LEGEND, SyntheticWorld(make_fleet(3, memory=[1e4, 1e9, 1e9])))
    assert plan.notes["too_little_memory"] == [0]
    assert [task.client for task in plan.tasks] == [1, 2]


def test_d1_downloads_the_layers_below_and_d2_does_not() -> None:
    for outside, expected in (("frozen", 0), ("absent", 2)):
        plan = plan_once(replace(LEGEND, outside=outside), DEEP)
        shape = model_for(LEGEND).adapter.shape
        shallow = next(task for task in plan.tasks if task.train.depth(shape) == 1)
        assert shallow.receive.lowest_layer(shape) == expected
        assert shallow.train.outside == outside
        assert shallow.send.lowest_layer(shape) == 2


def test_every_layer_is_trained_by_two_clients() -> None:
    chosen = depths(plan_once(LEGEND, SyntheticWorld(make_fleet(7, flops=[1e8] * 6 + [1e11], memory=1e9))))
    assert sorted(chosen.values())[-2:] == [3, 3]


def test_equal_depths_aggregate_to_fedavg_to_the_bit() -> None:
    """T3."""
    legend = replace(LEGEND, fixed_depth=3, weights="examples")
    model = model_for(LEGEND)
    seen = DEEP.observe(1, 0.0, Pending(), model)
    plan = legend.plan(legend.init(model, DEEP.fleet), seen, stream(0, "plan", 1))
    outcome, _ = DEEP.run(plan, model, Pending(), round_index=1, time=0.0)
    ours, _ = legend.aggregate(legend.init(model, DEEP.fleet), model, outcome)
    theirs, _ = FedIT().aggregate(None, model, outcome)
    assert same_adapters(ours.adapter, theirs.adapter)


def test_an_empty_layer_is_unchanged_and_a_single_owner_decides() -> None:
    """T3."""
    legend = replace(LEGEND, min_owners=1)
    world = SyntheticWorld(make_fleet(2, flops=[1e8, 1e11], memory=1e9))
    model = model_for(legend)
    seen = world.observe(1, 0.0, Pending(), model)
    plan = legend.plan(legend.init(model, world.fleet), seen, stream(0, "plan", 1))
    outcome, _ = world.run(plan, model, Pending(), round_index=1, time=0.0)
    after, _ = legend.aggregate(legend.init(model, world.fleet), model, outcome)
    deep = next(u for u in outcome.updates if u.task.train.depth(model.adapter.shape) == 3)
    for slot in model.adapter.shape.in_layer(0):
        assert torch.equal(after.adapter.factors[slot].A, deep.values.factors[slot].A)
    shallow = replace(outcome, updates=tuple(u for u in outcome.updates if u is not deep))
    unchanged, _ = legend.aggregate(legend.init(model, world.fleet), model, shallow)
    for slot in model.adapter.shape.in_layer(0):
        assert torch.equal(unchanged.adapter.factors[slot].A, model.adapter.factors[slot].A)


def test_measured_slowness_makes_a_client_shallower() -> None:
    """A device that is much slower than its profile says is found out by its reports."""
    honest = last(LEGEND, DEEP, 3)

    class Throttled(SyntheticWorld):
        def cost(self, task, seen):  # type: ignore[no-untyped-def]
            cost = super().cost(task, seen)
            factor = 30.0 if task.client == 6 else 1.0
            return replace(cost, compute_seconds=cost.compute_seconds * factor)

    throttled = Throttled(DEEP.fleet)
    slowed = last(LEGEND, throttled, 3)

    def next_depth(progress: Progress) -> int:
        seen = DEEP.observe(4, progress.time, progress.pending, progress.model)
        return depths(LEGEND.plan(progress.state, seen, stream(0, "plan", 4)))[6]

    assert next_depth(honest) == 3
    assert next_depth(slowed) < 3


def test_a_drawn_cohort_and_an_empty_fleet_of_idle_clients() -> None:
    assert len(plan_once(replace(LEGEND, cohort_size=3), DEEP).tasks) == 3
    model = model_for(LEGEND)
    seen = replace(DEEP.observe(1, 0.0, Pending(), model), idle=np.zeros(0, dtype=np.int64))
    plan = LEGEND.plan(LEGEND.init(model, DEEP.fleet), seen, stream(0, "plan", 1))
    plan.check(seen)
    assert plan.tasks == ()


def test_fixed_depth_and_uniform_rank_are_the_ablations() -> None:
    assert set(depths(plan_once(replace(LEGEND, fixed_depth=2), DEEP)).values()) == {2}
    assert set(replace(LEGEND, profile="uniform").ranks(make_adapter().shape).values()) == {2}


# ----------------------------------------------------------------------------------------------------------- variant C

VARYING = Legend(reference_rank=2, variant="C")


def test_variant_c_holds_the_largest_rank_of_any_profile_and_sends_those_of_one() -> None:
    shape = model_for(VARYING).adapter.shape
    assert [shape.slots[shape.in_layer(layer)[0]].rank for layer in range(3)] == [2, 2, 3]
    plan = plan_once(VARYING, DEEP)
    ranks = plan.notes["layer_ranks"]
    assert sum(ranks) == 6
    for task in plan.tasks:
        for slot, components in task.train.components.items():
            assert len(components) == ranks[shape.slots[slot].layer]


@pytest.mark.parametrize("shrink", ["svd", "truncate"])
def test_components_that_a_round_leaves_out_act_no_more_but_can_come_back(shrink: str) -> None:
    method = replace(VARYING, shrink=shrink)
    after = last(method, DEEP, 1)
    plan = plan_once(method, DEEP)
    ranks, shape = plan.notes["layer_ranks"], after.model.adapter.shape
    unused = 0
    for slot, factors in after.model.adapter.factors.items():
        rank = ranks[shape.slots[slot].layer]
        assert torch.count_nonzero(factors.B[:, rank:].abs() > 1e-6) == 0
        assert bool((factors.A[rank:].norm(dim=1) > 0).all())
        unused += factors.rank - rank
    assert unused > 0
    assert after.model.version == 1


def test_sorting_by_energy_keeps_the_products_and_makes_truncation_optimal() -> None:
    adapter = make_adapter(dtype=torch.float64)
    sorted_ = sorted_by_energy(adapter)
    for slot, factors in sorted_.factors.items():
        torch.testing.assert_close(factors.product(), adapter.factors[slot].product())
    shorter = emptied_beyond(sorted_, {slot: 2 for slot in adapter.factors})
    for slot, factors in shorter.factors.items():
        whole = adapter.factors[slot].product()
        best = torch.linalg.svdvals(whole)[2:].norm()
        torch.testing.assert_close((whole - factors.product()).norm(), best)


@pytest.mark.parametrize("shrink", ["svd", "truncate"])
def test_a_devices_rank_shrinks_and_grows_again_between_rounds(shrink: str) -> None:
    """Unequal devices want a steep profile, equal ones a flat one: the last layer's rank goes 3, 2, 3."""
    method, model, state, ranks = replace(VARYING, shrink=shrink), model_for(VARYING), None, []
    slot = model.adapter.shape.in_layer(2)[0]
    for index, speeds in enumerate(([1e9, 1e9, 1e9, 1e11], [1e9] * 4, [1e9, 1e9, 1e9, 1e11]), start=1):
        world = SyntheticWorld(make_fleet(4, flops=speeds, memory=1e9))
        state = method.init(model, world.fleet)  # the power modes have changed: judged by the cost functions again
        seen = world.observe(index, 0.0, Pending(), model)
        plan = method.plan(state, seen, stream(0, "plan", index))
        plan.check(seen)
        task = next(task for task in plan.tasks if task.client == 3)
        ranks.append(len(task.train.components[slot]))
        whole, start = model.adapter.factors[slot].product(), task.receive.take(model.adapter).factors[slot].product()
        if index == 3:
            torch.testing.assert_close(start, whole)  # growing changes nothing
        elif index == 2 and shrink == "svd":
            torch.testing.assert_close((whole - start).norm(), torch.linalg.svdvals(whole)[2:].norm())  # the best of 2
        outcome, _ = world.run(plan, model, Pending(), round_index=index, time=0.0)
        before, (model, state) = model, method.aggregate(state, model, outcome)
        factors = model.adapter.factors[slot]
        acting = torch.linalg.matrix_rank(factors.product().double(), rtol=1e-5)
        assert int(acting) == ranks[-1]  # and the component that came back has been trained
        assert bool((factors.A.norm(dim=1) > 0).all()), "a row of zeros could never train again"
        assert not torch.equal(factors.B, before.adapter.factors[slot].B)
    assert ranks == [3, 2, 3]


def test_bad_fields_name_themselves() -> None:
    for fields in (
        {"variant": "D"},
        {"outside": "below"},
        {"profile": "rising"},
        {"slope": 2.0},
        {"wait_tolerance": -0.1},
        {"least_depth": 0},
        {"smoothing": 1.0},
        {"reference_rank": 0},
    ):
        with pytest.raises(InputError, match="method"):
            Legend(**fields)  # type: ignore[arg-type]
    for fields in ({"least_depth": 4}, {"fixed_depth": 4}, {"cohort_size": 8}):
        with pytest.raises(InputError, match=next(iter(fields))):
            plan_once(replace(LEGEND, **fields), DEEP)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="needs rank 7"):
        Legend(reference_rank=4).ranks(make_adapter().shape)
