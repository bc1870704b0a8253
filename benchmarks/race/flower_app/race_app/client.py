"""The client: PEFT model in, adapter out. Rows and batches are read once per actor in both forms."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from race.peft_client import Work, get_state, set_state, train

app = ClientApp()
_works: dict[str, Work] = {}
_models: dict[str, torch.nn.Module] = {}


@app.train()
def train_client(message: Message, context: Context) -> Message:
    """Train one client for one round."""
    torch.set_num_threads(1)  # one actor per core
    folder = str(context.run_config["work"])
    if folder not in _works:
        _works[folder] = Work(folder)
    work = _works[folder]
    if not context.run_config["cached"]:
        model = work.build()
    else:
        if folder not in _models:
            _models[folder] = work.build()
        model = _models[folder]
    set_state(model, message.content["arrays"].to_torch_state_dict())
    client = int(context.node_config["partition-id"])
    round_index = int(message.content["config"]["server-round"])
    loss = train(model, work.client_batches(round_index, client), work.settings["learning_rate"])
    metrics = {"train_loss": float(loss), "num-examples": float(work.settings["examples"][client])}
    content = RecordDict({"arrays": ArrayRecord(get_state(model)), "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=message)
