"""SOFT's identities: what dropping a component costs, why pairs, and what travels (arXiv 2505.00333)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from airtune.compression.dense import Dense
from airtune.compression.rows import kept_count
from airtune.compression.soft import Soft, importance
from airtune.lora import Adapter, AdapterSlice, LoraFactors

seeds = st.integers(0, 2**32)
shapes = st.tuples(st.integers(1, 8), st.integers(8, 20), st.integers(8, 20))  # rank, in, out


def factors_of(seed, shape, *, orthogonal=""):
    rank, size_in, size_out = shape
    draw = torch.Generator().manual_seed(seed % 2**31)
    a = torch.randn(rank, size_in, generator=draw, dtype=torch.float64)
    b = torch.randn(size_out, rank, generator=draw, dtype=torch.float64)
    lengths = torch.rand(2, rank, generator=draw, dtype=torch.float64) * 3.0 + 0.01
    if "A" in orthogonal:
        a = torch.linalg.qr(a.T)[0].T * lengths[0][:, None]
    if "B" in orthogonal:
        b = torch.linalg.qr(b)[0] * lengths[1]
    return LoraFactors(a, b, 1.0)


def one_slot(factors, head=False):
    extras = {"head": torch.ones(3, dtype=torch.float64)} if head else {}
    return Adapter({"p": factors}, {"p": ("p",)}, {"p": 0}, 1, extras)


def drop_error(factors, keep):
    """Return the squared Frobenius norm of what zero fill drops, and the mask."""
    adapter = one_slot(factors)
    part = AdapterSlice.everything(adapter.shape)
    codec = Soft(keep / factors.rank, fill="zero")
    payload, _ = codec.encode(part, adapter, adapter, {}, np.random.default_rng(0))
    arrived = codec.decode(part, payload, adapter).factors["p"]
    kept = (arrived.B != 0).any(0)
    return float((factors.product() - factors.select(np.flatnonzero(kept.numpy())).product()).square().sum()), kept


@settings(max_examples=60, deadline=None)
@given(seeds, shapes, st.sampled_from(["A", "B", "AB"]), st.data())
def test_with_either_factor_orthogonal_the_error_is_the_sum_of_what_was_dropped(seed, shape, orthogonal, data):
    factors = factors_of(seed, shape, orthogonal=orthogonal)
    keep = data.draw(st.integers(1, shape[0]))
    error, kept = drop_error(factors, keep)
    v = importance(factors, factors)
    assert int(kept.sum()) == keep
    assert error == pytest.approx(float((v[~kept.numpy()] ** 2).sum()), rel=1e-9, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(seeds, shapes, st.data())
def test_with_both_orthogonal_norms_are_singular_values_and_dropping_is_optimal(seed, shape, data):
    factors = factors_of(seed, shape, orthogonal="AB")
    singular = torch.linalg.svdvals(factors.product())[: shape[0]].numpy()
    np.testing.assert_allclose(np.sort(importance(factors, factors))[::-1], singular, rtol=1e-9, atol=1e-9)
    keep = data.draw(st.integers(1, shape[0]))
    best = factors.truncate(keep).product()
    error, _ = drop_error(factors, keep)
    assert error == pytest.approx(float((factors.product() - best).square().sum()), rel=1e-7, abs=1e-9)


def coherence(columns):
    unit = columns / columns.norm(dim=0)
    gram = (unit.T @ unit).abs()
    return float((gram - torch.diag(gram.diagonal())).max())


def test_the_bound_with_coherences_holds_in_2000_random_cases():
    """Error <= (1 + mu_A mu_B (n - 1)) sum of the n dropped squares, from nearly orthogonal to fully random factors."""
    rng = np.random.default_rng(3)
    tight = 0
    for case in range(2000):
        rank = int(rng.integers(2, 9))
        exact = factors_of(case, (rank, 16, 18), orthogonal="AB")
        noise = factors_of(case + 10**6, (rank, 16, 18))
        size = 10 ** rng.uniform(-3, 1)
        factors = LoraFactors(exact.A + size * noise.A, exact.B + size * noise.B, 1.0)
        kept = int(rng.integers(1, rank + 1))
        v = importance(factors, factors)
        dropped = np.sort(np.argsort(-v)[kept:])
        error = float(factors.select(dropped).product().square().sum())
        bound = (1 + coherence(factors.A.T) * coherence(factors.B) * (len(dropped) - 1)) * float(
            (v[dropped] ** 2).sum()
        )
        assert error <= bound * (1 + 1e-12) + 1e-15
        tight += error > 0.7 * bound > 0
        assert float((v[dropped] ** 2).sum()) <= (1 - kept / rank) * float((v**2).sum()) * (1 + 1e-12)
    assert tight > 500  # the bound says something


@settings(max_examples=60, deadline=None)
@given(seeds, seeds, shapes)
def test_change_importance_is_the_dense_error_of_holding_a_component(seed, other, shape):
    trained, start = factors_of(seed, shape), factors_of(other, shape)
    dense = [
        float((torch.outer(trained.B[:, i], trained.A[i]) - torch.outer(start.B[:, i], start.A[i])).norm())
        for i in range(shape[0])
    ]
    np.testing.assert_allclose(importance(trained, start, "change"), dense, rtol=1e-9, atol=1e-9)


def test_change_importance_keeps_its_digits_where_little_changed():
    start = factors_of(1, (4, 9, 8))
    trained = LoraFactors(start.A * (1 + 1e-9), start.B, 1.0)
    wanted = 1e-9 * importance(start, start)
    np.testing.assert_allclose(importance(trained, start, "change"), wanted, rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(seeds, shapes, st.data(), st.sampled_from(["hold", "zero"]), st.sampled_from(["product", "sum", "change"]))
def test_a_and_b_share_the_mask_and_the_best_are_in_it(seed, shape, data, fill, kind):
    start, trained = one_slot(factors_of(seed, shape)), one_slot(factors_of(seed + 1, shape))
    keep = data.draw(st.integers(1, shape[0]))
    codec = Soft(keep / shape[0], fill=fill, importance=kind)
    part = AdapterSlice.everything(start.shape)
    payload, _ = codec.encode(part, trained, start, {}, np.random.default_rng(0))
    arrived = codec.decode(part, payload, start).factors["p"]
    fill_a, fill_b = (start.factors["p"].A, start.factors["p"].B) if fill == "hold" else (0.0, 0.0)
    rows, columns = (arrived.A != fill_a).any(1), (arrived.B != fill_b).any(0)
    assert torch.equal(rows, columns)
    assert int(rows.sum()) == keep
    scores = importance(trained.factors["p"], start.factors["p"], kind)
    assert set(np.flatnonzero(rows.numpy())) == set(np.argsort(-scores)[:keep])


@pytest.mark.parametrize(("slots", "rank", "keep"), [(24, 16, 4), (24, 8, 8), (3, 8, 1)])
@pytest.mark.parametrize("precision", [32, 16])
def test_bits_on_the_wire_are_those_of_the_formula(slots, rank, keep, precision):
    """bits * kappa * sum (d + m) + one bit a component + the head in fp32."""
    from airtune.compression.values import FloatingPoint

    factors = {f"m{i}": factors_of(i, (rank, 20, 12)) for i in range(slots)}
    adapter = Adapter(factors, {n: (n,) for n in factors}, dict.fromkeys(factors, 0), 1, {"head": torch.ones(2, 20)})
    codec = Soft(keep / rank, values=FloatingPoint("fp32" if precision == 32 else "fp16"))
    part = AdapterSlice.everything(adapter.shape)
    payload, _ = codec.encode(part, adapter, adapter, {}, np.random.default_rng(0))
    wanted = precision * keep * slots * (20 + 12) + slots * rank + 32 * 40
    assert payload.bits == codec.bits(part, adapter.shape) == wanted


def test_pooled_selection_takes_the_most_important_of_all_slots_in_no_more_bits():
    small, large = factors_of(0, (4, 10, 10)), factors_of(1, (4, 10, 10))
    large = LoraFactors(large.A * 100.0, large.B, 1.0)
    adapter = Adapter({"p": small, "q": large}, {"p": ("p",), "q": ("q",)}, {"p": 0, "q": 0}, 1)
    codec, part = Soft(0.5, fill="zero", scope="pooled"), AdapterSlice.everything(adapter.shape)
    payload, _ = codec.encode(part, adapter, adapter, {}, np.random.default_rng(0))
    arrived = codec.decode(part, payload, adapter)
    assert not arrived.factors["p"].A.any()
    torch.testing.assert_close(arrived.factors["q"].A, large.A, rtol=1e-6, atol=1e-6)
    assert payload.bits == codec.bits(part, adapter.shape)


def test_everything_kept_is_plain_federated_lora():
    start, trained = one_slot(factors_of(0, (4, 9, 8)), head=True), one_slot(factors_of(1, (4, 9, 8)), head=True)
    part, rng = AdapterSlice.everything(start.shape), np.random.default_rng(0)
    results = []
    for codec in (Soft(1.0), Soft(1.0, fill="zero"), Dense()):
        payload, _ = codec.encode(part, trained, start, {}, rng)
        results.append(codec.decode(part, payload, start))
    for result in results[:2]:
        for (_, _, got), (_, _, wanted) in zip(result.tensors(), results[2].tensors(), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_no_product_and_no_decomposition_on_the_client(monkeypatch):
    """By construction: no matrix product, QR or SVD is called, and no array of the layer's size is made."""
    trained, start = one_slot(factors_of(0, (4, 300, 200))), one_slot(factors_of(1, (4, 300, 200)))
    part = AdapterSlice.everything(start.shape)

    def refuse(*args, **kwargs):
        raise AssertionError("formed on the client")

    for name in ("svd", "qr", "eigh", "svdvals"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    for name in ("matmul", "mm", "__matmul__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    monkeypatch.setattr(LoraFactors, "product", refuse)
    for kind in ("product", "sum", "change"):
        payload, _ = Soft(0.5, importance=kind).encode(part, trained, start, {}, np.random.default_rng(0))
        assert max(array.size for array in payload.arrays.values()) <= 2 * (300 + 200)


def test_counts_follow_the_rank_of_each_slot():
    adapter = Adapter(
        {"p": factors_of(0, (8, 9, 9)), "q": factors_of(1, (3, 9, 9))}, {"p": ("p",), "q": ("q",)}, {"p": 0, "q": 0}, 1
    )
    part, codec = AdapterSlice.everything(adapter.shape), Soft(0.25, fill="zero")
    payload, _ = codec.encode(part, adapter, adapter, {}, np.random.default_rng(0))
    arrived = codec.decode(part, payload, adapter)
    kept = {name: int(f.A.any(1).sum()) for name, f in arrived.factors.items()}
    assert kept == {"p": kept_count(8, 0.25), "q": 1}
