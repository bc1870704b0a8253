"""FedAdapter's growth: small at first, deeper and wider in turns when the loss stalls, never beyond the adapter."""

from dataclasses import replace

import pytest

from airtune.errors import InputError
from airtune.methods.fedadapter import FedAdapter, Growth
from airtune.streams import stream
from airtune.types import Pending, ServerModel
from synthetic_federation import SyntheticWorld, make_adapter, make_fleet

WORLD = SyntheticWorld(make_fleet(5, memory=1e9))
MODEL = ServerModel(make_adapter())  # three layers of rank 4


def round_of(method: FedAdapter, state: Growth, loss: float) -> tuple[dict[str, int], Growth]:
    """Return the components of each slot that everybody trained, and the state after a round with this mean loss."""
    seen = WORLD.observe(1, 0.0, Pending(), MODEL)
    plan = method.plan(state, seen, stream(0, "plan", 1))
    plan.check(seen)
    outcome, _ = WORLD.run(plan, MODEL, Pending(), round_index=1, time=0.0)
    sizes = [{name: len(c) for name, c in task.train.components.items()} for task in plan.tasks]
    assert len(sizes) == 5 and all(size == sizes[0] for size in sizes)
    reports = [{**u.reports, "loss": loss + (0.1 if i % 2 else -0.1)} for i, u in enumerate(outcome.updates[:4])]
    updates = tuple(replace(u, reports=r) for u, r in zip(outcome.updates[:4], reports, strict=True))
    return sizes[0], method.aggregate(state, MODEL, replace(outcome, updates=updates))[1]


def sizes_of(method: FedAdapter, losses: list[float]) -> list[tuple[int, int]]:
    state, found = method.init(MODEL, WORLD.fleet), []
    for loss in losses:
        trained, state = round_of(method, state, loss)
        assert {name for name in trained} == {n for n in MODEL.adapter.factors if int(n[6]) >= 3 - len(trained) // 2}
        found.append((len(trained) // 2, max(trained.values())))
    return found


def test_nothing_grows_while_the_loss_falls() -> None:
    assert sizes_of(FedAdapter(), [2.0, 1.8, 1.6, 1.4, 1.2]) == [(1, 1)] * 5


def test_depth_and_width_grow_in_turns_up_to_what_there_is() -> None:
    found = sizes_of(FedAdapter(patience=1), [1.0] * 8)
    assert found == [(1, 1), (1, 1), (2, 1), (2, 2), (3, 2), (3, 4), (3, 4), (3, 4)]


def test_patience_counts_rounds_without_a_noticeable_gain() -> None:
    assert sizes_of(FedAdapter(patience=2), [1.0, 0.99, 0.8, 0.79, 0.78, 0.77]) == [*[(1, 1)] * 5, (2, 1)]


def test_first_configuration_and_steps_are_fields() -> None:
    found = sizes_of(FedAdapter(first_depth=1, first_width=3, depth_step=2, patience=1), [1.0] * 4)
    assert found == [(1, 3), (1, 3), (3, 3), (3, 4)]


def test_a_round_without_updates_teaches_nothing() -> None:
    method = FedAdapter(patience=1)
    state = method.init(MODEL, WORLD.fleet)
    seen = WORLD.observe(1, 0.0, Pending(), MODEL)
    outcome, _ = WORLD.run(method.plan(state, seen, stream(0, "plan", 1)), MODEL, Pending(), round_index=1, time=0.0)
    assert method.learn(state, replace(outcome, updates=())) == state


@pytest.mark.parametrize("field", ["first_depth", "first_width", "depth_step", "patience"])
def test_numbers_without_meaning_are_refused(field: str) -> None:
    with pytest.raises(InputError, match=rf"method\.{field}"):
        FedAdapter(**{field: 0})
    if field.startswith("first"):
        with pytest.raises(InputError, match=rf"method\.{field}: 9 .*valid: 1 to"):
            FedAdapter(**{field: 9}).init(MODEL, WORLD.fleet)
