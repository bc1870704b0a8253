"""How far a round's model is from what its clients' models say: the aggregation error, for any method.

With effective updates ``D_k = s_k B_k A_k`` and weights by examples, exact aggregation moves a module's weight to
``W0 + merged + sum_k p_k D_k``. What the server has instead is ``W0 + merged' + s B A``. The error is the norm of the
difference over all modules, as a share of the round's change ``sum_k p_k (D_k - D_k at the start)``: 0 is exact, 1 is
as far off as if nothing had been learnt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from airtune.aggregation.mean import client_weights, in_client_order
from airtune.lora import Adapter
from airtune.types import ClientUpdate, RoundOutcome, ServerModel

if TYPE_CHECKING:
    from torch import Tensor


def aggregation_error(before: ServerModel, outcome: RoundOutcome, after: ServerModel) -> dict[str, float]:
    """Return ``aggregation_error`` of a round, for `RoundRecord.diagnostics`; nothing where it is not defined.

    A client counts in the modules that it sends, with its share of their owners' examples. It is not defined without
    arrivals, for sketches (a client's own update is an estimate there), for factors that stay on their client, and if
    nothing changed. Costs one dense product in double precision per client and module: a diagnostic, off by default.

    Parameters
    ----------
    before, after : the server's model at the round's start and end. outcome : with the updates that arrived.
    """
    updates = in_client_order(outcome.updates)
    sends_all = all(update.task.train.tensors <= update.task.send.tensors for update in updates)
    if not updates or not sends_all or any(update.task.train.unbiased for update in updates):
        return {}
    weights = client_weights(updates, outcome, "examples")
    starts = [outcome.start_of(update, before) for update in updates]
    missed = changed = 0.0
    for module in before.adapter.placement:
        owners = [i for i, update in enumerate(updates) if _holds(update, module, before.adapter)]
        total = sum(weights[i] for i in owners)
        if not owners or total <= 0.0:
            continue
        shares = [weights[i] / total for i in owners]
        wanted = _mean([updates[i].values for i in owners], shares, module)
        change = wanted - _mean([starts[i] for i in owners], shares, module)
        found = _product(after.adapter, module) + _merged(after, module) - _merged(before, module)
        missed += float((found - wanted).square().sum())
        changed += float(change.square().sum())
    return {"aggregation_error": math.sqrt(missed / changed)} if changed > 0.0 else {}


def _holds(update: ClientUpdate, module: str, adapter: Adapter) -> bool:
    return all(update.task.send.kept(slot) for slot in adapter.placement[module])


def _mean(adapters: Sequence[Adapter], shares: Sequence[float], module: str) -> Tensor:
    first, *others = [share * _product(adapter, module) for adapter, share in zip(adapters, shares, strict=True)]
    return sum(others, start=first)


def _product(adapter: Adapter, module: str) -> Tensor:
    return adapter.module_product(module).double()


def _merged(model: ServerModel, module: str) -> Tensor | float:
    return model.base_update[module].product().double() if module in model.base_update else 0.0
