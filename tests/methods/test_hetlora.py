"""HetLoRA: ranks by memory, the tail and its penalty, pruning and its effect at the next download."""

from dataclasses import replace

import numpy as np
import pytest

from airtune.errors import InputError
from airtune.methods.hetlora import HetLoRA, RankLimits, tail_start
from airtune.streams import stream
from airtune.types import Observation, Pending, Plan, RoundOutcome, ServerModel, TailPenalty
from synthetic_federation import SyntheticWorld, make_adapter, make_fleet

WORLD = SyntheticWorld(make_fleet(5, memory=[4e4, 8e4, 1.6e5, 3.2e5, 6.4e5]))
METHOD = HetLoRA(lowest_rank=1, decay=0.5, penalty=0.01)
MODEL = ServerModel(make_adapter())


def plan_of(method: HetLoRA, state: RankLimits, world: SyntheticWorld = WORLD) -> tuple[Observation, Plan]:
    seen = world.observe(1, 0.0, Pending(), MODEL)
    plan = method.plan(state, seen, stream(0, "plan", 1))
    plan.check(seen)
    return seen, plan


def ranks(plan: Plan) -> list[int]:
    return [max(len(c) for c in task.train.components.values()) for task in plan.tasks]


def outcome_with(plan: Plan, shrunk: set[int]) -> RoundOutcome:
    """Return an outcome in which the tails of some clients became smaller, and those of the others larger."""
    outcome, _ = WORLD.run(plan, MODEL, Pending(), round_index=1, time=0.0)
    updates = [
        replace(
            u,
            reports={**u.reports, "tail_norm_before": 1.0, "tail_norm_after": 0.9 if u.task.client in shrunk else 1.1},
        )
        for u in outcome.updates
    ]
    return replace(outcome, updates=tuple(updates))


@pytest.mark.parametrize("decay", [0.5, 0.7, 0.9, 0.99])
def test_the_tail_is_never_empty(decay: float) -> None:
    """round(0.99 r) = r for every r up to 50: then the penalty would be zero."""
    for rank in range(1, 101):
        assert 0 <= tail_start(rank, decay) <= rank - 1
        assert tail_start(rank, decay) <= decay * rank + 1e-9


def test_known_tails() -> None:
    assert [tail_start(r, 0.99) for r in (1, 2, 8, 50, 100, 200)] == [0, 1, 7, 49, 99, 198]
    assert tail_start(10, 0.7) == 7


def test_ranks_rise_with_memory_from_lowest_to_highest() -> None:
    _, plan = plan_of(METHOD, METHOD.init(MODEL, WORLD.fleet))
    assert ranks(plan) == [1, 1, 2, 3, 4]
    _, plan = plan_of(replace(METHOD, lowest_rank=2, highest_rank=3), METHOD.init(MODEL, WORLD.fleet))
    assert ranks(plan) == [2, 2, 2, 2, 3]


def test_each_client_with_something_to_prune_has_the_penalty_of_its_own_tail() -> None:
    _, plan = plan_of(METHOD, METHOD.init(MODEL, WORLD.fleet))
    for task, rank in zip(plan.tasks, ranks(plan), strict=True):
        penalties = [p for p in task.training.penalties if isinstance(p, TailPenalty)]
        if rank == 1:
            assert penalties == []
        else:
            assert penalties == [TailPenalty(0.01, {slot: tail_start(rank, 0.5) for slot in MODEL.adapter.factors})]


def test_a_smaller_tail_prunes_and_a_larger_one_does_not_and_it_counts_at_the_next_download() -> None:
    state = METHOD.init(MODEL, WORLD.fleet)
    _, plan = plan_of(METHOD, state)
    model, state = METHOD.aggregate(state, MODEL, outcome_with(plan, {4}))
    assert model.version == 1
    _, after = plan_of(METHOD, state)
    assert ranks(after) == [1, 1, 2, 3, 2]
    assert plan.tasks[4].send.kept("layer.0.query") == 4  # the pruned rank was still sent in the round itself
    assert after.tasks[4].receive.kept("layer.0.query") == 2


def test_pruning_stops_at_the_lowest_rank() -> None:
    method = replace(METHOD, lowest_rank=2)
    state = method.init(MODEL, WORLD.fleet)
    for _ in range(4):
        _, plan = plan_of(method, state)
        state = method.learn(state, outcome_with(plan, set(range(5))))
    _, plan = plan_of(method, state)
    assert ranks(plan) == [2] * 5
    assert all(task.training.penalties == () for task in plan.tasks)


def test_without_a_penalty_nothing_is_pruned() -> None:
    method = replace(METHOD, penalty=0.0)
    state = method.init(MODEL, WORLD.fleet)
    _, plan = plan_of(method, state)
    assert all(task.training.penalties == () for task in plan.tasks)
    assert np.array_equal(method.learn(state, outcome_with(plan, set(range(5)))).ranks, state.ranks)


def test_the_global_adapter_has_the_highest_rank() -> None:
    shape = make_adapter().shape
    assert set(HetLoRA(highest_rank=3).ranks(shape).values()) == {3}
    assert set(HetLoRA().ranks(shape).values()) == {4}


def test_bad_fields_name_themselves() -> None:
    for fields in ({"decay": 0.0}, {"decay": 1.0}, {"penalty": -1.0}, {"lowest_rank": 0}, {"highest_rank": 1}):
        with pytest.raises(InputError, match=next(iter(fields))):
            HetLoRA(**fields)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"highest_rank: 2 and 9 are not possible; valid: .* <= 4, the adapter's rank"):
        plan_of(HetLoRA(highest_rank=9), HetLoRA().init(MODEL, WORLD.fleet))
