"""Messages under way. A reply is known by the message that it answers, never by the node that it seems to come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Protocol

from flwr.app import Message, RecordDict


class Carrier(Protocol):
    """What is needed of Flower's `Grid`."""

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that are connected."""
        ...

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand messages over; one id each."""
        ...

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there."""
        ...


@dataclass
class Mail:
    """Sends and collects.

    Attributes
    ----------
    carrier : Flower's grid.
    open : ids of messages without a reply. strays : ids of messages of which a second reply came.
    """

    carrier: Carrier
    open: set[str] = field(default_factory=set[str])
    strays: list[str] = field(default_factory=list[str])
    _answered: set[str] = field(default_factory=set[str])

    def send(self, node: int, kind: str, content: RecordDict, group: str, seconds: float) -> str | None:
        """Send one message and return its id; None if it could not be handed over.

        group : shown in Flower's logs (the round). seconds : after which nobody may use it any more.
        """
        message = Message(content, dst_node_id=node, message_type=kind, ttl=max(seconds, 1.0), group_id=group)
        identity = next(iter(self.carrier.push_messages([message])), None)
        if identity:
            self.open.add(identity)
        return identity or None

    def collect(self, among: AbstractSet[str] | None = None) -> Mapping[str, Message]:
        """Return what has arrived since the last call: id of our message -> its first reply.

        among : ask for the replies to these messages only; None: to all.
        """
        found: dict[str, Message] = {}
        wanted = self.open if among is None else self.open & among
        if not wanted:
            return found
        for reply in self.carrier.pull_messages(sorted(wanted)):
            answers = reply.metadata.reply_to_message_id
            if answers in found or answers in self._answered or answers not in wanted:
                self.strays.append(answers)
                continue
            found[answers] = reply
        self.open -= set(found)
        self._answered |= set(found)
        return found

    def forget(self, identity: str) -> None:
        """Wait no longer for a reply."""
        self.open.discard(identity)
