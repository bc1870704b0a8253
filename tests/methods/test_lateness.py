"""Deadlines, first arrivals, staleness and FedBuff: who is late, what it weighs, and that nothing is lost silently."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from airtune.aggregation.staleness import weaken_stale
from airtune.errors import InputError
from airtune.federation import Stop, begin, run
from airtune.methods.fedbuff import FedBuff
from airtune.methods.fedit import FedIT
from airtune.methods.wrappers import Deadline, FirstArrivals, Staleness
from airtune.types import Method, RoundRecord, ServerModel
from small_world import AddOne, make_cell, make_model, make_runner


def play(method: Method, rounds: int = 6, clients: int = 8, trainer: AddOne | None = None) -> list[tuple]:
    cell = make_cell(clients=clients)
    runner = make_runner(cell, trainer)
    start = begin(method, make_model(), cell)
    return list(run(method, start, cell, runner, stop=Stop(rounds=rounds), seed=0, evaluate=_nothing))


def _nothing(model: ServerModel) -> Mapping[str, float]:
    return {}


def records(method: Method, **more: int) -> list[RoundRecord]:
    return [record for _, record in play(method, **more)][1:]


def test_a_deadline_bounds_every_round_and_names_the_late() -> None:
    free = records(FedIT(), rounds=2)
    limit = free[0].duration_s / 2
    bounded = records(Deadline(FedIT(), seconds=limit), rounds=2)
    assert all(record.duration_s <= limit for record in bounded)
    late = {client for client, reason in bounded[0].dropped if reason == "late"}
    assert late and late | set(bounded[0].arrived) == set(bounded[0].cohort)
    assert bounded[0].energy_j == pytest.approx(free[0].energy_j)  # dropped work is charged


def test_first_arrivals_end_the_round_and_the_rest_is_dropped_or_comes_later() -> None:
    dropped = records(FirstArrivals(FedIT(), updates=3), rounds=1)[0]
    assert len(dropped.arrived) == 3 and len(dropped.dropped) == 5
    kept = records(FirstArrivals(FedIT(), updates=3, late="keep"), rounds=4)
    assert all(len(record.arrived) == 3 and not record.dropped for record in kept)
    # whoever is in flight is not asked again before it has arrived
    for earlier, later in pairwise(kept):
        assert not (set(later.cohort) & (set(earlier.cohort) - set(earlier.arrived)))


def test_stale_updates_are_moved_and_weakened() -> None:
    method = FirstArrivals(FedIT(), updates=3, late="keep")
    cell = make_cell(clients=8)
    runner = make_runner(cell)
    start = begin(method, make_model(), cell)
    *_, (first, _) = run(method, start, cell, runner, stop=Stop(rounds=1), seed=0, evaluate=_nothing)
    assert first.pending.in_flight
    seen = cell.observe(2, first.time, first.pending, first.model)
    plan = replace(method.plan(None, seen, np.random.default_rng(0)), groups=())
    second, _ = runner.run(plan, first.model, first.pending, round_index=2, time=first.time)
    assert {u.model_version for u in second.updates} == {0} and first.model.version == 1
    for exponent in (0.0, 0.5, 2.0):
        weak = weaken_stale(first.model, second, exponent)
        for update in weak.updates:
            for name, factors in update.values.factors.items():
                change = factors.A - first.model.adapter.factors[name].A
                torch.testing.assert_close(change, torch.full_like(change, 2.0**-exponent))
            extra = update.values.extras["classifier.bias"] - first.model.adapter.extras["classifier.bias"]
            torch.testing.assert_close(extra, torch.full_like(extra, 2.0**-exponent))


def test_staleness_leaves_fresh_rounds_alone() -> None:
    plain, wrapped = play(FedIT(), rounds=2), play(Staleness(FedIT(), exponent=1.0), rounds=2)
    for (one, _), (other, _) in zip(plain, wrapped, strict=True):
        for name, factors in one.model.adapter.factors.items():
            assert torch.equal(factors.A, other.model.adapter.factors[name].A)


def test_fedbuff_keeps_its_concurrency_and_steps_at_a_full_buffer() -> None:
    trainer = AddOne()
    history = play(FedBuff(concurrency=5, buffer_size=2), rounds=8, trainer=trainer)
    started = 0
    for (before, _), (after, record) in pairwise(history):
        started += len(record.cohort)
        assert len(before.pending.in_flight) + len(record.cohort) == 5
        assert len(record.arrived) == 2 and len(after.pending.in_flight) == 3
        assert after.model.version == before.model.version + 1
    assert len(trainer.jobs) == 16 == started - 3  # what has not arrived has not been trained
    assert any(job.model.version < 7 for job in trainer.jobs[-4:])


def test_fedbuff_without_staleness_is_the_mean_change() -> None:
    (_, _), (after, record) = play(FedBuff(concurrency=4, buffer_size=4), rounds=1, clients=4)
    assert len(record.arrived) == 4
    for name, factors in after.model.adapter.factors.items():
        torch.testing.assert_close(factors.B, make_model().adapter.factors[name].B + 1.0)


def test_fedbuff_is_faster_than_waiting_for_everyone() -> None:
    waiting = records(FedIT(), rounds=3)
    buffered = records(FedBuff(concurrency=8, buffer_size=4), rounds=6)
    assert sum(len(r.arrived) for r in waiting) == sum(len(r.arrived) for r in buffered) == 24
    assert buffered[-1].time_s < waiting[-1].time_s


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Deadline(FedIT(), seconds=0.0), "method.seconds"),
        (lambda: FirstArrivals(FedIT(), updates=0), "method.updates"),
        (lambda: Staleness(FedIT(), exponent=-1.0), "method.exponent"),
        (lambda: FedBuff(concurrency=2, buffer_size=3), "method.buffer_size"),
        (lambda: FedBuff(concurrency=9).init(make_model(), make_cell(clients=8).fleet), "method.concurrency"),
    ],
)
def test_bad_fields_are_named(make, field: str) -> None:
    with pytest.raises(InputError, match=field):
        make()
