"""TSFA's guarantee, planner and clock only: the mean round is that of the limit, whatever fades and is dropped.

Fading laws: "fourfold" is a gamma law of fourfold diversity; "rayleigh" is exponential, whose single deep fades are
longer than hundreds of other rounds. Profiles: "assumed", nothing has been uploaded, so the quadratic model decides;
"measured", the tails of updates that arrived every round (`state.tails`), which the default error model reads.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest

from airtune.federation import begin
from airtune.methods.tsfa import TSFA
from airtune.streams import stream
from airtune.types import Plan, RoundOutcome, ServerModel
from synthetic_federation import SyntheticWorld, make_adapter, make_fleet

FLEET = make_fleet(4, flops=[2e13, 3e13, 4e13, 6e13], memory=1e7)
MEAN_GAIN = np.geomspace(1e-12, 1e-11, 4)


@dataclass(frozen=True)
class Step:
    """A round: its plan, its seconds, the queue after it, and how many clients' profiles it planned with."""

    plan: Plan
    seconds: float
    queue: float
    profiles: int


def gain(law: str, index: int) -> np.ndarray:
    draw = stream(0, "test guarantee", index)
    return MEAN_GAIN * (draw.exponential(size=4) if law == "rayleigh" else draw.gamma(4.0, 0.25, 4))


def steps(method: TSFA, count: int, law: str = "fourfold", profiles: str = "assumed") -> Iterator[Step]:
    """Run planner and clock; with measured profiles made-up updates arrive, which nobody averages."""
    world, model = SyntheticWorld(FLEET, noise=0.5), ServerModel(make_adapter(ranks=8, layers=1))
    state = method.init(model, FLEET)
    seen = world.observe(1, 0.0, begin(method, model, world).pending, model)
    for index in range(1, count + 1):
        known = int((~np.isnan(state.tails[:, 0])).sum())
        seen = replace(seen, round=index, links=replace(seen.links, uplink_gain=gain(law, index)))
        plan = method.plan(state, seen, stream(0, "plan", index))
        costs = [world.cost(task, seen) for task in plan.tasks]
        ends = [cost.compute_seconds + cost.upload_seconds for cost in costs]
        updates = []
        if profiles == "measured":
            columns = zip(plan.tasks, costs, ends, strict=True)
            updates = [world.update(task, cost, model, index, 0.0, end) for task, cost, end in columns]
        state = method.learn(state, RoundOutcome(plan, FLEET, tuple(updates), (), 0.0, max(ends)))
        yield Step(plan, max(ends), float(state.queue[0]), known)


def seconds(found: Iterator[Step]) -> np.ndarray:
    return np.array([step.seconds for step in found])


@pytest.fixture(scope="module")
def unconstrained() -> dict[str, np.ndarray]:
    """Return the seconds of rounds in which everything is sent, by law."""
    free = TSFA(latency_limit=1e6, pilot_rounds=0)
    return {law: seconds(steps(free, 120, law)) for law in ("fourfold", "rayleigh")}


ROWS = [("fourfold", "assumed", 0.6), ("rayleigh", "assumed", 0.7), ("fourfold", "measured", 0.7)]
MORE = [
    *(("fourfold", "assumed", share) for share in (0.55, 0.75, 0.9)),
    *(("rayleigh", profiles, share) for profiles in ("assumed", "measured") for share in (0.55, 0.75)),
    *(("fourfold", "measured", share) for share in (0.55, 0.75, 0.9)),
]


@pytest.mark.parametrize(("law", "profiles", "share"), ROWS)
def test_the_mean_round_is_that_of_the_limit(law, profiles, share, unconstrained):
    limit = share * float(unconstrained[law].mean())
    found = list(steps(TSFA(latency_limit=limit, pilot_rounds=0), 120, law, profiles))
    assert found[-1].profiles == (4 if profiles == "measured" else 0)
    mean = float(np.mean([step.seconds for step in found]))
    assert 0.95 * limit <= mean <= 1.02 * limit


@pytest.mark.slow
@pytest.mark.parametrize(("law", "profiles", "share"), MORE)
def test_the_mean_of_2000_rounds_is_that_of_the_limit(law, profiles, share, unconstrained):
    limit = share * float(unconstrained[law].mean())
    mean = float(seconds(steps(TSFA(latency_limit=limit, pilot_rounds=0), 2000, law, profiles)).mean())
    assert 0.95 * limit <= mean <= 1.02 * limit


def test_a_limit_above_every_round_changes_nothing_and_one_below_some_does(unconstrained):
    longest, free = float(unconstrained["fourfold"].max()), unconstrained["fourfold"]
    above = list(steps(TSFA(latency_limit=1.001 * longest, pilot_rounds=0), 40))
    assert [step.queue for step in above] == [0.0] * 40
    assert {task.compressor.keep_ratio for step in above for task in step.plan.tasks} == {1.0}
    np.testing.assert_allclose([step.seconds for step in above], free[:40], rtol=1e-12)
    below = list(steps(TSFA(latency_limit=0.8 * longest, pilot_rounds=0), 40))
    after_a_long_one = [b.plan for a, b in itertools.pairwise(below) if a.queue > 0.0]
    assert any(plan.notes["mean_keep_ratio"] < 1.0 for plan in after_a_long_one)
    with_slack = [b.plan for a, b in itertools.pairwise(below) if a.queue == 0.0]
    assert all(plan.notes["mean_keep_ratio"] == 1.0 for plan in with_slack)
