"""A training job, and what came out of it, as bytes: one safetensors file whose header holds JSON.

`pack` and `unpack` of a `TrainingJob`, a `Trained` or a `Turn` give an equal object: the same bits, in the same memory
order. Nothing is pickled. What comes in is read against the dataclasses below, field by field, and no name in it is
ever looked up as a class but those of the penalties, optimizers and compressors that an experiment file may name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np

from airtune.deploy.tensors import Entry, TensorTable
from airtune.errors import InputError
from airtune.experiment.hints import Context, Plain
from airtune.experiment.kinds import choices
from airtune.experiment.schema import read_dataclass, write_dataclass
from airtune.lora import Adapter, AdapterSlice, DenseUpdate, Factor, LoraFactors, MergedUpdate
from airtune.types import ClientTask, Compressor, LocalTraining, Payload, ServerModel, Trained, TrainingJob

if TYPE_CHECKING:
    from torch import Tensor

Wire = TypeVar("Wire")


@dataclass(frozen=True)
class Turn:
    """What a client hands over after its local training.

    payload : the coded upload. memory : the client's new private tensors. reports : scalars that it measured.
    """

    payload: Payload
    memory: Mapping[str, Tensor]
    reports: Mapping[str, float]


def pack_job(job: TrainingJob) -> bytes:
    """Return a job as bytes; its whole model goes with it."""
    tensors = TensorTable()
    wire = _Job(
        task=_write_task(job.task),
        adapter=_write_adapter(job.model.adapter, tensors),
        base_update={name: _write_merged(update, tensors) for name, update in job.model.base_update.items()},
        version=job.model.version,
        merged_bits=job.model.merged_bits,
        round=job.round,
        cycle=job.cycle,
        memory={name: tensors.add(tensor) for name, tensor in job.memory.items()},
    )
    return tensors.file("job", write_dataclass(wire, _context()))


def unpack_job(content: bytes) -> TrainingJob:
    """Return the job of some bytes.

    Raises
    ------
    InputError : they are not a job, or its parts do not fit together.
    """
    tensors, plain = TensorTable.read("job", content)
    wire = _read(_Job, plain, "job")
    model = ServerModel(
        adapter=_read_adapter(wire.adapter, tensors, "job.adapter"),
        base_update={name: _read_merged(update, tensors, name) for name, update in wire.base_update.items()},
        version=wire.version,
        merged_bits=dict(wire.merged_bits),
    )
    task = _read_task(wire.task)
    for name, part in (("receive", task.receive), ("train", task.train), ("send", task.send)):
        if violations := part.violations(model.adapter.shape):
            raise InputError(f"job.task.{name}: {violations[0]}")
    memory = {name: tensors.tensor(entry, f"job.memory.{name}") for name, entry in wire.memory.items()}
    return TrainingJob(task, model, wire.round, wire.cycle, memory)


def pack_trained(trained: Trained) -> bytes:
    """Return the result of a job as bytes."""
    tensors = TensorTable()
    wire = _Trained(_write_adapter(trained.values, tensors), _write_reports(trained.reports))
    return tensors.file("trained", write_dataclass(wire))


def unpack_trained(content: bytes) -> Trained:
    """Return the result of some bytes; errors as in `unpack_job`."""
    tensors, plain = TensorTable.read("trained", content)
    wire = _read(_Trained, plain, "trained")
    return Trained(_read_adapter(wire.values, tensors, "trained.values"), _read_reports(wire.reports))


def pack_turn(turn: Turn) -> bytes:
    """Return a client's turn as bytes."""
    tensors = TensorTable()
    wire = _Turn(
        arrays={name: tensors.add_array(array) for name, array in turn.payload.arrays.items()},
        bits=turn.payload.bits,
        memory={name: tensors.add(tensor) for name, tensor in turn.memory.items()},
        reports=_write_reports(turn.reports),
    )
    return tensors.file("turn", write_dataclass(wire))


def unpack_turn(content: bytes) -> Turn:
    """Return the turn of some bytes; errors as in `unpack_job`."""
    tensors, plain = TensorTable.read("turn", content)
    wire = _read(_Turn, plain, "turn")
    arrays = {name: tensors.tensor(entry, f"turn.arrays.{name}").numpy() for name, entry in wire.arrays.items()}
    memory = {name: tensors.tensor(entry, f"turn.memory.{name}") for name, entry in wire.memory.items()}
    return Turn(Payload(arrays, wire.bits), memory, _read_reports(wire.reports))


# ---------------------------------------------------------------------------------------------------- slices and tasks


@dataclass(frozen=True)
class Slice:
    """An `AdapterSlice` in plain types."""

    components: Mapping[str, tuple[int, ...]]
    tensors: tuple[Factor, ...]
    unbiased: bool
    outside: Literal["absent", "frozen"]
    extras: bool


@dataclass(frozen=True)
class _Task:
    client: int
    receive: Slice
    train: Slice
    send: Slice
    training: LocalTraining
    compressor: Compressor
    bandwidth: float
    transmit_power: float
    probability: float


def write_slice(part: AdapterSlice) -> Slice:
    """Return a slice in plain types."""
    return Slice(
        components={name: tuple(int(index) for index in indices) for name, indices in part.components.items()},
        tensors=tuple(sorted(part.tensors)),
        unbiased=part.unbiased,
        outside=part.outside,
        extras=part.extras,
    )


def read_slice(wire: Slice) -> AdapterSlice:
    """Return the slice of plain types."""
    components = {name: np.array(indices, dtype=np.int64) for name, indices in wire.components.items()}
    return AdapterSlice(components, frozenset(wire.tensors), wire.unbiased, wire.outside, wire.extras)


def write_task(task: ClientTask) -> Plain:
    """Return a task as JSON data."""
    return write_dataclass(_write_task(task), _context())


def read_task(plain: Plain) -> ClientTask:
    """Return the task of JSON data; InputError names the field that is wrong."""
    return _read_task(_read(_Task, plain, "task"))


def _write_task(task: ClientTask) -> _Task:
    return _Task(
        client=task.client,
        receive=write_slice(task.receive),
        train=write_slice(task.train),
        send=write_slice(task.send),
        training=task.training,
        compressor=task.compressor,
        bandwidth=float(task.bandwidth),
        transmit_power=float(task.transmit_power),
        probability=float(task.probability),
    )


def _read_task(wire: _Task) -> ClientTask:
    return ClientTask(
        client=wire.client,
        receive=read_slice(wire.receive),
        train=read_slice(wire.train),
        send=read_slice(wire.send),
        training=wire.training,
        compressor=wire.compressor,
        bandwidth=wire.bandwidth,
        transmit_power=wire.transmit_power,
        probability=wire.probability,
    )


# ------------------------------------------------------------------------------------------------------------- adapters


@dataclass(frozen=True)
class _Factors:
    A: Entry
    B: Entry
    scaling: float
    core: Entry | None


@dataclass(frozen=True)
class _Merged:
    factors: _Factors | None
    matrix: Entry | None


@dataclass(frozen=True)
class _Adapter:
    factors: Mapping[str, _Factors]
    placement: Mapping[str, tuple[str, ...]]
    layer: Mapping[str, int]
    num_layers: int
    extras: Mapping[str, Entry]


@dataclass(frozen=True)
class _Job:
    task: _Task
    adapter: _Adapter
    base_update: Mapping[str, _Merged]
    version: int
    merged_bits: Mapping[int, int]
    round: int
    cycle: int
    memory: Mapping[str, Entry]


@dataclass(frozen=True)
class _Trained:
    values: _Adapter
    reports: Mapping[str, str]


@dataclass(frozen=True)
class _Turn:
    arrays: Mapping[str, Entry]
    bits: int
    memory: Mapping[str, Entry]
    reports: Mapping[str, str]


def _write_factors(factors: LoraFactors, tensors: TensorTable) -> _Factors:
    core = None if factors.core is None else tensors.add(factors.core)
    return _Factors(tensors.add(factors.A), tensors.add(factors.B), float(factors.scaling), core)


def _read_factors(wire: _Factors, tensors: TensorTable, where: str) -> LoraFactors:
    a, b = tensors.tensor(wire.A, where), tensors.tensor(wire.B, where)
    core = None if wire.core is None else tensors.tensor(wire.core, where)
    rank = a.shape[0] if a.dim() == 2 else -1
    fits = b.dim() == 2 and b.shape[1] == rank and a.is_floating_point() and b.is_floating_point()
    if not (fits and (core is None or tuple(core.shape) == (rank, rank))):
        raise InputError(f"{where}: A {list(a.shape)} and B {list(b.shape)} are not the factors of one product")
    return LoraFactors(a, b, wire.scaling, core)


def _write_adapter(adapter: Adapter, tensors: TensorTable) -> _Adapter:
    return _Adapter(
        factors={name: _write_factors(factors, tensors) for name, factors in adapter.factors.items()},
        placement=adapter.placement,
        layer=adapter.layer,
        num_layers=adapter.num_layers,
        extras={name: tensors.add(tensor) for name, tensor in adapter.extras.items()},
    )


def _read_adapter(wire: _Adapter, tensors: TensorTable, where: str) -> Adapter:
    if set(wire.layer) != set(wire.factors):
        raise InputError(f"{where}.layer: must name exactly the slots of the factors")
    if strangers := {slot for slots in wire.placement.values() for slot in slots} - set(wire.factors):
        raise InputError(f"{where}.placement: {sorted(strangers)} are not among the factors")
    return Adapter(
        factors={name: _read_factors(f, tensors, f"{where}.factors.{name}") for name, f in wire.factors.items()},
        placement=dict(wire.placement),
        layer=dict(wire.layer),
        num_layers=wire.num_layers,
        extras={name: tensors.tensor(entry, f"{where}.extras.{name}") for name, entry in wire.extras.items()},
    )


def _write_merged(update: MergedUpdate, tensors: TensorTable) -> _Merged:
    if isinstance(update, DenseUpdate):
        return _Merged(None, tensors.add(update.matrix))
    return _Merged(_write_factors(update, tensors), None)


def _read_merged(wire: _Merged, tensors: TensorTable, name: str) -> MergedUpdate:
    where = f"job.base_update.{name}"
    if wire.factors is not None:
        return _read_factors(wire.factors, tensors, where)
    if wire.matrix is None:
        raise InputError(f"{where}: has neither factors nor a matrix")
    matrix = tensors.tensor(wire.matrix, where)
    if matrix.dim() != 2 or not matrix.is_floating_point():
        raise InputError(f"{where}: {list(matrix.shape)} is not the shape of a matrix")
    return DenseUpdate(matrix)


# ----------------------------------------------------------------------------------------------------------- small ones


def _write_reports(reports: Mapping[str, float]) -> Mapping[str, str]:
    """Return numbers as hexadecimal text, which is exact and has a word for "not a number"."""
    return {name: float(value).hex() for name, value in reports.items()}


def _read_reports(wire: Mapping[str, str]) -> dict[str, float]:
    try:
        return {name: float.fromhex(text) for name, text in wire.items()}
    except (ValueError, OverflowError) as error:
        raise InputError(f"reports: {error}; valid: hexadecimal numbers") from error


def _read(kind: type[Wire], plain: Any, where: str) -> Wire:
    return cast("Wire", read_dataclass(kind, plain, where, _context()))


def _context() -> Context:
    return Context(choices=choices())
