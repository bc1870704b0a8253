"""What a client answers, and how the server looks at it before it uses a number of it.

A reply is made by a machine that the server does not control: it may be broken, half-updated, or hostile. So sizes,
dtypes, bits, finiteness, shapes and the norm of the change are checked, in this order, and a reply that fails is kept
out of the round with its reason, which rounds.jsonl names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from airtune.deploy.flower.codec import PayloadError, data_bits, from_record, to_record
from airtune.lora import Adapter
from airtune.types import ClientTask, Payload

UPDATE, REPORTS, STATUS = "update", "reports", "status"  # names of the records of a reply
OK, NEEDS_MODEL, LOST_MEMORY, DIVERGED = "ok", "needs-model", "lost-memory", "diverged"
STATUSES = (OK, NEEDS_MODEL, LOST_MEMORY, DIVERGED)
MOST_REPORTS = 64  # scalars that a client may report [our choice]


@dataclass(frozen=True)
class Reply:
    """What a client answered.

    Attributes
    ----------
    status : one of `STATUSES`.
    client, round, cycle : what it believes it did.
    payload : the coded update, None unless the status is "ok".
    reports : scalars that it measured. app_seconds : from the message's arrival in the app until the answer, s.
    own : whether it keeps tensors of its own that its next training starts from.
    """

    status: str
    client: int
    round: int
    cycle: int = 0
    payload: Payload | None = None
    reports: Mapping[str, float] | None = None
    app_seconds: float = 0.0
    own: bool = False


def write_reply(reply: Reply) -> RecordDict:
    """Return the content of a reply."""
    bits = 0 if reply.payload is None else reply.payload.bits
    words: dict[str, Any] = {"status": reply.status, "client": reply.client, "round": reply.round}
    words.update(cycle=reply.cycle, bits=bits, own=reply.own, **{"app-seconds": float(reply.app_seconds)})
    records: dict[str, Any] = {STATUS: ConfigRecord(words)}
    if reply.payload is not None:
        records[UPDATE] = to_record(reply.payload.arrays)
    if reply.reports is not None:
        records[REPORTS] = MetricRecord({name: float(value) for name, value in reply.reports.items()})
    return RecordDict(records)


def read_reply(content: RecordDict) -> Reply:
    """Return what a reply says; nothing of the payload but its sizes has been looked at.

    Raises
    ------
    PayloadError : it is not a reply of this version.
    """
    words = cast("Mapping[str, Any]", content.config_records.get(STATUS, ConfigRecord()))
    status, seconds = words.get("status"), words.get("app-seconds")
    numbers = [words.get(name) for name in ("client", "round", "cycle", "bits")]
    if status not in STATUSES or not all(type(number) is int for number in numbers):
        raise PayloadError("the reply has no valid status")
    if not isinstance(seconds, float) or not (math.isfinite(seconds) and seconds >= 0.0):
        raise PayloadError("the reply has no valid time")
    client, round_index, cycle, bits = (int(number or 0) for number in numbers)
    payload = None
    if status == OK:
        payload = Payload(from_record(content.array_records.get(UPDATE, {})), bits)
    own = words.get("own") is True
    return Reply(str(status), client, round_index, cycle, payload, _reports(content), seconds, own)


def _reports(content: RecordDict) -> dict[str, float]:
    found = cast("Mapping[str, Any]", content.metric_records.get(REPORTS, MetricRecord()))
    if len(found) > MOST_REPORTS:
        raise PayloadError(f"{len(found)} reports, more than {MOST_REPORTS}")
    for name, value in found.items():
        if not isinstance(value, int | float) or len(name) > 64 or not math.isfinite(value):
            raise PayloadError(f"report {name[:64]!r} is not a finite number")
    return {name: float(value) for name, value in found.items()}


def check_address(reply: Reply, task: ClientTask, round_index: int, cycle: int) -> None:
    """Raise PayloadError if a reply is about other work than it answers."""
    if (reply.client, reply.round, reply.cycle) != (task.client, round_index, cycle):
        raise PayloadError(f"the reply is that of client {reply.client} in round {reply.round}, cycle {reply.cycle}")


def checked_update(payload: Payload, task: ClientTask, model: Adapter, max_norm: float) -> Adapter:
    """Return the decoded update in the coordinates of `task.send`.

    Parameters
    ----------
    model : the adapter that the client started from.
    max_norm : largest Frobenius norm of the whole change (all factors and extras as one vector).

    Raises
    ------
    PayloadError : anything about it is not as it must be.
    """
    bound = task.compressor.bits(task.send, model.shape)
    if data_bits(payload.arrays) != payload.bits:
        raise PayloadError(f"{data_bits(payload.arrays)} bits arrived, the reply says {payload.bits}")
    if payload.bits > bound:
        raise PayloadError(f"{payload.bits} bits, more than the bound of {bound}")
    for name, values in payload.arrays.items():
        _check_finite(name, values)
    start = task.send.take(model)
    try:
        values = task.compressor.decode(task.send, payload, start)
    except Exception as error:  # whatever a codec does with broken bytes, it must not end the run
        raise PayloadError(f"cannot be decoded: {' '.join(str(error).split())[:120]}") from error
    _check_values(values, start, max_norm)
    return values


def _check_finite(name: str, values: NDArray[Any]) -> None:
    if values.ndim != 1 and values.size:
        raise PayloadError(f"array {name[:40]!r} is not flat")
    if np.issubdtype(values.dtype, np.floating) and not bool(np.isfinite(values).all()):
        raise PayloadError("not finite")


def _check_values(values: Adapter, start: Adapter, max_norm: float) -> None:
    """Check shapes, finiteness (bfloat16 is bits until now) and the norm of the change."""
    import torch

    expected = {(owner, kind): tensor for owner, kind, tensor in start.tensors()}
    found = {(owner, kind): tensor for owner, kind, tensor in values.tensors()}
    if {key: tuple(t.shape) for key, t in found.items()} != {key: tuple(t.shape) for key, t in expected.items()}:
        raise PayloadError("wrong shapes")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in found.values()):
        raise PayloadError("not finite")
    square = sum(float((found[key].double() - expected[key].double()).square().sum()) for key in expected)
    if not math.sqrt(square) <= max_norm:
        raise PayloadError(f"the norm of the change is {math.sqrt(square):.3g}, above {max_norm:g}")
