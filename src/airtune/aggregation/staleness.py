"""Updates that started from an earlier model than the one they are merged into."""

from __future__ import annotations

from dataclasses import replace

from airtune.lora import LoraFactors
from airtune.types import ClientUpdate, RoundOutcome, ServerModel


def weaken_stale(model: ServerModel, outcome: RoundOutcome, exponent: float) -> RoundOutcome:
    """Return the outcome with every stale update moved onto the current model and weakened by its age.

    The values become ``x + (1 + age)^-exponent (x_n - start_n)`` with the age in model versions (the polynomial weight
    of FedAsync, arXiv 1903.03934); fresh updates stay as they are.
    """
    updates = tuple(
        update if update.model_version == model.version else _weakened(update, model, outcome, exponent)
        for update in outcome.updates
    )
    return replace(outcome, updates=updates)


def _weakened(update: ClientUpdate, model: ServerModel, outcome: RoundOutcome, exponent: float) -> ClientUpdate:
    weight = (1.0 + model.version - update.model_version) ** -exponent
    now, start = update.task.send.take(model.adapter), outcome.start_of(update, model)
    factors = {
        name: _moved(now.factors[name], start.factors[name], values, weight)
        for name, values in update.values.factors.items()
    }
    extras = {
        name: now.extras[name] + weight * (tensor - start.extras[name]) for name, tensor in update.values.extras.items()
    }
    values = update.values.with_factors(factors, extras)
    return replace(update, values=values, model_version=model.version)


def _moved(now: LoraFactors, start: LoraFactors, values: LoraFactors, weight: float) -> LoraFactors:
    core, magnitude = values.core, values.magnitude
    if core is not None and now.core is not None and start.core is not None:
        core = now.core + weight * (core - start.core)
    if magnitude is not None and now.magnitude is not None and start.magnitude is not None:
        magnitude = now.magnitude + weight * (magnitude - start.magnitude)
    return LoraFactors(
        A=now.A + weight * (values.A - start.A),
        B=now.B + weight * (values.B - start.B),
        scaling=values.scaling,
        core=core,
        magnitude=magnitude,
    )
