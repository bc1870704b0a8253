"""TSFA where links fail, estimates are old, and devices differ."""

from dataclasses import replace

import numpy as np
import pytest

from airtune.errors import InputError
from airtune.federation import begin
from airtune.methods.tsfa import TSFA
from airtune.streams import stream
from airtune.types import RoundOutcome, ServerModel
from synthetic_federation import SyntheticWorld, make_adapter, make_fleet

FLEET = make_fleet(4, flops=[2e13, 3e13, 4e13, 6e13], memory=1e7)
MEAN = np.geomspace(1e-12, 1e-11, 4)
LIMIT = 5e-3  # s; these adapters are tiny


def observation(gain, fleet=FLEET, index=1):
    world, model = SyntheticWorld(fleet), ServerModel(make_adapter(ranks=8))
    seen = world.observe(index, 0.0, begin(TSFA(), model, world).pending, model)
    return model, replace(seen, links=replace(seen.links, uplink_gain=np.asarray(gain, dtype=float)))


def planned(method, gain, fleet=FLEET, queue=0.0):
    model, seen = observation(gain, fleet)
    state = replace(method.init(model, fleet), queue=np.array([queue]))
    plan = method.plan(state, seen, stream(0, "plan", 1))
    plan.check(seen)
    return plan


def test_a_client_without_a_link_is_left_out():
    plan = planned(TSFA(pilot_rounds=0), MEAN * np.array([1.0, 1.0, 0.0, 1.0]))
    assert [task.client for task in plan.tasks] == [0, 1, 3]
    assert not planned(TSFA(pilot_rounds=0), 0.0 * MEAN).tasks


def test_deep_fades_are_left_out_where_the_user_says_so():
    gain = MEAN * np.array([1.0, 1e-4, 1.0, 1.0])
    patient, strict = (TSFA(latency_limit=LIMIT, pilot_rounds=0, outage_after=after) for after in (None, 1.0))
    long, short = planned(patient, gain, queue=1e3), planned(strict, gain, queue=1e3)
    assert len(long.tasks) == 4 and [task.client for task in short.tasks] == [0, 2, 3]
    assert short.notes["outage"] == [1]
    assert short.notes["planned_latency_s"] < LIMIT < long.notes["planned_latency_s"]


def test_where_all_are_in_a_fade_the_best_link_sends():
    plan = planned(TSFA(latency_limit=LIMIT, pilot_rounds=0, outage_after=1e-6), MEAN)
    assert [task.client for task in plan.tasks] == [3]


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf])
def test_a_bad_outage_is_refused(value):
    with pytest.raises(InputError, match=r"method\.outage_after.*valid"):
        TSFA(outage_after=value)


def test_a_slower_device_sends_no_more_over_the_same_link_and_all_end_in_time():
    fleet = make_fleet(4, flops=[1e12, 2e12, 4e12, 4e13], memory=1e7)
    method = TSFA(pilot_rounds=0)
    plan = planned(method, np.full(4, 3e-12), fleet, queue=0.01)
    sent = [task.compressor.keep_ratio for task in plan.tasks]
    assert sent == sorted(sent) and sent[0] < sent[-1]
    _, seen = observation(np.full(4, 3e-12), fleet)
    world = SyntheticWorld(fleet)
    costs = [world.cost(task, seen) for task in plan.tasks]
    ends = [cost.compute_seconds + cost.upload_seconds for cost in costs]
    assert max(ends) <= plan.notes["planned_latency_s"] * (1 + 1e-9)
    assert len({round(cost.compute_seconds, 9) for cost in costs}) == 4


def late_uploads(method, correlation, rounds=25):
    """Return how many uploads end after the planned latency if the planner sees an older channel."""
    model, seen = observation(MEAN)
    world, state, late = SyntheticWorld(FLEET), method.init(model, FLEET), []
    for index in range(1, rounds + 1):
        parts = stream(0, "test delay", index).normal(size=(4, 4)) / np.sqrt(2)
        old, new = parts[0] + 1j * parts[1], parts[2] + 1j * parts[3]
        truth = np.abs(correlation * old + np.sqrt(1 - correlation**2) * new) ** 2
        estimate = replace(seen, round=index, links=replace(seen.links, uplink_gain=MEAN * np.abs(old) ** 2))
        plan = method.plan(state, estimate, stream(0, "plan", index))
        true = replace(seen, links=replace(seen.links, uplink_gain=MEAN * truth))
        costs = [world.cost(task, true) for task in plan.tasks]
        ends = [cost.compute_seconds + cost.upload_seconds for cost in costs]
        late += [end > plan.notes["planned_latency_s"] * (1 + 1e-9) for end in ends]
        state = method.learn(state, RoundOutcome(plan, FLEET, (), (), 0.0, max(ends)))
    return float(np.mean(late))


def test_the_quantile_covers_delay_with_the_variance_that_belongs_to_it():
    """An estimate of correlation rho with the channel leaves the variance 1 - rho^2 open, whatever made it so."""
    rho = 0.9
    plain = late_uploads(TSFA(latency_limit=LIMIT, pilot_rounds=0), rho)
    robust = late_uploads(TSFA(latency_limit=LIMIT, pilot_rounds=0, rate_quantile=0.05, error_variance=1 - rho**2), rho)
    assert plain > 0.3
    assert robust < 0.15
