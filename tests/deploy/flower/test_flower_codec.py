"""Numbers on the wire: the same bits back, the bits that were counted, and nothing that does not say what it is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from hypothesis import given
from hypothesis import strategies as st

from airtune.compression.dense import Dense
from airtune.compression.error_feedback import ErrorFeedback
from airtune.compression.lowrank import LowRank
from airtune.compression.quantize import Quantized
from airtune.compression.soft import Soft
from airtune.compression.topk import RandomComponents, RowTopK, TopK
from airtune.compression.values import Stochastic
from airtune.deploy.flower.codec import (
    ARRAY_HEADER_BYTES,
    MESSAGE_HEADER_BYTES,
    REQUEST_HEADER_BYTES,
    STYPE,
    PayloadError,
    data_bits,
    from_array,
    from_record,
    tensor_from_array,
    tensor_to_array,
    to_array,
    to_record,
)
from airtune.deploy.flower.replies import OK, Reply, check_address, checked_update, read_reply, write_reply
from airtune.deploy.flower.requests import Address, model_of, read_request, write_request
from airtune.lora import ONLY_B, Adapter, AdapterSlice, DenseUpdate, LoraFactors
from airtune.types import ClientTask, Payload, ServerModel
from small_world import make_adapter, make_task

CODECS = (
    Dense(),
    Dense("bf16"),
    Dense("fp16"),
    TopK(0.1),
    TopK(0.3, values=Stochastic(4)),
    RowTopK(0.5),
    RandomComponents(0.5),
    Soft(0.5),
    Quantized(3),
    LowRank(0.5),
    ErrorFeedback(TopK(0.2)),
)
DTYPES = ("float16", "float32", "float64", "uint8", "int8", "uint16", "int16", "int32", "int64")


def moved(adapter: Adapter, size: float = 0.1) -> Adapter:
    generator = torch.Generator().manual_seed(1)

    def away(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + size * torch.randn(tensor.shape, generator=generator)

    factors = {name: replace(f, A=away(f.A), B=away(f.B)) for name, f in adapter.factors.items()}
    return adapter.with_factors(factors, {name: away(tensor) for name, tensor in adapter.extras.items()})


def coded(task: ClientTask, adapter: Adapter) -> Payload:
    start = task.send.take(adapter)
    return task.compressor.encode(task.send, moved(start), start, {}, np.random.default_rng(0))[0]


# -- arrays ------------------------------------------------------------------------------------------------------------


@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3), st.integers(0, 2**32 - 1))
def test_every_array_comes_back_bit_by_bit(dtype: str, shape: list[int], seed: int) -> None:
    raw = np.random.default_rng(seed).bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize)
    values = np.frombuffer(raw, dtype=dtype).reshape(shape)
    back = from_array(to_array(values))
    assert back.dtype == values.dtype and back.shape == values.shape and back.tobytes() == values.tobytes()
    assert len(to_array(values).data) == values.nbytes


def test_bfloat16_keeps_its_bits_where_flower_refuses_it() -> None:
    tensor = torch.randn(5, 3).bfloat16()
    with pytest.raises(TypeError):
        Array(tensor)
    array = tensor_to_array(tensor)
    assert array.dtype == "bfloat16" and len(array.data) == 2 * 15
    assert torch.equal(tensor_from_array(array), tensor) and tensor_from_array(array).dtype is torch.bfloat16


@pytest.mark.parametrize(
    "array",
    [
        Array("float32", (2,), "numpy.ndarray", b"\x93NUMPY--"),
        Array("float32", (2,), STYPE, b"\0" * 7),
        Array("float32", (-2, -1), STYPE, b"\0" * 8),
        Array("object", (1,), STYPE, b"\0" * 8),
        Array("float32", (2**62, 4), STYPE, b""),
    ],
)
def test_an_array_that_is_not_what_it_says_is_refused(array: Array) -> None:
    with pytest.raises(PayloadError):
        from_array(array)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_bytes_on_the_wire_are_the_counted_bits_and_a_bounded_header(codec: object) -> None:
    adapter = make_adapter()
    task = make_task(0, adapter, compressor=codec)
    payload = coded(task, adapter)
    assert data_bits(payload.arrays) == payload.bits <= task.compressor.bits(task.send, adapter.shape)
    reports = {f"report-{index}": 1.0 for index in range(8)}
    content = write_reply(Reply(OK, 0, 1, payload=payload, reports=reports, app_seconds=1.0))
    assert from_record(content.array_records["update"]).keys() == payload.arrays.keys()
    on_wire = sum(len(found.deflate()) for found in get_all_nested_objects(content).values())
    header = on_wire - payload.bits // 8
    assert 0 < header <= len(payload.arrays) * ARRAY_HEADER_BYTES + MESSAGE_HEADER_BYTES


# -- requests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensors", [None, ONLY_B])
def test_a_request_gives_the_client_the_servers_model_for_the_counted_bits(tensors: object) -> None:
    old = make_adapter()
    new = moved(old)
    whole = AdapterSlice.everything(old.shape)
    receive = whole if tensors is None else replace(whole, tensors=tensors)
    factors = {name: replace(f, A=old.factors[name].A) for name, f in new.factors.items()} if tensors else new.factors
    model = ServerModel(new.with_factors(factors), version=3)
    task = make_task(1, old, receive=receive)
    sent = write_request(task, model, Address(4, 0, 2), held=0)
    assert sent.bits == 32 * receive.num_values(old.shape)
    on_wire = sum(len(found.deflate()) for found in get_all_nested_objects(sent.content).values())
    assert 0 < on_wire - sent.bits // 8 <= REQUEST_HEADER_BYTES
    request = read_request(sent.content)
    assert (request.address, request.version) == (Address(4, 0, 2), 3)
    assert (request.task.client, request.task.training) == (task.client, task.training)
    found = model_of(request, ServerModel(old))
    assert found is not None and found.version == 3
    for (_, _, ours), (_, _, theirs) in zip(found.adapter.tensors(), model.adapter.tensors(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_client_with_another_model_notices_and_the_whole_model_helps() -> None:
    model = ServerModel(moved(make_adapter()), version=1)
    task = make_task(0, model.adapter, receive=replace(AdapterSlice.everything(model.adapter.shape), tensors=ONLY_B))
    stranger = ServerModel(make_adapter(seed=5))
    part = read_request(write_request(task, model, Address(1), held=0).content)
    assert model_of(part, stranger) is None
    sent = write_request(task, model, Address(1), held=0, whole=True)
    found = model_of(read_request(sent.content), stranger)
    assert found is not None and torch.equal(
        found.adapter.factors[next(iter(found.adapter.factors))].A,
        model.adapter.factors[next(iter(model.adapter.factors))].A,
    )
    assert sent.bits == 32 * AdapterSlice.everything(model.adapter.shape).num_values(model.adapter.shape)


def test_merges_travel_when_the_client_has_missed_them_and_other_ranks_fit() -> None:
    adapter = make_adapter()
    names = list(adapter.factors)
    merged = {
        names[0]: LoraFactors(torch.randn(2, 16), torch.randn(16, 2), 0.5),
        names[1]: DenseUpdate(torch.randn(16, 16)),
    }
    model = ServerModel(make_adapter(rank=6), merged, version=2, merged_bits={1: 10, 2: 10})
    task = make_task(0, model.adapter)
    sent = write_request(task, model, Address(1), held=1)
    base_bits = 32 * (2 * 16 + 16 * 2 + 16 * 16)
    assert sent.bits == 32 * task.receive.num_values(model.adapter.shape) + base_bits
    found = model_of(read_request(sent.content), ServerModel(adapter))
    assert found is not None
    assert torch.equal(found.base_update[names[1]].product(), merged[names[1]].product())
    nothing_missed = write_request(task, model, Address(1), held=2)
    assert nothing_missed.bits == sent.bits - base_bits
    assert model_of(read_request(nothing_missed.content), ServerModel(adapter)) is None
    assert model_of(read_request(nothing_missed.content), ServerModel(adapter, merged)) is not None


def test_the_same_slice_is_one_object_for_all_clients() -> None:
    model = ServerModel(make_adapter())
    contents = [write_request(make_task(c, model.adapter), model, Address(1), held=0).content for c in (0, 1)]
    first, second = (content.array_records["values"]["values"].object_id for content in contents)
    assert first == second


@pytest.mark.parametrize("change", [{"json": "{"}, {"json": "[]"}, {"other": 1}, {"json": '{"task": {"client": "x"}}'}])
def test_a_request_that_is_none_is_refused(change: dict[str, object]) -> None:
    model = ServerModel(make_adapter())
    content = write_request(make_task(0, model.adapter), model, Address(1), held=0).content
    content["task"] = ConfigRecord(change)
    with pytest.raises(PayloadError):
        read_request(content)


# -- replies -----------------------------------------------------------------------------------------------------------


def spoiled(payload: Payload, change: object) -> Payload:
    values = payload.arrays["values"].copy()
    return Payload({"values": change(values)}, 8 * change(values).nbytes)


def with_nan(values: np.ndarray) -> np.ndarray:
    values[3] = np.nan
    return values


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_nan, "not finite"),
        (lambda values: values * np.float32(1e6), "norm of the change"),
        (lambda values: values[:-1], "cannot be decoded"),
        (lambda values: np.concatenate([values, values]), "more than the bound"),
        (lambda values: values.astype(np.float64)[: len(values) // 2], "cannot be decoded"),
        (lambda values: values.reshape(1, -1), "not flat"),
    ],
)
def test_bad_updates_are_refused_with_their_reason(change: object, reason: str) -> None:
    adapter = make_adapter()
    task = make_task(0, adapter)
    good = coded(task, adapter)
    assert checked_update(good, task, adapter, 100.0).factors.keys() == adapter.factors.keys()
    with pytest.raises(PayloadError, match=reason):
        checked_update(spoiled(good, change), task, adapter, 100.0)


def test_bits_that_are_not_those_of_the_arrays_are_refused() -> None:
    adapter = make_adapter()
    task = make_task(0, adapter)
    good = coded(task, adapter)
    with pytest.raises(PayloadError, match="bits arrived"):
        checked_update(Payload(good.arrays, good.bits - 32), task, adapter, 100.0)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
@given(st.integers(0, 2**32 - 1))
def test_random_bytes_never_end_a_run(codec: object, seed: int) -> None:
    adapter = make_adapter()
    task = make_task(0, adapter, compressor=codec)
    rng = np.random.default_rng(seed)
    good = coded(task, adapter).arrays
    noise = {name: np.frombuffer(rng.bytes(values.nbytes), dtype=values.dtype) for name, values in good.items()}
    try:
        values = checked_update(Payload(noise, data_bits(noise)), task, adapter, 100.0)
    except PayloadError:
        return
    assert all(bool(torch.isfinite(tensor).all()) for _, _, tensor in values.tensors())


@pytest.mark.parametrize(
    "status",
    [
        {},
        {"status": "fine", "client": 0, "round": 1, "cycle": 0, "bits": 1, "app-seconds": 1.0},
        {"status": "ok", "client": "0", "round": 1, "cycle": 0, "bits": 1, "app-seconds": 1.0},
        {"status": "ok", "client": 0, "round": 1, "cycle": 0, "bits": 1, "app-seconds": float("inf")},
    ],
)
def test_a_reply_without_a_valid_status_is_refused(status: dict[str, object]) -> None:
    with pytest.raises(PayloadError):
        read_reply(RecordDict({"status": ConfigRecord(status), "update": ArrayRecord()}))


def test_the_reply_to_other_work_is_refused() -> None:
    adapter = make_adapter()
    reply = read_reply(write_reply(Reply(OK, 2, 1, payload=Payload({}, 0), reports={"loss": 1.0})))
    check_address(reply, make_task(2, adapter), 1, 0)
    for task, round_index, cycle in (
        (make_task(1, adapter), 1, 0),
        (make_task(2, adapter), 2, 0),
        (make_task(2, adapter), 1, 1),
    ):
        with pytest.raises(PayloadError, match="reply is that of client 2"):
            check_address(reply, task, round_index, cycle)


def test_arrays_of_another_kind_do_not_travel() -> None:
    with pytest.raises(TypeError, match="complex64"):
        to_record({"values": np.zeros(2, dtype=np.complex64)})
