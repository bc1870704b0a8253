"""The aggregation error of a round: zero for exact rules, the factors' covariance for means of factors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aggregation_examples import SIZES, effective, ideal, random_adapter, round_of
from airtune.aggregation.covariance import covariance_norm
from airtune.aggregation.error import aggregation_error
from airtune.aggregation.mean import Mean
from airtune.aggregation.one_factor import FrozenA
from airtune.aggregation.residual import ResidualMerge
from airtune.aggregation.stacking import Stacking
from airtune.aggregation.truncation import Truncation
from airtune.lora import ONLY_B
from airtune.types import RoundOutcome, ServerModel

EXAMPLES = (10, 30, 5, 55)


@pytest.fixture(scope="module")
def model() -> ServerModel:
    return ServerModel(random_adapter(6))


@pytest.fixture(scope="module")
def arrived(model: ServerModel) -> RoundOutcome:
    return round_of(model, EXAMPLES)


@pytest.mark.parametrize("rule", [Stacking(), ResidualMerge()])
def test_exact_rules_have_none(model: ServerModel, arrived: RoundOutcome, rule: object) -> None:
    found = aggregation_error(model, arrived, rule(model, arrived))  # type: ignore[operator]
    assert found["aggregation_error"] < 1e-12


def test_a_common_factor_leaves_none(model: ServerModel) -> None:
    result = round_of(model, EXAMPLES, tensors=ONLY_B)
    assert aggregation_error(model, result, FrozenA()(model, result))["aggregation_error"] < 1e-12


def test_means_of_factors_miss_their_covariance(model: ServerModel, arrived: RoundOutcome) -> None:
    found = aggregation_error(model, arrived, Mean()(model, arrived))["aggregation_error"]
    missed = changed = 0.0
    for slot in SIZES:
        parts = [update.values.factors[slot] for update in arrived.updates]
        missed += covariance_norm(parts, EXAMPLES) ** 2
        changed += float((ideal(arrived, slot) - effective(model, slot)).square().sum())
    assert found == pytest.approx((missed / changed) ** 0.5, rel=1e-9)
    assert found > 0.01


def test_a_server_that_learns_nothing_misses_everything(model: ServerModel, arrived: RoundOutcome) -> None:
    assert aggregation_error(model, arrived, model)["aggregation_error"] == pytest.approx(1.0, rel=1e-12)


def test_truncation_misses_the_smallest_singular_values(model: ServerModel, arrived: RoundOutcome) -> None:
    found = aggregation_error(model, arrived, Truncation()(model, arrived))["aggregation_error"]
    missed = changed = 0.0
    for slot in SIZES:
        wanted = ideal(arrived, slot)
        missed += float(torch.linalg.svdvals(wanted)[6:].square().sum())
        changed += float((wanted - effective(model, slot)).square().sum())
    assert found == pytest.approx((missed / changed) ** 0.5, rel=1e-6)


def test_nothing_is_said_where_it_is_not_defined(model: ServerModel, arrived: RoundOutcome) -> None:
    assert aggregation_error(model, replace(arrived, updates=()), model) == {}
    sketched = tuple(
        replace(u, task=replace(u.task, train=replace(u.task.train, unbiased=True))) for u in arrived.updates
    )
    assert aggregation_error(model, replace(arrived, updates=sketched), model) == {}
    kept = tuple(replace(u, task=replace(u.task, send=replace(u.task.send, tensors=ONLY_B))) for u in arrived.updates)
    assert aggregation_error(model, replace(arrived, updates=kept), model) == {}
