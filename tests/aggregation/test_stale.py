"""Stale changes under every rule: what is added to a weight is weakened, whatever basis the adapter has by now."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from aggregation_examples import SIZES, effective, outcome, random_adapter, relative, round_of, task, trained, update
from airtune.aggregation.declaring import exchange_of
from airtune.aggregation.mean import Mean
from airtune.aggregation.merging import Redraw
from airtune.aggregation.one_factor import FrozenA, MergeAndRedraw
from airtune.aggregation.privacy import ClientPrivacy
from airtune.aggregation.residual import ResidualMerge, RidgeCorrection
from airtune.aggregation.robust import CoordinateMedian, NormClipping, StalenessWeights, TrimmedMean
from airtune.aggregation.stacking import EnergyThreshold, Stacking
from airtune.aggregation.truncation import PrincipalSplit, Refactoring, Truncation
from airtune.errors import InputError
from airtune.federation import Stop, begin, prepared, run
from airtune.lora import AdapterSlice
from airtune.methods.composed import Composed
from airtune.methods.fedopt import FedOpt
from airtune.methods.flexlora import FlexLoRA
from airtune.methods.rac_lora import RACLoRA
from airtune.methods.wrappers import FirstArrivals, Staleness
from airtune.types import RoundOutcome, ServerModel
from small_world import make_cell, make_model, make_runner

EXPONENT, WEIGHT = 0.7, 2.0**-0.7
ROUNDED = 1e-9
EXACT = [
    Stacking(),
    EnergyThreshold(energy=1.0),
    PrincipalSplit(energy=1.0),
    ResidualMerge(),
    Refactoring(start=Redraw("orthonormal")),
    MergeAndRedraw(),
    MergeAndRedraw(drawn="B"),
    FrozenA(),
]


def named(rule: object) -> str:
    return f"{type(rule).__name__}-{getattr(rule, 'drawn', '')}"


def late_round(rule: Any) -> tuple[ServerModel, ServerModel, RoundOutcome]:
    """Return two versions of the model, and a round at the second: one update from each, by 3 and by 1 examples."""
    first = prepared(rule, ServerModel(random_adapter()))
    tensors = exchange_of(rule, 1).send
    second = rule(first, round_of(first, (10, 30, 5), tensors=tensors))
    send = replace(AdapterSlice.everything(first.adapter.shape), tensors=tensors)
    fresh = update(task(0, send), trained(second, send, seed=21), version=second.version)
    stale = update(task(1, send), trained(first, send, seed=22), version=first.version)
    mixed = outcome([fresh, stale], (3, 1))
    return first, second, replace(mixed, past_models={first.version: first})


def wanted(first: ServerModel, second: ServerModel, mixed: RoundOutcome, slot: str) -> Tensor:
    """Return what a rule on products owes: the base so far, and the mean of the products, the stale change weakened."""
    fresh, stale = (one.values.factors[slot].product() for one in mixed.updates)
    now, start = second.adapter.factors[slot].product(), first.adapter.factors[slot].product()
    base = effective(second, slot) - now
    return base + 0.75 * fresh + 0.25 * (now + WEIGHT * (stale - start))


@pytest.mark.parametrize("rule", EXACT, ids=named)
def test_a_stale_change_of_the_product_is_weakened_whatever_the_basis(rule: Any) -> None:
    first, second, mixed = late_round(rule)
    after = StalenessWeights(EXPONENT, inner=rule)(second, mixed)
    assert after.version == second.version + 1
    for slot in SIZES:
        ideal = wanted(first, second, mixed, slot)
        assert relative(effective(after, slot) - ideal, ideal) < ROUNDED, slot
        unweakened = effective(rule(second, mixed), slot)
        assert relative(unweakened - ideal, ideal) > 1e-2  # the weight is visible


def test_truncation_keeps_the_best_rank_of_the_weakened_sum() -> None:
    first, second, mixed = late_round(Truncation())
    after = StalenessWeights(EXPONENT, inner=Truncation())(second, mixed)
    for slot in SIZES:
        u, s, vh = torch.linalg.svd(wanted(first, second, mixed, slot), full_matrices=False)
        best = (u[:, :6] * s[:6]) @ vh[:6]
        assert relative(effective(after, slot) - best, best) < ROUNDED


def test_lora_fair_corrects_towards_the_weakened_sum() -> None:
    rule = RidgeCorrection(strength=1e-9)
    first, second, mixed = late_round(rule)
    after = StalenessWeights(EXPONENT, inner=rule)(second, mixed)
    for slot in SIZES:
        left = wanted(first, second, mixed, slot) - effective(after, slot)
        assert (left @ after.adapter.factors[slot].A.T).norm() < 1e-6 * left.norm()


@pytest.mark.parametrize("rule", [*EXACT, Truncation(), RidgeCorrection(), Mean()], ids=named)
def test_a_stale_head_is_weakened_and_fresh_rounds_are_untouched(rule: Any) -> None:
    first, second, mixed = late_round(rule)
    after = StalenessWeights(EXPONENT, inner=rule)(second, mixed)
    (name,) = second.adapter.extras
    now, start = second.adapter.extras[name], first.adapter.extras[name]
    fresh, stale = (one.values.extras[name] for one in mixed.updates)
    mean = 0.75 * fresh + 0.25 * (now + WEIGHT * (stale - start))
    torch.testing.assert_close(after.adapter.extras[name], mean)
    alone = replace(mixed, updates=mixed.updates[:1])
    plain, wrapped = rule(second, alone), StalenessWeights(EXPONENT, inner=rule)(second, alone)
    assert all(torch.equal(effective(plain, slot), effective(wrapped, slot)) for slot in SIZES)


def test_merges_of_stale_updates_cost_no_more_ranks_than_they_have() -> None:
    """A product that is zero, of an adapter drawn anew, is not stacked: one client of rank 6 each."""
    _, second, mixed = late_round(Stacking())
    after = StalenessWeights(EXPONENT, inner=Stacking())(second, mixed)
    values = sum(min(12 * (i + o), i * o) for i, o in SIZES.values())
    assert after.merged_bits[after.version] == 32 * values


def test_clipping_inside_staleness_weights_sees_each_update_in_its_own_basis() -> None:
    _, second, mixed = late_round(Stacking())
    plain = StalenessWeights(EXPONENT, inner=Stacking())(second, mixed)
    loose = StalenessWeights(EXPONENT, inner=NormClipping(1e9, Stacking()))(second, mixed)
    for slot in SIZES:
        assert relative(effective(plain, slot) - effective(loose, slot), effective(plain, slot)) < ROUNDED


@pytest.mark.parametrize("wrapper", [TrimmedMean(inner=Stacking()), CoordinateMedian(inner=Truncation())], ids=named)
def test_what_compares_values_in_changing_bases_is_refused(wrapper: Any) -> None:
    with pytest.raises(InputError, match="basis"):
        StalenessWeights(inner=wrapper)
    with pytest.raises(InputError, match="basis"):
        Staleness(Composed(aggregator=wrapper))
    _, second, mixed = late_round(wrapper.inner)
    with pytest.raises(InputError, match="late"):
        wrapper(second, mixed)


def test_noise_on_changes_of_two_bases_is_refused() -> None:
    _, second, mixed = late_round(MergeAndRedraw())
    with pytest.raises(InputError, match="late"):
        ClientPrivacy(inner=MergeAndRedraw())(second, mixed)


@pytest.mark.parametrize("method", [RACLoRA(), FlexLoRA(), Composed(aggregator=Stacking())], ids=named)
def test_the_wrapper_of_methods_does_what_the_wrapper_of_rules_does(method: Any) -> None:
    rule = getattr(method, "composed", method).aggregator
    _, second, mixed = late_round(rule)
    wrapped = Staleness(FirstArrivals(method, updates=2, late="keep"), exponent=EXPONENT)
    after, _ = wrapped.aggregate(None, second, mixed)
    expected = StalenessWeights(EXPONENT, inner=rule)(second, mixed)
    for slot in SIZES:
        assert torch.equal(effective(after, slot), effective(expected, slot))


def test_a_run_in_which_bases_change_reaches_the_weight() -> None:
    """The base of rac-lora after the first late arrival depends on the exponent, and is the same before it."""
    merged = []
    for exponent in (0.0, 3.0):
        method = Staleness(FirstArrivals(RACLoRA(), updates=3, late="keep"), exponent=exponent)
        cell = make_cell(clients=8)
        steps = run(
            method, begin(method, make_model(), cell), cell, make_runner(cell), stop=Stop(3), seed=0, evaluate=_nothing
        )
        found = list(steps)
        late = [index for index, (_, r) in enumerate(found) if set(r.arrived) - set(r.cohort)]
        slot = next(iter(found[-1][0].model.base_update))
        merged.append([after.model.base_update[slot].product() for after, _ in found[1 : late[0] + 1]])
    assert len(merged[0]) > 1
    assert all(torch.equal(one, other) for one, other in zip(merged[0][:-1], merged[1][:-1], strict=True))
    assert not torch.allclose(merged[0][-1], merged[1][-1])


def _nothing(model: ServerModel) -> dict[str, float]:
    return {}


def test_an_optimizer_of_the_server_sees_through_wrappers() -> None:
    with pytest.raises(InputError, match="basis"):
        FedOpt(method=FirstArrivals(FlexLoRA(), updates=2))
