"""The `ClientApp`: Flower's messages in, a `Device`'s answers out.

Flower's deployment starts a process for each message. Where the node names a resident trainer (``airtune device``), the
message is passed on to it and this process imports neither torch nor the model.
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from airtune.clock import host_seconds
from airtune.deploy.device.relay import relay_of
from airtune.deploy.flower.probe import answer

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train once, and answer with the coded update."""
    received_at = host_seconds()
    relay = relay_of(context.run_config, context.node_config)
    if relay is not None:
        reply, context.state = relay.train(message.content, context.state, received_at)
        return Message(reply, reply_to=message)
    from airtune.deploy.flower.device import device_of

    device = device_of(context.run_config, context.node_config)
    return Message(device.train(message.content, context.state, received_at), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure the server's model with the client's own part of it."""
    relay = relay_of(context.run_config, context.node_config)
    if relay is not None:
        return Message(relay.evaluate(message.content, context.state), reply_to=message)
    from airtune.deploy.flower.device import device_of

    device = device_of(context.run_config, context.node_config)
    return Message(device.evaluate(message.content, context.state), reply_to=message)


@app.query("probe")
def probe(message: Message, context: Context) -> Message:
    """Answer with as many bytes as the server wants: it times them."""
    return Message(answer(message.content), reply_to=message)


@app.query("facts")
def facts(message: Message, context: Context) -> Message:
    """Say who this is, and how fast."""
    measure = bool(message.content.config_records["query"]["measure"])
    relay = relay_of(context.run_config, context.node_config)
    if relay is not None:
        return Message(relay.facts(measure=measure), reply_to=message)
    from airtune.deploy.flower.device import device_of

    return Message(device_of(context.run_config, context.node_config).facts(measure=measure), reply_to=message)
