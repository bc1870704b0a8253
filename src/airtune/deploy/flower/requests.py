"""What the server asks and a client reads: one task, the part of the model that the plan counts, and a check.

A train message holds the task as JSON and the `receive` slice as one flat array of fp32 numbers, the bits that the
plan counts. What a client does not receive it knows: from the seed, from an earlier message, or because it is its own.
The message therefore carries a fingerprint of the model that the client must end up with. A client whose model has
another one (it is new, it lost its state, it missed a round) says so, and the same task is sent again with everything
in it; those bits are counted as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from airtune.compression.dense import Dense
from airtune.deploy.flower.codec import PayloadError, from_array, tensor_from_array, tensor_to_array, to_record
from airtune.deploy.jobs import read_task, write_task
from airtune.errors import InputError
from airtune.lora import BOTH, Adapter, AdapterSlice, DenseUpdate, LoraFactors, MergedUpdate
from airtune.types import ClientTask, Payload, ServerModel

if TYPE_CHECKING:
    from torch import Tensor

VALUES, BASE, TASK = "values", "base", "task"  # names of the records of a message
_CODER = Dense("fp32")


@dataclass(frozen=True)
class Address:
    """Which piece of work a message is about.

    round, cycle : of the plan. memory_round : round of the client's last update that the server used, 0 for none: the
    client starts from what it kept after that one. keeps : False in all cycles of a round but the last, in which the
    client's own state is neither used nor changed.
    """

    round: int
    cycle: int = 0
    memory_round: int = 0
    keeps: bool = True


@dataclass(frozen=True)
class Sent:
    """A message's content, and the bits of the model in it."""

    content: RecordDict
    bits: int


@dataclass(frozen=True)
class Request:
    """What a client reads of a train message.

    Attributes
    ----------
    task, address : the work.
    version : of the model. shape : slot -> (rank, scaling) of the model's factors.
    part : what `values` holds. values : flat fp32 numbers of it.
    base : what was merged into the base model so far; None: what the client holds is still right.
    fingerprint : of the model that the client must have.
    """

    task: ClientTask
    address: Address
    version: int
    shape: Mapping[str, tuple[int, float]]
    part: AdapterSlice
    values: NDArray[Any]
    base: Mapping[str, MergedUpdate] | None
    fingerprint: str


# ---------------------------------------------------------------------------------------------------------- the server


def write_request(task: ClientTask, model: ServerModel, address: Address, *, held: int, whole: bool = False) -> Sent:
    """Return the message for one client.

    held : version of the merges that the client holds. whole : send all that the task needs, whatever is known.
    """
    part = everything_in(task.receive) if whole else task.receive
    values, _ = _CODER.encode(part, part.take(model.adapter), model.adapter, {}, np.random.default_rng(0))
    records: dict[str, Any] = {VALUES: to_record(values.arrays)}
    bits, scalings = values.bits, None
    if whole or model.catch_up_bits(held):
        base = {name: tensor_to_array(tensor) for name, tensor in _base_tensors(model.base_update)}
        records[BASE] = ArrayRecord(base)
        bits += 8 * sum(len(array.data) for array in base.values())
        scalings = {name: _scaling(update) for name, update in model.base_update.items()}
    words = {
        "task": write_task(task),
        "round": address.round,
        "cycle": address.cycle,
        "memory_round": address.memory_round,
        "keeps": address.keeps,
        "version": model.version,
        "whole": whole,
        "shape": {name: (f.rank, f.scaling) for name, f in model.adapter.factors.items()},
        "base": scalings,
        "fingerprint": fingerprint(model, task.receive),
    }
    records[TASK] = ConfigRecord({"json": json.dumps(words, separators=(",", ":"), allow_nan=False)})
    return Sent(RecordDict(records), bits)


def everything_in(part: AdapterSlice) -> AdapterSlice:
    """Return the slice with both factors and the extras."""
    return replace(part, tensors=BOTH, extras=True, unbiased=False)


def fingerprint(model: ServerModel, receive: AdapterSlice) -> str:
    """Return a hash of all numbers of a model that a task with this `receive` slice may use."""
    found = hashlib.sha256()
    needed = everything_in(receive).take(model.adapter)
    for name, factors in needed.factors.items():
        found.update(f"{name} {factors.scaling!r} ".encode())
    for owner, kind, tensor in needed.tensors():
        _add(found, f"{owner} {kind}", tensor)
    for name, update in sorted(model.base_update.items()):
        found.update(f"{name} {_scaling(update)!r} ".encode())
    for name, tensor in _base_tensors(model.base_update):
        _add(found, name, tensor)
    return found.hexdigest()


def _add(found: Any, name: str, tensor: Tensor) -> None:
    array = tensor_to_array(tensor)
    found.update(f"{name} {array.dtype} {array.shape} ".encode())
    found.update(array.data)


def _base_tensors(base: Mapping[str, MergedUpdate]) -> Iterator[tuple[str, Tensor]]:
    for name, update in sorted(base.items()):
        if isinstance(update, DenseUpdate):
            yield f"{name}/matrix", update.matrix
            continue
        for kind, tensor in (("A", update.A), ("B", update.B), ("core", update.core)):
            if tensor is not None:
                yield f"{name}/{kind}", tensor


def _scaling(update: MergedUpdate) -> float:
    return 1.0 if isinstance(update, DenseUpdate) else float(update.scaling)


# ---------------------------------------------------------------------------------------------------------- the client


def read_request(content: RecordDict) -> Request:
    """Return what a train message asks.

    Raises
    ------
    PayloadError : it is not a message of this version.
    """
    try:
        words = cast("dict[str, Any]", json.loads(str(content.config_records[TASK]["json"])))
        task = read_task(words["task"])
        base = None if words["base"] is None else _read_base(content.array_records[BASE], words["base"])
        return Request(
            task=task,
            address=Address(int(words["round"]), int(words["cycle"]), int(words["memory_round"]), bool(words["keeps"])),
            version=int(words["version"]),
            shape={name: (int(rank), float(scaling)) for name, (rank, scaling) in words["shape"].items()},
            part=everything_in(task.receive) if words["whole"] else task.receive,
            values=from_array(content.array_records[VALUES]["values"]),
            base=base,
            fingerprint=str(words["fingerprint"]),
        )
    except (KeyError, TypeError, ValueError, InputError) as error:
        raise PayloadError(f"train message: {type(error).__name__}: {error}") from error


def _read_base(arrays: Mapping[str, Array], scalings: Mapping[str, float]) -> dict[str, MergedUpdate]:
    base: dict[str, MergedUpdate] = {}
    for name, scaling in scalings.items():
        if f"{name}/matrix" in arrays:
            base[name] = DenseUpdate(tensor_from_array(arrays[f"{name}/matrix"]))
            continue
        a, b = (tensor_from_array(arrays[f"{name}/{kind}"]) for kind in ("A", "B"))
        core = tensor_from_array(arrays[f"{name}/core"]) if f"{name}/core" in arrays else None
        base[name] = LoraFactors(a, b, scaling, core)
    return base


def model_of(request: Request, held: ServerModel) -> ServerModel | None:
    """Return the model that a message means, given the one that the client holds; None: it lacks something.

    held : of the last message, or the one that follows from the seed.

    Raises
    ------
    PayloadError : the message does not fit the client's adapter.
    """
    if set(request.shape) != set(held.adapter.factors):
        raise PayloadError(f"train message: slots {sorted(request.shape)[:3]} ... are not those of this model")
    adapter = _resized(held.adapter, request.shape)
    if violations := request.part.violations(adapter.shape):
        raise PayloadError(f"train message: receive: {violations[0]}")
    start = request.part.take(adapter)
    try:
        values = _CODER.decode(request.part, Payload({"values": request.values}, 0), start)
    except ValueError as error:
        raise PayloadError(f"train message: {error}") from error
    base = held.base_update if request.base is None else request.base
    model = ServerModel(request.part.put(adapter, values), base, request.version)
    return model if fingerprint(model, request.task.receive) == request.fingerprint else None


def _resized(adapter: Adapter, shape: Mapping[str, tuple[int, float]]) -> Adapter:
    """Return an adapter whose factors have other ranks and scalings; a slot of another rank starts from zero."""
    if all((f.rank, f.scaling) == shape[name] for name, f in adapter.factors.items()):
        return adapter

    def resized(name: str, f: LoraFactors) -> LoraFactors:
        rank, scaling = shape[name]
        if rank == f.rank:
            return replace(f, scaling=scaling)
        a, b = f.A.new_zeros((rank, f.in_features)), f.B.new_zeros((f.out_features, rank))
        core = None if f.core is None else f.core.new_zeros((rank, rank))
        return LoraFactors(a, b, scaling, core)

    return adapter.with_factors({name: resized(name, f) for name, f in adapter.factors.items()})
