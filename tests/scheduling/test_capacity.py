"""Capacity estimates: smoothing, one wild measurement, real changes, and what devices report."""

import numpy as np
import pytest

from airtune.compression.dense import Dense
from airtune.errors import InputError
from airtune.scheduling.bandwidth import EqualSplit
from airtune.scheduling.capacity import Capacity, CapacityEstimator, Estimate, assumed_speeds
from airtune.scheduling.planner import make_tasks, share_band
from airtune.scheduling.slicing import depth_slices
from airtune.scheduling.work import LocalWork
from airtune.types import Group, LocalTraining, Pending, Plan, ServerModel
from synthetic_federation import SyntheticWorld, make_adapter, make_fleet


def series(values: list[float], estimator: CapacityEstimator) -> list[float]:
    estimate, seen = Estimate.unknown(1), []
    for value in values:
        estimate = estimator.update(estimate, np.array([0]), np.array([value]))
        seen.append(float(estimate.value[0]))
    return seen


def test_smoothing_is_the_one_of_the_specification() -> None:
    assert series([1.0, 1.5], CapacityEstimator(0.8, 10.0)) == pytest.approx([1.0, 0.8 * 1.0 + 0.2 * 1.5])


@pytest.mark.parametrize("wild", [1e-6, 1e6])
def test_one_wild_measurement_moves_an_estimate_by_a_fifth_at_most(wild: float) -> None:
    after = series([1.0] * 5 + [wild] + [1.0] * 10, CapacityEstimator())
    assert 0.8 <= min(after) and max(after) <= 1.2 + 1e-12
    assert after[-1] == pytest.approx(1.0, abs=0.03)


def test_two_that_agree_are_a_real_change() -> None:
    after = series([1.0] * 5 + [100.0, 110.0], CapacityEstimator())
    assert after[-1] == pytest.approx(np.sqrt(100.0 * 110.0))


def test_two_wild_ones_that_disagree_are_not() -> None:
    after = series([1.0] * 5 + [100.0, 0.01, 1.0], CapacityEstimator())
    assert 0.7 < after[-1] < 1.3


def test_what_is_not_a_positive_number_is_ignored() -> None:
    assert series([1.0, float("nan"), 0.0, float("inf"), -3.0], CapacityEstimator()) == [1.0] * 5


def test_bad_fields() -> None:
    for arguments in ({"smoothing": 1.0}, {"smoothing": -0.1}, {"outlier_factor": 1.0}):
        with pytest.raises(InputError, match="valid"):
            CapacityEstimator(**arguments)


@pytest.mark.parametrize("local_steps", [7, None])
def test_reports_of_a_round_predict_the_next_one_exactly_at_any_depth(local_steps: int | None) -> None:
    """In a world whose backward pass is linear in depth, what is learnt at depth 2 predicts depth 3, and the clock."""
    world = SyntheticWorld(make_fleet(4, memory=1e9), noise=0.0)
    model = ServerModel(make_adapter())
    shape = model.adapter.shape
    work = LocalWork(LocalTraining(local_steps=local_steps), Dense())
    seen = world.observe(1, 0.0, Pending(), model)
    clients = np.arange(4)
    options = {depth: depth_slices(shape, depth, "frozen") for depth in (2, 3)}

    def outcome(depth: int):
        tasks = make_tasks(clients, [options[depth]] * 4, seen, work)
        plan = Plan((Group(share_band(tasks, seen, EqualSplit())),))
        return world.run(plan, model, Pending(), round_index=1, time=0.0)[0]

    learnt = CapacityEstimator().learn(Capacity.unknown(4), outcome(2))
    for capacity in (Capacity.unknown(4), learnt):
        speeds = assumed_speeds(capacity, seen, work, clients, options[3])
        bits = np.array([float(work.compressor.bits(options[3].send, shape))])
        predicted = speeds.seconds(np.array([3]), bits)[:, 0]
        clock = [u.cost.compute_seconds + u.cost.upload_seconds for u in outcome(3).updates]
        np.testing.assert_allclose(predicted, clock, rtol=1e-4)


def test_clients_that_report_nothing_stay_unknown() -> None:
    world = SyntheticWorld(make_fleet(3, memory=1e9), missing=1)
    model = ServerModel(make_adapter())
    seen = world.observe(1, 0.0, Pending(), model)
    work = LocalWork(LocalTraining(), Dense())
    tasks = make_tasks(np.arange(3), [depth_slices(model.adapter.shape, 2, "frozen")] * 3, seen, work)
    outcome, _ = world.run(
        Plan((Group(share_band(tasks, seen, EqualSplit())),)), model, Pending(), round_index=1, time=0.0
    )
    learnt = CapacityEstimator().learn(Capacity.unknown(3), outcome)
    assert np.isnan(learnt.forward.value).tolist() == [False, True, False]
