"""Updates that started from an earlier model than the one they are merged into.

With the age in model versions, a stale change counts ``(1 + age)^-exponent`` (FedAsync, arXiv 1903.03934). Which change
that is depends on the rule. Where the adapter goes on from round to round and its factors are averaged, it is the
change of A and of B, moved onto the present factors. Where the basis is drawn anew, or where products are summed, the
change of A and of B means nothing under another basis: there the product changed by ``D_k - D_start``, and the client
counts as ``D_now + (1 + age)^-exponent (D_k - D_start)``. Such rules say `weakens_products` and use `part_of` here.
"""

from __future__ import annotations

from dataclasses import replace

from airtune.aggregation.declaring import redraws, weakens_products
from airtune.aggregation.mean import in_client_order
from airtune.errors import InputError
from airtune.lora import LoraFactors, stack
from airtune.types import ClientUpdate, RoundOutcome, ServerModel


def check_weakens(part: object, field: str) -> None:
    """Raise InputError for an aggregator or a method whose stale changes nobody knows how to weaken."""
    if redraws(part) and not weakens_products(part):
        raise InputError(
            f"{field}: {type(part).__name__} changes the adapter's basis every round and cannot weaken a stale change; "
            "valid: rules on products (stacking, truncation, merge-and-redraw ...), or rules whose adapter goes on"
        )


def weaken_stale(model: ServerModel, outcome: RoundOutcome, exponent: float, rule: object = None) -> RoundOutcome:
    """Return the outcome with stale changes weakened by their age; fresh updates stay as they are.

    The values become ``x + (1 + age)^-exponent (x_n - start_n)``, and the update counts as fresh. For a `rule` that
    weakens products itself the values stay, and the outcome carries the exponent to it.
    """
    if weakens_products(rule):
        return outcome if outcome.stale_exponent is not None else replace(outcome, stale_exponent=exponent)
    updates = tuple(
        update if update.model_version == model.version else _weakened(update, model, outcome, exponent)
        for update in outcome.updates
    )
    return replace(outcome, updates=updates)


def arrived(model: ServerModel, outcome: RoundOutcome) -> list[ClientUpdate]:
    """Return the updates in the clients' order, with stale heads weakened where products are; factors as they came."""
    updates = in_client_order(outcome.updates)
    exponent = outcome.stale_exponent
    if exponent is None:
        return updates
    return [_with_weak_extras(u, model, outcome, exponent) if is_weak(u, model, outcome) else u for u in updates]


def moved_factors(model: ServerModel, outcome: RoundOutcome) -> RoundOutcome:
    """Return the outcome for the average of factors beside a sum of products: moved where products are weakened."""
    return outcome if outcome.stale_exponent is None else weaken_stale(model, outcome, outcome.stale_exponent)


def is_weak(update: ClientUpdate, model: ServerModel, outcome: RoundOutcome) -> bool:
    """Return whether an update's product has to be weakened by the rule."""
    return outcome.stale_exponent is not None and update.model_version != model.version


def part_of(update: ClientUpdate, model: ServerModel, outcome: RoundOutcome, slot: str) -> LoraFactors:
    """Return what a client's product in one slot counts as: its own, or weakened, as stacked factors.

    ``D_now + w (D_k - D_start)`` with D_now the product of the present components; parts that are zero are left out, as
    D_now and D_start are where the adapter is drawn anew.
    """
    values = update.values.factors[slot]
    if not is_weak(update, model, outcome):
        return values
    weight = _weight(update, model, outcome.stale_exponent or 0.0)
    now = update.task.send.take(model.adapter).factors[slot]
    start = outcome.start_of(update, model).factors[slot]
    parts = [(part, w) for part, w in ((now, 1.0), (values, weight), (start, -weight)) if _acts(part)]
    parts = parts or [(values, weight)]
    return stack([part for part, _ in parts], [w for _, w in parts])


def _acts(factors: LoraFactors) -> bool:
    return bool(factors.A.any()) and bool(factors.B.any()) and (factors.core is None or bool(factors.core.any()))


def _weight(update: ClientUpdate, model: ServerModel, exponent: float) -> float:
    return float(1.0 + model.version - update.model_version) ** -exponent


def _with_weak_extras(update: ClientUpdate, model: ServerModel, outcome: RoundOutcome, exponent: float) -> ClientUpdate:
    weight, start = _weight(update, model, exponent), outcome.start_of(update, model)
    extras = {
        name: model.adapter.extras[name] + weight * (tensor - start.extras[name])
        for name, tensor in update.values.extras.items()
    }
    return replace(update, values=replace(update.values, extras=extras))


def _weakened(update: ClientUpdate, model: ServerModel, outcome: RoundOutcome, exponent: float) -> ClientUpdate:
    weight = _weight(update, model, exponent)
    now, start = update.task.send.take(model.adapter), outcome.start_of(update, model)
    factors = {
        name: _moved(now.factors[name], start.factors[name], values, weight)
        for name, values in update.values.factors.items()
    }
    update = _with_weak_extras(update, model, outcome, exponent)
    return replace(update, values=update.values.with_factors(factors), model_version=model.version)


def _moved(now: LoraFactors, start: LoraFactors, values: LoraFactors, weight: float) -> LoraFactors:
    core = values.core
    if core is not None and now.core is not None and start.core is not None:
        core = now.core + weight * (core - start.core)
    return LoraFactors(
        A=now.A + weight * (values.A - start.A),
        B=now.B + weight * (values.B - start.B),
        scaling=values.scaling,
        core=core,
    )
