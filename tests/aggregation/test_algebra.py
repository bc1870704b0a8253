"""The server's algebra against dense linear algebra."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aggregation_examples import normal, random_factors, relative
from airtune.aggregation.algebra import mean_residual, random_rows, ridge_correction
from airtune.lora import DenseUpdate, LoraFactors, lora_scaling, merge, rank_for_energy, stack

SIZE = st.integers(1, 24)
RANK = st.integers(1, 8)
SCALING = st.tuples(st.floats(0.5, 32), RANK, st.booleans()).map(
    lambda t: lora_scaling(t[0], t[1], rank_stabilized=t[2])
)


@st.composite
def clients(draw: st.DrawFn, equal_ranks: bool = False) -> tuple[list[LoraFactors], list[float]]:
    count = draw(st.integers(1, 5))
    sizes = draw(st.tuples(SIZE, SIZE))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    rank = draw(RANK)
    parts = [
        random_factors(rank if equal_ranks else draw(RANK), sizes, seed=k, scaling=draw(SCALING), dtype=dtype)
        for k in range(count)
    ]
    raw = [draw(st.floats(0.1, 10)) for _ in parts]
    return parts, [w / sum(raw) for w in raw]


def _ideal(parts: list[LoraFactors], weights: list[float]) -> torch.Tensor:
    return sum(w * p.product().double() for w, p in zip(weights, parts, strict=True))


def _tolerance(parts: list[LoraFactors]) -> float:
    return 1e-10 if parts[0].A.dtype == torch.float64 else 1e-5


@given(clients())
def test_stack_is_the_weighted_sum_of_the_products(example):
    parts, weights = example
    assert relative(stack(parts, weights).product() - _ideal(parts, weights), _ideal(parts, weights)) < _tolerance(
        parts
    )


@given(clients(equal_ranks=True))
def test_mean_residual_is_what_the_mean_of_the_factors_leaves_out(example):
    parts, weights = example
    scaling = parts[0].scaling
    common = [p.with_scaling(scaling) for p in parts]
    b = sum(w * p.B.double() for w, p in zip(weights, common, strict=True))
    a = sum(w * p.A.double() for w, p in zip(weights, common, strict=True))
    residual = mean_residual(parts, weights)
    assert residual.rank == (len(parts) - 1) * parts[0].rank
    wanted = _ideal(parts, weights)
    assert relative(residual.product() + scaling * (b @ a) - wanted, wanted) < 10 * _tolerance(parts)
    # and it is the covariance of the factors (equation of the module's docstring)
    covariance = sum(
        w * scaling * (p.B.double() - b) @ (p.A.double() - a) for w, p in zip(weights, common, strict=True)
    )
    assert relative(residual.product() - covariance, wanted) < 10 * _tolerance(parts)


def test_mean_residual_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="equal ranks"):
        mean_residual([random_factors(2), random_factors(3)], [0.5, 0.5])
    with pytest.raises(ValueError, match="sum to 1"):
        mean_residual([random_factors(2), random_factors(2)], [0.5, 0.6])


@given(clients(), st.integers(1, 12), st.booleans())
def test_truncation_of_the_stack_is_the_dense_truncation(example, rank, balanced):
    parts, weights = example
    stacked = stack(parts, weights)
    u, s, vh = torch.linalg.svd(_ideal(parts, weights), full_matrices=False)
    wanted = (u[:, :rank] * s[:rank]) @ vh[:rank]
    got = stacked.truncate(rank, balanced=balanced)
    assert got.rank <= rank
    error = torch.linalg.matrix_norm(got.product() - _ideal(parts, weights))
    best = s[rank:].norm()
    assert error <= best + 1e-5 * s[0]  # as good as Eckart-Young, whatever the gaps
    if rank < len(s) and s[rank - 1] > 1.05 * s[rank]:
        assert relative(got.product() - wanted, wanted) < 100 * _tolerance(parts)


@given(clients(), st.floats(0.05, 1.0))
def test_energy_threshold_keeps_the_smallest_sufficient_rank(example, energy):
    parts, weights = example
    stacked = stack(parts, weights)
    squares = torch.linalg.svdvals(_ideal(parts, weights)) ** 2
    head, tail = stacked.split(0, energy)
    assert head.rank == 0
    kept = squares[: tail.rank].sum() / squares.sum()
    assert kept >= energy - 1e-6
    if tail.rank > 1:
        assert squares[: tail.rank - 1].sum() / squares.sum() < energy + 1e-6 or energy == 1.0


@given(clients(), st.integers(0, 10))
def test_split_at_full_energy_loses_nothing(example, rank):
    parts, weights = example
    stacked = stack(parts, weights)
    head, tail = stacked.split(rank, 1.0)
    wanted = _ideal(parts, weights)
    assert head.rank <= rank
    assert relative(head.product() + tail.product() - wanted, wanted) < 10 * _tolerance(parts)


def test_split_keeps_a_zero_update_zero():
    zero = LoraFactors(normal(3, 8, seed=1), torch.zeros(5, 3, dtype=torch.float64), 2.0)
    head, tail = zero.split(2, 0.9)
    assert tail.rank == 0 and not head.product().any()
    assert rank_for_energy(torch.zeros(3), 0.9) == 0


@given(st.tuples(SIZE, SIZE), RANK, st.floats(0.1, 4))
def test_merged_updates_add_up_across_the_change_to_dense(sizes, rank, scaling):
    merged, wanted = None, torch.zeros(sizes[1], sizes[0], dtype=torch.float64)
    for step in range(6):
        addition = random_factors(rank, sizes, seed=step, scaling=scaling)
        merged = merge(merged, addition)
        wanted = wanted + addition.product()
        assert relative(merged.product() - wanted, wanted) < 1e-12
        assert isinstance(merged, DenseUpdate) == ((step + 1) * rank >= min(sizes))
        assert merged.rank <= min(sizes)
        columns = normal(sizes[0], 3, seed=77)
        assert relative(merged.times(columns) - wanted @ columns, wanted) < 1e-12
        if isinstance(merged, DenseUpdate):
            assert torch.equal(merged.factors().product(), merged.matrix)


def test_merging_half_precision_updates_keeps_single_precision():
    """A bf16 accumulator loses small updates entirely; ours does not (the point of a side accumulator)."""
    start = random_factors(40, (40, 40), seed=1, scaling=1.0, dtype=torch.bfloat16)
    small = random_factors(4, (40, 40), seed=2, scaling=1e-4, dtype=torch.bfloat16)
    merged = merge(merge(None, start), small)
    assert isinstance(merged, DenseUpdate) and merged.matrix.dtype == torch.float32
    wanted = small.cast(torch.float64).product()
    got = merged.matrix.double() - start.cast(torch.float64).product()
    rounded = (start.product() + small.product()).double() - start.product().double()
    assert relative(got - wanted, wanted) < 0.05
    assert relative(rounded - wanted, wanted) > 0.5


@given(st.integers(1, 6), st.integers(1, 8), st.floats(1e-3, 10), st.floats(0.1, 4))
def test_ridge_correction_is_the_minimum(rank, stacked_rank, strength, scaling):
    residual = random_factors(stacked_rank, (12, 9), seed=3, scaling=1.3)
    a = normal(rank, 12, seed=5)
    best = ridge_correction(residual, a, strength, scaling)

    def loss(d):
        fit = torch.linalg.matrix_norm(residual.product() - scaling * d @ a) ** 2
        return fit + strength * scaling**2 * torch.linalg.matrix_norm(d) ** 2

    variable = best.clone().requires_grad_(True)
    loss(variable).backward()
    assert variable.grad.norm() < 1e-9 * (1 + float(loss(best)))
    for seed in range(3):
        assert loss(best) <= loss(best + 0.1 * normal(9, rank, seed=seed))


def test_random_rows_follow_their_laws_and_their_seed():
    for law in ("kaiming", "gaussian", "orthonormal"):
        assert torch.equal(random_rows(8, 64, 5, law), random_rows(8, 64, 5, law))
        assert not torch.equal(random_rows(8, 64, 5, law), random_rows(8, 64, 6, law))
    kaiming = random_rows(64, 256, 1, "kaiming")
    assert kaiming.abs().max() <= 1 / 16 and abs(float(kaiming.var()) * 256 - 1 / 3) < 0.01
    assert abs(float(random_rows(64, 256, 1, "gaussian").var()) * 256 - 1) < 0.05
    orthonormal = random_rows(8, 64, 5, "orthonormal")
    assert torch.allclose(orthonormal @ orthonormal.T, torch.eye(8), atol=1e-6)
    with pytest.raises(ValueError, match="orthonormal"):
        random_rows(9, 8, 1, "orthonormal")
