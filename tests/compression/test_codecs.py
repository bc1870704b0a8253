"""One table of lossy codecs: bits as promised, what is not sent stays or is zero, nothing else changes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from airtune.compression.error_feedback import ErrorFeedback
from airtune.compression.lowrank import LowRank, aligned
from airtune.compression.quantize import Quantized
from airtune.compression.rows import kept_count
from airtune.compression.soft import Soft
from airtune.compression.topk import RandomComponents, RowTopK, TopK
from airtune.compression.values import FloatingPoint, Stochastic, pack_integers, unpack_integers
from airtune.errors import InputError, NoResultError
from airtune.experiment.hints import Context
from airtune.experiment.kinds import choices
from airtune.experiment.schema import read, write
from airtune.lora import Adapter, AdapterSlice, LoraFactors
from airtune.types import Compressor

SIZES = {"p": (12, 9, 6), "q": (7, 10, 4), "s": (5, 8, 1)}  # in, out, rank
HEAD_BITS = 32 * (2 * 7 + 2)

HOLD = [
    Soft(0.5),
    Soft(0.4, importance="sum"),
    Soft(0.4, importance="change"),
    Soft(0.6, scope="pooled"),
    Soft(0.5, values=Stochastic(4, group=8)),
    Soft(0.5, values=FloatingPoint("fp16")),
    TopK(0.1),
    TopK(0.6),
    RowTopK(0.5),
    RandomComponents(0.5),
    Quantized(8),
    Quantized(4, group=16),
    ErrorFeedback(TopK(0.2)),
    ErrorFeedback(Soft(0.3)),
    ErrorFeedback(Quantized(4)),
]
ZERO = [
    Soft(0.5, fill="zero"),
    Soft(0.6, fill="zero", scope="pooled"),
    TopK(0.3, fill="zero"),
    RowTopK(0.5, fill="zero"),
    RandomComponents(0.5, fill="zero"),
]
LOW_RANK = [LowRank(0.5), LowRank(0.5, FloatingPoint("fp16"))]
ALL = [*HOLD, *ZERO, *LOW_RANK]
each_codec = pytest.mark.parametrize("codec", ALL, ids=lambda c: f"{type(c).__name__}-{ALL.index(c)}")


def adapter_of(seed=0, *, core=False, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=draw).to(dtype)

    factors = {
        name: LoraFactors(normal(rank, i), normal(o, rank), 2.0, core=normal(rank, rank) if core else None)
        for name, (i, o, rank) in SIZES.items()
    }
    extras = {"head.weight": normal(2, 7), "head.bias": normal(2)}
    return Adapter(factors, {n: (n,) for n in factors}, {n: k for k, n in enumerate(factors)}, 3, extras)


def moved(adapter, seed=7, size=0.3):
    """Return what training may make of an adapter."""
    other = adapter_of(seed)
    factors = {
        n: LoraFactors(f.A + size * other.factors[n].A.to(f.A), f.B + size * other.factors[n].B.to(f.B), f.scaling)
        for n, f in adapter.factors.items()
    }
    return adapter.with_factors(factors, {n: t + 1.0 for n, t in adapter.extras.items()})


@st.composite
def parts(draw, both=False):
    chosen = {
        name: np.array(sorted(draw(st.sets(st.integers(0, rank - 1)))), dtype=np.int64)
        for name, (_, _, rank) in SIZES.items()
    }
    tensors = draw(st.sampled_from([frozenset("AB"), *([] if both else [frozenset("A"), frozenset("B"), frozenset()])]))
    return AdapterSlice(chosen, tensors, extras=draw(st.booleans()))


def sent(codec, part, trained, start, memory=None, seed=0):
    rng = np.random.default_rng(seed)
    payload, memory = codec.encode(part, part.take(trained), part.take(start), memory or {}, rng)
    return payload, codec.decode(part, payload, part.take(start)), memory


@each_codec
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_bits_are_those_of_what_is_serialised_and_within_the_bound(codec, data):
    part = data.draw(parts(both=isinstance(codec, LowRank)))
    start = adapter_of()
    payload, arrived, _ = sent(codec, part, moved(start), start)
    assert payload.bits == 8 * sum(array.nbytes for array in payload.arrays.values())
    bound = codec.bits(part, start.shape)
    pooled = getattr(codec, "scope", "slot") == "pooled"
    assert payload.bits <= bound if pooled else payload.bits == bound
    assert arrived.shape == part.take(start).shape


@each_codec
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_what_the_slice_does_not_name_stays_and_the_head_arrives_exactly(codec, data):
    part = data.draw(parts(both=isinstance(codec, LowRank)))
    start = adapter_of()
    trained = moved(start)
    _, arrived, _ = sent(codec, part, trained, start)
    for name, factors in arrived.factors.items():
        before = part.take(start).factors[name]
        assert "A" in part.tensors or torch.equal(factors.A, before.A)
        assert "B" in part.tensors or torch.equal(factors.B, before.B)
        assert factors.scaling == before.scaling
    for name, tensor in arrived.extras.items():
        assert torch.equal(tensor, trained.extras[name])


@each_codec
def test_inputs_are_not_modified_and_precision_is_kept(codec):
    for dtype in (torch.float32, torch.float64):
        start = adapter_of(dtype=dtype)
        trained = moved(start)
        before = [t.clone() for a in (trained, start) for _, _, t in a.tensors()]
        payload, arrived, _ = sent(codec, AdapterSlice.everything(start.shape), trained, start)
        for array in payload.arrays.values():
            array[...] = 0
        after = [t for a in (trained, start) for _, _, t in a.tensors()]
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
        assert all(t.dtype == dtype for _, kind, t in arrived.tensors() if kind != "extra")


@pytest.mark.parametrize("codec", HOLD, ids=lambda c: f"{type(c).__name__}-{HOLD.index(c)}")
def test_with_hold_fill_a_client_that_changed_nothing_changes_nothing(codec):
    start = adapter_of()
    _, arrived, _ = sent(codec, AdapterSlice.everything(start.shape), start, start)
    for (_, _, got), (_, _, was) in zip(arrived.tensors(), start.tensors(), strict=True):
        assert torch.equal(got, was)


@pytest.mark.parametrize("codec", [*HOLD[:4], HOLD[6], HOLD[7], HOLD[8], HOLD[9], *ZERO], ids=repr)
def test_every_value_is_the_trained_one_or_the_fill(codec):
    start = adapter_of()
    trained = moved(start)
    _, arrived, _ = sent(codec, AdapterSlice.everything(start.shape), trained, start)
    fill = 0.0 if codec.fill == "zero" else 1.0
    share = []
    for name, factors in arrived.factors.items():
        for kind in ("A", "B"):
            got, new, old = (getattr(x, kind) for x in (factors, trained.factors[name], start.factors[name]))
            is_new, is_fill = torch.isclose(got, new, atol=1e-6), got == fill * old
            assert bool((is_new | is_fill).all())
            share.append(float(is_new.double().mean()))
    assert 0.0 < sum(share) / len(share) < 0.9


@pytest.mark.parametrize("kind", [Soft, TopK, RowTopK, RandomComponents, LowRank])
@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.1, float("nan")])
def test_a_keep_ratio_that_is_none_is_refused(kind, ratio):
    with pytest.raises(InputError, match=r"compressor\.keep_ratio"):
        kind(ratio)


@pytest.mark.parametrize("kind", [Soft, TopK, RowTopK, RandomComponents])
def test_keep_ratio_one_sends_everything(kind):
    start = adapter_of()
    trained = moved(start)
    for fill in ("hold", "zero"):
        _, arrived, _ = sent(kind(1.0, fill=fill), AdapterSlice.everything(start.shape), trained, start)
        for (_, _, got), (_, _, wanted) in zip(arrived.tensors(), trained.tensors(), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_kept_count_does_not_lose_a_component_to_rounding():
    assert [kept_count(8, i / 8) for i in range(1, 9)] == list(range(1, 9))
    assert [kept_count(49, i / 49) for i in range(1, 50)] == list(range(1, 50))
    assert kept_count(8, 0.01) == 1
    assert kept_count(0, 0.5) == 0


def test_wrong_names_are_refused():
    for make in (
        lambda: Soft(fill="mean"),
        lambda: Soft(importance="random"),
        lambda: Soft(scope="layer"),
        lambda: TopK(fill="mean"),
        lambda: FloatingPoint("fp8"),
        lambda: Stochastic(9),
        lambda: Stochastic(4, group=0),
        lambda: Quantized(1),
        lambda: ErrorFeedback(Soft(fill="zero")),
    ):
        with pytest.raises(InputError, match="valid:"):
            make()


# ------------------------------------------------------------------------------------------------------ top-k and rows


def test_top_k_sends_the_largest_changes_of_each_factor():
    start = adapter_of()
    trained = moved(start)
    _, arrived, _ = sent(TopK(0.25), AdapterSlice.everything(start.shape), trained, start)
    for name, f in arrived.factors.items():
        for kind in ("A", "B"):
            got, new, old = (getattr(x, kind) for x in (f, trained.factors[name], start.factors[name]))
            changed = got != old
            assert int(changed.sum()) == kept_count(old.numel(), 0.25)
            change = (new - old).abs()
            assert float(change[changed].min()) >= float(change[~changed].max())


def test_few_positions_take_fewer_bits_than_a_bitmap():
    start = adapter_of()
    part = AdapterSlice({"p": np.arange(6)}, frozenset("A"), extras=False)  # 72 elements, 7 bits a position
    assert TopK(2 / 72).bits(part, start.shape) == 2 * 32 + 16  # 14 bits of positions, in whole bytes
    assert TopK(0.5).bits(part, start.shape) == 36 * 32 + 72


def test_rows_chosen_separately_leave_only_the_intersection_in_the_product():
    a, b = torch.eye(4), torch.eye(4)
    a[:2] *= 10.0  # the largest rows of A ...
    b[:, 2:] *= 10.0  # ... meet the smallest columns of B
    trained = Adapter({"p": LoraFactors(a, b, 1.0)}, {"p": ("p",)}, {"p": 0}, 1)
    part = AdapterSlice.everything(trained.shape)
    _, separate, _ = sent(RowTopK(0.5, fill="zero"), part, trained, trained)
    _, paired, _ = sent(Soft(0.5, fill="zero"), part, trained, trained)
    assert separate.module_product("p").abs().sum() == 0.0
    assert int((paired.module_product("p").diagonal() != 0).sum()) == 2


def test_random_components_are_uniform_and_paired():
    start = adapter_of()
    trained, part = moved(start), AdapterSlice.everything(start.shape)
    counts = np.zeros(6)
    for seed in range(600):
        _, arrived, _ = sent(RandomComponents(0.5), part, trained, start, seed=seed)
        f, old = arrived.factors["p"], start.factors["p"]
        rows, columns = (f.A != old.A).any(1), (f.B != old.B).any(0)
        assert torch.equal(rows, columns)
        counts += rows.numpy()
    assert np.all(np.abs(counts / 600 - 0.5) < 4 * 0.5 / np.sqrt(600))


# -------------------------------------------------------------------------------------------------------- quantisation


@given(st.integers(1, 12), st.lists(st.integers(0, 2**32), max_size=50))
def test_packed_integers_come_back(width, numbers):
    values = np.array(numbers, dtype=np.int64) % 2**width
    packed = pack_integers(values, width)
    assert packed.nbytes == -(-len(values) * width // 8)
    assert np.array_equal(unpack_integers(packed, width, len(values)), values)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_stochastic_rounding_is_unbiased_and_within_one_step(bits):
    """The mean of 4,000 draws is within 5 standard errors of the value, for every one of 40 values."""
    coder, draws = Stochastic(bits, group=16), 4000
    values = np.random.default_rng(1).normal(size=40).astype(np.float32)
    step = np.repeat([np.abs(values[i : i + 16]).max() for i in range(0, 40, 16)], 16)[:40] / coder.levels
    found = np.array(
        [coder.unpack(coder.pack(values, np.random.default_rng(seed)), 40) for seed in range(draws)], dtype=np.float64
    )
    assert np.all(np.abs(found - values) <= step * (1 + 1e-5))
    assert np.all(np.abs(found.mean(axis=0) - values) < 5 * 0.5 * step / np.sqrt(draws) + 1e-6)


def test_zeros_and_no_values_survive_quantisation():
    coder, rng = Stochastic(4), np.random.default_rng(0)
    for size in (0, 1, 256, 257):
        arrays = coder.pack(np.zeros(size, dtype=np.float32), rng)
        assert not coder.unpack(arrays, size).any()
        assert 8 * sum(a.nbytes for a in arrays.values()) == coder.size_bits(size)


def test_quantised_bits():
    start = adapter_of()
    part = AdapterSlice.everything(start.shape)
    numbers = sum(rank * (i + o) for i, o, rank in SIZES.values())
    assert Quantized(4).bits(part, start.shape) == 8 * -(-numbers * 4 // 8) + 32 * -(-numbers // 256) + HEAD_BITS


def test_fp16_says_when_a_value_is_too_large():
    with pytest.raises(NoResultError, match="fp16"):
        FloatingPoint("fp16").pack(np.array([1e6], dtype=np.float32), np.random.default_rng(0))


# -------------------------------------------------------------------------------------------------------- low rank


def test_low_rank_is_the_best_approximation_of_each_product():
    start = adapter_of(3)
    trained = moved(start)
    _, arrived, _ = sent(LowRank(0.5), AdapterSlice.everything(start.shape), trained, start)
    for name, factors in trained.factors.items():
        dense = factors.product().double()
        singular = torch.linalg.svdvals(dense)
        rank = kept_count(factors.rank, 0.5)
        error = (arrived.factors[name].product().double() - dense).square().sum()
        assert float(error) == pytest.approx(float(singular[rank:].square().sum()), rel=1e-4, abs=1e-6)


def test_alignment_leaves_the_product_and_finds_the_servers_own_components():
    like = adapter_of(5).factors["p"]
    q = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    found = aligned(q.T @ like.A.double(), like.B.double() @ q, like)
    torch.testing.assert_close(found.A, like.A)
    torch.testing.assert_close(found.B, like.B)
    part = aligned(like.A[:3], like.B[:, :3], like)
    torch.testing.assert_close(part.product(), 2.0 * like.B[:, :3] @ like.A[:3])


def test_low_rank_needs_both_factors_and_no_core():
    start = adapter_of()
    with pytest.raises(InputError, match="both factors"):
        LowRank().bits(AdapterSlice.everything(start.shape, frozenset("B")), start.shape)
    cored = adapter_of(core=True)
    with pytest.raises(InputError, match="core"):
        LowRank().bits(AdapterSlice.everything(cored.shape), cored.shape)


# -------------------------------------------------------------------------------------------------------- feedback


@pytest.mark.parametrize("inner", [TopK(0.1), Soft(0.3), Quantized(2), RowTopK(0.2), RandomComponents(0.3)], ids=repr)
def test_with_error_feedback_everything_arrives_in_the_end(inner):
    """A client that changes by the same amount every round: what arrived in n rounds differs from n changes by the
    present residual, exactly, and the residual stays bounded, so that the share that arrives tends to one."""
    start, part = adapter_of(), AdapterSlice.everything(adapter_of().shape)
    trained, memory, total = moved(start), {"own/x": torch.ones(1)}, None
    rounds = 60
    for index in range(rounds):
        _, arrived, memory = sent(ErrorFeedback(inner), part, trained, start, memory, seed=index)
        change = arrived.factors["p"].A - start.factors["p"].A
        total = change if total is None else total + change
    step = trained.factors["p"].A - start.factors["p"].A
    torch.testing.assert_close(total + memory["feedback/A/p"], rounds * step, rtol=1e-4, atol=1e-4)
    assert float((total / rounds - step).norm()) < 0.5 * float(step.norm())
    assert torch.equal(memory["own/x"], torch.ones(1))


def test_the_residual_follows_components_through_changing_slices():
    start = adapter_of()
    trained, codec = moved(start), ErrorFeedback(TopK(0.2))
    first = AdapterSlice({"p": np.array([1, 4])}, extras=False)
    _, _, memory = sent(codec, first, trained, start)
    other = AdapterSlice({"p": np.array([0, 4, 5])}, extras=False)
    wanted = trained.factors["p"].A[[0, 4, 5]].clone()
    wanted[1] += memory["feedback/A/p"][4]
    _, arrived, after = sent(codec, other, trained, start, memory)
    torch.testing.assert_close(arrived.factors["p"].A + after["feedback/A/p"][[0, 4, 5]], wanted)
    assert torch.equal(after["feedback/A/p"][1], memory["feedback/A/p"][1])


# -------------------------------------------------------------------------------------------------------- configuration


def test_experiments_find_every_codec_by_its_name():
    names = choices()[Compressor]
    wanted = {"dense", "soft", "top-k", "row-top-k", "random-components", "quantized", "low-rank", "error-feedback"}
    assert set(names) == wanted


@each_codec
def test_configuration_and_back(codec):
    context = Context(choices=choices())
    plain = write(Compressor, codec, context)
    assert read(Compressor, plain, "compressor", context) == codec


def test_error_feedback_of_an_experiment_does_not_wrap_itself():
    table = {"type": "error-feedback"}
    context = Context(choices=choices(), defaults={Compressor: table})
    assert read(Compressor, table, "compressor", context) == ErrorFeedback()
