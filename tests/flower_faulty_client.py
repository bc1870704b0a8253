"""A client app for tests: in round 1 it does what its node's configuration calls `fault`."""

from __future__ import annotations

import os
import time

from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

from airtune.deploy.flower import client_app
from airtune.deploy.flower.codec import from_array, to_array

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    fault = str(context.node_config.get("fault", "")) if message.metadata.group_id == "1" else ""
    if fault == "raise":
        raise RuntimeError("out of memory")
    if fault == "exit":
        os._exit(1)
    if fault == "sleep":
        time.sleep(600)
    answer = client_app.train(message, context)
    if fault in ("nan", "huge", "short"):
        values = from_array(answer.content.array_records["update"]["values"])
        spoiled = {"nan": values * float("nan"), "huge": values * 1e9, "short": values[:7]}[fault]
        answer.content["update"] = ArrayRecord({"values": to_array(spoiled)})
    return answer


@app.query("facts")
def facts(message: Message, context: Context) -> Message:
    return client_app.facts(message, context)
