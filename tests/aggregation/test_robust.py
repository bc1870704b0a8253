"""Robust wrappers, client-level privacy and the server's optimizers: closed forms on small adapters."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregation_examples import SIZES, effective, outcome, random_adapter, relative, round_of
from airtune.aggregation.changes import change_of, moved
from airtune.aggregation.declaring import exchange_of, is_linear, redraws
from airtune.aggregation.mean import FrobeniusWeighted, IndependentSampling, Mean
from airtune.aggregation.one_factor import Alternating, FrozenA, MergeAndRedraw, SharedCore, SharedFactor
from airtune.aggregation.privacy import ClientPrivacy, epsilon
from airtune.aggregation.registry import AGGREGATORS
from airtune.aggregation.residual import ResidualMerge, RidgeCorrection
from airtune.aggregation.robust import CoordinateMedian, NormClipping, StalenessWeights, TrimmedMean, Wrapper
from airtune.aggregation.server_optimizer import Moment, ServerStep, stepped
from airtune.aggregation.stacking import EnergyThreshold, Stacking
from airtune.aggregation.truncation import PrincipalSplit, Refactoring, Truncation
from airtune.errors import InputError
from airtune.experiment.config import read_experiment
from airtune.federation import Stop, begin, prepared, run
from airtune.lora import ONLY_B, LoraFactors
from airtune.methods.composed import Composed
from airtune.methods.fedopt import FedOpt
from airtune.methods.flexlora import FlexLoRA
from airtune.scheduling.planner import Separate
from airtune.scheduling.slicing import RankByMemory
from airtune.types import RoundOutcome, ServerModel
from synthetic_federation import SyntheticWorld, make_adapter, make_fleet

EXAMPLES = (10, 30, 5, 55, 20)


def model_of() -> ServerModel:
    return ServerModel(random_adapter())


def changes(model: ServerModel, result: RoundOutcome) -> torch.Tensor:
    return torch.stack([change_of(u, result, model) for u in result.updates])


def moved_by(model: ServerModel, after: ServerModel) -> torch.Tensor:
    parts = [
        (new.double() - old.double()).reshape(-1)
        for (_, _, new), (_, _, old) in zip(after.adapter.tensors(), model.adapter.tensors(), strict=True)
    ]
    return torch.cat(parts)


def poisoned(result: RoundOutcome, factor: float) -> RoundOutcome:
    """Let the last client send values that are far too large."""
    bad = result.updates[-1]
    factors = {s: LoraFactors(f.A * factor, f.B * factor, f.scaling) for s, f in bad.values.factors.items()}
    return replace(result, updates=(*result.updates[:-1], replace(bad, values=bad.values.with_factors(factors))))


def test_trimmed_mean_and_median_are_those_of_the_values() -> None:
    model = model_of()
    result = round_of(model, EXAMPLES)
    ordered = changes(model, result).sort(dim=0).values
    assert torch.allclose(moved_by(model, TrimmedMean(0.2)(model, result)), ordered[1:4].mean(0))
    assert torch.allclose(moved_by(model, TrimmedMean(0.0)(model, result)), ordered.mean(0))
    assert torch.allclose(moved_by(model, CoordinateMedian()(model, result)), ordered[2])
    even = replace(result, updates=result.updates[:4])
    ordered = changes(model, even).sort(dim=0).values
    assert torch.allclose(moved_by(model, CoordinateMedian()(model, even)), ordered[1:3].mean(0))


@pytest.mark.parametrize("rule", [TrimmedMean(0.2), CoordinateMedian(), NormClipping(5.0)])
def test_one_client_cannot_move_the_model_far(rule: TrimmedMean) -> None:
    model = model_of()
    result = round_of(model, EXAMPLES)
    honest, attacked = rule(model, result), rule(model, poisoned(result, 1e6))
    assert moved_by(model, attacked).norm() < 10 * max(float(moved_by(model, honest).norm()), 1.0)
    assert moved_by(model, Mean()(model, poisoned(result, 1e6))).norm() > 1e4


def test_clipping_shrinks_to_the_norm_and_leaves_small_changes_alone() -> None:
    model = model_of()
    result = round_of(model, EXAMPLES)
    large = NormClipping(1e9)(model, result)
    assert all(
        relative(effective(large, s) - effective(Mean()(model, result), s), effective(large, s)) < 1e-12 for s in SIZES
    )
    one = replace(result, updates=result.updates[:1])
    assert float(moved_by(model, NormClipping(0.5)(model, one)).norm()) == pytest.approx(0.5)


@pytest.mark.parametrize("inner", [kind() for kind in AGGREGATORS.values() if not issubclass(kind, Wrapper)], ids=str)
@pytest.mark.parametrize("wrapper", [TrimmedMean, CoordinateMedian, NormClipping, StalenessWeights])
def test_wrappers_fit_around_any_aggregator(wrapper: type, inner: object) -> None:
    rule = wrapper(inner=inner)
    model = rule.prepare(model_of())
    exchange = exchange_of(rule, 1)
    assert exchange == exchange_of(inner, 1)  # type: ignore[arg-type]
    result = round_of(model, EXAMPLES, tensors=exchange.send)
    after = rule(model, result)
    assert after.version == model.version + 1
    same = rule(model, replace(result, updates=result.updates[::-1]))
    assert all(torch.equal(effective(after, slot), effective(same, slot)) for slot in SIZES)
    assert rule(model, outcome([], EXAMPLES)) is model


def test_rules_that_compare_values_refuse_unequal_slices() -> None:
    with pytest.raises(InputError, match="one by one"):
        Composed(Separate(slicer=RankByMemory()), TrimmedMean())
    Composed(Separate(slicer=RankByMemory()), NormClipping())
    model = model_of()
    with pytest.raises(InputError, match="same slice"):
        CoordinateMedian()(model, round_of(model, EXAMPLES, ranks=(1, 2, 3, 4, 5)))


def test_nested_aggregators_are_read_from_a_table() -> None:
    table = {
        "name": "composed",
        "aggregator": {"type": "trimmed-mean", "trim": 0.25, "inner": {"type": "frozen-a", "weights": "uniform"}},
    }
    read = read_experiment({"method": table, "fleet": {"devices": {"jetson-tx2": 4}}})
    assert read.method.aggregator == TrimmedMean(0.25, FrozenA("uniform"))


# ------------------------------------------------------------------------------------------------------------- privacy


def test_privacy_without_noise_is_the_clipped_sum_over_the_expected_clients() -> None:
    model = model_of()
    result = round_of(model, EXAMPLES)
    rule = ClientPrivacy(largest_norm=2.0, noise_multiplier=0.0, expected_clients=8.0)
    clipped = torch.stack([c * min(1.0, 2.0 / float(c.norm())) for c in changes(model, result)])
    assert torch.allclose(moved_by(model, rule(model, result)), clipped.sum(0) / 8)


def test_one_client_moves_the_sum_by_at_most_the_clipping_norm() -> None:
    model = model_of()
    result = poisoned(round_of(model, EXAMPLES), 1e5)
    rule = ClientPrivacy(largest_norm=0.7, noise_multiplier=1.0, expected_clients=1.0, seed=3)
    without = replace(result, updates=result.updates[:-1])
    gap = moved_by(model, rule(model, result)) - moved_by(model, rule(model, without))
    assert float(gap.norm()) == pytest.approx(0.7, rel=1e-6)  # the noise is the same: it depends on the version alone


def test_the_noise_has_the_stated_size_and_is_fresh_in_every_version() -> None:
    model = model_of()
    result = round_of(model, EXAMPLES)
    rule = ClientPrivacy(largest_norm=2.0, noise_multiplier=1.5, expected_clients=4.0)
    silent = replace(rule, noise_multiplier=0.0)
    noise = moved_by(model, rule(model, result)) - moved_by(model, silent(model, result))
    assert float(noise.std()) == pytest.approx(1.5 * 2.0 / 4.0, rel=0.1)
    later = replace(model, version=1)
    fresh = replace(result, updates=tuple(replace(u, model_version=1) for u in result.updates))
    other = moved_by(later, rule(later, fresh)) - moved_by(later, silent(later, fresh))
    assert abs(float(torch.corrcoef(torch.stack([noise, other]))[0, 1])) < 0.1


def test_privacy_covers_what_travels_and_nothing_else() -> None:
    rule = ClientPrivacy(inner=FrozenA())
    model = model_of()
    after = rule(model, round_of(model, EXAMPLES, tensors=ONLY_B))
    assert all(torch.equal(after.adapter.factors[s].A, model.adapter.factors[s].A) for s in SIZES)


LINEAR = [Mean(), FrozenA(), Alternating(), SharedFactor(), SharedCore(), Refactoring(), MergeAndRedraw()]
SUMS = [(rule, 1) for rule in (*LINEAR, IndependentSampling("uniform"), MergeAndRedraw(drawn="B"), SharedFactor("B"))]
SUMS += [(Alternating(), 2)]  # its even rounds train the other factor
NOT_LINEAR = [
    FrobeniusWeighted(),
    Stacking(),
    EnergyThreshold(),
    Truncation(),
    PrincipalSplit(),
    ResidualMerge(),
    RidgeCorrection(),
    TrimmedMean(),
    CoordinateMedian(),
    NormClipping(),
]


def test_only_linear_rules_can_be_private() -> None:
    for rule in LINEAR:
        assert is_linear(rule) and ClientPrivacy(inner=rule)
    for rule in NOT_LINEAR:
        assert not is_linear(rule)
        with pytest.raises(InputError, match=r"method\.inner"):
            ClientPrivacy(inner=rule)
    covered = {type(rule) for rule in (*LINEAR, *NOT_LINEAR)}
    assert set(AGGREGATORS.values()) - covered <= {
        AGGREGATORS[n] for n in ("independent-sampling", "staleness-weights", "client-privacy")
    }


@pytest.mark.parametrize(("rule", "number"), SUMS, ids=lambda value: str(value).partition("(")[0])
@given(seed=st.integers(0, 50))
@settings(max_examples=8)
def test_linear_means_that_sums_of_updates_are_enough(rule: Any, number: int, seed: int) -> None:
    """Any two cohorts with the same weighted sum of uploads give the same model, as under secure aggregation."""
    model = prepared(rule, model_of())
    result = round_of(model, (1, 1, 1), tensors=exchange_of(rule, number).send, seed=seed)
    mean = changes(model, result).mean(0)
    start = result.updates[0].task.send.take(model.adapter)
    draws = [torch.Generator().manual_seed(seed + k) for k in (0, 1)]
    masks = [torch.randn(len(mean), generator=draw, dtype=torch.float64) for draw in draws]
    masks.append(-masks[0] - masks[1])
    masked = tuple(moved(u, start, mean + m) for u, m in zip(result.updates, masks, strict=True))
    one, other = rule(model, result), rule(model, replace(result, updates=masked))
    assert moved_by(model, one).norm() > 0
    for slot in SIZES:
        assert relative(effective(one, slot) - effective(other, slot), effective(one, slot)) < 1e-9
    for name, head in one.adapter.extras.items():
        torch.testing.assert_close(head, other.adapter.extras[name])


def test_every_rule_declared_linear_is_in_the_test_of_sums() -> None:
    declared = {kind for kind in AGGREGATORS.values() if is_linear(kind())}
    assert declared - {ClientPrivacy} == {type(rule) for rule, _ in SUMS}  # that one is a sum by its own test


def test_sums_with_weights_of_their_own_are_not_private() -> None:
    with pytest.raises(InputError, match="a_n / q_n"):
        ClientPrivacy(inner=IndependentSampling())


def test_epsilon_agrees_with_the_closed_form_of_one_full_round() -> None:
    """One Gaussian mechanism on everybody: between the exact value (Balle and Wang 2018) and the classical bound."""
    pytest.importorskip("dp_accounting")
    from scipy.optimize import brentq
    from scipy.stats import norm

    def delta_of(e: float, z: float) -> float:
        return float(norm.cdf(0.5 / z - e * z) - np.exp(e) * norm.cdf(-0.5 / z - e * z))

    exact = brentq(lambda e: delta_of(e, 2.0) - 1e-5, 0.01, 20)
    found = epsilon(2.0, 1, 1.0, 1e-5)
    assert exact <= found <= np.sqrt(2 * np.log(1.25 / 1e-5)) / 2.0
    assert epsilon(2.0, 100, 0.1, 1e-5) < epsilon(2.0, 100, 1.0, 1e-5)
    assert epsilon(1.0, 100, 0.1, 1e-5) > epsilon(2.0, 100, 0.1, 1e-5)


@pytest.mark.parametrize("numbers", [(0.0, 1, 1.0, 1e-5), (1.0, 0, 1.0, 1e-5), (1.0, 1, 1.5, 1e-5), (1.0, 1, 1.0, 0.0)])
def test_impossible_accounting_is_refused(numbers: tuple[float, int, float, float]) -> None:
    with pytest.raises(InputError, match="privacy"):
        epsilon(*numbers)


# ---------------------------------------------------------------------------------------------------- server optimizer


@pytest.mark.parametrize("rule", ["momentum", "adam", "yogi", "adagrad"])
def test_server_steps_are_those_of_the_paper(rule: str) -> None:
    """Three steps of one value by hand."""
    step = ServerStep(rule, learning_rate=0.1, beta1=0.8, beta2=0.9, adaptivity=0.01)  # type: ignore[arg-type]
    adapter, moment = random_adapter(2), Moment()
    value, m, v = adapter.factors["layer0.q"].A[1, 3].item(), 0.0, 0.01**2
    for number in range(3):
        after = random_adapter(2, seed=number + 1)
        d = after.factors["layer0.q"].A[1, 3].item() - adapter.factors["layer0.q"].A[1, 3].item()
        m = 0.8 * m + 0.2 * d
        v = {
            "momentum": v,
            "adam": 0.9 * v + 0.1 * d * d,
            "adagrad": v + d * d,
            "yogi": v - 0.1 * d * d * np.sign(v - d * d),
        }[rule]
        value += 0.1 * (m if rule == "momentum" else m / (np.sqrt(v) + 0.01))
        adapter, moment = step(adapter, after, moment)
        assert adapter.factors["layer0.q"].A[1, 3].item() == pytest.approx(value, rel=1e-12)


def test_a_second_moment_of_a_whole_tensor_is_the_mean_of_its_squares() -> None:
    adapter = random_adapter(2)
    after = stepped(adapter, adapter, lambda _, old, __: old + torch.linspace(0.1, 0.5, old.numel()).reshape(old.shape))
    step = ServerStep("adam", learning_rate=0.1, beta1=0.0, beta2=0.9, adaptivity=0.01, second_moment="tensor")
    moved, moment = step(adapter, after, Moment())
    old, new = adapter.factors["layer0.q"].A.double(), after.factors["layer0.q"].A.double()
    v = 0.9 * 0.01**2 + 0.1 * (new - old).square().mean()
    torch.testing.assert_close(moment.second["A/layer0.q"], v, check_dtype=False)
    wanted = old + 0.1 * (new - old) / (v.sqrt() + 0.01)
    torch.testing.assert_close(moved.factors["layer0.q"].A.double(), wanted)


def test_momentum_without_memory_at_rate_one_is_the_method_itself() -> None:
    world = SyntheticWorld(make_fleet(7))
    plain, wrapped = Composed(), FedOpt(rule="momentum", learning_rate=1.0, beta1=0.0)
    models = []
    for method in (plain, wrapped):
        start = begin(method, ServerModel(make_adapter()), world)
        rounds = list(run(method, start, world, world, stop=Stop(3), seed=0, evaluate=lambda _: {}))
        models.append(rounds[-1][0].model.adapter)
    for (_, _, one), (_, _, other) in zip(models[0].tensors(), models[1].tensors(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_methods_that_change_the_basis_are_refused_where_single_values_need_a_mean_square() -> None:
    for rule in ("adam", "yogi", "adagrad"):
        with pytest.raises(InputError, match="basis"):
            FedOpt(method=FlexLoRA(), rule=rule)  # type: ignore[arg-type]
        FedOpt(method=FlexLoRA(), rule=rule, second_moment="tensor")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="basis"):
        FedOpt(method=Composed(aggregator=NormClipping(inner=Refactoring())))
    with pytest.raises(InputError, match="basis"):
        FedOpt(FedOpt(FlexLoRA(), rule="momentum"), rule="adam")
    assert redraws(Stacking()) and not redraws(Mean())
    FedOpt(method=Composed(aggregator=FrozenA()))
