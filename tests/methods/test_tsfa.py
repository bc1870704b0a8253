"""TSFA: the mean latency meets its limit, the rank comes from the pilot's bound, the robust plan is late less often."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from airtune.compression.dense import Dense
from airtune.compression.error_feedback import ErrorFeedback
from airtune.compression.lowrank import LowRank
from airtune.compression.soft import Soft
from airtune.compression.topk import TopK
from airtune.errors import InputError
from airtune.federation import Stop, begin, run
from airtune.methods.tsfa import TSFA
from airtune.scheduling.latency_control import LatencyControl, quantile_gain, relative_errors
from airtune.streams import stream
from airtune.types import OrthogonalityPenalty, Plan, RoundOutcome, ServerModel
from synthetic_federation import SyntheticWorld, make_adapter, make_fleet

FLEET = make_fleet(4, flops=[2e13, 3e13, 4e13, 6e13], memory=1e7)


def fading_gain(index: int, size: int = 4, seed: int = 0) -> np.ndarray:
    """Return faded gains of a round, of fourfold diversity: means differ by a factor of ten.

    Under plain Rayleigh fading single deep fades, longer than hundreds of other rounds, make up the mean latency of
    waiting for everybody: their slack cannot be used beforehand, so the mean then stays below the limit.
    """
    return np.geomspace(1e-12, 1e-11, size) * stream(seed, "test fading", index).gamma(4.0, 0.25, size)


def rounds(method: TSFA, count: int, *, world: SyntheticWorld | None = None, static: bool = False):
    """Run planner and clock without training: yield (state, plan, seconds) of each round."""
    world = SyntheticWorld(FLEET) if world is None else world
    model = ServerModel(make_adapter(ranks=8))
    state = method.init(model, world.fleet)
    progress = begin(method, model, world)
    seen = world.observe(1, 0.0, progress.pending, model)
    for index in range(1, count + 1):
        gain = fading_gain(0 if static else index, world.fleet.size)
        seen = replace(seen, round=index, links=replace(seen.links, uplink_gain=gain))
        plan = method.plan(state, seen, stream(0, "plan", index))
        plan.check(seen)
        seconds = max(
            world.cost(task, seen).compute_seconds + world.cost(task, seen).upload_seconds for task in plan.tasks
        )
        outcome = RoundOutcome(plan, world.fleet, (), (), 0.0, seconds)
        state = method.learn(state, outcome)
        yield state, plan, seconds


def mean_latency(method: TSFA, count: int) -> float:
    return float(np.mean([seconds for _, _, seconds in rounds(method, count)]))


@pytest.fixture(scope="module")
def unconstrained() -> float:
    """The mean latency of sending everything: a limit that never binds."""
    return mean_latency(TSFA(latency_limit=1e6, pilot_rounds=0), 60)


def test_a_moderate_weight_settles_within_one_per_cent(unconstrained):
    """The specification's queue toy: over the last 100 of 150 rounds the mean is within 1 % of the limit."""
    limit = 0.7 * unconstrained
    last = [seconds for _, _, seconds in rounds(TSFA(latency_limit=limit, pilot_rounds=0), 150)][-100:]
    assert np.mean(last) == pytest.approx(limit, rel=0.01)


def test_a_larger_error_weight_trades_latency_for_components(unconstrained):
    limit, kept, latency = 0.7 * unconstrained, [], []
    for weight in (0.3, 30.0, 1000.0):
        found = list(rounds(TSFA(latency_limit=limit, error_weight=weight, pilot_rounds=0), 40))
        kept.append(np.mean([plan.notes["mean_keep_ratio"] for _, plan, _ in found]))
        latency.append(np.mean([seconds for _, _, seconds in found]))
    assert kept[0] < kept[1] < kept[2]
    assert latency[0] < latency[1] < latency[2]


def test_with_client_queues_every_clients_mean_meets_the_limit(unconstrained):
    limit = 0.8 * unconstrained
    method = TSFA(latency_limit=limit, queues="client", pilot_rounds=0, error_weight=0.3)
    world, total = SyntheticWorld(FLEET), np.zeros(4)
    model = ServerModel(make_adapter(ranks=8))
    state = method.init(model, FLEET)
    seen = world.observe(1, 0.0, begin(method, model, world).pending, model)
    for index in range(1, 121):
        seen = replace(seen, round=index, links=replace(seen.links, uplink_gain=fading_gain(index)))
        plan = method.plan(state, seen, stream(0, "plan", index))
        plan.check(seen)
        costs = [world.cost(task, seen) for task in plan.tasks]
        ends = [cost.compute_seconds + cost.upload_seconds for cost in costs]
        updates = [
            world.update(task, cost, model, index, 0.0, end)
            for task, cost, end in zip(plan.tasks, costs, ends, strict=True)
        ]
        total += ends
        state = method.learn(state, RoundOutcome(plan, FLEET, tuple(updates), (), 0.0, max(ends)))
    assert state.queue.shape == (4,)
    assert (total / 120 <= 1.03 * limit).all()


# ---------------------------------------------------------------------------------------------------- infeasible limits


def test_a_limit_below_a_clients_computing_is_refused_and_names_it():
    method = TSFA(latency_limit=1e-4)
    with pytest.raises(InputError, match=r"method\.latency_limit.*client 0 computes"):
        next(rounds(method, 1))


def test_a_limit_that_one_link_cannot_meet_names_the_client():
    """Client 2 has next to no channel: alone in the whole band it would need longer than the limit."""
    world = SyntheticWorld(FLEET)
    method = TSFA(latency_limit=20.0, pilot_rounds=0)
    model = ServerModel(make_adapter(ranks=8))
    seen = world.observe(1, 0.0, begin(method, model, world).pending, model)
    gain = np.array([1e-10, 1e-10, 1e-19, 1e-10])
    plan = method.plan(
        method.init(model, FLEET), replace(seen, links=replace(seen.links, uplink_gain=gain)), stream(0, "p")
    )
    assert "client 2 cannot send" in plan.notes["limit_out_of_reach"]
    assert plan.notes["least_latency_s"] > 20.0


def test_an_infeasible_limit_is_said_in_every_round_and_the_least_is_sent(unconstrained):
    found = list(rounds(TSFA(latency_limit=0.05 * unconstrained, pilot_rounds=0), 30, static=True))
    assert all("limit_out_of_reach" in plan.notes for _, plan, _ in found[5:])
    assert found[-1][1].notes["mean_keep_ratio"] == pytest.approx(1 / 8, abs=0.05)


def test_without_a_limit_round_one_sets_one_that_lies_in_between():
    found = list(rounds(TSFA(pilot_rounds=0), 5))
    limits = {plan.notes["latency_limit_s"] for _, plan, _ in found}
    assert len(limits) == 1
    limit = limits.pop()
    assert found[0][1].notes["least_latency_s"] < limit
    for share, compare in ((0.0, np.less), (1.0, np.greater)):
        other = next(rounds(TSFA(pilot_rounds=0, limit_share=share), 1))[1].notes["latency_limit_s"]
        assert compare(other, limit)


# ---------------------------------------------------------------------------------------------------- plans


def test_plans_keep_components_by_importance_of_the_last_upload():
    """A client whose energy sits in one component sends less than one whose components weigh the same."""
    tails = np.full((4, 9), np.nan)
    tails[:] = np.linspace(1.0, 0.0, 9)
    tails[0] = np.array([1.0, *([1e-6] * 7), 0.0])
    method = TSFA(latency_limit=1.0, pilot_rounds=0)
    world, model = SyntheticWorld(replace(FLEET, flops_per_second=np.full(4, 1e12))), ServerModel(make_adapter(ranks=8))
    state = replace(method.init(model, FLEET), tails=tails, queue=np.array([0.8]), limit=1.0, rounds=3)
    seen = world.observe(1, 0.0, begin(method, model, world).pending, model)
    plan = method.plan(state, replace(seen, links=replace(seen.links, uplink_gain=np.full(4, 1e-10))), stream(0, "p"))
    kept = [task.compressor.keep_ratio for task in plan.tasks]
    assert kept[0] == pytest.approx(1 / 8)
    assert min(kept[1:]) > kept[0]


def test_every_task_trains_with_the_penalty_and_predicts_the_clock():
    for _, plan, seconds in rounds(TSFA(pilot_rounds=0, orthogonality="mixed", orthogonality_weight=0.3), 10):
        assert all(OrthogonalityPenalty(0.3, "mixed") in task.training.penalties for task in plan.tasks)
        assert plan.notes["planned_latency_s"] == pytest.approx(seconds, rel=1e-9)


@pytest.mark.parametrize("codec", [TopK(0.5), LowRank(0.5), ErrorFeedback(Soft(0.5)), Dense()], ids=repr)
def test_any_codec_can_be_controlled(codec, unconstrained):
    method = TSFA(latency_limit=0.45 * unconstrained, pilot_rounds=0, compressor=codec)
    found = list(rounds(method, 20))
    ratios = {task.compressor.keep_ratio for _, plan, _ in found for task in plan.tasks} if codec != Dense() else {1.0}
    assert len(ratios) > 2 or codec == Dense()
    assert all(sum(task.bandwidth for task in plan.tasks) <= 1e6 * (1 + 1e-9) for _, plan, _ in found)


def test_measured_networks_share_no_band():
    method, world = TSFA(latency_limit=8.0, pilot_rounds=0), SyntheticWorld(FLEET)
    model = ServerModel(make_adapter(ranks=8))
    seen = world.observe(1, 0.0, begin(method, model, world).pending, model)
    rates = np.array([2e3, 4e3, 1e4, 1e4])
    links = replace(seen.links, fixed_uplink_rate=rates, fixed_downlink_rate=np.full(4, 1e6))
    state = replace(method.init(model, FLEET), queue=np.array([30.0]), limit=8.0, rounds=2)
    plan = method.plan(state, replace(seen, links=links), stream(0, "p"))
    kept = [task.compressor.keep_ratio for task in plan.tasks]
    assert kept[0] < kept[2]
    assert len({task.bandwidth for task in plan.tasks}) == 1


# ---------------------------------------------------------------------------------------------------- the pilot


def trained(method: Any, count: int, seed: int = 0):
    world = SyntheticWorld(make_fleet(5, memory=1e7), fading=True)
    start = begin(method, ServerModel(make_adapter(ranks=4)), world)
    return list(run(method, start, world, world, stop=Stop(count), seed=seed, evaluate=lambda _: {}))


def test_the_pilot_fixes_a_rank_and_everybody_keeps_to_it():
    progress = trained(TSFA(candidate_ranks=(1, 2)), 4)
    (_, _), (first, pilot), (second, after), *_ = progress
    assert pilot.notes["offline"]["ranks"] == [1, 2]
    assert pilot.notes["structural_rank"] == 4 and pilot.notes["mean_keep_ratio"] == 1.0
    rank = first.state.rank
    assert rank in (1, 2)
    assert after.notes["structural_rank"] == rank
    assert second.state.rank == rank
    for factors in first.model.adapter.factors.values():
        assert bool((factors.B[:, rank:] == 0).all())
    assert len(after.notes["curves"][0]["y"]) == 2 and after.notes["curves"][0]["chosen"] == rank
    assert all(client.components == rank * 6 for client in after.clients)


def test_the_pilots_adapter_is_cut_by_singular_value():
    """What the pilot's average had is kept up to the energy beyond the chosen rank."""
    method, whole = TSFA(candidate_ranks=(2,)), TSFA(pilot_rounds=0)
    cut, full = (trained(m, 1)[-1][0].model.adapter for m in (method, whole))
    for name, factors in full.factors.items():
        singular = torch.linalg.svdvals(factors.product().double())
        error = (factors.product() - cut.factors[name].product()).double().square().sum()
        assert float(error) == pytest.approx(float(singular[2:].square().sum()), rel=1e-3)


def test_a_pilot_of_no_rounds_keeps_the_rank_of_the_model():
    (_, _), (progress, record) = trained(TSFA(pilot_rounds=0), 1)
    assert progress.state.rank == 4
    assert "offline" not in record.notes


def test_diagnostics_are_on_record():
    records = [record for _, record in trained(TSFA(), 3)][1:]
    for record in records:
        assert {"covariance_norm", "coherence_a", "coherence_b", "queue_s", "mean_latency_s"} <= set(record.diagnostics)
    times = [record.duration_s for record in records]
    assert records[-1].diagnostics["mean_latency_s"] == pytest.approx(np.mean(times), rel=1e-9)


# ---------------------------------------------------------------------------------------------------- channel knowledge


def test_quantile_gain_is_the_quantile_of_the_true_gain_given_the_estimate():
    """Against 100,000 draws of the model of the channel estimate."""
    rng = np.random.default_rng(0)

    def normal(n):
        return (rng.normal(size=n) + 1j * rng.normal(size=n)) / np.sqrt(2)

    s2, h = 0.2, normal(100_000)
    seen = np.abs(np.sqrt(1 - s2) * h + np.sqrt(s2) * normal(100_000)) ** 2
    for quantile in (0.05, 0.5):
        below = np.abs(h) ** 2 * 3e-10 < quantile_gain(seen * 3e-10, np.full(100_000, 3e-10), s2, quantile)
        assert below.mean() == pytest.approx(quantile, abs=0.006)
        strong = seen > 1.5
        assert below[strong].mean() == pytest.approx(quantile, abs=0.015)
    same = quantile_gain(np.array([1e-10]), np.array([2e-10]), 0.0, 0.05)
    assert same[0] == 1e-10


def late_share(method: TSFA, error_variance: float, count: int = 30) -> tuple[float, float]:
    """Return how many uploads end after the planned latency, and the mean latency, under imperfect estimates."""
    world, model, late, seconds = SyntheticWorld(FLEET), ServerModel(make_adapter(ranks=8)), [], []
    state = method.init(model, FLEET)
    seen = world.observe(1, 0.0, begin(method, model, world).pending, model)
    mean = np.geomspace(1e-12, 1e-11, 4)
    for index in range(1, count + 1):
        parts = stream(0, "test estimate", index).normal(size=(4, 4)) / np.sqrt(2)
        h, e = parts[0] + 1j * parts[1], parts[2] + 1j * parts[3]
        guess = np.sqrt(1 - error_variance) * h + np.sqrt(error_variance) * e
        estimate, truth = (replace(seen.links, uplink_gain=mean * np.abs(g) ** 2) for g in (guess, h))
        plan = method.plan(state, replace(seen, round=index, links=estimate), stream(0, "plan", index))
        costs = [world.cost(task, replace(seen, links=truth)) for task in plan.tasks]
        ends = [cost.compute_seconds + cost.upload_seconds for cost in costs]
        late += [end > plan.notes["planned_latency_s"] * (1 + 1e-9) for end in ends]
        seconds.append(max(ends))
        state = method.learn(state, RoundOutcome(plan, FLEET, (), (), 0.0, max(ends)))
    return float(np.mean(late)), float(np.mean(seconds))


def test_planning_on_a_quantile_of_the_rate_makes_uploads_late_less_often(unconstrained):
    limit = 0.8 * unconstrained
    shares = [
        late_share(TSFA(latency_limit=limit, pilot_rounds=0, rate_quantile=q, error_variance=0.1), 0.1)[0]
        for q in (None, 0.2, 0.05)
    ]
    assert shares[0] > 0.3
    assert shares[0] > shares[1] > shares[2]
    assert shares[2] < 0.12
    perfect, _ = late_share(TSFA(latency_limit=limit, pilot_rounds=0), 0.0)
    assert perfect == 0.0


# ---------------------------------------------------------------------------------------------------- parts


def test_relative_errors():
    weights = np.array([0.25, 0.75])
    unknown = np.full((2, 5), np.nan)
    np.testing.assert_allclose(
        relative_errors(unknown, weights, 4, "profile"), [[(1 - i / 4) ** 2 for i in (1, 2, 3, 4)]] * 2
    )
    np.testing.assert_allclose(relative_errors(unknown, weights, 4, "linear")[0], [0.75, 0.5, 0.25, 0.0])
    tails = np.array([[8.0, 4.0, 2.0, 1.0, 0.0], [np.nan] * 5])
    found = relative_errors(tails, weights, 4, "profile")
    np.testing.assert_allclose(found[0], np.array([4.0, 2.0, 1.0, 0.0]) / 8.0)
    np.testing.assert_allclose(found[1], [(1 - i / 4) ** 2 for i in (1, 2, 3, 4)])
    assert relative_errors(np.zeros((2, 5)), weights, 4, "profile").max() < 1.0


def test_the_queue_never_falls_below_zero_and_counts_every_round():
    state = replace(LatencyControl.new(3, 4, per_client=False), limit=2.0)
    for start, end, queue in ((0.0, 5.0, 3.0), (5.0, 6.0, 2.0), (6.0, 6.5, 0.5), (6.5, 7.0, 0.0), (7.0, 9.5, 0.5)):
        state = state.after(RoundOutcome(Plan(()), FLEET, (), (), start, end))
        assert state.queue[0] == pytest.approx(queue)
    assert state.rounds == 5
    assert state.mean_latency == pytest.approx(9.5 / 5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("latency_limit", 0.0),
        ("limit_share", 1.5),
        ("error_weight", 0.0),
        ("pilot_rounds", -1),
        ("candidate_ranks", (4, 2)),
        ("candidate_ranks", (0, 2)),
        ("rate_quantile", 1.0),
        ("error_variance", 2.0),
        ("queues", "none"),
        ("error_model", "cubic"),
        ("orthogonality", "none"),
        ("orthogonality_weight", -1.0),
    ],
)
def test_bad_fields_are_refused_by_name(name, value):
    with pytest.raises(InputError, match=rf"method\.{name}.*valid"):
        TSFA(**{name: value})


def test_a_rank_above_the_models_is_refused():
    with pytest.raises(InputError, match=r"candidate_ranks.*\[model\]\.rank"):
        TSFA(candidate_ranks=(2, 16)).init(ServerModel(make_adapter(ranks=4)), FLEET)
