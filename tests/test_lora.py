"""Properties of LoRA factors, adapters and slices on hypothesis-drawn shapes, in double precision."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from airtune.lora import Adapter, AdapterSlice, LoraFactors, lora_scaling, stack

FACTORS = st.sampled_from([frozenset({"A", "B"}), frozenset({"A"}), frozenset({"B"})])


def factors_of(rank, in_features, out_features, seed, scaling=1.0, *, core=False):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    return LoraFactors(
        A=normal(rank, in_features),
        B=normal(out_features, rank),
        scaling=scaling,
        core=normal(rank, rank) if core else None,
    )


@st.composite
def factor_sets(draw, *, max_rank=5):
    sizes = st.integers(1, 7)
    return factors_of(
        draw(st.integers(1, max_rank)),
        draw(sizes),
        draw(sizes),
        draw(st.integers(0, 999)),
        draw(st.floats(0.1, 4)),
        core=draw(st.booleans()),
    )


@st.composite
def adapters(draw):
    """Adapters of up to 4 layers; one slot may be shared by all layers; some have a core."""
    layers, seed = draw(st.integers(1, 4)), draw(st.integers(0, 99))
    scaling = draw(st.sampled_from([0.25, 1.0, 2.0]))
    factors, placement, layer = {}, {}, {}
    for index in range(layers):
        name = f"layer.{index}.query"
        size = (draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.integers(1, 6)))
        factors[name] = factors_of(*size, seed + index, scaling, core=draw(st.booleans()))
        placement[name], layer[name] = (name,), index
    if draw(st.booleans()):
        factors["shared"], layer["shared"] = factors_of(draw(st.integers(1, 4)), 3, 2, seed + 77, scaling), 0
        placement |= {f"layer.{index}.value": ("shared",) for index in range(layers)}
    extras = {"head.weight": torch.full((2, 3), 0.5, dtype=torch.float64)} if draw(st.booleans()) else {}
    return Adapter(factors, placement, layer, layers, extras)


@st.composite
def slices(draw, adapter: Adapter):
    chosen = {}
    for name, factors in adapter.factors.items():
        indices = draw(st.sets(st.integers(0, factors.rank - 1)))
        if indices or draw(st.booleans()):
            chosen[name] = np.array(sorted(indices), dtype=np.int64)
    return AdapterSlice(chosen, draw(FACTORS), draw(st.booleans()), extras=draw(st.booleans()))


@st.composite
def sliced(draw):
    adapter = draw(adapters())
    return adapter, draw(slices(adapter))


def tensors(adapter):
    return {(owner, kind): tensor for owner, kind, tensor in adapter.tensors()}


def noisy(adapter, seed=5):
    """Return an adapter of the same sizes of which every value differs."""
    draw = torch.Generator().manual_seed(seed)

    def other(tensor):
        return None if tensor is None else torch.rand(tensor.shape, generator=draw, dtype=tensor.dtype) + 10

    changed = {
        name: LoraFactors(other(f.A), other(f.B), f.scaling, other(f.core)) for name, f in adapter.factors.items()
    }
    return replace(adapter, factors=changed, extras={name: other(t) for name, t in adapter.extras.items()})


# ------------------------------------------------------------------------------------------------------------- factors


@given(factor_sets())
def test_product_is_the_layer_applied_to_the_unit_vectors(factors):
    core = torch.eye(factors.rank, dtype=torch.float64) if factors.core is None else factors.core
    columns = [factors.scaling * (factors.B @ (core @ factors.A[:, i])) for i in range(factors.in_features)]
    assert torch.allclose(factors.product(), torch.stack(columns, dim=1), atol=1e-12)
    assert torch.allclose(factors.times(torch.eye(factors.in_features, dtype=torch.float64)), factors.product())


@given(factor_sets())
def test_frobenius_norm_is_that_of_the_dense_product(factors):
    assert factors.frobenius_norm() == pytest.approx(float(factors.product().norm()), rel=1e-9, abs=1e-9)


@given(factor_sets())
def test_component_norms_are_those_of_the_rank_one_products(factors):
    dense = [torch.outer(factors.B[:, i], factors.A[i]).norm() for i in range(factors.rank)]
    assert torch.allclose(factors.component_norms(), torch.stack(dense))


@given(factor_sets(), st.integers(0, 6), st.booleans())
def test_truncation_is_the_dense_svd_truncation(factors, rank, balanced):
    u, s, vh = torch.linalg.svd(factors.product(), full_matrices=False)
    s[rank:] = 0
    cut = factors.truncate(rank, balanced=balanced)
    assert cut.rank <= rank and cut.scaling == factors.scaling and cut.core is None
    assert torch.allclose(cut.product(), u @ torch.diag(s) @ vh, atol=1e-9)


@given(factor_sets())
def test_truncation_puts_the_scale_where_it_says(factors):
    eye = torch.eye(min(factors.rank, factors.in_features, factors.out_features), dtype=torch.float64)
    cut = factors.truncate(len(eye))
    assert torch.allclose(cut.A @ cut.A.T, eye[: cut.rank, : cut.rank], atol=1e-9)
    even = factors.truncate(len(eye), balanced=True)
    assert torch.allclose(even.A @ even.A.T, even.B.T @ even.B, atol=1e-8)


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=4), st.integers(0, 99), st.booleans())
def test_stack_is_the_weighted_sum_of_products(weights, seed, core):
    parts = [factors_of(1 + i, 4, 5, seed + i, 0.5 + i, core=core) for i in range(len(weights))]
    stacked = stack(parts, weights)
    wanted = sum(w * part.product() for w, part in zip(weights, parts, strict=True))
    assert stacked.rank == sum(part.rank for part in parts)
    assert torch.allclose(stacked.product(), wanted, atol=1e-10)


@given(factor_sets(), st.floats(0.1, 10))
def test_another_scaling_keeps_the_product(factors, scaling):
    changed = factors.with_scaling(scaling)
    assert changed.scaling == scaling
    assert torch.allclose(changed.product(), factors.product(), atol=1e-10)


@given(factor_sets(max_rank=3), st.integers(0, 3))
def test_growing_keeps_the_product(factors, more):
    factors = replace(factors, core=None)
    grown = factors.grow(factors.rank + more, torch.ones((more, factors.in_features), dtype=torch.float64))
    assert grown.rank == factors.rank + more
    assert torch.equal(grown.product(), factors.product()) or torch.allclose(grown.product(), factors.product())
    with pytest.raises(ValueError, match="new rows"):
        factors.grow(factors.rank + more + 1, torch.ones((more, factors.in_features)))


def test_scaling_of_lora_and_of_rank_stabilised_lora():
    assert lora_scaling(16, 8) == 2
    assert lora_scaling(16, 64, rank_stabilized=True) == 2


# --------------------------------------------------------------------------------------------------- taking and putting


@given(sliced())
def test_slice_then_put_is_the_identity_on_the_slice(example):
    adapter, part = example
    values = noisy(part.take(adapter))
    again = part.take(part.put(adapter, values))
    put = {(o, k): t for o, k, t in part.payload(again)}
    wanted = {(o, k): t for o, k, t in part.payload(values)}
    assert put.keys() == wanted.keys()
    assert all(torch.equal(put[key], wanted[key]) for key in wanted)


@given(sliced())
def test_putting_back_what_was_taken_changes_nothing(example):
    adapter, part = example
    back = part.put(adapter, part.take(adapter))
    assert all(torch.equal(tensor, tensors(adapter)[key]) for key, tensor in tensors(back).items())
    assert {n: f.scaling for n, f in back.factors.items()} == {n: f.scaling for n, f in adapter.factors.items()}


@given(sliced())
def test_put_leaves_everything_else_untouched_to_the_bit(example):
    adapter, part = example
    before = {key: tensor.clone() for key, tensor in tensors(adapter).items()}
    after = tensors(part.put(adapter, noisy(part.take(adapter))))
    for (owner, kind), tensor in before.items():
        assert torch.equal(tensors(adapter)[owner, kind], tensor), "put changed its argument"
        changed = after[owner, kind] != tensor
        if kind == "extra":
            assert bool(changed.all()) == part.extras and bool(changed.any()) == part.extras
            continue
        inside = np.zeros(adapter.factors[owner].rank, dtype=bool)
        inside[part.components.get(owner, [])] = True
        assert torch.equal(changed, _owned(kind, torch.from_numpy(inside), part, changed.shape))


def _owned(kind, rows, part, shape):
    """Return which entries of a slot's tensor the slice owns."""
    if kind in ("A", "B") and kind not in part.tensors:
        return torch.zeros(shape, dtype=torch.bool)
    owned = {"A": rows[:, None], "B": rows[None, :], "core": torch.outer(rows, rows)}
    return owned[kind].expand(shape)


@given(sliced())
def test_take_is_scaled_exactly_once(example):
    adapter, part = example
    taken = part.take(adapter)
    assert set(taken.factors) == {name for name in adapter.factors if part.kept(name)}
    for name, factors in taken.factors.items():
        full, indices = adapter.factors[name], part.components[name]
        gain = full.rank / len(indices) if part.unbiased else 1.0
        core = torch.eye(len(indices), dtype=torch.float64)
        if full.core is not None:
            core = full.core[np.ix_(indices, indices)]
        by_hand = full.scaling * gain * (full.B[:, indices] @ core @ full.A[indices])
        assert torch.allclose(factors.product(), by_hand, rtol=1e-12, atol=1e-12)


@given(st.integers(1, 5), st.data())
def test_the_mean_of_all_sketches_is_the_full_product(rank, data):
    kept = data.draw(st.integers(1, rank))
    factors = factors_of(rank, 4, 3, seed=rank, scaling=1.7)
    adapter = Adapter({"s": factors}, {"s": ("s",)}, {"s": 0}, 1)
    subsets = [np.array(subset) for subset in combinations(range(rank), kept)]
    products = [AdapterSlice({"s": s}, unbiased=True).take(adapter).factors["s"].product() for s in subsets]
    assert torch.allclose(torch.stack(products).mean(dim=0), factors.product(), atol=1e-12)
    biased = [AdapterSlice({"s": s}).take(adapter).factors["s"].product() for s in subsets]
    assert torch.allclose(torch.stack(biased).mean(dim=0), factors.product() * kept / rank, atol=1e-12)


@given(adapters(), st.integers(1, 5), st.integers(0, 99))
def test_sketch_draws_equal_numbers_within_the_rank(adapter, kept, seed):
    part = AdapterSlice.sketch(adapter.shape, kept, np.random.default_rng(seed))
    assert part.unbiased and part.violations(adapter.shape) == []
    assert all(part.kept(name) == min(kept, f.rank) for name, f in adapter.factors.items())
    again = AdapterSlice.sketch(adapter.shape, kept, np.random.default_rng(seed))
    assert all(np.array_equal(again.components[name], part.components[name]) for name in adapter.factors)


def test_sketch_draws_every_component_equally_often():
    adapter = Adapter({"s": factors_of(5, 2, 2, 0)}, {"s": ("s",)}, {"s": 0}, 1)
    rng = np.random.default_rng(0)
    counts = np.zeros(5)
    for _ in range(2000):
        counts[AdapterSlice.sketch(adapter.shape, 2, rng).components["s"]] += 1
    assert np.all(np.abs(counts / 2000 - 2 / 5) < 0.05)  # 4.5 standard deviations of a share


@given(adapters(), st.integers(0, 6))
def test_truncation_keeps_the_first_components(adapter, rank):
    part = AdapterSlice.truncation(adapter.shape, rank)
    assert all(
        np.array_equal(part.components[name], np.arange(min(rank, f.rank))) for name, f in adapter.factors.items()
    )
    by_slot = AdapterSlice.truncation(adapter.shape, dict.fromkeys(adapter.factors, rank))
    assert by_slot.total_components() == part.total_components()


@given(adapters(), st.integers(0, 5))
def test_depth_keeps_whole_slots_of_the_top_layers(adapter, depth):
    part = AdapterSlice.top_layers(adapter.shape, depth)
    assert part.outside == "frozen"
    for name, factors in adapter.factors.items():
        above = adapter.layer[name] >= adapter.num_layers - depth
        assert part.kept(name) == (factors.rank if above else 0)
    assert part.depth(adapter.shape) <= depth
    if part.total_components():
        assert part.lowest_layer(adapter.shape) == min(
            adapter.layer[name] for name in adapter.factors if part.kept(name)
        )
    else:
        assert part.lowest_layer(adapter.shape) == adapter.num_layers


@given(sliced())
def test_slice_and_complement_divide_the_adapter(example):
    adapter, part = example
    rest = part.complement(adapter.shape)
    assert not rest.extras and not rest.unbiased
    for name, factors in adapter.factors.items():
        both = [*part.components.get(name, []), *rest.components.get(name, [])]
        assert sorted(both) == list(range(factors.rank))


@given(sliced())
def test_the_number_of_values_is_that_of_the_payload(example):
    adapter, part = example
    payload = list(part.payload(part.take(adapter)))
    assert part.num_values(adapter.shape) == sum(tensor.numel() for _, _, tensor in payload)
    assert len({(owner, kind) for owner, kind, _ in payload}) == len(payload)


def test_shared_slots_are_counted_once_and_placed_often():
    shared = factors_of(2, 3, 4, seed=0)
    placement = {f"layer.{i}.value": ("shared",) for i in range(5)}
    adapter = Adapter({"shared": shared}, placement, {"shared": 0}, 5)
    assert AdapterSlice.everything(adapter.shape).num_values(adapter.shape) == 2 * (3 + 4)
    assert adapter.shape.slots["shared"].modules == tuple(placement)
    assert all(torch.equal(adapter.module_product(module), shared.product()) for module in placement)


def test_several_slots_on_a_module_add_up():
    first, second = factors_of(2, 3, 4, seed=0), factors_of(1, 3, 4, seed=1, scaling=0.5)
    adapter = Adapter({"a": first, "b": second}, {"m": ("a", "b")}, {"a": 0, "b": 0}, 1)
    assert torch.allclose(adapter.module_product("m"), first.product() + second.product())


@given(sliced())
def test_everything_is_the_whole_adapter(example):
    adapter, _ = example
    whole = AdapterSlice.everything(adapter.shape)
    assert whole.complement(adapter.shape).total_components() == 0
    taken = tensors(whole.take(adapter))
    assert taken.keys() == tensors(adapter).keys()
    assert all(torch.equal(taken[key], tensor) for key, tensor in tensors(adapter).items())


@pytest.mark.parametrize("wrong", [[1, 0], [0, 0], [-1, 2], [0, 3]])
def test_wrong_components_are_found(wrong):
    adapter = Adapter({"s": factors_of(3, 2, 2, 0)}, {"s": ("s",)}, {"s": 0}, 1)
    assert AdapterSlice({"s": np.array(wrong)}).violations(adapter.shape)
    assert AdapterSlice({"other": np.array([0])}).violations(adapter.shape)
    assert AdapterSlice({"s": np.array([0, 2])}).violations(adapter.shape) == []


def test_with_factors_refuses_other_slots():
    adapter = Adapter({"s": factors_of(3, 2, 2, 0)}, {"s": ("s",)}, {"s": 0}, 1)
    with pytest.raises(ValueError, match="exactly the slots"):
        adapter.with_factors({})
