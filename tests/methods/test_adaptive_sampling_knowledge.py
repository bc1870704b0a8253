"""Adaptive sampling with what it learns, and in worlds that it knows badly: noisy or old channels, churn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from airtune.devices.availability import Markov
from airtune.federation import Stop, begin, run
from airtune.methods.adaptive_sampling import AdaptiveSampling
from airtune.scheduling.capacity import Estimate
from airtune.scheduling.joint_cohort import RoundConstants
from airtune.simulation.cell import Cell
from airtune.solvers.round_bound import RoundModel
from airtune.streams import stream
from airtune.types import Pending, RoundRecord
from airtune.wireless.channel import Channel
from airtune.wireless.knowledge import ChannelKnowledge
from small_world import AddOne, make_cell, make_model, make_runner

CLIENTS, EVERY, ROUNDS = 5, 3, 10
PICKY = RoundConstants(alpha=30.0, beta=1.6)


def probabilities(method: AdaptiveSampling, **known: Any) -> np.ndarray:
    """Return q of a decision that knows losses or gradients of all clients."""
    cell, model = make_cell(CLIENTS, num_examples=[30] * CLIENTS, channel=Channel(block="round")), make_model()
    state = method.init(model, cell.fleet)
    state = replace(state, measured=replace(state.measured, **known))
    plan = method.plan(state, cell.observe(1, 0.0, Pending(), model), stream(0, "plan", 1))
    return np.array(plan.notes["sampling"]["probability"])


@pytest.mark.parametrize("noise", ["losses", "gradients"])
@pytest.mark.parametrize("client", [3])  # client 0 always joins here
def test_a_doubled_loss_or_gradient_raises_the_probability(noise: str, client: int) -> None:
    method = AdaptiveSampling(noise=noise, sizes="largest", constants=PICKY, polish_evaluations=100)
    values = np.ones(CLIENTS)
    doubled = np.where(np.arange(CLIENTS) == client, 2.0, values)

    def decided(found: np.ndarray) -> np.ndarray:
        if noise == "losses":
            return probabilities(method, loss=found)
        return probabilities(method, gradient=Estimate(found, np.full(CLIENTS, np.nan)))

    before, after = decided(values), decided(doubled)
    assert before[client] < 1.0
    assert after[client] > before[client]
    others = np.arange(CLIENTS) != client
    assert after[client] / after.sum() > before[client] / before.sum()
    assert after[others].mean() < before[others].mean()
    equal = replace(method, noise="equal")
    assert np.array_equal(probabilities(equal, loss=values), probabilities(equal, loss=doubled))


# -------------------------------------------------------------------------------------------------- imperfect knowledge


def followed(cell: Cell) -> list[RoundRecord]:
    """Return the rounds of a run that decides anew every three rounds."""
    method, model = AdaptiveSampling(replan_every=EVERY, constants=PICKY, polish_evaluations=100), make_model()
    steps = run(
        method,
        begin(method, model, cell),
        cell,
        make_runner(cell, AddOne()),
        stop=Stop(ROUNDS),
        seed=cell.seed,
        evaluate=lambda _: {},
    )
    return [record for _, record in steps if record.round]


def seconds_to_target(records: list[RoundRecord], cell: Cell, there: float = 1.0) -> float:
    """Return fleet seconds over the part of the way that the round model says is done: seconds to its target."""
    weight, model, way = cell.fleet.data_weight, RoundModel(PICKY.alpha or 0.0, PICKY.beta or 0.0), 0.0
    decided: dict[str, Any] = {}
    for record in records:
        decided = record.notes.get("sampling", decided)
        q, ratio = np.array(decided["probability"]) * there, np.array(decided["kept"]) / 4.0
        way += 1.0 / model.rounds(weight, 1.0, q, ratio)
    return records[-1].time_s / way


def world(**changes: Any) -> Cell:
    return make_cell(CLIENTS, seed=3, num_examples=[30] * CLIENTS, channel=Channel(block="round"), **changes)


WORLDS = {
    "noisy estimates": (world(knowledge=ChannelKnowledge(error_variance=0.5)), 1.0),
    "estimates a round old": (world(knowledge=ChannelKnowledge(delay_rounds=1)), 1.0),
    "churn": (world(availability=Markov(mean_on=20.0, mean_off=10.0, anchor=3600.0)), 2.0 / 3.0),
}


@pytest.mark.parametrize("name", WORLDS)
def test_it_decides_anew_and_the_loss_of_time_against_perfect_knowledge_is_finite(name: str) -> None:
    cell, there = WORLDS[name]
    records, perfect = followed(cell), followed(world())
    for found in (records, perfect):
        assert [r.round for r in found if "sampling" in r.notes] == [1, 4, 7, 10]
        assert all(np.isfinite(r.duration_s) and r.duration_s > 0.0 for r in found)
        assert all(np.isfinite(r.notes["predicted_round_s"]) for r in found)  # on record beside the clock's
    lost = seconds_to_target(records, cell, there) / seconds_to_target(perfect, world())
    assert np.isfinite(lost)
    assert 0.3 < lost < 30.0


def test_predictions_are_off_where_the_channel_is_known_badly() -> None:
    def error(cell: Cell) -> float:
        some = [r for r in followed(cell) if r.cohort]
        return float(np.mean([abs(r.notes["predicted_round_s"] / r.duration_s - 1.0) for r in some]))

    assert error(world()) < 0.5 * error(WORLDS["noisy estimates"][0])
