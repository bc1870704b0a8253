"""Aggregation over groups that aggregated among themselves before: their mean, and what each layer moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from airtune.aggregation.mean import Mean
from airtune.capabilities import Trait
from airtune.errors import unknown_name
from airtune.lora import Adapter
from airtune.types import ClientUpdate, Floats, RoundOutcome, ServerModel

GroupWeights = Literal["examples", "normalised"]


@dataclass(frozen=True)
class GroupMean:
    """The mean over the clients of all groups, by examples, over the owners of each component.

    Since the members of a group start their last cycle from one model and are averaged by examples, this is the mean
    of the groups' models by the examples of the groups.

    Parameters
    ----------
    weights : "examples"; or "normalised": each client's change of the factors is divided by the number of cycles of
        its group first, against bias towards groups that aggregate often (as FedNova does for local steps).
    """

    weights: GroupWeights = "examples"

    def __post_init__(self) -> None:
        """Check the name."""
        if self.weights not in ("examples", "normalised"):
            raise unknown_name("method.weights", self.weights, ("examples", "normalised"))

    @property
    def refuses(self) -> Mapping[Trait, str]:
        """Return nothing: it takes what `Mean` over owners takes."""
        return {}

    def __call__(self, model: ServerModel, outcome: RoundOutcome) -> ServerModel:
        """Return the next model."""
        if self.weights == "normalised":
            cycles = {task.client: group.cycles for group in outcome.plan.groups for task in group.tasks}
            shortened = [_shortened(u, model.adapter, 1.0 / cycles.get(u.task.client, 1)) for u in outcome.updates]
            outcome = replace(outcome, updates=tuple(shortened))
        return Mean("examples", absent="excluded")(model, outcome)


def layer_energies(adapter: Adapter, updates: tuple[ClientUpdate, ...]) -> Floats | None:
    """Return each adapted layer's share of the squared change, [layers], mean over updates that trained all layers.

    None if no update trained all layers, or nothing moved.
    """
    layers = adapter.shape.layers
    full = [update for update in updates if len({*update.values.layer.values()}) == len(layers)]
    total = np.zeros(len(layers))
    for update in sorted(full, key=lambda u: (u.task.client, u.started_at)):
        moved = _moved(adapter, update)
        total += np.array([moved[layer] for layer in layers]) / max(sum(moved.values()), 1e-300)
    return total / total.sum() if total.sum() > 0.0 else None


def _moved(adapter: Adapter, update: ClientUpdate) -> dict[int, float]:
    start, moved = update.task.send.take(adapter), dict.fromkeys(adapter.shape.layers, 0.0)
    for name, after in update.values.factors.items():
        before = start.factors[name]
        change = ((after.A - before.A).double() ** 2).sum() + ((after.B - before.B).double() ** 2).sum()
        moved[adapter.layer[name]] += float(change)
    return moved


def _shortened(update: ClientUpdate, adapter: Adapter, step: float) -> ClientUpdate:
    """Return the update with its change to the factors scaled by `step`."""
    start = update.task.send.take(adapter)
    factors = {
        name: replace(f, A=start.factors[name].A.lerp(f.A, step), B=start.factors[name].B.lerp(f.B, step))
        for name, f in update.values.factors.items()
    }
    return replace(update, values=update.values.with_factors(factors))
