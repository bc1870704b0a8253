"""Accuracy and loss of the federation's model, with exact sums, and their spread over clients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from airtune.training.data import length_sorted_batches
from airtune.training.examples import Examples
from airtune.training.hardware import on_device
from airtune.training.losses import loss_by_example
from airtune.training.model import FederatedModel
from airtune.types import ServerModel

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Scores:
    """What a model does on each example.

    Attributes
    ----------
    loss : [examples], summed over the example's predictions.
    weight : [examples], number of predictions: 1, or the predicted tokens of an example.
    correct : [examples], 1.0 where the class is right; None for causal language modelling.
    """

    loss: Floats
    weight: Floats
    correct: Floats | None

    def metrics(self, indices: Indices | None = None) -> dict[str, float]:
        """Return "accuracy" (classification only) and "loss" per prediction, over all or some examples."""
        chosen = slice(None) if indices is None else indices
        found: dict[str, float] = {}
        if self.correct is not None:
            found["accuracy"] = float(self.correct[chosen].mean())
        found["loss"] = math.fsum(self.loss[chosen]) / math.fsum(self.weight[chosen])
        return found


def score(model: FederatedModel, server: ServerModel, tokens: Examples, *, batch_size: int = 64) -> Scores:
    """Return the scores of the server's model on each example: batched, sorted by length, in order of the examples.

    Whatever `model` carried before is replaced.
    """
    model.show(server)
    classify = tokens.task != "causal-lm"
    loss, weight, correct = (np.zeros(len(tokens)) for _ in range(3))
    with torch.inference_mode():
        for indices in length_sorted_batches(tokens, batch_size):
            batch = on_device(tokens.batch(indices), model.device)
            logits, labels = model.output(batch), batch["labels"]
            losses, weights = loss_by_example(logits, labels)
            loss[indices], weight[indices] = losses.double().cpu().numpy(), weights.double().cpu().numpy()
            if classify:
                correct[indices] = (logits.argmax(dim=-1) == labels).double().cpu().numpy()
    return Scores(loss, weight, correct if classify else None)


def evaluate(model: FederatedModel, server: ServerModel, tokens: Examples, *, batch_size: int = 64) -> dict[str, float]:
    """Return {"accuracy", "loss"} of the server's model; for causal language modelling {"loss"} per predicted token.

    With the adapter before round 1 this is the model's performance without any training.
    """
    if len(tokens) == 0:
        raise ValueError("no examples to evaluate on")
    return score(model, server, tokens, batch_size=batch_size).metrics()


def client_metrics(scores: Scores, clients: Sequence[Indices]) -> list[dict[str, float] | None]:
    """Return each client's metrics over its own examples; None for a client without any."""
    return [scores.metrics(indices) if len(indices) else None for indices in clients]


def client_spread(metrics: Sequence[Mapping[str, float] | None], name: str, *, share: float = 0.1) -> dict[str, float]:
    """Return the mean of a metric over clients, and over the worst of them (each client counts once).

    Parameters
    ----------
    metrics : of each client; None: no examples, left out.
    name : "accuracy" (low is bad) or "loss" (high is bad).
    share : the worst share of the clients, rounded up to at least one client.

    Returns
    -------
    {"clients": number with examples, "mean": ..., "worst_10_percent": ...}, the name telling the share.
    """
    values = sorted((found[name] for found in metrics if found is not None), reverse=name == "loss")
    if not values:
        raise ValueError("no client has examples")
    worst = values[: max(1, math.ceil(share * len(values)))]
    return {
        "clients": float(len(values)),
        "mean": math.fsum(values) / len(values),
        f"worst_{share * 100:g}_percent": math.fsum(worst) / len(worst),
    }
