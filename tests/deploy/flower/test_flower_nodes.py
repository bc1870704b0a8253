"""Who is there: asked once, refused by name, asked again after leaving; replies of others are left where they are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import pytest

pytest.importorskip("flwr")

from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from airtune.deploy.flower.facts import Facts, write_facts
from airtune.deploy.flower.mail import Mail
from airtune.deploy.flower.nodes import Nodes, first_line
from airtune.deploy.flower.options import DeviceOptions, ServerOptions, read_options
from airtune.errors import InputError, NoResultError

IDENTITY = {"model": "m", "data": "d"}
FACTS = Facts(0, "box", 10, 12.0, False, 1e9, 1e9, 1e6, 1e6, json.dumps(IDENTITY))


@dataclass
class Carrier:
    """Nodes that answer with prepared facts, or with an error."""

    present: dict[int, Facts | str]
    back: list[Message] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

    def get_node_ids(self) -> Iterable[int]:
        return list(self.present)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:
            node = message.metadata.dst_node_id
            message.metadata.__dict__["_message_id"] = message.object_id
            self.asked.append(node)
            facts = self.present[node]
            content = write_facts(facts) if isinstance(facts, Facts) else None
            answer = Message(content, reply_to=message) if content else Message(Error(2, str(facts)), reply_to=message)
            self.back.append(answer)
            yield message.object_id

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = set(message_ids)
        found = [message for message in self.back if message.metadata.reply_to_message_id in wanted]
        self.back = [message for message in self.back if message not in found]
        return found


def nodes_of(carrier: Carrier, clients: int = 3, identity: Mapping[str, str] = IDENTITY) -> Nodes:
    return Nodes(Mail(carrier), clients, identity, measure=False, wait_seconds=0.2)


def test_clients_are_found_whatever_their_nodes_are_called() -> None:
    carrier = Carrier({2**62: replace(FACTS, client=2), 5: FACTS, 9: replace(FACTS, client=1)})
    nodes = nodes_of(carrier)
    nodes.wait(3, 0.01)
    assert [nodes.node_of(client) for client in (0, 1, 2, 3)] == [5, 9, 2**62, None]
    nodes.wait(3, 0.01)
    assert len(carrier.asked) == 3


def test_those_who_leave_are_forgotten_and_asked_again() -> None:
    carrier = Carrier({5: FACTS, 9: replace(FACTS, client=1)})
    nodes = nodes_of(carrier)
    nodes.wait(2, 0.01)
    facts = carrier.present.pop(5)
    nodes.update()
    assert list(nodes.facts()) == [1]
    carrier.present[5] = facts
    nodes.wait(2, 0.01)
    assert carrier.asked.count(5) == 2 and nodes.node_of(0) == 5


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (replace(FACTS, identity=json.dumps({"model": "other", "data": "d"})), "its model differ"),
        (replace(FACTS, identity="[]"), "its model, data differ"),
        (replace(FACTS, identity="{"), "its model, data differ"),
        (replace(FACTS, client=3), "the experiment has clients 0 to 2"),
        ("Traceback\n  ...\nInputError: partition-id: is missing", "partition-id: is missing"),
    ],
)
def test_strangers_are_refused_with_a_reason(answer: Facts | str, reason: str) -> None:
    nodes = nodes_of(Carrier({5: answer}))
    with pytest.raises(NoResultError, match=reason):
        nodes.wait(1, 0.01)


def test_a_resumed_run_goes_on_with_those_who_have_come_back() -> None:
    nodes = nodes_of(Carrier({5: FACTS}))
    nodes.wait(3, 0.01, at_least=1)
    assert list(nodes.facts()) == [0]
    with pytest.raises(NoResultError, match=r"1 of 3 clients .* missing \[1, 2\]"):
        nodes.wait(3, 0.01, at_least=2)


def test_rows_of_their_own_need_no_common_data() -> None:
    own = replace(FACTS, identity=json.dumps({"model": "m", "data": "own"}), own_data=True)
    nodes = nodes_of(Carrier({5: own}))
    nodes.wait(1, 0.01)
    assert nodes.facts()[0].own_data


def test_waiting_leaves_the_replies_to_other_messages_where_they_are() -> None:
    carrier = Carrier({5: FACTS})
    nodes = nodes_of(carrier)
    task = nodes.mail.send(5, "train", RecordDict({"task": ConfigRecord({})}), "1", 60.0)
    nodes.wait(1, 0.01)
    assert set(nodes.mail.collect()) == {task}
    assert not nodes.mail.collect() and not nodes.mail.strays


def test_the_last_line_of_an_error_is_what_counts() -> None:
    assert first_line("\x1b[36mray::Actor\x1b[39m ...\n\nValueError: no memory\n") == "ValueError: no memory"
    assert first_line(None) == "no reason given"


@pytest.mark.parametrize(
    ("kind", "config", "reason"),
    [
        (ServerOptions, {}, "experiment: is missing"),
        (ServerOptions, {"experiment": "x", "observe": "guessed"}, "valid: measured, simulated"),
        (ServerOptions, {"experiment": "x", "resume": "yes"}, "resume: 'yes' is not of type bool"),
        (ServerOptions, {"experiment": "x", "round-seconds": -1}, "round-seconds"),
        (ServerOptions, {"experiment": "x", "nodes": -1}, "nodes"),
        (DeviceOptions, {}, "partition-id: is missing"),
        (DeviceOptions, {"partition-id": 0, "gflops": -1.0}, "gflops"),
    ],
)
def test_settings_are_checked(kind: type, config: dict[str, object], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        read_options(kind, config)
    assert read_options(ServerOptions, {"experiment": "x", "max-norm": 5, "other": 1}).max_norm == 5.0
