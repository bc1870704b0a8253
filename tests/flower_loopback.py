"""A grid without processes: messages go straight to devices, and a test may spoil what comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flwr.app import Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from airtune.deploy.flower.device import device_of
from airtune.deploy.flower.options import ServerOptions
from airtune.deploy.flower.probe import answer

Spoil = Callable[["Delivery"], Any]  # a message, several, or None


@dataclass
class Delivery:
    """One message at a device: `answer()` does what the device does."""

    grid: LoopbackGrid
    node: int
    message: Message

    @property
    def kind(self) -> str:
        return self.message.metadata.message_type

    @property
    def round(self) -> int:
        return int(self.message.metadata.group_id) if self.kind == "train" else 0

    def answer(self) -> Message:
        config = {"experiment": self.grid.options.experiment, "method": self.grid.options.method}
        device = device_of({**config, "overrides": self.grid.options.overrides}, self.grid.nodes[self.node])
        state = self.grid.states.setdefault(self.node, RecordDict())
        if self.kind == "query.facts":
            return self.reply(device.facts(measure=False))
        if self.kind == "query.probe":
            return self.reply(answer(self.message.content))
        if self.kind == "evaluate":
            return self.reply(device.evaluate(self.message.content, state))
        return self.reply(device.train(self.message.content, state, 0.0))

    def reply(self, content: RecordDict) -> Message:
        return Message(content, reply_to=self.message)

    def error(self, reason: str) -> Message:
        return Message(Error(2, reason), reply_to=self.message)


@dataclass
class LoopbackGrid:
    """An `airtune.deploy.flower.mail.Carrier`; `spoil` sees a delivery and returns what comes back, None: nothing."""

    options: ServerOptions
    nodes: dict[int, Mapping[str, Any]]
    spoil: Spoil = Delivery.answer
    states: dict[int, RecordDict] = field(default_factory=dict)
    sent: list[Message] = field(default_factory=list)
    back: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # as in a ServerApp's process

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        identities: list[str] = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            identities.append(message.object_id)
            self.sent.append(message)
            answer = self.spoil(Delivery(self, message.metadata.dst_node_id, message))
            self.back += answer if isinstance(answer, list) else [answer] if answer is not None else []
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        asked = set(message_ids)
        found = [message for message in self.back if message.metadata.reply_to_message_id in asked]
        self.back = [message for message in self.back if message not in found]
        return found


def options_for(path: Path, out: Path, **changes: Any) -> ServerOptions:
    """Return options of a quick run: plans as in simulation, devices do not measure themselves."""
    given = ServerOptions(
        experiment=str(path), out=str(out), observe="simulated", measure=False, poll_seconds=0.01, wait_seconds=60.0
    )
    return replace(given, **changes)


def fleet_of_nodes(count: int, **config: Any) -> dict[int, Mapping[str, Any]]:
    """Return nodes with large numbers for names, in another order than their clients."""
    return {2**62 + 977 * (count - client): {"partition-id": client, **config} for client in range(count)}
