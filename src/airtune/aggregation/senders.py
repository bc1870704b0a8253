"""The mean over those who sent a component, where a codec chose which components to send."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from airtune.aggregation.mean import Mean, Weights
from airtune.capabilities import Trait
from airtune.errors import InputError, unknown_name
from airtune.lora import Adapter, AdapterSlice, Indices
from airtune.types import ClientUpdate, Compressor, RoundOutcome, ServerModel

AverageOver = Literal["everyone", "senders"]


def check_average_over(name: str, compressor: Compressor) -> None:
    """Raise InputError for an unknown name, and for senders where the codec does not tell who they are."""
    if name not in ("everyone", "senders"):
        raise unknown_name("method.average_over", name, ("everyone", "senders"))
    if name == "senders" and getattr(compressor, "fill", "hold") != "hold":
        raise InputError('method.average_over: "senders" needs to know who sent what; valid: compressor.fill = "hold"')


@dataclass(frozen=True)
class SendersMean:
    """The separate mean of A and B, each component over the clients that sent it.

    `Mean` divides by everybody: a client whose codec left a component out counts as the server's own value. Here it
    does not count, so that a component that few send moves as far as its senders say, with their noise. What was not
    sent is known by its change, which is exactly zero under hold fill; a client that sent single elements of a
    component counts as its sender.

    Parameters
    ----------
    weights : "examples" or "uniform".
    """

    weights: Weights = "examples"

    @property
    def refuses(self) -> Mapping[Trait, str]:
        """Return what this mean cannot take."""
        return {}

    def __call__(self, model: ServerModel, outcome: RoundOutcome) -> ServerModel:
        """Return the next model."""
        updates = tuple(as_sent(update, outcome.start_of(update, model)) for update in outcome.updates)
        return Mean(self.weights, absent="excluded")(model, replace(outcome, updates=updates))


def as_sent(update: ClientUpdate, start: Adapter) -> ClientUpdate:
    """Return the update with those components alone that differ from `start`, what its client started from."""
    send = update.task.send
    places: dict[str, Indices] = {}
    for slot, new in update.values.factors.items():
        old = start.factors[slot]
        moved = (new.A != old.A).any(1) | (new.B != old.B).any(0)
        places[slot] = np.flatnonzero(moved.cpu().numpy())
    components = {slot: np.asarray(send.components[slot])[found] for slot, found in places.items()}
    values = AdapterSlice(places, extras=send.extras).take(update.values)
    return replace(update, task=replace(update.task, send=replace(send, components=components)), values=values)
