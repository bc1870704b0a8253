"""Guided sampling: explore first, then prefer loss and data, and avoid the slow."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from airtune.errors import InputError
from airtune.scheduling.utility import Utility
from airtune.types import Observation, Pending
from small_world import make_cell, make_model


def seen(reports: dict[int, dict[str, float]], clients: int = 10) -> Observation:
    cell = make_cell(clients=clients, num_examples=[10] * clients)
    return replace(cell.observe(3, 0.0, Pending(), make_model()), reports=reports)


def report(loss: float, seconds: float = 1.0) -> dict[str, float]:
    return {"loss": loss, "backward_seconds": seconds}


def draw(sampler: Utility, observation: Observation, seed: int = 0) -> list[int]:
    return sampler.sample(observation.idle, observation, np.random.default_rng(seed)).clients.tolist()


def test_clients_without_a_report_are_explored() -> None:
    assert len(draw(Utility(4), seen({}))) == 4
    reports = {c: report(1.0) for c in range(8)}
    chosen = draw(Utility(4, exploration=0.5), seen(reports))
    assert {8, 9} <= set(chosen) and len(chosen) == 4


def test_high_loss_wins_and_slowness_costs() -> None:
    reports = {c: report(1.0 + c) for c in range(10)}
    assert draw(Utility(3, exploration=0.0), seen(reports)) == [7, 8, 9]
    reports[9] = report(10.0, seconds=100.0)
    assert draw(Utility(3, exploration=0.0), seen(reports)) == [6, 7, 8]
    assert draw(Utility(3, exploration=0.0, penalty=0.0), seen(reports)) == [7, 8, 9]


def test_more_data_is_worth_more() -> None:
    observation = seen({c: report(1.0) for c in range(10)})
    examples = np.arange(10, 20)
    richer = replace(observation, fleet=replace(observation.fleet, num_examples=examples))
    assert draw(Utility(2, exploration=0.0), richer) == [8, 9]


def test_fields_are_checked() -> None:
    with pytest.raises(InputError, match="exploration"):
        Utility(3, exploration=1.5)
    with pytest.raises(InputError, match="cohort_size"):
        draw(Utility(30), seen({}))
