"""Averages: fixed points, order, owners, padding, and what is not touched."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from airtune.aggregation.mean import FrobeniusWeighted, IndependentSampling, Mean
from airtune.compression.dense import Dense
from airtune.errors import InputError
from airtune.lora import Adapter, AdapterSlice, LoraFactors
from airtune.types import (
    ClientTask,
    ClientUpdate,
    LocalTraining,
    Plan,
    RoundOutcome,
    ServerModel,
    TaskCost,
)
from synthetic_federation import disturbed, make_adapter, make_fleet, same_adapters

COST = TaskCost(0.0, 1.0, 1.0, 0, 0, 0.0)
AGGREGATORS = [
    Mean(),
    Mean("uniform"),
    Mean(absent="unchanged"),
    Mean(absent="zero"),
    FrobeniusWeighted(),
    FrobeniusWeighted("model"),
    IndependentSampling(),
    IndependentSampling("uniform"),
]


def make_update(client: int, part: AdapterSlice, values: Adapter, probability: float = 1.0) -> ClientUpdate:
    task = ClientTask(client, part, part, part, LocalTraining(), Dense(), 1e5, 0.1, probability)
    return ClientUpdate(task, values, 0, 0.0, 1.0, COST, {"loss": 1.0})


def make_outcome(updates: list[ClientUpdate], size: int = 7) -> RoundOutcome:
    return RoundOutcome(Plan(()), make_fleet(size), tuple(updates), (), 0.0, 1.0)


def random_updates(adapter: Adapter, slices: list[AdapterSlice], seed: int = 1) -> list[ClientUpdate]:
    generator = torch.Generator().manual_seed(seed)
    updates: list[ClientUpdate] = []
    for client, part in enumerate(slices):
        empty = make_update(client, part, adapter)
        updates.append(replace(empty, values=disturbed(empty.task, adapter, 0.5, generator)))
    return updates


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_no_update_leaves_the_very_same_model(aggregator: Mean) -> None:
    model = ServerModel(make_adapter())
    assert aggregator(model, make_outcome([])) is model


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_order_of_arrival_does_not_matter_to_the_bit(aggregator: Mean) -> None:
    model = ServerModel(make_adapter())
    shape = model.adapter.shape
    updates = random_updates(model.adapter, [AdapterSlice.truncation(shape, r) for r in (1, 4, 2, 4, 3)])
    forward = aggregator(model, make_outcome(updates))
    backward = aggregator(model, make_outcome(updates[::-1]))
    assert same_adapters(forward.adapter, backward.adapter)
    assert forward.version == model.version + 1


@pytest.mark.parametrize("aggregator", [a for a in AGGREGATORS if not isinstance(a, IndependentSampling)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_updates_are_a_fixed_point_to_the_bit(aggregator: Mean, dtype: torch.dtype) -> None:
    model = ServerModel(make_adapter(dtype=dtype))
    part = AdapterSlice.everything(model.adapter.shape)
    target = make_adapter(seed=9, dtype=dtype)
    result = aggregator(model, make_outcome([make_update(client, part, target) for client in range(7)]))
    assert same_adapters(result.adapter, target)


def test_the_inputs_are_not_modified() -> None:
    adapter = make_adapter()
    before = make_adapter()
    updates = random_updates(adapter, [AdapterSlice.truncation(adapter.shape, r) for r in (1, 2, 4)])
    kept = [update.values for update in updates]
    for aggregator in AGGREGATORS:
        aggregator(ServerModel(adapter), make_outcome(updates))
    assert same_adapters(adapter, before)
    assert all(update.values is values for update, values in zip(updates, kept, strict=True))


def reference_mean(
    current: LoraFactors, updates: list[ClientUpdate], slot: str, weights: list[float], absent: str
) -> tuple[np.ndarray, np.ndarray]:
    """Average component by component, in plain loops."""
    a, b = current.A.numpy().astype(float), current.B.numpy().astype(float)
    new_a, new_b = a.copy(), b.copy()
    for component in range(a.shape[0]):
        rows, columns, used = np.zeros(a.shape[1]), np.zeros(b.shape[0]), 0.0
        owned = False
        for update, weight in zip(updates, weights, strict=True):
            indices = update.task.send.components.get(slot, np.zeros(0, int)).tolist()
            if component in indices:
                position = indices.index(component)
                rows += weight * update.values.factors[slot].A[position].numpy().astype(float)
                columns += weight * update.values.factors[slot].B[:, position].numpy().astype(float)
                used, owned = used + weight, True
            elif absent == "unchanged":
                rows, columns, used = rows + weight * a[component], columns + weight * b[:, component], used + weight
            elif absent == "zero":
                used += weight
        if owned:
            new_a[component], new_b[:, component] = rows / used, columns / used
    return new_a, new_b


@pytest.mark.parametrize("absent", ["excluded", "unchanged", "zero"])
@given(seed=st.integers(0, 1000), ranks=st.lists(st.integers(0, 4), min_size=1, max_size=6), depth=st.integers(1, 3))
def test_against_plain_loops_for_unequal_slices(absent: str, seed: int, ranks: list[int], depth: int) -> None:
    adapter = make_adapter(seed=seed)
    shape = adapter.shape
    slices = [AdapterSlice.truncation(shape, r) for r in ranks] + [AdapterSlice.top_layers(shape, depth)]
    slices.append(AdapterSlice.sketch(shape, 2, np.random.default_rng(seed)))
    updates = random_updates(adapter, slices, seed)
    outcome = make_outcome(updates, size=8)
    weights = [float(outcome.fleet.num_examples[update.task.client]) for update in updates]
    result = Mean(absent=absent)(ServerModel(adapter), outcome).adapter  # type: ignore[arg-type]
    for slot, current in adapter.factors.items():
        a, b = reference_mean(current, updates, slot, weights, absent)
        np.testing.assert_allclose(result.factors[slot].A.numpy(), a, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(result.factors[slot].B.numpy(), b, rtol=1e-5, atol=1e-6)


def test_a_component_without_owner_is_unchanged_to_the_bit_in_every_mode() -> None:
    adapter = make_adapter()
    updates = random_updates(adapter, [AdapterSlice.truncation(adapter.shape, 2)] * 3)
    for aggregator in (Mean(), Mean(absent="unchanged"), Mean(absent="zero"), FrobeniusWeighted()):
        result = aggregator(ServerModel(adapter), make_outcome(updates)).adapter
        for slot, current in adapter.factors.items():
            assert torch.equal(result.factors[slot].A[2:], current.A[2:])
            assert torch.equal(result.factors[slot].B[:, 2:], current.B[:, 2:])


def test_a_single_owner_gives_its_own_values_to_the_bit() -> None:
    adapter = make_adapter()
    shape = adapter.shape
    deep, shallow = AdapterSlice.everything(shape), AdapterSlice.top_layers(shape, 1)
    updates = random_updates(adapter, [shallow, deep, shallow])
    result = Mean("uniform")(ServerModel(adapter), make_outcome(updates)).adapter
    for slot in shape.in_layer(0):
        assert torch.equal(result.factors[slot].A, updates[1].values.factors[slot].A)
        assert torch.equal(result.factors[slot].B, updates[1].values.factors[slot].B)


def test_a_factor_that_is_not_trained_stays_to_the_bit() -> None:
    adapter = make_adapter()
    only_b = AdapterSlice.everything(adapter.shape, tensors=frozenset({"B"}))
    updates = random_updates(adapter, [only_b] * 4)
    for aggregator in (Mean(), Mean(absent="unchanged"), Mean(absent="zero"), IndependentSampling()):
        result = aggregator(ServerModel(adapter), make_outcome(updates)).adapter
        for slot, current in adapter.factors.items():
            assert torch.equal(result.factors[slot].A, current.A)
            assert not torch.equal(result.factors[slot].B, current.B)


def test_extras_are_averaged_by_their_own_weights() -> None:
    adapter = make_adapter()
    part = AdapterSlice.everything(adapter.shape)
    updates = random_updates(adapter, [part, part, replace(part, extras=False)])
    updates[2] = replace(updates[2], values=replace(updates[2].values, extras={}))
    outcome = make_outcome(updates)
    result = Mean("uniform", extras_weights="examples")(ServerModel(adapter), outcome).adapter
    weights = outcome.fleet.num_examples[:2].astype(float)
    expected = sum(w * u.values.extras["head.weight"].double() for w, u in zip(weights, updates[:2], strict=True))
    torch.testing.assert_close(result.extras["head.weight"].double(), expected / weights.sum(), rtol=1e-6, atol=1e-7)


def test_the_core_is_averaged_too() -> None:
    base = make_adapter(layers=1)
    generator = torch.Generator().manual_seed(0)

    def dressed(adapter: Adapter) -> Adapter:
        return adapter.with_factors(
            {
                name: replace(f, core=torch.randn(f.rank, f.rank, generator=generator))
                for name, f in adapter.factors.items()
            }
        )

    server, one, two = dressed(base), dressed(base), dressed(base)
    part = AdapterSlice.everything(server.shape)
    outcome = make_outcome([make_update(0, part, one), make_update(1, part, two)])
    equal = Mean("uniform")(ServerModel(server), outcome).adapter
    unbiased = IndependentSampling("uniform")(ServerModel(server), replace(outcome, fleet=make_fleet(2))).adapter
    for result in (equal, unbiased):
        for name, factors in result.factors.items():
            x, y = one.factors[name], two.factors[name]
            assert factors.core is not None and x.core is not None and y.core is not None
            torch.testing.assert_close(factors.core, (x.core + y.core) / 2)


@pytest.mark.parametrize("scope", ["slot", "model"])
def test_frobenius_weights_are_those_of_the_dense_products_and_pad_with_zeros(scope: str) -> None:
    adapter = make_adapter()
    shape = adapter.shape
    updates = random_updates(adapter, [AdapterSlice.truncation(shape, r) for r in (1, 2, 4)])
    result = FrobeniusWeighted(scope)(ServerModel(adapter), make_outcome(updates)).adapter  # type: ignore[arg-type]
    dense = {s: [float(u.values.factors[s].product().double().norm()) for u in updates] for s in adapter.factors}
    whole = [sum(dense[s][k] ** 2 for s in dense) ** 0.5 for k in range(3)]
    for slot, current in adapter.factors.items():
        norms = np.array(dense[slot] if scope == "slot" else whole)
        a, b = np.zeros(current.A.shape), np.zeros(current.B.shape)
        for weight, update, rank in zip(norms / norms.sum(), updates, (1, 2, 4), strict=True):
            a[:rank] += weight * update.values.factors[slot].A.numpy()
            b[:, :rank] += weight * update.values.factors[slot].B.numpy()
        np.testing.assert_allclose(result.factors[slot].A.numpy(), a, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(result.factors[slot].B.numpy(), b, rtol=1e-5, atol=1e-6)


def test_frobenius_weights_fall_to_sample_counts_where_all_products_are_zero() -> None:
    adapter = make_adapter()
    zero = adapter.with_factors({n: replace(f, B=torch.zeros_like(f.B)) for n, f in adapter.factors.items()})
    part = AdapterSlice.everything(adapter.shape)
    other = zero.with_factors({n: replace(f, A=2 * f.A) for n, f in zero.factors.items()})
    outcome = make_outcome([make_update(0, part, zero), make_update(1, part, other)])
    by_norm = FrobeniusWeighted()(ServerModel(zero), outcome).adapter
    assert same_adapters(by_norm, Mean()(ServerModel(zero), outcome).adapter)


def test_independent_sampling_is_unbiased_over_all_cohorts() -> None:
    """Sum over all 2^n cohorts, weighted with their probabilities, of the result: the update of the whole fleet."""
    adapter = make_adapter(layers=1, dtype=torch.float64)
    part = AdapterSlice.everything(adapter.shape)
    updates = random_updates(adapter, [part] * 4)
    q = [0.2, 0.5, 0.9, 0.4]
    updates = [replace(u, task=replace(u.task, probability=p)) for u, p in zip(updates, q, strict=True)]
    fleet = make_fleet(4)
    expected = {slot: torch.zeros_like(f.A) for slot, f in adapter.factors.items()}
    for mask in range(16):
        cohort = [updates[n] for n in range(4) if mask >> n & 1]
        chance = np.prod([q[n] if mask >> n & 1 else 1 - q[n] for n in range(4)])
        outcome = replace(make_outcome(cohort), fleet=fleet)
        result = IndependentSampling()(ServerModel(adapter), outcome).adapter
        for slot in expected:
            expected[slot] += chance * result.factors[slot].A
    shares = fleet.data_weight
    for slot in expected:
        whole = sum(shares[n] * updates[n].values.factors[slot].A for n in range(4))
        torch.testing.assert_close(expected[slot], whole, rtol=1e-12, atol=1e-12)


def test_the_error_of_the_mean_is_the_covariance_of_the_factors() -> None:
    """sum p B A - B A = sum p (B_k - B)(A_k - A): the identity behind every exact method."""
    adapter = make_adapter(dtype=torch.float64)
    updates = random_updates(adapter, [AdapterSlice.everything(adapter.shape)] * 5)
    outcome = make_outcome(updates)
    p = outcome.fleet.num_examples[:5] / outcome.fleet.num_examples[:5].sum()
    mean = Mean()(ServerModel(adapter), outcome).adapter
    for slot, average in mean.factors.items():
        parts = [u.values.factors[slot] for u in updates]
        ideal = sum(w * part.product() for w, part in zip(p, parts, strict=True))
        covariance = sum(
            w * part.scaling * (part.B - average.B) @ (part.A - average.A) for w, part in zip(p, parts, strict=True)
        )
        torch.testing.assert_close(ideal - average.product(), covariance, rtol=1e-9, atol=1e-9)


def test_unknown_names_are_refused() -> None:
    for make in (
        lambda: Mean("median"),  # type: ignore[arg-type]
        lambda: Mean(absent="skipped"),  # type: ignore[arg-type]
        lambda: FrobeniusWeighted("layer"),  # type: ignore[arg-type]
        lambda: IndependentSampling("all"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError, match="valid:"):
            make()
