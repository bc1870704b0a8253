"""Rounds over shaped links: before each one the links get the plan's rates; the plan's seconds go on record.

`app` is the ServerApp of the runs over Flower; `Sockets` carries the same messages without Flower.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.serverapp import Grid, ServerApp
from predicted_vs_measured_net import shape

from airtune.deploy.device.frames import receive, send
from airtune.deploy.flower import server_app
from airtune.deploy.flower.options import ServerOptions, read_options
from airtune.deploy.prediction import ClientSeconds, Predicting, Simulated
from airtune.experiment.build import Bench
from airtune.experiment.run import Actors

log = logging.getLogger("flwr")
app = ServerApp()
_actors_of = server_app.actors_of


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one method over Flower on shaped links."""
    run(grid, read_options(ServerOptions, context.run_config))


def run(carrier: Any, options: ServerOptions) -> None:
    """Run one experiment with a runner that shapes the links; `network.json` lies beside the experiment file."""
    prefix = json.loads((Path(options.experiment).parent / "network.json").read_text())["prefix"]

    def actors_of(bench: Bench, carrier: Any, options: ServerOptions) -> Actors:
        actors = _actors_of(bench, carrier, options)

        inner = actors.runner.inner if isinstance(actors.runner, Predicting) else actors.runner

        def before(predicted: Sequence[ClientSeconds]) -> None:
            for each in predicted:
                shape(prefix, each.client, each.up_bit_s, each.down_bit_s)

        return replace(actors, runner=Predicting(inner, Simulated(bench), before))

    server_app.actors_of = actors_of
    try:
        server_app.serve(carrier, options)
    finally:
        server_app.actors_of = _actors_of


# ------------------------------------------------------------------------------------------------------ without Flower


@dataclass
class Sockets:
    """An `airtune.deploy.flower.mail.Carrier` over plain TCP connections, one to each device."""

    listener: socket.socket
    devices: int
    run_config: dict[str, Any] = field(default_factory=dict)
    connections: dict[int, socket.socket] = field(default_factory=dict)
    messages: dict[str, Message] = field(default_factory=dict)
    replies: list[Message] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        from flwr.supercore.task_identity import TaskIdentity

        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        while len(self.connections) < self.devices:
            connection, _ = self.listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            node = 1000 + int(receive(connection, 0).head["client"])
            self.connections[node] = connection
            threading.Thread(target=self._read, args=(connection,), daemon=True).start()

    def get_node_ids(self) -> Iterable[int]:
        return list(self.connections)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        identities: list[str] = []
        for message in messages:
            identity = message.object_id
            message.metadata.__dict__["_message_id"] = identity
            self.messages[identity] = message
            identities.append(identity)
            threading.Thread(target=self._send, args=(message, identity), daemon=True).start()
        return identities

    def _send(self, message: Message, identity: str) -> None:
        kind = "facts" if message.metadata.message_type.startswith("query") else "train"
        body = recorddict_to_proto(message.content).SerializeToString()
        send(
            self.connections[message.metadata.dst_node_id], {"id": identity, "kind": kind, "run": self.run_config}, body
        )

    def _read(self, connection: socket.socket) -> None:
        while True:
            frame = receive(connection, 1 << 30)
            content = recorddict_from_proto(ProtoRecordDict.FromString(frame.body))
            with self.lock:
                self.replies.append(Message(content, reply_to=self.messages[frame.head["id"]]))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        asked = set(message_ids)
        with self.lock:
            found = [reply for reply in self.replies if reply.metadata.reply_to_message_id in asked]
            self.replies = [reply for reply in self.replies if reply not in found]
        return found


def over_sockets(experiment: str, runs: str, devices: int, jobs: list[dict[str, Any]]) -> None:
    """Run several methods over plain sockets: each job holds the changed `ServerOptions`."""
    with socket.create_server(("0.0.0.0", 7000)) as listener:
        carrier = Sockets(listener, devices)
        for job in jobs:
            options = ServerOptions(experiment, observe="simulated", measure=False, poll_seconds=0.05, **job)
            carrier.run_config = {"experiment": experiment, "method": options.method, "overrides": options.overrides}
            run(carrier, replace(options, out=f"{runs}/{options.out}"))
