"""The server's optimizer on products: the closed form, over rules that merge, redraw or truncate."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aggregation_examples import SIZES, effective, random_adapter, relative, round_of
from airtune.aggregation.declaring import exchange_of
from airtune.aggregation.merging import Redraw
from airtune.aggregation.one_factor import MergeAndRedraw
from airtune.aggregation.stacking import EnergyThreshold, Stacking
from airtune.aggregation.truncation import PrincipalSplit, Refactoring, Truncation
from airtune.federation import prepared
from airtune.lora import DenseUpdate
from airtune.methods.composed import Composed
from airtune.methods.fedopt import FedOpt
from airtune.types import ServerModel

EXAMPLES = (10, 30, 5)
RULES = [
    Stacking(),
    EnergyThreshold(0.9),
    PrincipalSplit(0.9),
    Truncation(),
    Refactoring(start=Redraw("orthonormal")),
    MergeAndRedraw(),
]


def named(rule: object) -> str:
    return type(rule).__name__


def play(
    rule: Any, rate: float, memory: float, rounds: int = 4, step: str = "momentum", **other: Any
) -> list[tuple[ServerModel, ServerModel, ServerModel]]:
    """Return (before, after the rule alone, after the step) of some rounds."""
    method = FedOpt(Composed(aggregator=rule), rule=step, learning_rate=rate, beta1=memory, **other)  # type: ignore[arg-type]
    model = prepared(rule, ServerModel(random_adapter(3)))
    state, found = method.init(model, None), []  # type: ignore[arg-type]
    for number in range(rounds):
        result = round_of(model, EXAMPLES, tensors=exchange_of(rule, number + 1).send, seed=number)
        after, state = method.aggregate(state, model, result)
        found.append((model, rule(model, result), after))
        model = after
    return found


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_the_weight_moves_by_the_momentum_of_its_changes(rule: Any) -> None:
    rate, memory = 0.7, 0.6
    rounds = play(rule, rate, memory)
    for slot in SIZES:
        momentum = torch.zeros(1, dtype=torch.float64)
        for before, plain, after in rounds:
            change = effective(plain, slot) - effective(before, slot)
            momentum = memory * momentum + (1 - memory) * change
            wanted = effective(before, slot) + rate * momentum
            assert relative(effective(after, slot) - wanted, wanted) < 1e-9
            assert relative(wanted - effective(plain, slot), wanted) > 1e-3  # the step is visible
            for one, other in zip(plain.adapter.factors.values(), after.adapter.factors.values(), strict=True):
                assert torch.equal(one.A, other.A) and torch.equal(one.B, other.B)  # the rule's own adapter stays
    if isinstance(rule, Stacking):
        assert any(isinstance(part, DenseUpdate) for part in rounds[-1][2].base_update.values())


def second_moment(step: str, v: float, square: float) -> float:
    if step == "yogi":
        return v - 0.1 * square * float(torch.sign(torch.tensor(v - square)))
    return 0.9 * v + 0.1 * square if step == "adam" else v + square


@pytest.mark.parametrize("step", ["adam", "yogi", "adagrad"])
@pytest.mark.parametrize("rule", RULES, ids=named)
def test_adaptive_steps_divide_by_the_mean_square_of_each_product(rule: Any, step: str) -> None:
    rate, memory, tau = 0.02, 0.6, 0.01
    rounds = play(rule, rate, memory, step=step, beta2=0.9, adaptivity=tau, second_moment="tensor")
    for slot in SIZES:
        momentum, v = torch.zeros(1, dtype=torch.float64), tau**2
        for before, plain, after in rounds:
            change = effective(plain, slot) - effective(before, slot)
            momentum = memory * momentum + (1 - memory) * change
            v = second_moment(step, v, float(change.double().square().mean()))
            wanted = effective(before, slot) + rate * momentum / (v**0.5 + tau)
            assert relative(effective(after, slot) - wanted, wanted) < 1e-6
            assert relative(wanted - effective(plain, slot), wanted) > 1e-3  # the step is visible


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_without_memory_at_rate_one_it_is_the_rule_itself(rule: Any) -> None:
    for _, plain, after in play(rule, 1.0, 0.0, rounds=2):
        assert plain.merged_bits == after.merged_bits
        for slot in SIZES:
            assert torch.equal(effective(plain, slot), effective(after, slot))


def test_what_the_momentum_adds_is_charged_and_the_head_takes_the_step_too() -> None:
    (before, plain, after), *_ = play(Stacking(), 0.5, 0.5, rounds=1)
    change = 32 * sum(min(9 * (i + o), i * o) for i, o in SIZES.values())
    assert plain.merged_bits == {1: change} and after.merged_bits == {1: 2 * change}
    (name,) = before.adapter.extras
    start = before.adapter.extras[name]
    torch.testing.assert_close(after.adapter.extras[name], start + 0.25 * (plain.adapter.extras[name] - start))
