"""The covariance of separately averaged factors: the identity, its norm without dense products, what is recorded."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregation_examples import random_adapter, random_factors
from airtune.aggregation.covariance import coherence, covariance_norm, factor_diagnostics, pilot_terms, tail_energies
from airtune.compression.soft import Soft
from airtune.federation import Stop, begin, run
from airtune.lora import AdapterSlice, LoraFactors
from airtune.methods.fedit import FedIT
from airtune.types import Plan, RoundOutcome, ServerModel
from synthetic_federation import SyntheticWorld, make_adapter, make_fleet


def clients(count, rank, seed):
    parts = [random_factors(rank, (14, 11), seed=100 * seed + k) for k in range(count)]
    weights = np.random.default_rng(seed).uniform(0.1, 3.0, count).tolist()
    return parts, weights


def dense_covariance(parts, weights):
    p = np.array(weights) / sum(weights)
    b, a = (sum(w * getattr(part, n) for w, part in zip(p, parts, strict=True)) for n in ("B", "A"))
    scaling = parts[0].scaling
    lost = sum(w * part.product() for w, part in zip(p, parts, strict=True)) - scaling * b @ a
    spread = sum(w * (part.B - b) @ (part.A - a) for w, part in zip(p, parts, strict=True)) * scaling
    return lost, spread


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 1000))
def test_the_identity_and_its_norm_without_the_product(count, rank, seed):
    parts, weights = clients(count, rank, seed)
    lost, spread = dense_covariance(parts, weights)
    torch.testing.assert_close(lost, spread, rtol=1e-10, atol=1e-10)
    assert covariance_norm(parts, weights) == pytest.approx(float(lost.norm()), rel=1e-8, abs=1e-10)


def test_a_shared_factor_has_no_covariance():
    parts, weights = clients(5, 4, 1)
    assert covariance_norm([replace(p, A=parts[0].A) for p in parts], weights) < 1e-12
    assert covariance_norm([parts[0]] * 5, weights) < 1e-12


def test_nothing_of_the_size_of_the_layer_is_made(monkeypatch):
    """Layers of 30,000 x 20,000 would need 4.8 GB each."""
    parts = [
        LoraFactors(torch.randn(2, 30_000, dtype=torch.float64), torch.randn(20_000, 2, dtype=torch.float64), 1.0)
        for _ in range(3)
    ]
    monkeypatch.setattr(LoraFactors, "product", lambda self: (_ for _ in ()).throw(AssertionError("dense")))
    assert covariance_norm(parts, [1.0, 2.0, 3.0]) > 0.0


@pytest.mark.parametrize("fill", ["hold", "zero"])
def test_the_true_change_is_the_ideal_one_minus_covariance_minus_what_was_dropped(fill):
    """Section 6's decomposition: B'A' of the separate means = mean of products - C - mean of the drop errors."""
    start = random_adapter(4, seed=9)
    part, rng = AdapterSlice.everything(start.shape), np.random.default_rng(0)
    p = np.array([0.2, 0.5, 0.3])
    trained = [random_adapter(4, seed=k) for k in range(3)]
    codec = Soft(0.5, fill=fill)
    arrived = [codec.decode(part, codec.encode(part, t, start, {}, rng)[0], start) for t in trained]
    for slot in start.factors:
        kept = [a.factors[slot] for a in arrived]
        b, a = (sum(w * getattr(f, n) for w, f in zip(p, kept, strict=True)) for n in ("B", "A"))
        separate = kept[0].scaling * b @ a
        ideal = sum(w * t.factors[slot].product() for w, t in zip(p, trained, strict=True))
        dropped = sum(w * (t.factors[slot].product() - f.product()) for w, t, f in zip(p, trained, kept, strict=True))
        covariance, _ = dense_covariance(kept, p.tolist())
        torch.testing.assert_close(separate, ideal - covariance - dropped, rtol=1e-9, atol=1e-9)


def test_coherence_of_known_columns():
    assert coherence(torch.eye(4)) == 0.0
    assert coherence(torch.tensor([[1.0, -2.0], [0.0, 0.0]])) == pytest.approx(1.0)
    assert coherence(torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])) == pytest.approx(2**-0.5)
    assert coherence(torch.zeros(3, 2)) == 0.0
    assert coherence(torch.ones(3, 1)) == 0.0


def test_tail_energies_are_sums_of_sorted_squares():
    adapter = random_adapter(5)
    wanted = np.zeros(6)
    for f in adapter.factors.values():
        each = [float((f.scaling * torch.outer(f.B[:, i], f.A[i])).norm()) ** 2 for i in range(5)]
        wanted += [sum(sorted(each)[: 5 - kept]) for kept in range(6)]
    found = tail_energies(adapter, 5)
    np.testing.assert_allclose(found, wanted, rtol=1e-10)
    assert (np.diff(found, 2) >= -1e-9).all()


def outcome_of(world, method):
    progress = begin(method, ServerModel(make_adapter()), world)
    seen = world.observe(1, 0.0, progress.pending, progress.model)
    plan = method.plan(progress.state, seen, np.random.default_rng(0))
    return world.run(plan, progress.model, progress.pending, round_index=1, time=0.0)[0]


def test_diagnostics_of_a_round():
    outcome = outcome_of(SyntheticWorld(make_fleet(4)), FedIT())
    found = factor_diagnostics(outcome)
    parts = {n: [u.values.factors[n] for u in outcome.updates] for n in outcome.updates[0].values.factors}
    weights = [float(outcome.fleet.num_examples[u.task.client]) for u in outcome.updates]
    squares = sum(float(dense_covariance(p, weights)[0].square().sum()) for p in parts.values())
    assert found["covariance_norm"] == pytest.approx(squares**0.5, rel=1e-4)
    energy = sum(w * float(f.product().square().sum()) for p in parts.values() for w, f in zip(weights, p, strict=True))
    assert found["covariance_share"] == pytest.approx(squares / (energy / sum(weights)), rel=1e-4)
    assert 0.0 < found["coherence_a"] <= 1.0
    assert found["importance_ratio"] > 1.0


def test_no_updates_no_diagnostics():
    outcome = outcome_of(SyntheticWorld(make_fleet(3)), FedIT())
    assert factor_diagnostics(replace(outcome, updates=())) == {}
    assert isinstance(outcome, RoundOutcome) and isinstance(outcome.plan, Plan)


def test_records_of_a_method_that_diagnoses_hold_what_it_found():
    from airtune.methods.soft import SoftLoRA

    world, method = SyntheticWorld(make_fleet(3)), SoftLoRA()
    start = begin(method, ServerModel(make_adapter()), world)
    records = [r for _, r in run(method, start, world, world, stop=Stop(2), seed=0, evaluate=lambda _: {})]
    assert "covariance_norm" not in records[0].diagnostics
    assert all(record.diagnostics["covariance_norm"] > 0.0 for record in records[1:])


def test_pilot_terms_against_dense_matrices():
    world, method = SyntheticWorld(make_fleet(4)), FedIT()
    outcome, model = outcome_of(world, method), ServerModel(make_adapter())
    averaged, _ = method.aggregate(None, model, outcome)
    terms = pilot_terms(model, averaged, outcome, (1, 2, 4), "examples")
    weights = [float(outcome.fleet.num_examples[u.task.client]) for u in outcome.updates]
    p = np.array(weights) / sum(weights)
    residual, energies, covariance = np.zeros(3), np.zeros(4), 0.0
    for name, before in model.adapter.factors.items():
        change = averaged.adapter.factors[name].product().double() - before.product().double()
        squares = torch.linalg.svdvals(change).numpy() ** 2
        residual += [squares[r:].sum() for r in (1, 2, 4)]
        parts = [u.values.factors[name] for u in outcome.updates]
        norms = np.array([(f.component_norms() * f.scaling).double().numpy() for f in parts])
        energies += p @ np.sort(norms**2, axis=1)[:, ::-1]
        covariance += float(dense_covariance(parts, weights)[0].square().sum())
    np.testing.assert_allclose(terms.residual, residual, rtol=1e-4)
    np.testing.assert_allclose(terms.energies, energies, rtol=1e-5)
    assert terms.covariance[-1] == pytest.approx(covariance, rel=1e-4)
    assert (np.diff(terms.residual) <= 0).all()
    assert pilot_terms(model, averaged, replace(outcome, updates=()), (1, 2), "examples") is None
