"""Flower's messages passed on to the resident trainer: the app process imports no torch and loads no model.

A question is the message's content and the client's own state as Flower serialises them, one after the other; the
answer is the reply's content and the new state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from airtune.deploy.device.client import Device
from airtune.deploy.device.handshake import read_token
from airtune.errors import InputError

Config = Mapping[str, bool | float | int | str]
Kind = Literal["train", "evaluate", "facts"]
QUESTION = "flower"


@dataclass(frozen=True)
class Relay:
    """The way from an app process to the resident trainer of its device.

    device : the trainer. run_config, node_config : of the app's context.
    """

    device: Device
    run_config: Config
    node_config: Config

    def train(self, content: RecordDict, state: RecordDict, received_at: float) -> tuple[RecordDict, RecordDict]:
        """Return the answer to a train message and the client's new state.

        received_at : host seconds when the message came; the clock is that of the whole machine.

        Raises
        ------
        DeviceError : the trainer is not there. InputError : it refuses the message.
        """
        return self._ask("train", content, state, received_at=received_at)

    def evaluate(self, content: RecordDict, state: RecordDict) -> RecordDict:
        """Return the answer to an evaluate message; the state stays as it is. Errors as in `train`."""
        return self._ask("evaluate", content, state)[0]

    def facts(self, *, measure: bool) -> RecordDict:
        """Return what the device says of itself; errors as in `train`."""
        return self._ask("facts", RecordDict(), RecordDict(), measure=measure)[0]

    def _ask(self, kind: Kind, content: RecordDict, state: RecordDict, **words: Any) -> tuple[RecordDict, RecordDict]:
        body, sizes = join([content, state])
        head = {"kind": kind, "sizes": sizes, "run": dict(self.run_config), "node": dict(self.node_config), **words}
        answer = self.device.ask(QUESTION, body, head)
        reply, changed = split(answer.body, answer.head.get("sizes"), 2)
        return reply, changed


def relay_of(run_config: Config, node_config: Config) -> Relay | None:
    """Return the relay that a node's configuration names (``device`` and ``token-file``), None if it names none."""
    address = str(node_config.get("device", ""))
    if not address:
        return None
    token_file = str(node_config.get("token-file", ""))
    token = read_token(Path(token_file).expanduser()) if token_file else None
    return Relay(Device(address, token), run_config, node_config)


def join(records: Sequence[RecordDict]) -> tuple[bytes, list[int]]:
    """Return records as bytes, one after the other, and the size of each."""
    parts = [recorddict_to_proto(record).SerializeToString() for record in records]
    return b"".join(parts), [len(part) for part in parts]


def split(body: bytes, sizes: object, count: int) -> list[RecordDict]:
    """Return the records of some bytes; InputError if the sizes are not theirs."""
    if not isinstance(sizes, list) or len(sizes) != count or not all(type(size) is int for size in sizes):
        raise InputError(f"{QUESTION}: sizes must be {count} whole numbers")
    if min(sizes) < 0 or sum(sizes) != len(body):
        raise InputError(f"{QUESTION}: sizes {sizes} are not those of {len(body)} bytes")
    records: list[RecordDict] = []
    for size in sizes:
        part, body = body[:size], body[size:]
        records.append(_read(part))
    return records


def _read(part: bytes) -> RecordDict:
    from google.protobuf.message import DecodeError

    try:
        return recorddict_from_proto(ProtoRecordDict.FromString(part))
    except (DecodeError, ValueError, TypeError) as error:
        raise InputError(f"{QUESTION}: the records cannot be read ({error})") from error
