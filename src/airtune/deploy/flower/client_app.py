"""The `ClientApp`: Flower's messages in, a `Device`'s answers out."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from airtune.clock import host_seconds
from airtune.deploy.flower.device import device_of

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train once, and answer with the coded update."""
    received_at = host_seconds()
    device = device_of(context.run_config, context.node_config)
    return Message(device.train(message.content, context.state, received_at), reply_to=message)


@app.query("facts")
def facts(message: Message, context: Context) -> Message:
    """Say who this is, and how fast."""
    device = device_of(context.run_config, context.node_config)
    measure = bool(message.content.config_records["query"]["measure"])
    return Message(device.facts(measure=measure), reply_to=message)
