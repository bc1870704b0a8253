"""The rules on products: identities, not agreement with themselves. Effective weights are compared, never factors."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregation_examples import (
    SIZES,
    effective,
    ideal,
    normal,
    outcome,
    random_adapter,
    relative,
    round_of,
    task,
    trained,
    update,
)
from airtune.aggregation.declaring import exchange_of
from airtune.aggregation.mean import Absent, Mean
from airtune.aggregation.merging import Redraw
from airtune.aggregation.one_factor import Alternating, FrozenA, MergeAndRedraw, SharedCore, SharedFactor
from airtune.aggregation.residual import ResidualMerge, RidgeCorrection
from airtune.aggregation.stacking import EnergyThreshold, Stacking
from airtune.aggregation.truncation import PrincipalSplit, Refactoring, Truncation
from airtune.federation import prepared
from airtune.lora import BOTH, ONLY_A, ONLY_B, AdapterSlice, DenseUpdate
from airtune.types import RoundOutcome, ServerModel

EXAMPLES = (10, 30, 5, 55)
UNEQUAL = (2, 4, 6, 3)
EXACT = [Stacking(), EnergyThreshold(energy=1.0), ResidualMerge(), PrincipalSplit(energy=1.0)]
Aggregate = Callable[[ServerModel, RoundOutcome], ServerModel]


def name_of(value: object) -> str:
    return type(value).__name__


def model_of(rank: int = 6, **changes: object) -> ServerModel:
    return ServerModel(random_adapter(rank, **changes))  # type: ignore[arg-type]


def assert_ideal(aggregate: Aggregate, model: ServerModel, result: RoundOutcome, tolerance: float = 1e-10) -> None:
    after = aggregate(model, result)
    for slot in SIZES:
        wanted = ideal(result, slot)
        assert relative(effective(after, slot) - wanted, wanted) < tolerance, slot


def rescaled(result: RoundOutcome, scalings: Sequence[float]) -> RoundOutcome:
    """Return the round in which every client computed with its own scaling."""
    updates = []
    for one, scaling in zip(result.updates, scalings, strict=False):
        factors = {slot: replace(f, scaling=scaling) for slot, f in one.values.factors.items()}
        updates.append(replace(one, values=one.values.with_factors(factors)))
    return replace(result, updates=tuple(updates))


@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    examples=st.lists(st.integers(1, 1000), min_size=5, max_size=5),
    scalings=st.lists(st.floats(0.5, 4), min_size=6, max_size=6),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 100),
)
@settings(max_examples=25)
@pytest.mark.parametrize("aggregate", EXACT, ids=name_of)
def test_exact_rules_give_the_ideal_for_any_ranks_weights_scales_and_types(
    aggregate: Aggregate, ranks: list[int], examples: list[int], scalings: list[float], dtype: torch.dtype, seed: int
) -> None:
    """Every client has its own scaling; the sums of adapters in half precision are as exact as those in single.

    Scalings differ by up to 8, more than alpha / r and alpha / sqrt(r) do at these ranks: FedEx adds and subtracts the
    mean in the server's scaling, so that its rounding grows with the ratio (1e-5 of the target at a ratio of 250).
    """
    model = model_of(scaling=scalings[0], dtype=dtype)
    result = rescaled(round_of(model, examples[: len(ranks)], ranks=ranks, seed=seed), scalings[1:])
    assert_ideal(aggregate, model, result, 1e-10 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("aggregate", EXACT, ids=name_of)
def test_exact_rules_take_updates_of_other_scalings(aggregate: Aggregate) -> None:
    """alpha / r_k and alpha / sqrt(r_k): every client computes with its own scaling."""
    model = model_of()
    scalings = [8 / rank if index % 2 else 8 / rank**0.5 for index, rank in enumerate(UNEQUAL)]
    assert_ideal(aggregate, model, rescaled(round_of(model, EXAMPLES, ranks=UNEQUAL), scalings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("drawn", ["A", "B"])
def test_what_is_merged_is_exact_to_single_precision_whatever_the_adapter_is_in(drawn: str, dtype: torch.dtype) -> None:
    aggregate = MergeAndRedraw(drawn=drawn)  # type: ignore[arg-type]
    model = aggregate.prepare(model_of(dtype=dtype))
    result = round_of(model, EXAMPLES, ranks=UNEQUAL, tensors=ONLY_B if drawn == "A" else ONLY_A)
    assert_ideal(aggregate, model, result, 1e-6)
    assert all(part.A.dtype == torch.float32 for part in aggregate(model, result).base_update.values())


@pytest.mark.parametrize("aggregate", [*EXACT, Truncation(), FrozenA(), Refactoring(), Mean()], ids=name_of)
def test_one_client_gives_its_own_model(aggregate: Aggregate) -> None:
    model = model_of(6, zero_b=False)
    tensors = ONLY_B if isinstance(aggregate, FrozenA | Refactoring) else BOTH
    assert_ideal(aggregate, model, round_of(model, [7], tensors=tensors))


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(
    "aggregate",
    [Alternating(), SharedFactor(), SharedFactor("B"), SharedCore(), MergeAndRedraw(), MergeAndRedraw(drawn="B")],
    ids=str,
)
def test_one_client_of_rules_on_one_factor_gives_its_own_model(aggregate: Any, number: int) -> None:
    """In odd and in even rounds: the two trained factors of RoLoRA."""
    model = prepared(aggregate, model_of())
    assert_ideal(aggregate, model, round_of(model, [7], tensors=exchange_of(aggregate, number).send))


@pytest.mark.parametrize(
    "aggregate",
    [*EXACT, Truncation(), Truncation(balanced=True), RidgeCorrection(), FrozenA(), Refactoring()],
    ids=name_of,
)
def test_identical_clients_give_the_model_of_each(aggregate: Aggregate) -> None:
    model = model_of()
    tensors = ONLY_B if isinstance(aggregate, FrozenA | Refactoring) else BOTH
    one = round_of(model, [7], tensors=tensors).updates[0]
    clones = [replace(one, task=replace(one.task, client=client)) for client in range(3)]
    assert_ideal(aggregate, model, outcome(clones, [7, 3, 1]))


@pytest.mark.parametrize(
    "aggregate",
    [*EXACT, Truncation(), RidgeCorrection(), ResidualMerge(rank=2), EnergyThreshold(0.8), PrincipalSplit(0.9)],
    ids=name_of,
)
def test_the_order_of_updates_cannot_matter_to_the_bit(aggregate: Aggregate) -> None:
    model = model_of(dtype=torch.float32)
    result = round_of(model, EXAMPLES)
    one, other = aggregate(model, result), aggregate(model, replace(result, updates=result.updates[::-1]))
    for slot in SIZES:
        assert torch.equal(effective(one, slot), effective(other, slot))


def test_common_a_makes_averaging_exact() -> None:
    """FedIT is exact, FedEx has no residual, LoRA-FAIR corrects nothing, FLoRA equals FFA."""
    model = model_of()
    result = round_of(model, EXAMPLES, tensors=ONLY_B)
    as_both = replace(
        result,
        updates=tuple(
            replace(u, task=replace(u.task, send=replace(u.task.send, tensors=BOTH))) for u in result.updates
        ),
    )
    assert_ideal(Mean(), model, as_both)
    assert_ideal(FrozenA(), model, result)
    fedex = ResidualMerge()(model, as_both)
    fair = RidgeCorrection()(model, as_both)
    mean = Mean()(model, as_both)
    for slot in SIZES:
        wanted = ideal(result, slot)
        assert relative(effective(fedex, slot) - mean.adapter.module_product(slot), wanted) < 1e-12
        assert relative(fair.adapter.factors[slot].B - mean.adapter.factors[slot].B, wanted) < 1e-12
        assert relative(effective(Stacking()(model, result), slot) - effective(mean, slot), wanted) < 1e-12


def test_error_of_averaging_is_the_covariance_of_the_factors() -> None:
    model = model_of()
    result = round_of(model, EXAMPLES)
    after = Mean()(model, result)
    weights = torch.tensor(EXAMPLES, dtype=torch.float64) / sum(EXAMPLES)
    for slot in SIZES:
        mean = after.adapter.factors[slot]
        covariance = sum(
            w * mean.scaling * (u.values.factors[slot].B - mean.B) @ (u.values.factors[slot].A - mean.A)
            for w, u in zip(weights, result.updates, strict=True)
        )
        error = ideal(result, slot) - effective(after, slot)
        assert error.norm() > 0.05 * ideal(result, slot).norm()  # averaging is visibly wrong here
        assert relative(error - covariance, error) < 1e-12


def _gauged(result: RoundOutcome) -> RoundOutcome:
    """Return the round with (B G, G^-1 A) in place of (B, A): the same products."""
    updates = []
    for index, one in enumerate(result.updates):
        factors = {}
        for slot, f in one.values.factors.items():
            g = normal(f.rank, f.rank, seed=index) + 3 * torch.eye(f.rank, dtype=torch.float64)
            factors[slot] = replace(f, B=f.B @ g, A=torch.linalg.solve(g, f.A))
        updates.append(replace(one, values=one.values.with_factors(factors)))
    return replace(result, updates=tuple(updates))


@pytest.mark.parametrize("aggregate", [*EXACT, Truncation(), EnergyThreshold(0.7), PrincipalSplit(0.8)], ids=name_of)
def test_rules_on_products_do_not_see_the_gauge(aggregate: Aggregate) -> None:
    model = model_of()
    result = round_of(model, EXAMPLES)
    for slot in SIZES:
        one, other = effective(aggregate(model, result), slot), effective(aggregate(model, _gauged(result)), slot)
        assert relative(one - other, one) < 1e-8


@pytest.mark.parametrize("aggregate", [Mean(), RidgeCorrection()], ids=name_of)
def test_rules_on_factors_do_see_the_gauge(aggregate: Aggregate) -> None:
    model = model_of()
    result = round_of(model, EXAMPLES)
    for slot in SIZES:
        one, other = effective(aggregate(model, result), slot), effective(aggregate(model, _gauged(result)), slot)
        assert relative(one - other, one) > 0.1


def test_exact_rules_agree_and_truncations_agree() -> None:
    """FLoRIST at energy 1 = FLoRA = FedEx = FedMomentum at 1; the head of FedMomentum = FlexLoRA = the dense SVD."""
    model = model_of()
    result = round_of(model, EXAMPLES, ranks=UNEQUAL)
    split = PrincipalSplit(energy=1.0)(model, result)
    flex = Truncation()(model, result)
    for slot in SIZES:
        wanted = ideal(result, slot)
        for aggregate in EXACT:
            assert relative(effective(aggregate(model, result), slot) - wanted, wanted) < 1e-10
        u, s, vh = torch.linalg.svd(wanted, full_matrices=False)
        best = (u[:, :6] * s[:6]) @ vh[:6]
        assert relative(effective(flex, slot) - best, best) < 1e-10
        assert relative(split.adapter.module_product(slot) - best, best) < 1e-10
        a = flex.adapter.factors[slot].A
        assert torch.allclose(a @ a.T, torch.eye(6, dtype=a.dtype), atol=1e-10)
        balanced = Truncation(balanced=True)(model, result).adapter.factors[slot]
        assert torch.allclose(balanced.A @ balanced.A.T, balanced.B.T @ balanced.B, atol=1e-10)


def test_clients_of_lower_rank_receive_the_best_approximation_of_their_rank() -> None:
    model = model_of()
    result = round_of(model, EXAMPLES, ranks=UNEQUAL)
    flex = Truncation()(model, result)
    for rank in (1, 3, 5):
        part = AdapterSlice.truncation(flex.adapter.shape, rank).take(flex.adapter)
        for slot in SIZES:
            u, s, vh = torch.linalg.svd(ideal(result, slot), full_matrices=False)
            best = (u[:, :rank] * s[:rank]) @ vh[:rank]
            assert relative(part.factors[slot].product() - best, best) < 1e-10


def test_truncation_of_fewer_directions_than_the_rank_can_still_grow() -> None:
    """One client of rank 2 under an adapter of rank 6: four components get random rows and zero columns."""
    model = model_of()
    result = round_of(model, [5], ranks=[2])
    after = Truncation()(model, result)
    assert after.adapter.shape == model.adapter.shape
    assert_ideal(Truncation(), model, result)
    for factors in after.adapter.factors.values():
        assert not factors.B[:, 2:].any()
        assert (factors.A[2:].norm(dim=1) > 0.1).all()


def test_florist_keeps_the_smallest_rank_with_the_energy() -> None:
    model = model_of(zero_b=True)
    result = round_of(model, EXAMPLES)
    after = EnergyThreshold(0.9)(model, result)
    for slot in SIZES:
        squares = torch.linalg.svdvals(ideal(result, slot)) ** 2
        shares = squares.cumsum(0) / squares.sum()
        wanted = int((shares < 0.9).sum()) + 1
        assert after.base_update[slot].rank == wanted < 24
        error = ideal(result, slot) - effective(after, slot)
        assert error.norm() ** 2 == pytest.approx(squares[wanted:].sum())


@pytest.mark.parametrize("aggregate", [Stacking(), EnergyThreshold(0.9)], ids=name_of)
def test_merging_rules_start_over_from_the_seed(aggregate: Stacking | EnergyThreshold) -> None:
    model = aggregate.prepare(model_of())
    for factors in model.adapter.factors.values():
        assert not factors.B.any()
    result = round_of(model, EXAMPLES)
    after, again = aggregate(model, result), aggregate(model, result)
    other = replace(aggregate, redraw=Redraw(seed=1))(model, result)
    places = list(SIZES)
    for slot in places:
        a = after.adapter.factors[slot].A
        assert torch.equal(a, again.adapter.factors[slot].A)
        assert not torch.equal(a, other.adapter.factors[slot].A)
        assert not torch.equal(a, model.adapter.factors[slot].A)
        assert not after.adapter.factors[slot].B.any()
    same_width = [after.adapter.factors[slot].A for slot in places if SIZES[slot][0] == 24]
    assert not torch.equal(same_width[0], same_width[1])  # a seed reset inside the loop would make them equal


def test_fedex_keeps_the_mean_and_merges_a_residual_of_rank_k_minus_one_r() -> None:
    model = model_of()
    result = round_of(model, EXAMPLES)
    after, mean = ResidualMerge()(model, result), Mean()(model, result)
    for slot, (inputs, outputs) in SIZES.items():
        factors, plain = after.adapter.factors[slot], mean.adapter.factors[slot]
        assert torch.equal(factors.A, plain.A) and torch.equal(factors.B, plain.B)
        rank = torch.linalg.matrix_rank(after.base_update[slot].product(), rtol=1e-10)
        assert rank == min(3 * 6, inputs, outputs)
    values = sum(min(18 * (i + o), i * o) for i, o in SIZES.values())
    assert after.merged_bits == {1: 32 * values} and after.catch_up_bits(0) == 32 * values


@pytest.mark.parametrize("absent", ["excluded", "unchanged", "zero"])
def test_after_unequal_ranks_fedex_lets_everybody_start_from_the_same_model(absent: Absent) -> None:
    """A client of low rank sees the server's model, although it holds a part of the adapter: round after round."""
    rule, model = ResidualMerge(absent=absent), model_of()
    for number in range(3):
        result = round_of(model, EXAMPLES, ranks=(6, 2, 4, 3), seed=number)
        model = rule(model, result)
        for slot in SIZES:
            whole = effective(model, slot)
            own = AdapterSlice.truncation(model.adapter.shape, 2).take(model.adapter)
            seen = whole - model.adapter.module_product(slot) + own.module_product(slot)
            assert relative(seen - whole, whole) < 1e-12
            assert model.adapter.factors[slot].B[:, :2].any()


def test_fedex_at_a_lower_rank_is_the_best_of_that_rank() -> None:
    model = model_of()
    result = round_of(model, EXAMPLES)
    after, mean = ResidualMerge(rank=4)(model, result), Mean()(model, result)
    for slot in SIZES:
        residual = ideal(result, slot) - mean.adapter.module_product(slot)
        singular = torch.linalg.svdvals(residual)
        error = (ideal(result, slot) - effective(after, slot)).norm()
        assert error == pytest.approx(singular[4:].norm())


def test_merges_add_up_over_rounds_and_turn_dense() -> None:
    aggregate = Stacking()
    model = aggregate.prepare(model_of())
    wanted = {slot: torch.zeros(o, i, dtype=torch.float64) for slot, (i, o) in SIZES.items()}
    for number in range(3):
        result = round_of(model, EXAMPLES, ranks=(1, 2, 3, 2), seed=number)
        wanted = {slot: total + ideal(result, slot) for slot, total in wanted.items()}
        model = aggregate(model, result)
        for slot in SIZES:
            assert relative(effective(model, slot) - wanted[slot], wanted[slot]) < 1e-10
            assert isinstance(model.base_update[slot], DenseUpdate) == (8 * (number + 1) >= 24)
    one = 32 * sum(8 * (i + o) for i, o in SIZES.values())
    dense = 32 * sum(i * o for i, o in SIZES.values())
    assert model.merged_bits == {1: one, 2: one, 3: one}
    assert [model.catch_up_bits(held) for held in (3, 2, 1, 0)] == [0, one, min(2 * one, dense), dense]


def test_lora_fair_is_the_ridge_minimum_and_helps_a_little() -> None:
    model = model_of()
    result = round_of(model, EXAMPLES, spread=0.3)
    mean = Mean()(model, result)
    fair = RidgeCorrection(strength=1e-9)(model, result)
    for slot in SIZES:
        wanted = ideal(result, slot)
        before, after = wanted - effective(mean, slot), wanted - effective(fair, slot)
        # what is left is orthogonal to the rows of A: nothing else could be corrected
        assert (after @ fair.adapter.factors[slot].A.T).norm() < 1e-6 * wanted.norm()
        assert after.norm() < before.norm()
        assert torch.equal(fair.adapter.factors[slot].A, mean.adapter.factors[slot].A)


def test_lora_fair_published_iteration_lowers_its_own_loss_but_not_the_distance_as_far() -> None:
    model = model_of()
    result = round_of(model, EXAMPLES, spread=0.3)
    mean = Mean()(model, result)
    closed = RidgeCorrection(strength=0.01)(model, result)
    published = RidgeCorrection(strength=0.01, correction="published", iterations=300)(model, result)
    for slot in SIZES:
        wanted = ideal(result, slot)

        def cosine_loss(after: ServerModel, slot: str = slot, wanted: torch.Tensor = wanted) -> float:
            cosine = torch.nn.functional.cosine_similarity(effective(after, slot), wanted, dim=0)
            return float((1 - cosine).sum())

        def distance(after: ServerModel, slot: str = slot, wanted: torch.Tensor = wanted) -> float:
            return float((wanted - effective(after, slot)).norm())

        assert cosine_loss(published) < cosine_loss(mean)
        assert distance(closed) < distance(published)
        step = published.adapter.factors[slot].B - mean.adapter.factors[slot].B
        assert step.norm() < mean.adapter.factors[slot].B.norm()  # from zero, not from noise


def test_fedsvd_keeps_the_product_and_the_row_space() -> None:
    model = model_of(zero_b=True)
    first = model.adapter
    for number in range(3):
        result = round_of(model, EXAMPLES, tensors=ONLY_B, seed=number)
        mean = FrozenA()(model, result)
        model = Refactoring()(model, result)
        for slot in SIZES:
            a, a0 = model.adapter.factors[slot].A, first.factors[slot].A
            assert relative(effective(model, slot) - effective(mean, slot), effective(mean, slot)) < 1e-12
            assert torch.allclose(a @ a.T, torch.eye(6, dtype=a.dtype), atol=1e-10)
            outside = a - a @ torch.linalg.pinv(a0) @ a0
            assert outside.norm() < 1e-10


def test_fedsvd_does_nothing_while_b_is_zero_and_follows_its_period() -> None:
    model = model_of(zero_b=True)
    idle = [
        update(
            task(0, s := replace(AdapterSlice.everything(model.adapter.shape), tensors=ONLY_B)), s.take(model.adapter)
        )
    ]
    after = Refactoring()(model, outcome(idle, [3]))
    assert all(torch.equal(after.adapter.factors[s].A, model.adapter.factors[s].A) for s in SIZES)
    every_second = Refactoring(period=2)
    one = every_second(model, round_of(model, EXAMPLES, tensors=ONLY_B))
    assert all(torch.equal(one.adapter.factors[s].A, model.adapter.factors[s].A) for s in SIZES)
    two = every_second(one, round_of(one, EXAMPLES, tensors=ONLY_B))
    assert not any(torch.equal(two.adapter.factors[s].A, one.adapter.factors[s].A) for s in SIZES)


def test_fedsvd_with_gradient_descent_is_ffa_with_orthonormal_rows() -> None:
    """Quadratic losses, plain gradient descent: the two give the same products over several rounds."""
    start = FrozenA(start=Redraw("orthonormal", 3)).prepare(model_of(zero_b=True))
    targets = {slot: [normal(o, i, seed=50 + k) for k in range(3)] for slot, (i, o) in SIZES.items()}

    def one_round(model: ServerModel, aggregate: Aggregate) -> ServerModel:
        send = replace(AdapterSlice.everything(model.adapter.shape), tensors=ONLY_B)
        updates = []
        for client in range(3):
            factors = {}
            for slot, f in model.adapter.factors.items():
                for _ in range(4):
                    gradient = f.scaling * (f.product() - targets[slot][client]) @ f.A.T
                    f = replace(f, B=f.B - 0.1 * gradient)
                factors[slot] = f
            updates.append(update(task(client, send), model.adapter.with_factors(factors)))
        return aggregate(replace(model, version=0), outcome(updates, [4, 2, 1]))

    ffa, fedsvd = start, start
    for _ in range(6):
        ffa, fedsvd = one_round(ffa, FrozenA()), one_round(fedsvd, Refactoring())
    for slot in SIZES:
        assert relative(effective(ffa, slot) - effective(fedsvd, slot), effective(ffa, slot)) < 1e-10
        assert not torch.allclose(ffa.adapter.factors[slot].A, fedsvd.adapter.factors[slot].A, atol=1e-3)


@pytest.mark.parametrize("drawn", ["A", "B"])
@pytest.mark.parametrize("ranks", [None, UNEQUAL])
def test_rac_merges_exactly_and_draws_anew(drawn: str, ranks: tuple[int, ...] | None) -> None:
    aggregate = MergeAndRedraw(drawn=drawn)  # type: ignore[arg-type]
    model = aggregate.prepare(model_of())
    trained_side = ONLY_B if drawn == "A" else ONLY_A
    assert aggregate.exchange(1).send == trained_side and aggregate.linear
    total = {slot: torch.zeros(o, i, dtype=torch.float64) for slot, (i, o) in SIZES.items()}
    for number in range(3):
        for f in model.adapter.factors.values():
            drawn_rows = f.A if drawn == "A" else f.B.T
            assert torch.allclose(drawn_rows @ drawn_rows.T, torch.eye(6, dtype=f.A.dtype), atol=1e-6)
            assert not (f.B if drawn == "A" else f.A).any()
        result = round_of(model, EXAMPLES, ranks=ranks, tensors=trained_side, seed=number)
        total = {slot: value + ideal(result, slot) for slot, value in total.items()}
        before, model = model, aggregate(model, result)
        for slot in SIZES:
            assert relative(effective(model, slot) - total[slot], total[slot]) < 1e-10
            old, new = before.adapter.factors[slot], model.adapter.factors[slot]
            assert not torch.equal(old.A, new.A) if drawn == "A" else not torch.equal(old.B, new.B)
    side = 1 if drawn == "A" else 0
    assert model.merged_bits[1] == 32 * 6 * sum(sizes[side] for sizes in SIZES.values())


def test_rac_stacks_what_is_stale() -> None:
    aggregate = MergeAndRedraw()
    old = aggregate.prepare(model_of())
    new = aggregate(old, round_of(old, [3, 4], tensors=ONLY_B))
    fresh = round_of(new, [3, 4, 5], tensors=ONLY_B, seed=1)
    late = round_of(old, [3, 4, 5], tensors=ONLY_B, seed=2).updates[2]
    mixed = replace(fresh, updates=(fresh.updates[0], late))
    after = aggregate(new, mixed)
    for slot in SIZES:
        wanted = effective(new, slot) + ideal(mixed, slot)
        assert relative(effective(after, slot) - wanted, wanted) < 1e-6  # drawn in single precision


def test_fedsvd_takes_stale_updates_in_the_present_basis() -> None:
    old = model_of(zero_b=True)
    new = Refactoring()(old, round_of(old, [3, 4], tensors=ONLY_B))
    fresh = round_of(new, [3, 4, 5], tensors=ONLY_B, seed=1)
    late = round_of(old, [3, 4, 5], tensors=ONLY_B, seed=2).updates[2]
    mixed = replace(fresh, updates=(fresh.updates[0], late))
    after = Refactoring()(new, mixed)
    for slot in SIZES:
        assert relative(effective(after, slot) - ideal(mixed, slot), ideal(mixed, slot)) < 1e-9


def test_rolora_trains_b_first_and_leaves_the_other_factor_alone() -> None:
    rule = Alternating()
    assert rule.exchange(1).train == rule.exchange(1).send == ONLY_B
    assert rule.exchange(2).train == ONLY_A and rule.exchange(3).train == ONLY_B
    model = model_of()
    for number, side in ((1, ONLY_B), (2, ONLY_A)):
        result = round_of(model, EXAMPLES, tensors=side, seed=number)
        after = rule(model, result)
        assert_ideal(rule, model, result)
        for slot in SIZES:
            kept = "A" if side == ONLY_B else "B"
            assert torch.equal(getattr(after.adapter.factors[slot], kept), getattr(model.adapter.factors[slot], kept))
        model = after


def test_fed_sb_trains_the_core_alone_and_is_exact() -> None:
    rule = SharedCore(seed=4)
    model = rule.prepare(model_of())
    exchange = rule.exchange(1)
    assert not exchange.train and not exchange.send and not exchange.receive
    for slot in SIZES:
        f = model.adapter.factors[slot]
        assert torch.allclose(f.A @ f.A.T, torch.eye(6, dtype=f.A.dtype), atol=1e-6)
        assert torch.allclose(f.B.T @ f.B, torch.eye(6, dtype=f.A.dtype), atol=1e-6)
        assert not effective(model, slot).any()
    result = round_of(model, EXAMPLES, tensors=frozenset())
    after = rule(model, result)
    assert_ideal(rule, model, result)
    assert not any(torch.equal(after.adapter.factors[s].core, model.adapter.factors[s].core) for s in SIZES)
    send = replace(AdapterSlice.everything(model.adapter.shape), tensors=frozenset(), extras=False)
    assert send.num_values(model.adapter.shape) == 3 * 6 * 6


def test_partial_depth_sums_over_the_owners_unless_told_otherwise() -> None:
    """A client without slots of layer 0: left out there, or counted with the server's product, or with zero."""
    model = model_of()
    shape = model.adapter.shape
    whole, top = AdapterSlice.everything(shape), AdapterSlice.top_layers(shape, 1)
    updates = [
        update(task(0, whole), trained(model, whole, seed=1)),
        update(task(1, top, receive=whole), trained(model, top, seed=2)),
    ]
    result = outcome(updates, [1, 3])
    low = "layer0.q"
    own = updates[0].values.factors[low].product()
    present = model.adapter.module_product(low)
    for absent, wanted in (("excluded", own), ("unchanged", own / 4 + 3 * present / 4), ("zero", own / 4)):
        for rule in (Stacking(absent=absent), ResidualMerge(absent=absent), PrincipalSplit(1.0, absent=absent)):
            assert relative(effective(rule(model, result), low) - wanted, wanted) < 1e-10
    high = "layer1.q"
    both = updates[0].values.factors[high].product() / 4 + 3 * updates[1].values.factors[high].product() / 4
    assert relative(effective(Stacking()(model, result), high) - both, both) < 1e-10


def test_components_held_frozen_belong_to_the_product() -> None:
    model = model_of()
    shape = model.adapter.shape
    whole = AdapterSlice.everything(shape)
    part = replace(AdapterSlice.truncation(shape, 2), outside="frozen")
    one = update(task(0, part, receive=whole), trained(model, part, seed=1))
    after = Stacking()(model, outcome([one], [1]))
    for slot in SIZES:
        rest = model.adapter.factors[slot].select(torch.arange(2, 6).numpy()).product()
        wanted = one.values.factors[slot].product() + rest
        assert relative(effective(after, slot) - wanted, wanted) < 1e-10


@pytest.mark.parametrize(
    "aggregate", [*EXACT, Truncation(), Refactoring(), MergeAndRedraw(), RidgeCorrection()], ids=name_of
)
def test_nothing_arrived_nothing_changes(aggregate: Aggregate) -> None:
    model = model_of()
    assert aggregate(model, outcome([], [1, 2])) is model


@pytest.mark.parametrize("aggregate", [*EXACT, Truncation(), RidgeCorrection(), MergeAndRedraw()], ids=name_of)
def test_the_head_is_averaged(aggregate: Aggregate) -> None:
    model = model_of()
    result = round_of(model, EXAMPLES)
    head = aggregate(model, result).adapter.extras["classifier.weight"]
    wanted = sum(n * u.values.extras["classifier.weight"] for n, u in zip(EXAMPLES, result.updates, strict=True)) / 100
    assert torch.allclose(head, wanted)
