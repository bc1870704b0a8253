"""Penalties: closed forms, gradients by finite differences, and finiteness where B is zero."""

import numpy as np
import pytest
import torch

from airtune.lora import Adapter, AdapterSlice, LoraFactors
from airtune.training.model import ActiveAdapter
from airtune.training.penalties import orthogonality, penalty_value, proximal_distance, tail_norm
from airtune.types import OrthogonalityPenalty, ProximalPenalty, TailPenalty

FORMS = ("cosine", "off-diagonal", "identity", "mixed")
TAIL = TailPenalty(0.5, {"p": 2, "q": 1, "elsewhere": 0})


def active_adapter(components=None, *, zero_b=False, rank=4, seed=0):
    """Return two slots p [3 -> 5] and q [4 -> 2], of which the given components are trained, and a head."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=draw, dtype=torch.float64)

    sizes = {"p": (3, 5), "q": (4, 2)}
    factors = {
        n: LoraFactors(normal(rank, i), normal(o, rank) * (not zero_b), scaling=3.0) for n, (i, o) in sizes.items()
    }
    whole = Adapter(factors, {"p": ("p",), "q": ("q",)}, {"p": 0, "q": 1}, 2, {"head.weight": normal(2, 3)})
    components = {name: np.arange(rank) for name in sizes} if components is None else components
    part = AdapterSlice(components)
    start = part.take(whole)
    leaves = {
        n: LoraFactors(f.A.clone().requires_grad_(), f.B.clone().requires_grad_(), f.scaling)
        for n, f in start.factors.items()
    }
    extras = {n: t.clone().requires_grad_() for n, t in start.extras.items()}
    return ActiveAdapter(part, start.with_factors(leaves, extras), start)


def leaves_of(active):
    return [tensor for _, _, tensor in active.trained()]


def move(active, size=0.1, seed=3):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in leaves_of(active):
            tensor += size * torch.randn(tensor.shape, generator=draw, dtype=tensor.dtype)


PENALTIES = [TAIL, ProximalPenalty(0.7), *(OrthogonalityPenalty(0.3, form) for form in FORMS)]


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
@pytest.mark.parametrize("rank", [1, 4])
def test_value_and_gradient_are_finite_where_b_is_zero(penalty, rank):
    active = active_adapter(zero_b=True, rank=rank)
    value = penalty_value([penalty], active)
    assert np.isfinite(value.item()) and value.item() >= 0
    for tensor in torch.autograd.grad(value, leaves_of(active), allow_unused=True):
        assert tensor is None or bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_gradients_are_those_of_finite_differences(penalty):
    active = active_adapter()
    move(active)
    leaves = leaves_of(active)
    gradients = torch.autograd.grad(penalty_value([penalty], active), leaves, allow_unused=True)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        for place in np.ndindex(*leaf.shape):
            sides = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    leaf[place] += step
                    sides.append(penalty_value([penalty], active).item())
                    leaf[place] -= step
            found = 0.0 if gradient is None else float(gradient[place])
            assert found == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-4, abs=1e-6)


def test_terms_add_up_with_their_weights():
    active = active_adapter()
    move(active)
    together = penalty_value(PENALTIES, active)
    assert together.item() == pytest.approx(sum(penalty_value([one], active).item() for one in PENALTIES))
    assert penalty_value([], active) is None


def test_tail_norm_is_that_of_the_tail_components():
    active = active_adapter()
    p, q = active.adapter.factors["p"], active.adapter.factors["q"]
    wanted = p.B[:, 2:].norm() * p.A[2:].norm() + q.B[:, 1:].norm() * q.A[1:].norm()
    assert tail_norm(TAIL, active).item() == pytest.approx(wanted.item())


def test_tail_is_told_by_the_index_in_the_adapter_not_in_the_slice():
    active = active_adapter({"p": np.array([0, 2, 3]), "q": np.array([0])})
    p = active.adapter.factors["p"]
    assert tail_norm(TAIL, active).item() == pytest.approx((p.B[:, 1:].norm() * p.A[1:].norm()).item())
    assert tail_norm(TailPenalty(1.0, {"p": 9}), active).item() == 0
    assert tail_norm(TailPenalty(1.0, {}), active).item() == 0


def test_proximal_distance_is_half_the_squared_distance_of_all_that_is_trained():
    active = active_adapter()
    assert proximal_distance(active).item() == 0
    with torch.no_grad():
        for tensor in leaves_of(active):
            tensor += 2.0
    assert proximal_distance(active).item() == pytest.approx(2.0 * sum(t.numel() for t in leaves_of(active)))


@pytest.mark.parametrize("form", FORMS)
def test_orthogonality_against_the_columns_one_by_one(form):
    active = active_adapter()
    total = 0.0
    for factors in active.adapter.factors.values():
        for matrix, kind in ((factors.B, "off-diagonal"), (factors.A.T, "identity")):
            kind = kind if form == "mixed" else form
            columns = matrix.detach().T.numpy()
            for i, x in enumerate(columns):
                for j, y in enumerate(columns):
                    if kind == "cosine" and i != j:
                        total += (x @ y / np.linalg.norm(x) / np.linalg.norm(y)) ** 2
                    if kind == "off-diagonal" and i != j:
                        total += (x @ y) ** 2
                    if kind == "identity":
                        total += (x @ y - (i == j)) ** 2
    assert orthogonality(form, active).item() == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_orthonormal_columns_cost_nothing(form):
    eye = torch.eye(6, dtype=torch.float64)
    factors = {"p": LoraFactors(eye[:3].clone(), eye[:, :3].clone(), 1.0)}
    whole = Adapter(factors, {"p": ("p",)}, {"p": 0}, 1)
    active = ActiveAdapter(AdapterSlice.everything(whole.shape), whole, whole)
    assert orthogonality(form, active).item() == 0


def test_the_cosine_does_not_see_the_length_of_columns():
    active = active_adapter()
    before = orthogonality("cosine", active).item()
    with torch.no_grad():
        for factors in active.adapter.factors.values():
            factors.B.mul_(torch.tensor([0.1, 1.0, 10.0, 100.0]))
    assert orthogonality("cosine", active).item() == pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize(("form", "limit"), [("cosine", 0.1), ("mixed", 0.1)])
def test_penalised_components_of_a_fit_can_be_dropped_by_their_norms(form, limit):
    """The toy of the method's analysis: fit singular values 3 * 0.7^i, drop the 4 of 8 components of least norm.

    The best rank-4 error is 0.054 of the squared norm; without penalty the norms tell little and it is about 0.4.
    """

    def relative_error(weight):
        draw = torch.Generator().manual_seed(0)
        u, v = (torch.linalg.qr(torch.randn(64, 8, generator=draw, dtype=torch.float64))[0] for _ in range(2))
        target = u @ torch.diag(3.0 * 0.7 ** torch.arange(8, dtype=torch.float64)) @ v.T
        a = (torch.rand(8, 64, generator=draw, dtype=torch.float64) - 0.5).mul_(0.25).requires_grad_()
        b = torch.zeros(64, 8, dtype=torch.float64, requires_grad=True)
        whole = Adapter({"p": LoraFactors(a, b, 1.0)}, {"p": ("p",)}, {"p": 0}, 1)
        active = ActiveAdapter(AdapterSlice.everything(whole.shape), whole, whole)
        optimizer = torch.optim.Adam([a, b], lr=0.02)
        for _ in range(600):
            optimizer.zero_grad()
            loss = (b @ a - target).square().sum()
            (loss + weight * orthogonality(form, active)).backward()
            optimizer.step()
        with torch.no_grad():
            kept = (b.norm(dim=0) * a.norm(dim=1)).argsort(descending=True)[:4]
            return float((b[:, kept] @ a[kept] - target).square().sum() / target.square().sum())

    assert relative_error(0.1) < limit < 0.2 < relative_error(0.0)
