"""`FlowerRunner`: a plan becomes messages to real devices, and replies become a `RoundOutcome`.

The same protocol as `airtune.simulation.runner.SimulatedRunner`: each client gets its own slice, settings and deadline.
Here the clock is real: a round ends when all have answered, at the plan's cut-off, or at the longest time that a round
may take. What is not there by then is dropped or stays under way, as the plan says; what is broken is kept out and
named. The runner remembers nothing that a restart would miss: training is a function of the job, so what was under way
when the server died is simply asked again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from airtune.clock import WallClock
from airtune.deploy.flower.environment import FlowerEnvironment
from airtune.deploy.flower.mail import Mail
from airtune.deploy.flower.nodes import pause
from airtune.deploy.flower.sitting import MEMORY_ROUND, Flight, Sitting, UnderWay
from airtune.types import InFlight, Pending, Plan, RoundOutcome, ServerModel

log = logging.getLogger("flwr")


@dataclass
class FlowerRunner:
    """Runs rounds on the devices of a Flower federation.

    Attributes
    ----------
    mail : messages under way. environment : who is there, and what things cost.
    round_seconds : the longest round. poll_seconds : between two looks for replies. idle_seconds : what a round costs
        in which nobody takes part. max_norm : of an update's change.
    under_way : (client, round) -> a task of an earlier round whose reply is still awaited.
    abandoned : id of a message -> (client, round) of a task that was dropped; its reply may still come, and is named.
    owners : client -> round after which it kept factors of its own, where clients do.
    """

    mail: Mail
    environment: FlowerEnvironment
    round_seconds: float = 3600.0
    poll_seconds: float = 0.5
    idle_seconds: float = 3.0
    max_norm: float = 1000.0
    under_way: UnderWay = field(default_factory=dict[tuple[int, int], Flight])
    abandoned: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    owners: Mapping[int, int] = field(default_factory=dict[int, int])

    def run(
        self, plan: Plan, model: ServerModel, pending: Pending, *, round_index: int, time: float
    ) -> tuple[RoundOutcome, Pending]:
        """Run one round that starts at `time` fleet seconds (real ones, evaluation not counted)."""
        clock: WallClock[None] = WallClock(time)
        sitting = Sitting(
            mail=self.mail,
            nodes=self.environment.nodes,
            costs=self.environment.costs_now(model),
            rates=self.environment.rates(),
            plan=plan,
            model=model,
            pending=pending,
            round=round_index,
            start=time,
            limit=self.round_seconds,
            max_norm=self.max_norm,
            abandoned=self.abandoned,
        )
        sitting.begin(self.under_way, clock)
        if not plan.tasks and not pending.in_flight:
            pause(clock, self.idle_seconds)
        sitting.look(clock)
        while not sitting.over(clock.now):
            pause(clock, self.poll_seconds)
            sitting.look(clock)  # before the cut-off is looked at: what is there by then counts
        kept = sitting.close()
        self.under_way = {(flight.task.client, flight.round): flight for flight in kept}
        outcome = RoundOutcome(
            plan=with_incidents(plan, sitting.incidents),
            fleet=sitting.costs.fleet,
            updates=tuple(sorted(sitting.updates, key=lambda update: update.task.client)),
            lost=tuple(sorted(sitting.lost, key=lambda lost: lost.task.client)),
            start_time=time,
            end_time=clock.now,
            past_models=pending.models,
        )
        for lost in outcome.lost:
            log.warning("round %s: client %s is left out: %s", round_index, lost.task.client, lost.reason)
        following = next_pending(pending, outcome, kept, sitting, model)
        self.owners = _owners(plan, following)
        return outcome, following


def _owners(plan: Plan, pending: Pending) -> dict[int, int]:
    """Return the clients that keep a part of the model, and since when; none where all that is trained is sent."""
    if not any(task.train.tensors - task.send.tensors for task in plan.tasks):
        return {}
    rounds = {client: int(report.get(MEMORY_ROUND, 0)) for client, report in pending.reports.items()}
    return {client: number for client, number in rounds.items() if number}


def with_incidents(plan: Plan, incidents: Sequence[Mapping[str, Any]]) -> Plan:
    """Return the plan with what happened beside it, so that rounds.jsonl names it."""
    return replace(plan, notes={**plan.notes, "incidents": list(incidents)}) if incidents else plan


def next_pending(
    pending: Pending, outcome: RoundOutcome, kept: Sequence[Flight], sitting: Sitting, model: ServerModel
) -> Pending:
    """Return what outlives the round. The clients' memories are theirs: only the round of each is known here."""
    models = {**pending.models, model.version: model}
    in_flight = tuple(
        InFlight(f.task, f.version, f.started_at, float("inf"), f.round, sitting.spent(f, None)) for f in kept
    )
    versions = {flight.model_version for flight in in_flight}
    reports: dict[int, Mapping[str, float]] = {**pending.reports}
    reports.update({update.task.client: update.reports for update in outcome.updates})
    for client in sitting.forgotten:
        reports[client] = {key: value for key, value in reports.get(client, {}).items() if key != MEMORY_ROUND}
    return Pending(
        in_flight=in_flight,
        models={version: found for version, found in models.items() if version in versions},
        held_version={**pending.held_version, **dict.fromkeys(sitting.reached, model.version)},
        memory={},
        reports=reports,
        round_starts=(*pending.round_starts, outcome.start_time),
    )
