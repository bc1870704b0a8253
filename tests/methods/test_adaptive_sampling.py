"""Adaptive sampling: coins with the solved probabilities, equal finish, empty rounds, re-planning, baselines."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from airtune.errors import InputError, NoResultError
from airtune.federation import Stop, begin, run
from airtune.lora import AdapterSlice
from airtune.methods.adaptive_sampling import AdaptiveSampling
from airtune.scheduling.bandwidth import EqualSplit
from airtune.scheduling.joint_cohort import RoundConstants
from airtune.streams import stream
from airtune.types import LocalTraining, Observation, Pending, Plan, ServerModel
from small_world import AddOne, make_cell, make_model, make_runner
from synthetic_federation import SyntheticWorld, make_adapter, make_fleet, same_adapters

PICKY = RoundConstants(alpha=30.0, beta=1.0)  # about two participants a round
QUICK = {"polish_evaluations": 100, "constants": PICKY}


def world_of(size: int = 9, **fields) -> SyntheticWorld:
    fleet = {"memory": 1e9, **{key: fields.pop(key) for key in ("flops", "memory", "examples") if key in fields}}
    return SyntheticWorld(make_fleet(size, **fleet), **fields)


def observed(world: SyntheticWorld, round_index: int = 1) -> Observation:
    return world.observe(round_index, 0.0, Pending(), ServerModel(make_adapter()))


def first_plan(method: AdaptiveSampling, world: SyntheticWorld, seed: int = 0) -> Plan:
    seen = observed(world)
    return method.plan(method.init(ServerModel(make_adapter()), world.fleet), seen, stream(seed, "plan", 1))


def probabilities(plan: Plan) -> np.ndarray:
    return np.array(plan.notes["sampling"]["probability"])


# ------------------------------------------------------------------------------------------------------------- a round


def test_every_client_joins_on_its_own_with_its_probability() -> None:
    world, method = world_of(), AdaptiveSampling(**QUICK)
    decided = first_plan(method, world)
    q = probabilities(decided)
    state = replace(
        method.init(ServerModel(make_adapter()), world.fleet),
        probability=q,
        kept=np.array(decided.notes["sampling"]["kept"]),
        decided=1,
    )
    seen = observed(world, 2)
    joined = np.zeros((600, 9))
    for trial in range(600):
        plan = method.plan(state, seen, stream(trial, "plan", 2))
        for task in plan.tasks:
            joined[trial, task.client] = 1
            assert task.probability == q[task.client]
            assert task.train.kept("layer.0.query") == state.kept[task.client]
            assert task.train.unbiased
    assert ((joined.mean(axis=0) - q) ** 2 <= 16 * q * (1 - q) / 600 + 1e-12).all()
    pairs = np.cov(joined.T)  # independent: no covariance between clients
    spread = np.sqrt(np.outer(q * (1 - q), q * (1 - q)) / 600)
    assert (np.abs(pairs - np.diag(np.diag(pairs))) <= 4.5 * spread + 1e-9).all()


def test_the_drawn_cohort_finishes_together_and_never_later_than_with_equal_shares() -> None:
    world = world_of()
    compared = 0
    for seed in range(12):
        equal_finish = first_plan(AdaptiveSampling(**QUICK), world, seed)
        tasks = equal_finish.tasks
        if len(tasks) < 2:
            continue
        compared += 1
        seen = observed(world)
        ends = [finish(task, seen) for task in tasks]
        assert np.ptp(ends) < 1e-6 * max(ends)
        alone = first_plan(AdaptiveSampling(count_download=False, **QUICK), world, seed)
        if alone.tasks:
            predicted = alone.notes["predicted_round_s"]
            assert predicted == pytest.approx(max(finish(task, seen) for task in alone.tasks))
        assert sum(task.bandwidth for task in tasks) == pytest.approx(seen.free_bandwidth)
        share = seen.free_bandwidth / len(tasks)
        assert max(ends) <= max(finish(replace(task, bandwidth=share), seen) for task in tasks) * (1 + 1e-9)
    assert compared > 3


def finish(task, seen: Observation) -> float:
    client, power = np.array([task.client]), np.array([task.transmit_power])
    rate = float(seen.links.uplink_rate(client, np.array([task.bandwidth]), power)[0])
    return seen.costs.compute_seconds(task) + seen.costs.uplink_bits(task) / rate


def test_empty_rounds_leave_the_model_are_recorded_and_cost_the_cells_idle_time() -> None:
    cell = make_cell(4, idle_seconds=7.5)
    method = AdaptiveSampling(sampling="uniform", sizes="largest", expected_cohort_size=0.3)
    model = make_model()
    previous, empty = begin(method, model, cell), 0
    for progress, record in run(
        method, previous, cell, make_runner(cell, AddOne()), stop=Stop(12), seed=1, evaluate=lambda _: {}
    ):
        if record.round and not record.cohort:
            empty += 1
            assert record.notes["empty_round"] is True
            assert record.duration_s == pytest.approx(7.5)
            assert record.uplink_bits == record.energy_j == 0
            assert progress.model.version == previous.model.version
            assert same_adapters(progress.model.adapter, previous.model.adapter)
        previous = progress
    assert 3 <= empty < 12
    assert previous.model.version == 12 - empty


def test_components_outside_the_sketches_do_not_change() -> None:
    world, method = world_of(), AdaptiveSampling(ratios=(0.25, 0.5), **QUICK)
    model = ServerModel(make_adapter())
    state = method.init(model, world.fleet)
    plan = first_plan(method, world, 3)
    outcome, _ = world.run(plan, model, Pending(), round_index=1, time=0.0)
    assert outcome.updates
    after, _ = method.aggregate(state, model, outcome)
    for name, before in model.adapter.factors.items():
        sent = sorted({int(i) for u in outcome.updates for i in u.task.send.components[name]})
        rows = [i for i in range(4) if not torch.equal(after.adapter.factors[name].A[i], before.A[i])]
        assert rows == sent


# ---------------------------------------------------------------------------------------------------------- decisions


def test_q_and_k_are_solved_once_and_kept() -> None:
    world, method = world_of(fading=True), AdaptiveSampling(**QUICK)
    notes = [record.notes for _, record in rounds_of(method, world, 5)]
    assert "sampling" in notes[0]
    assert not any("sampling" in later for later in notes[1:])


def test_replanning_follows_the_measured_seconds() -> None:
    """A device that turns out six times slower than its profile joins less from the next decision on."""
    world = SlowerThanThought(make_fleet(9, memory=1e9))
    method = AdaptiveSampling(replan_every=6, smoothing=0.0, outlier_factor=10.0, constants=RoundConstants(30.0, 0.5))
    notes = [record.notes for _, record in rounds_of(method, world, 13, seed=2)]
    places = [place for place, note in enumerate(notes) if "sampling" in note]
    assert places == [0, 6, 12]
    before, after = (np.array(notes[place]["sampling"]["probability"]) for place in (0, 12))
    assert before[8] > 0.3  # it takes part, so there are measurements
    assert after[8] < before[8]
    assert notes[12]["expected_round_s"] > notes[0]["expected_round_s"]


@dataclass(frozen=True)
class SlowerThanThought(SyntheticWorld):
    """Client 8 reports six times the seconds of its profile."""

    def update(self, task, cost, model, round_index, start, end):
        made = super().update(task, cost, model, round_index, start, end)
        if task.client != 8:
            return made
        slow = {name: 6 * made.reports[name] for name in ("forward_seconds", "backward_seconds")}
        return replace(made, reports={**made.reports, **slow})


def rounds_of(method, world, count, seed=0):
    progress = begin(method, ServerModel(make_adapter()), world)
    steps = run(method, progress, world, world, stop=Stop(count), seed=seed, evaluate=lambda _: {})
    return [(p, r) for p, r in steps if r.round]


def test_losses_and_gradients_become_noise_weights() -> None:
    world = world_of(4, flops=1e9, examples=20)
    for noise in ("losses", "gradients"):
        method = AdaptiveSampling(noise=noise, replan_every=1, constants=RoundConstants(30.0, 1.5))
        progress, _ = rounds_of(method, world, 4)[-1]
        measured = progress.state.measured
        known = measured.loss if noise == "losses" else measured.gradient.value
        assert np.isfinite(known).any()
    norms = AdaptiveSampling(
        constants=RoundConstants(30.0, 1.5, gradient_norms=(9.0, 1.0, 1.0, 1.0)), noise="gradients"
    )
    q = probabilities(first_plan(norms, world))
    assert q[0] > q[1:].max()


def test_the_gradient_norm_of_an_update_is_that_of_its_change() -> None:
    world, model = world_of(3), ServerModel(make_adapter())
    method = AdaptiveSampling(sampling="full", sizes="largest", noise="gradients")
    plan = first_plan(method, world)
    outcome, _ = world.run(plan, model, Pending(), round_index=1, time=0.0)
    _, state = method.aggregate(method.init(model, world.fleet), model, outcome)
    for update in outcome.updates:
        start = AdapterSlice.everything(model.adapter.shape).take(model.adapter)
        parts = zip(update.values.tensors(), start.tensors(), strict=True)
        change = sum(float(((a - b).double() ** 2).sum()) for (_, _, a), (_, _, b) in parts) ** 0.5
        expected = change / (method.training.local_steps * method.training.learning_rate)
        assert state.measured.gradient.value[update.task.client] == pytest.approx(expected)


def test_the_expected_round_is_what_rounds_take_on_average() -> None:
    """The planner fixes the spectral efficiency at an equal share; the clock does not. Within 15 %."""
    world, method = world_of(12), AdaptiveSampling(count_download=False, idle_seconds=1.0, constants=PICKY)
    records = [record for _, record in rounds_of(method, world, 150)]
    assert records[0].notes["expected_cohort"] < 9
    mean = np.mean([record.duration_s for record in records])
    error = np.std([record.duration_s for record in records]) / len(records) ** 0.5
    expected = records[0].notes["expected_round_s"]
    assert abs(mean - expected) < 0.15 * expected + 3 * error


def test_clients_that_cannot_take_part_are_never_drawn_and_small_memories_hold_small_sketches() -> None:
    seen = observed(world_of())
    work = AdaptiveSampling().training
    method = AdaptiveSampling(**QUICK)
    needed = [seen.costs.memory_bytes(replace_task(seen, kept, work)) for kept in (1, 2, 4)]
    memory = np.array([1e9] * 9)
    memory[2], memory[5] = needed[0] * 0.9, needed[1]
    examples = np.array([20] * 9)
    examples[7] = 0
    plan = first_plan(method, world_of(memory=memory, examples=examples))
    q, kept = probabilities(plan), np.array(plan.notes["sampling"]["kept"])
    assert q[2] == q[7] == 0.0
    assert (np.delete(q, [2, 7]) > 0).all()
    assert kept[5] <= 2


def replace_task(seen: Observation, kept: int, training: LocalTraining):
    from airtune.compression.dense import Dense
    from airtune.scheduling.sketching import Sketching
    from airtune.scheduling.work import LocalWork

    return LocalWork(training, Dense()).task(0, Sketching().sized(seen.shape, kept), seen)


# ---------------------------------------------------------------------------------------------------------- baselines


@pytest.mark.parametrize("name", ["full", "uniform", "weighted", "statistical", "published", "split"])
def test_baselines_have_their_shape_and_are_never_predicted_better(name: str) -> None:
    world = world_of(8, examples=[20, 25, 30, 20, 40, 20, 25, 30])
    norms = tuple(np.linspace(1.0, 2.0, 8).tolist())
    constants = RoundConstants(30.0, 2.2, gradient_norms=norms)
    plan = first_plan(AdaptiveSampling(sampling=name, sizes="largest", constants=constants), world)
    q, a = probabilities(plan), world.fleet.data_weight
    assert plan.notes["sampling"]["kept"] == [4] * 8
    shape = {"full": np.ones(8), "uniform": np.ones(8), "weighted": a, "statistical": a * np.array(norms)}.get(name)
    if shape is not None:
        free = q < 1
        np.testing.assert_allclose(q[free] / shape[free], (q[free] / shape[free])[:1].repeat(free.sum()), rtol=1e-9)
    if name == "full":
        assert (q == 1).all()
    best = first_plan(AdaptiveSampling(constants=constants), world)
    assert best.notes["expected_total_s"] <= plan.notes["expected_total_s"] * 1.02  # rates assume different cohorts
    assert best.notes["gain_over_uniform"] >= 1.0
    uniform = first_plan(AdaptiveSampling(sampling="uniform", sizes="largest", constants=constants), world)
    gain = plan.notes["gain_over_uniform"]  # of every baseline, by the same measure of time
    assert gain == pytest.approx(uniform.notes["expected_total_s"] / plan.notes["expected_total_s"], rel=0.02)
    assert plan.notes["time_measure"] == best.notes["time_measure"] == "mean over every cohort"


def test_the_expected_cohort_size_of_a_baseline_can_be_given() -> None:
    for name in ("uniform", "weighted", "statistical"):
        plan = first_plan(AdaptiveSampling(sampling=name, expected_cohort_size=2.5), world_of())
        assert probabilities(plan).sum() == pytest.approx(2.5)
        assert plan.notes["expected_cohort"] == pytest.approx(2.5)


def test_one_decision_at_a_time() -> None:
    slow = np.repeat([1e9, 3e8], 6)
    q_only = first_plan(
        AdaptiveSampling(sizes="largest", constants=RoundConstants(30.0, 4.0)), world_of(12, flops=slow)
    )
    assert set(q_only.notes["sampling"]["kept"]) == {4}
    assert np.ptp(probabilities(q_only)) > 0.01
    k_only = first_plan(AdaptiveSampling(sampling="uniform", constants=PICKY), world_of(12, flops=slow))
    assert np.ptp(probabilities(k_only)) < 1e-12


def test_the_gain_is_known_above_a_thousand_clients() -> None:
    for fields in ({}, {"sampling": "weighted", "sizes": "largest"}):
        notes = first_plan(AdaptiveSampling(ratios=(0.25, 1.0), **fields), world_of(1001)).notes
        assert notes["time_measure"] == "upper bound U2"
        assert notes["gain_over_uniform"] > 0.5
        assert notes["gain_over_uniform"] >= 1.0 or fields


def test_expected_bits_are_the_mean_over_cohorts() -> None:
    world = world_of(8)
    full = first_plan(AdaptiveSampling(sampling="full", sizes="largest"), world)
    seen = observed(world)
    assert full.notes["expected_uplink_bits"] == sum(seen.costs.uplink_bits(task) for task in full.tasks)
    half = first_plan(AdaptiveSampling(sampling="uniform", sizes="largest", expected_cohort_size=4.0), world)
    assert half.notes["expected_uplink_bits"] == pytest.approx(full.notes["expected_uplink_bits"] / 2)


def test_the_equal_split_is_planned_as_such() -> None:
    world = world_of()
    equal = first_plan(AdaptiveSampling(bandwidth=EqualSplit(), **QUICK), world)
    best = first_plan(AdaptiveSampling(**QUICK), world)
    assert equal.notes["expected_total_s"] > best.notes["expected_total_s"]


# -------------------------------------------------------------------------------------------------------------- notes


def test_sgd_is_the_default_and_other_optimizers_are_flagged() -> None:
    world = world_of(3)
    assert "heuristic_scaling" not in first_plan(AdaptiveSampling(), world).notes
    for training in (LocalTraining(), LocalTraining(optimizer="sgd", momentum=0.9)):
        assert "heuristic" in first_plan(AdaptiveSampling(training=training), world).notes["heuristic_scaling"]


def test_clipping_changes_the_weight_and_is_called_a_departure() -> None:
    world, model = world_of(6), ServerModel(make_adapter(dtype=torch.float64))
    plain = AdaptiveSampling(sampling="uniform", sizes="largest", expected_cohort_size=1.2)
    capped = replace(plain, weight_cap=2.0)
    seeds = [s for s in range(20) if first_plan(plain, world, s).tasks]
    plan = first_plan(capped, world, seeds[0])
    outcome, _ = world.run(plan, model, Pending(), round_index=1, time=0.0)
    assert "clipped" in plan.notes["departure"]
    assert plan.notes["clipped"] == [task.client for task in plan.tasks]
    state = plain.init(model, world.fleet)
    moved = [m.aggregate(state, model, outcome)[0].adapter.factors["layer.0.query"].A for m in (plain, capped)]
    before = model.adapter.factors["layer.0.query"].A
    torch.testing.assert_close(moved[1] - before, (moved[0] - before) * (2.0 * 0.2), rtol=1e-9, atol=1e-12)


def test_a_target_out_of_reach_is_no_result() -> None:
    with pytest.raises(NoResultError, match=r"out of reach.*client"):
        first_plan(AdaptiveSampling(constants=RoundConstants(1.0, 1e-3)), world_of())


def test_what_the_plan_says() -> None:
    plan = first_plan(AdaptiveSampling(**QUICK), world_of())
    assert plan.notes["solver"]["branch"] in plan.notes["candidates_s"]
    assert plan.notes["expected_total_s"] == pytest.approx(
        plan.notes["expected_rounds"] * plan.notes["expected_round_s"]
    )
    assert plan.notes["round_model"] == {"alpha": 30.0, "beta": 1.0, "form": "V", "from_pilot": True}
    assert not first_plan(AdaptiveSampling(), world_of()).notes["round_model"]["from_pilot"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("sampling", "luck"), ("sizes", "x"), ("noise", "x"), ("weight_cap", 0.5), ("replan_every", 0), ("ratios", ())],
)
def test_bad_fields_are_refused(field: str, value) -> None:
    with pytest.raises(InputError, match=field):
        AdaptiveSampling(**{field: value})


def test_constants_are_checked() -> None:
    with pytest.raises(InputError, match="both or neither"):
        RoundConstants(alpha=1.0)
    with pytest.raises(InputError, match="gradient_norms"):
        first_plan(AdaptiveSampling(constants=RoundConstants(gradient_norms=(1.0,)), noise="gradients"), world_of())
