"""AdamW, stochastic gradient descent, and LoRA+: torch's optimizers with the right groups."""

from __future__ import annotations

import torch

from airtune.optimizers import AdamW, LoraPlus
from airtune.training.model import ActiveAdapter
from airtune.training.optimizers.groups import adamw_of, parameter_groups
from airtune.types import LocalTraining


def adamw(active: ActiveAdapter, training: LocalTraining, chosen: AdamW) -> torch.optim.Optimizer:
    """Return AdamW (arXiv 1711.05101)."""
    return adamw_of(parameter_groups(active, training), training, chosen)


def sgd(active: ActiveAdapter, training: LocalTraining) -> torch.optim.Optimizer:
    """Return stochastic gradient descent with heavy-ball momentum."""
    return torch.optim.SGD(
        parameter_groups(active, training),
        lr=training.learning_rate,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        foreach=False,
    )


def lora_plus(active: ActiveAdapter, training: LocalTraining, chosen: LoraPlus) -> torch.optim.Optimizer:
    """Return AdamW with `ratio` times the learning rate on B (LoRA+, arXiv 2402.12354); the head has its own."""
    rates = {"B": chosen.ratio * training.learning_rate}
    return adamw_of(parameter_groups(active, training, rates), training, chosen)
