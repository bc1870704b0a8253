"""`AirtuneStrategy`: a method the standard way, for a `ServerApp` that calls ``strategy.start(grid, ...)``.

The messages, checks and aggregation are those of `airtune.deploy.flower.server_app`. What Flower's own loop has no
place for is missing here: it cannot resume, a round waits for its slowest client or the timeout, whatever the plan's
cut-off says, nothing stays under way, groups with several cycles are refused, and since a client that lacks a part of
the model cannot be asked twice, the whole slice is sent each time. Prefer the server app.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from airtune.clock import WallClock
from airtune.deploy.flower.mail import Carrier, Mail
from airtune.deploy.flower.options import ServerOptions, read_experiment_of
from airtune.deploy.flower.runner import next_pending, with_incidents
from airtune.deploy.flower.server_app import environment_of
from airtune.deploy.flower.sitting import Flight, Sitting
from airtune.errors import InputError
from airtune.experiment.build import Bench, Workshop, build
from airtune.federation import begin
from airtune.lora import Adapter, LoraFactors
from airtune.streams import stream
from airtune.types import Plan, RoundOutcome


@dataclass
class _Outbox:
    """A carrier that keeps messages for Flower's loop to send, and hands out the replies that the loop has brought."""

    messages: dict[str, Message] = field(default_factory=dict[str, Message])
    replies: list[Message] = field(default_factory=list[Message])

    def get_node_ids(self) -> Iterable[int]:
        return ()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        names = [str(len(self.messages) + index) for index, _ in enumerate(messages)]
        self.messages.update(zip(names, messages, strict=True))
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies, self.replies = self.replies, []
        return replies


class AirtuneStrategy(Strategy):
    """Runs an experiment's method inside Flower's own loop.

    Parameters
    ----------
    options : as for the server app; `out` and `resume` have no effect.
    """

    def __init__(self, options: ServerOptions) -> None:
        """Build the experiment's objects.

        Raises
        ------
        InputError : the experiment cannot be built.
        """
        experiment, _ = read_experiment_of(options)
        self.options = options
        self.bench: Bench = build(experiment, Workshop())
        self._environment: Any = None
        self._progress: Any = None
        self._sitting: Sitting | None = None
        self._handed_out: ArrayRecord | None = None
        self._outbox = _Outbox()
        self._clock: WallClock[None] = WallClock()

    def initial_arrays(self) -> ArrayRecord:
        """Return the adapter before round 1, for ``start(initial_arrays=...)``."""
        self._handed_out = arrays_of(self.bench.start.adapter)
        return self._handed_out

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return one message for each task of the method's plan.

        Raises
        ------
        InputError : the plan has a group of several cycles, or the arrays are not those of the adapter.
        """
        environment = self._meet(cast("Carrier", grid))
        progress = self._progress
        model = progress.model
        if arrays is not self._handed_out:
            model = replace(model, adapter=adapter_of(arrays, model.adapter))
        self._progress = replace(progress, model=model)
        seen = environment.observe(server_round, progress.time, progress.pending, model)
        method, seed = self.bench.experiment.method, self.bench.experiment.seed
        plan: Plan = method.plan(progress.state, seen, stream(seed, "plan", server_round))
        plan.check(seen)
        if any(group.cycles > 1 for group in plan.groups):
            raise InputError("method: groups with several cycles need airtune's own server app; valid: another method")
        self._outbox, self._clock = _Outbox(), WallClock(progress.time)
        self._sitting = Sitting(
            mail=Mail(self._outbox),
            nodes=environment.nodes,
            costs=environment.costs_now(model),
            rates=environment.rates(),
            plan=plan,
            model=model,
            pending=replace(progress.pending, in_flight=()),
            round=server_round,
            start=progress.time,
            limit=self.options.round_seconds,
            max_norm=self.options.max_norm,
            abandoned={},
            always_whole=True,
        )
        self._sitting.begin({}, self._clock)
        return list(self._outbox.messages.values())

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the next adapter, and the mean training loss of the updates that could be used."""
        sitting = self._sitting
        assert sitting is not None, "Flower's loop configures a round before it aggregates it"
        self._outbox.replies = list(replies)
        sitting.rename({name: message.metadata.message_id for name, message in self._outbox.messages.items()})
        sitting.look(self._clock)
        late: list[Flight] = sitting.close()
        outcome = RoundOutcome(
            plan=with_incidents(sitting.plan, sitting.incidents),
            fleet=sitting.costs.fleet,
            updates=tuple(sorted(sitting.updates, key=lambda update: update.task.client)),
            lost=tuple(sorted(sitting.lost, key=lambda lost: lost.task.client)),
            start_time=sitting.start,
            end_time=self._clock.now,
        )
        pending = replace(next_pending(sitting.pending, outcome, late, sitting, sitting.model), in_flight=(), models={})
        model, state = self.bench.experiment.method.aggregate(self._progress.state, sitting.model, outcome)
        self._progress = replace(
            self._progress, round=server_round, time=outcome.end_time, model=model, state=state, pending=pending
        )
        if not outcome.updates:
            return None, None
        losses = [update.reports["loss"] for update in outcome.updates if "loss" in update.reports]
        metrics = {"train_loss": float(np.mean(losses))} if losses else {}
        self._handed_out = arrays_of(model.adapter)
        return self._handed_out, MetricRecord({**metrics, "updates": len(outcome.updates)})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return no message: give ``start`` an `evaluate_fn` (`evaluate`) to measure on the server."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return nothing, as nothing was asked."""
        return None

    def evaluate(self, server_round: int, arrays: ArrayRecord) -> MetricRecord:
        """Return the metrics of the model on the experiment's test rows, as ``evaluate_fn`` of ``start``."""
        model = self.bench.start if self._progress is None else self._progress.model
        found = self.bench.evaluate(replace(model, adapter=adapter_of(arrays, model.adapter)))
        return MetricRecord({name: float(value) for name, value in found.items()})

    def summary(self) -> None:
        """Say nothing: the experiment file says it all."""

    def _meet(self, carrier: Carrier) -> Any:
        if self._environment is None:
            self._environment = environment_of(self.bench, Mail(carrier), self.options)
            self._progress = begin(self.bench.experiment.method, self.bench.start, self._environment)
        return self._environment


def arrays_of(adapter: Adapter) -> ArrayRecord:
    """Return an adapter as arrays that any Flower tool reads: ``SLOT/A``, ``SLOT/B`` and ``extra/NAME``, fp32."""
    found: dict[str, Array] = {}
    for owner, kind, tensor in adapter.tensors():
        name = f"extra/{owner}" if kind == "extra" else f"{owner}/{kind}"
        found[name] = Array(tensor.detach().cpu().float().numpy())
    return ArrayRecord(found)


def adapter_of(arrays: Mapping[str, Array], like: Adapter) -> Adapter:
    """Return the adapter of such arrays.

    Raises
    ------
    InputError : a name is missing, or a size is another.
    """
    import torch

    def read(name: str, like: Any) -> Any:
        if like is None:
            return None
        if name not in arrays or tuple(arrays[name].shape) != tuple(like.shape):
            raise InputError(f"arrays: {name} is missing or of another size; valid: those of initial_arrays()")
        return torch.from_numpy(arrays[name].numpy().copy()).to(like)

    factors = {
        slot: LoraFactors(
            read(f"{slot}/A", f.A),
            read(f"{slot}/B", f.B),
            f.scaling,
            read(f"{slot}/core", f.core),
        )
        for slot, f in like.factors.items()
    }
    return like.with_factors(factors, {name: read(f"extra/{name}", value) for name, value in like.extras.items()})
