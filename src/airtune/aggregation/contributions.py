"""What each client's model adds to a weight: the products that the exact rules sum up.

The ideal of every rule that aggregates products is ``sum_k p_k s_k B_k A_k``. Here a client's B_k A_k is what its model
computed with: the components that it sent and, if it held others frozen, those too. A factor that was not sent is the
one it started from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from airtune.aggregation.mean import Absent, Weights, client_weights
from airtune.aggregation.staleness import is_weak, part_of
from airtune.lora import BOTH, AdapterSlice, Indices, LoraFactors, stack
from airtune.types import ClientUpdate, RoundOutcome, ServerModel


@dataclass(frozen=True)
class Contributions:
    """The products of one slot and their weights, which sum to 1 (to less under ``absent="zero"``).

    whole : whether every part holds all components in the server's order, with A and B as they were averaged.
    """

    parts: tuple[LoraFactors, ...]
    weights: tuple[float, ...]
    whole: bool = False

    def stacked(self) -> LoraFactors:
        """Return factors of the weighted sum of the products: exact, of the summed rank."""
        return stack(self.parts, self.weights)


def contributions(
    model: ServerModel,
    updates: Sequence[ClientUpdate],
    outcome: RoundOutcome,
    weights: Weights,
    absent: Absent,
) -> dict[str, Contributions]:
    """Return the contributions to every slot of which somebody sent a component.

    absent : what a client without any component of a slot counts as: "excluded" (the sum over the owners, weights
        renormalised), "unchanged" (the server's own product) or "zero".
    """
    given = client_weights(updates, outcome, weights)
    found: dict[str, Contributions] = {}
    for slot, current in model.adapter.factors.items():
        owners = [update.task.send.kept(slot) > 0 for update in updates]
        if not any(owners):
            continue
        total = sum(w for w, owns in zip(given, owners, strict=True) if owns or absent != "excluded")
        products = [_product_of(model, update, outcome, slot) for update in updates]
        parts = [(part, w / total) for part, w in zip(products, given, strict=True)]
        missing = current if absent == "unchanged" else None
        kept = [(missing if part is None else part, weight) for part, weight in parts]
        pairs = [(part, weight) for part, weight in kept if part is not None]
        sent = [update for update, owns in zip(updates, owners, strict=True) if owns]
        whole = all(_is_whole(current, update, slot) and not is_weak(update, model, outcome) for update in sent)
        found[slot] = Contributions(tuple(part for part, _ in pairs), tuple(weight for _, weight in pairs), whole)
    return found


def _is_whole(current: LoraFactors, update: ClientUpdate, slot: str) -> bool:
    send, values = update.task.send, update.values.factors[slot]
    return send.kept(slot) == current.rank and send.tensors == BOTH and values.scaling == current.scaling


def _product_of(model: ServerModel, update: ClientUpdate, outcome: RoundOutcome, slot: str) -> LoraFactors | None:
    """Return the factors with which a client's model computed in one slot, None if it sent none of it.

    A stale change may be weakened: `airtune.aggregation.staleness.part_of`.
    """
    task = update.task
    if not task.send.kept(slot):
        return None
    part = part_of(update, model, outcome, slot)
    rest = _held_frozen(task.receive, task.send, slot) if task.train.outside == "frozen" else None
    return part if rest is None else stack([part, model.adapter.factors[slot].select(rest)])


def _held_frozen(receive: AdapterSlice, send: AdapterSlice, slot: str) -> Indices | None:
    """Return the components that a client held beside those it sent, None if there are none."""
    rest = np.setdiff1d(receive.components.get(slot, send.components[slot]), send.components[slot])
    return rest if len(rest) else None
