"""Dense packing: exact in fp32, half the bits and nearest rounding in 16 bits, bits as promised before training."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from airtune.compression.dense import Dense
from airtune.errors import InputError, NoResultError
from airtune.lora import Adapter, AdapterSlice, LoraFactors

PRECISIONS = ("fp32", "fp16", "bf16")


def adapter_of(seed=0, *, core=False, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=draw).to(dtype)

    factors = {
        "p": LoraFactors(normal(4, 3), normal(5, 4), 2.0, core=normal(4, 4) if core else None),
        "q": LoraFactors(normal(2, 6), normal(1, 2), 2.0),
    }
    extras = {"head.weight": normal(2, 3), "head.bias": normal(2)}
    return Adapter(factors, {"p": ("p",), "q": ("q",)}, {"p": 0, "q": 1}, 2, extras)


@st.composite
def parts(draw):
    chosen = {
        name: np.array(sorted(draw(st.sets(st.integers(0, rank - 1)))), dtype=np.int64)
        for name, rank in (("p", 4), ("q", 2))
    }
    tensors = draw(st.sampled_from([frozenset("AB"), frozenset("A"), frozenset("B")]))
    return AdapterSlice(chosen, tensors, extras=draw(st.booleans()))


def round_trip(compressor, part, trained, start):
    rng = np.random.default_rng(0)
    payload, memory = compressor.encode(part, part.take(trained), part.take(start), {"kept": torch.ones(1)}, rng)
    assert set(memory) == {"kept"}
    return payload, compressor.decode(part, payload, part.take(start))


@given(parts(), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_fp32_is_exact_and_leaves_what_was_not_sent(part, core, dtype):
    trained, start = adapter_of(1, core=core).with_factors(adapter_of(1, core=core).factors), adapter_of(2, core=core)
    trained, start = (
        a.with_factors({n: f.cast(dtype) for n, f in a.factors.items()}, {n: t.to(dtype) for n, t in a.extras.items()})
        for a in (trained, start)
    )
    _, arrived = round_trip(Dense(), part, trained, start)
    assert arrived.shape == part.take(start).shape
    sent = {(owner, kind): tensor for owner, kind, tensor in part.payload(part.take(trained))}
    kept = {(owner, kind): tensor for owner, kind, tensor in part.take(start).tensors()}
    for owner, kind, tensor in arrived.tensors():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, sent.get((owner, kind), kept[owner, kind]))


@given(parts(), st.sampled_from(PRECISIONS))
def test_bits_are_those_of_what_is_serialised(part, precision):
    compressor = Dense(precision)
    payload, _ = round_trip(compressor, part, adapter_of(1, core=True), adapter_of(2, core=True))
    assert payload.bits == 8 * sum(array.nbytes for array in payload.arrays.values())
    assert payload.bits == compressor.bits(part, adapter_of(core=True).shape)
    width = 32 if precision == "fp32" else 16
    assert payload.bits == width * part.num_values(adapter_of(core=True).shape)


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_sixteen_bits_round_to_nearest(precision, dtype):
    part = AdapterSlice.everything(adapter_of().shape)
    _, arrived = round_trip(Dense(precision), part, adapter_of(1), adapter_of(2))
    for (_, _, got), (_, _, sent) in zip(arrived.tensors(), adapter_of(1).tensors(), strict=True):
        assert torch.equal(got, sent.to(dtype).float())


def test_encoding_copies():
    trained = adapter_of(1)
    payload, _ = round_trip(Dense(), AdapterSlice.everything(trained.shape), trained, adapter_of(2))
    payload.arrays["values"][:] = 0
    assert bool(trained.factors["p"].A.all())


def test_too_large_for_fp16_is_said():
    big = adapter_of(1)
    big.factors["p"].A[0, 0] = 1e5
    part = AdapterSlice.everything(big.shape)
    with pytest.raises(NoResultError, match="fp16"):
        round_trip(Dense("fp16"), part, big, big)
    _, arrived = round_trip(Dense("bf16"), part, big, big)
    assert float(arrived.factors["p"].A[0, 0]) == pytest.approx(1e5, rel=0.01)


def test_a_payload_of_the_wrong_size_is_refused():
    part, adapter = AdapterSlice.everything(adapter_of().shape), adapter_of()
    payload, _ = round_trip(Dense(), part, adapter, adapter)
    shorter = AdapterSlice.truncation(adapter.shape, 1)
    with pytest.raises(ValueError, match="size of the slice"):
        Dense().decode(shorter, payload, shorter.take(adapter))


def test_an_unknown_precision_is_refused():
    with pytest.raises(InputError, match=r"compressor\.precision.*bf16"):
        Dense("fp8")
