"""A job and its result as bytes: equal to the bit after the way there and back, and bad bytes are refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from airtune.compression.dense import Dense
from airtune.compression.error_feedback import ErrorFeedback
from airtune.compression.quantize import Quantized
from airtune.compression.topk import TopK
from airtune.deploy.jobs import (
    Turn,
    pack_job,
    pack_trained,
    pack_turn,
    read_task,
    unpack_job,
    unpack_trained,
    unpack_turn,
    write_task,
)
from airtune.deploy.turn import take_turn
from airtune.errors import InputError, NoResultError
from airtune.lora import ONLY_A, Adapter, AdapterSlice, DenseUpdate, LoraFactors, own_tensors
from airtune.optimizers import GaLore
from airtune.types import Compressor, LocalTraining, Payload, ServerModel, TailPenalty, Trained, TrainingJob
from small_world import AddOne, make_adapter, make_task


def make_job(**changes: object) -> TrainingJob:
    adapter = make_adapter()
    names = list(adapter.factors)
    factors = dict(adapter.factors)
    factors[names[0]] = replace(factors[names[0]], B=factors[names[0]].B.T.contiguous().T, core=torch.eye(4))
    adapter = adapter.with_factors(factors)
    training = LocalTraining(
        local_steps=None, learning_rate=1 / 3, optimizer=GaLore(), penalties=(TailPenalty(0.1, {names[1]: 2}),)
    )
    train = AdapterSlice.sketch(adapter.shape, 2, np.random.default_rng(3))
    task = make_task(2, adapter, train=train, send=replace(train, tensors=ONLY_A), training=training)
    merged = {
        names[0]: LoraFactors(torch.randn(2, 16), torch.randn(16, 2), 1.0),
        names[1]: DenseUpdate(torch.randn(16, 16, dtype=torch.float64)),
    }
    model = ServerModel(adapter, merged, version=7, merged_bits={3: 100, 7: 12})
    job = TrainingJob(task, model, round=5, cycle=1, memory={"own/A/x": torch.randn(3).bfloat16()})
    return replace(job, **changes)


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and first.stride() == second.stride() and torch.equal(first, second)


def test_a_job_comes_back_equal() -> None:
    job = make_job()
    back = unpack_job(pack_job(job))
    assert pack_job(back) == pack_job(job)
    assert (back.round, back.cycle, back.model.version, back.model.merged_bits) == (5, 1, 7, {3: 100, 7: 12})
    assert back.task.training == job.task.training
    assert back.task.send.tensors == ONLY_A and back.task.train.unbiased
    for (owner, kind, tensor), (owner2, kind2, tensor2) in zip(
        job.model.adapter.tensors(), back.model.adapter.tensors(), strict=True
    ):
        assert (owner, kind) == (owner2, kind2)
        assert same(tensor, tensor2), (owner, kind)
    for name, update in job.model.base_update.items():
        assert type(back.model.base_update[name]) is type(update)
        assert same(back.model.base_update[name].product(), update.product())
    assert same(back.memory["own/A/x"], job.memory["own/A/x"])
    for name, indices in job.task.train.components.items():
        assert np.array_equal(back.task.train.components[name], indices)


@pytest.mark.parametrize("compressor", [Dense("bf16"), TopK(0.25), Quantized(4), ErrorFeedback(Quantized(8))])
def test_a_task_keeps_its_compressor(compressor: Compressor) -> None:
    task = make_task(1, make_adapter(), compressor=compressor)
    plain = json.loads(json.dumps(write_task(task)))
    assert read_task(plain).compressor == compressor


def test_results_come_back_with_numbers_that_are_none() -> None:
    values = make_adapter(3)
    back = unpack_trained(pack_trained(Trained(values, {"loss": math.nan, "steps": 3.0, "x": 0.1})))
    assert math.isnan(back.reports["loss"]) and back.reports["x"] == 0.1
    assert all(same(a[2], b[2]) for a, b in zip(values.tensors(), back.values.tensors(), strict=True))
    arrays = {"values": np.arange(5, dtype=np.float32), "codes": np.arange(6, dtype=np.uint8).reshape(2, 3).T}
    turn = unpack_turn(pack_turn(Turn(Payload(arrays, 200), {"own/A/x": torch.ones(2)}, {"loss": 1.5})))
    assert turn.payload.bits == 200 and turn.reports == {"loss": 1.5}
    for name, array in arrays.items():
        assert turn.payload.arrays[name].dtype == array.dtype and np.array_equal(turn.payload.arrays[name], array)


def _changed(change: object) -> bytes:
    """Return a packed job whose JSON went through a function."""
    content = pack_job(make_job())
    length = int.from_bytes(content[:8], "little")
    head = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["airtune"])
    change(head)  # type: ignore[operator]
    from safetensors.torch import load

    return save(load(content), metadata={"airtune": json.dumps(head)})


def _set(*path: str, value: object) -> object:
    def change(head: dict) -> None:
        for key in path[:-1]:
            head = head[key]
        head[path[-1]] = value

    return change


def _of_memory(head: dict) -> dict:
    return head["content"]["memory"]["own/A/x"]


SLOT = next(iter(make_adapter().factors))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("kind", value="trained"), "is 'trained'"),
        (_set("format", value=9), "format 9"),
        (_set("content", "strange", value=1), "unknown key"),
        (_set("content", "round", value="x"), "job.round"),
        (_set("content", "task", "compressor", value={"type": "os.system"}), "unknown name"),
        (_set("content", "task", "train", "components", value={SLOT: [1, 99]}), "components must increase"),
        (_set("content", "task", "train", "outside", value="elsewhere"), "outside"),
        (_set("content", "adapter", "factors", SLOT, "A", value={"name": "77", "order": None}), "no tensor '77'"),
        (_set("content", "adapter", "factors", SLOT, "A", value={"name": "0", "order": [0, 0]}), "are not the axes"),
        (lambda head: head["content"]["adapter"]["factors"][SLOT].update(A=_of_memory(head)), "not the factors"),
        (_set("content", "adapter", "placement", value={"m": ["nothing"]}), "placement"),
        (_set("content", "adapter", "layer", value={}), "layer"),
    ],
)
def test_bytes_that_do_not_fit_are_refused(change: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        unpack_job(_changed(change))


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"\xff" * 64, pack_job(make_job())[:-9]])
def test_bytes_that_are_no_file_are_refused(content: bytes) -> None:
    with pytest.raises(InputError, match="job: cannot be read"):
        unpack_job(content)


def test_a_turn_codes_what_the_simulation_would(tmp_path: object) -> None:
    adapter = make_adapter()
    whole = AdapterSlice.everything(adapter.shape)
    task = make_task(1, adapter, send=replace(whole, tensors=ONLY_A), compressor=ErrorFeedback(TopK(0.5)))
    job = TrainingJob(task, ServerModel(adapter), round=1)
    first = take_turn(AddOne(), job, seed=0)
    assert first.payload.bits <= task.compressor.bits(task.send, adapter.shape)
    trained = AddOne().train([job])[0]
    for name, tensor in own_tensors(task.train, task.send, trained.values).items():
        assert torch.equal(first.memory[name], tensor)
    again = take_turn(AddOne(), replace(job, round=2, memory=first.memory), seed=0)
    name = next(name for name in first.memory if name.startswith("own/"))
    assert torch.equal(again.memory[name], first.memory[name] + 1.0)  # went on from its own, not from the server's


class Unread(TopK):
    """A codec whose payloads only the server reads."""

    def decode(self, *_: object) -> Adapter:
        raise AssertionError("a device decodes only where the codec drops components and says how much")


def test_a_device_does_not_decode_what_it_sends() -> None:
    adapter = make_adapter()
    job = TrainingJob(make_task(1, adapter, compressor=Unread(0.5)), ServerModel(adapter), round=1)
    assert take_turn(AddOne(), job, seed=0).payload.bits > 0


def test_a_diverged_turn_is_no_result() -> None:
    job = TrainingJob(make_task(1, make_adapter()), ServerModel(make_adapter()), round=1)
    with pytest.raises(NoResultError, match="diverged"):
        take_turn(AddOne(diverging=frozenset({1})), job, seed=0)


def test_the_file_is_plain_safetensors(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("jobs") / "job.safetensors"
    path.write_bytes(pack_job(make_job()))
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["airtune"])["kind"] == "job"
