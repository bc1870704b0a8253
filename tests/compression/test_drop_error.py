"""What a client measures of its dropping: the true error, the sum that norms predict, and the near-orthogonal bound."""

import tracemalloc

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from airtune.compression.drop_error import DROP_KEYS, drop_error, drop_reports
from airtune.compression.soft import Soft, importance
from airtune.compression.topk import TopK
from airtune.lora import Adapter, AdapterSlice, LoraFactors


def factors_of(seed, rank=6, size_in=15, size_out=12, *, orthogonal=False):
    draw = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, size_in, generator=draw, dtype=torch.float64)
    b = torch.randn(size_out, rank, generator=draw, dtype=torch.float64)
    if orthogonal:
        a, b = torch.linalg.qr(a.T)[0].T * a.norm(dim=1)[:, None], torch.linalg.qr(b)[0] * b.norm(dim=0)
    return LoraFactors(a, b, 1.5)


def one_slot(factors):
    return Adapter({"p": factors}, {"p": ("p",)}, {"p": 0}, 1, {})


def coded(trained, start, codec):
    """Return the factors that arrive."""
    adapter, held = one_slot(trained), one_slot(start)
    part = AdapterSlice.everything(adapter.shape)
    payload, _ = codec.encode(part, adapter, held, {}, np.random.default_rng(0))
    return codec.decode(part, payload, held).factors["p"]


def coherence(columns):
    gram = ((columns / columns.norm(dim=0)).T @ (columns / columns.norm(dim=0))).abs()
    return float((gram - torch.diag(gram.diagonal())).max())


@pytest.mark.parametrize("fill", ["hold", "zero"])
@pytest.mark.parametrize("seed", range(15))
def test_true_error_prediction_and_bound_against_dense_matrices(seed, fill):
    start = factors_of(seed)
    trained = LoraFactors(start.A + 0.3 * factors_of(seed + 100).A, start.B + 0.3 * factors_of(seed + 100).B, 1.5)
    arrived = coded(trained, start, Soft(0.5, fill=fill))
    found = drop_error(trained, arrived)
    assert found.true == pytest.approx(float((trained.product() - arrived.product()).square().sum()), rel=1e-6)
    kept = np.argsort(-importance(trained, start))[:3]
    kind = "change" if fill == "hold" else "product"
    parts = np.delete(importance(trained, start, kind) * 1.5, kept) ** 2
    assert found.predicted == pytest.approx(float(parts.sum()), rel=1e-6)
    assert found.true <= found.bound * (1 + 1e-9)
    if fill == "zero":
        paper = 1.0 + coherence(trained.A.T) * coherence(trained.B) * (len(parts) - 1)
        assert found.bound <= paper * found.predicted * (1 + 1e-4)


def test_orthogonal_components_make_the_prediction_exact():
    trained = factors_of(3, orthogonal=True)
    found = drop_error(trained, coded(trained, trained, Soft(0.5, fill="zero")))
    assert found.predicted > 0.0
    assert found.true == pytest.approx(found.predicted, rel=1e-6)
    assert found.bound == pytest.approx(found.predicted, rel=1e-4)


def test_small_changes_keep_their_digits():
    trained = factors_of(1)
    arrived = LoraFactors(trained.A, trained.B * (1 + 1e-7), 1.5)
    assert drop_error(trained, arrived).true == pytest.approx(1e-14 * trained.frobenius_norm() ** 2, rel=1e-4)


def test_reports_are_relative_to_the_product_and_only_of_codecs_that_drop_components():
    trained, start = factors_of(4), factors_of(5)
    arrived = coded(trained, start, Soft(0.5))
    found = drop_reports(Soft(0.5), one_slot(trained), one_slot(arrived))
    error, energy = drop_error(trained, arrived), trained.frobenius_norm() ** 2
    shares = np.array([error.true, error.predicted, error.bound]) / energy
    assert found == pytest.approx(dict(zip(DROP_KEYS, shares, strict=True)))
    assert drop_reports(TopK(0.5), one_slot(trained), one_slot(arrived)) == {}
    empty = one_slot(LoraFactors(trained.A, 0.0 * trained.B, 1.0))
    assert drop_reports(Soft(0.5), empty, empty) == {}


class NothingDense(TorchDispatchMode):
    """Refuses every operation of torch with an output of at least `size` numbers."""

    def __init__(self, size):
        super().__init__()
        self.size, self.seen = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor):
                self.seen += 1
                assert tensor.numel() < self.size, f"{func} made {tuple(tensor.shape)}"
        return result


@pytest.mark.parametrize("fill", ["hold", "zero"])
@pytest.mark.parametrize("kind", ["product", "sum", "change"])
def test_no_array_of_the_layers_size_is_made_on_the_client(kind, fill):
    """Neither by torch (every output is watched) nor by numpy (whose memory is traced): coding and measuring."""
    size_in, size_out, codec = 700, 500, Soft(0.5, fill=fill, importance=kind)
    trained, start = (one_slot(factors_of(seed, 4, size_in, size_out)) for seed in (0, 1))
    part = AdapterSlice.everything(start.shape)
    rng = np.random.default_rng(0)
    watch = NothingDense(size_in * size_out)
    with NothingDense(10**9):  # what is imported on the way is not counted
        drop_reports(codec, trained, codec.decode(part, codec.encode(part, trained, start, {}, rng)[0], start))
    tracemalloc.start()
    try:
        with watch:
            payload, _ = codec.encode(part, trained, start, {}, rng)
            drop_reports(codec, trained, codec.decode(part, payload, start))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert watch.seen > 10
    assert peak < 4 * size_in * size_out


def test_the_watch_sees_a_product():
    trained = factors_of(0)
    with pytest.raises(AssertionError, match="made"), NothingDense(15 * 12):
        trained.product()
