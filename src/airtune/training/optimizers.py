"""The optimizers of local training, by name. Their state is fresh in every round of every client.

An optimizer is made from the client's active adapter, not from a list of tensors, so that one that needs pairs (A, B)
of a slot with its scaling can have them. A new one is a function here and a row in `OPTIMIZERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from airtune.errors import unknown_name
from airtune.training.model import ActiveAdapter
from airtune.types import LocalTraining

Make = Callable[[ActiveAdapter, LocalTraining], torch.optim.Optimizer]


def parameter_groups(active: ActiveAdapter, training: LocalTraining) -> list[dict[str, Any]]:
    """Return the trained tensors in two groups: LoRA factors, and the head with its own learning rate."""
    head_rate = training.learning_rate if training.head_learning_rate is None else training.head_learning_rate
    factors = [tensor for _, kind, tensor in active.trained() if kind != "extra"]
    extras = [tensor for _, kind, tensor in active.trained() if kind == "extra"]
    groups: list[dict[str, Any]] = [
        {"params": factors, "lr": training.learning_rate},
        {"params": extras, "lr": head_rate},
    ]
    return [group for group in groups if group["params"]]


def adamw(active: ActiveAdapter, training: LocalTraining) -> torch.optim.Optimizer:
    """Return AdamW (arXiv 1711.05101) with beta = (0.9, 0.999) and epsilon = 1e-8."""
    groups = parameter_groups(active, training)
    return torch.optim.AdamW(groups, lr=training.learning_rate, weight_decay=training.weight_decay, foreach=False)


def sgd(active: ActiveAdapter, training: LocalTraining) -> torch.optim.Optimizer:
    """Return stochastic gradient descent with heavy-ball momentum."""
    return torch.optim.SGD(
        parameter_groups(active, training),
        lr=training.learning_rate,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        foreach=False,
    )


OPTIMIZERS: Mapping[str, Make] = {"adamw": adamw, "sgd": sgd}


def make_optimizer(active: ActiveAdapter, training: LocalTraining) -> torch.optim.Optimizer:
    """Return a fresh optimizer for what the client trains.

    Raises
    ------
    InputError : the name is not known.
    """
    if training.optimizer not in OPTIMIZERS:
        raise unknown_name("training.optimizer", training.optimizer, OPTIMIZERS)
    return OPTIMIZERS[training.optimizer](active, training)
