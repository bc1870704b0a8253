"""One round on real devices, from the first message to the cut-off: what is asked, what comes back, what is lost."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message

from airtune.clock import WallClock
from airtune.deploy.flower.codec import PayloadError
from airtune.deploy.flower.mail import Mail
from airtune.deploy.flower.nodes import Nodes, first_line
from airtune.deploy.flower.replies import (
    DIVERGED,
    LOST_MEMORY,
    NEEDS_MODEL,
    Reply,
    check_address,
    checked_update,
    read_reply,
)
from airtune.deploy.flower.requests import Address, write_request
from airtune.simulation.costs import CostModel
from airtune.simulation.flights import NOTHING, plus
from airtune.types import (
    ClientTask,
    ClientUpdate,
    Floats,
    Group,
    LostTask,
    Pending,
    Plan,
    RoundOutcome,
    ServerModel,
    TaskCost,
)

log = logging.getLogger("flwr")
TRAIN = "train"
NOT_CONNECTED = "not connected"
MEMORY_ROUND = "memory_round"  # the report that says after which round a client's own state is the one that counts


@dataclass
class Flight:
    """One task under way.

    Attributes
    ----------
    task : what was asked. round, cycle : of the plan. model, version : what it starts from.
    started_at : fleet seconds at the round's start. sent_at : fleet seconds of the message that is open.
    memory_round : see `Address`. message : id of the open message; None: it never left.
    bits_down : of all messages so far. whole : the whole model has been sent already.
    """

    task: ClientTask
    round: int
    model: ServerModel
    version: int
    started_at: float
    memory_round: int
    cycle: int = 0
    sent_at: float = 0.0
    message: str | None = None
    bits_down: int = 0
    whole: bool = False


UnderWay = dict[tuple[int, int], Flight]


@dataclass
class _Table:
    """One group: its cycle and the model that it started from, who is at work, who is done with it."""

    group: Group
    model: ServerModel
    cycle: int = 0
    waiting: list[Flight] = field(default_factory=list[Flight])
    done: list[ClientUpdate] = field(default_factory=list[ClientUpdate])
    ended: bool = False

    @property
    def last_cycle(self) -> bool:
        """Return whether the updates of this cycle are those of the round."""
        return self.cycle >= self.group.cycles - 1


@dataclass
class Sitting:
    """One round; see `FlowerRunner`.

    Attributes
    ----------
    always_whole : send each task with the whole model at once.
    updates, lost : what came of the tasks. incidents : what else happened, for the record.
    reached : clients to which a message went. forgotten : clients that have lost their own state.
    """

    mail: Mail
    nodes: Nodes
    costs: CostModel
    rates: tuple[Floats, Floats]
    plan: Plan
    model: ServerModel
    pending: Pending
    round: int
    start: float
    limit: float
    max_norm: float
    abandoned: dict[str, tuple[int, int]]
    always_whole: bool = False
    updates: list[ClientUpdate] = field(default_factory=list[ClientUpdate])
    lost: list[LostTask] = field(default_factory=list[LostTask])
    incidents: list[Mapping[str, Any]] = field(default_factory=list[Mapping[str, Any]])
    reached: list[int] = field(default_factory=list[int])
    forgotten: list[int] = field(default_factory=list[int])
    _tables: list[_Table] = field(default_factory=list[_Table])
    _earlier_cycles: dict[int, TaskCost] = field(default_factory=dict[int, TaskCost])

    # -- asking -------------------------------------------------------------------------------------------------------

    def begin(self, under_way: UnderWay, clock: WallClock[None]) -> None:
        """Send all tasks of the plan, and again those of earlier rounds of which nothing is under way any more."""
        groups = self.plan.groups or (Group(()),)
        self._tables = [_Table(group, self.model) for group in groups]
        for earlier in self.pending.in_flight:
            flight = under_way.get((earlier.task.client, earlier.round))
            if flight is None:
                models = {**self.pending.models, self.model.version: self.model}
                flight = self._flight(earlier.task, models[earlier.model_version], earlier.round, earlier.started_at)
                self._send(flight, clock.now, last=True)
            self._tables[0].waiting.append(flight)
        for table in self._tables:
            for task in table.group.tasks:
                self._dispatch(table, self._flight(task, self.model, self.round, self.start), clock.now)

    def _flight(self, task: ClientTask, model: ServerModel, round_index: int, started_at: float) -> Flight:
        memory_round = int(self.pending.reports.get(task.client, {}).get(MEMORY_ROUND, 0))
        return Flight(task, round_index, model, model.version, started_at, memory_round, whole=self.always_whole)

    def _dispatch(self, table: _Table, flight: Flight, now: float) -> None:
        table.waiting.append(flight)
        if not self._send(flight, now, last=table.last_cycle):
            self._lose(table, flight, NOT_CONNECTED)

    def _send(self, flight: Flight, now: float, *, last: bool) -> bool:
        """Hand a task over to its device; False if it is not there. last : see `Address.keeps`."""
        node = self.nodes.node_of(flight.task.client)
        if node is None:
            return False
        address = Address(flight.round, flight.cycle, flight.memory_round, keeps=last)
        earlier = self.pending.held_version.get(flight.task.client, 0)
        held = self.model.version if flight.task.client in self.reached else earlier
        sent = write_request(flight.task, flight.model, address, held=held, whole=flight.whole)
        flight.message = self.mail.send(node, TRAIN, sent.content, str(flight.round), 2 * self.limit)
        flight.sent_at = now
        flight.bits_down += sent.bits
        if flight.message is not None:
            self.reached.append(flight.task.client)
        return flight.message is not None

    # -- reading ------------------------------------------------------------------------------------------------------

    def look(self, clock: WallClock[None]) -> None:
        """Read what has arrived."""
        found = dict(self.nodes.read(self.mail.collect()))
        for table in self._tables:
            for flight in list(table.waiting):
                if flight.message is not None and flight.message in found:
                    self._read(table, flight, found.pop(flight.message), clock.now)
            self._advance(table, clock.now)
        self._strays(found)

    def _read(self, table: _Table, flight: Flight, message: Message, now: float) -> None:
        try:
            if message.has_error():
                raise PayloadError(f"client error: {first_line(message.error.reason)}")
            reply = read_reply(message.content)
            check_address(reply, flight.task, flight.round, flight.cycle)
            if reply.status == NEEDS_MODEL and not flight.whole:
                flight.whole = True
                self._note(flight, "was sent the whole model")
                if not self._send(flight, now, last=table.last_cycle):
                    raise PayloadError(NOT_CONNECTED)
                return
            self._take(table, flight, reply, now)
        except PayloadError as error:
            self._lose(table, flight, str(error))

    def _take(self, table: _Table, flight: Flight, reply: Reply, now: float) -> None:
        """Take the update of a reply; raises PayloadError if it cannot be used."""
        task = flight.task
        if reply.status == LOST_MEMORY:
            self.forgotten.append(task.client)
            raise PayloadError("has lost its own state")
        if reply.status == DIVERGED:
            raise PayloadError("diverged")
        if reply.payload is None:
            raise PayloadError("cannot rebuild the model")
        try:
            values = checked_update(reply.payload, task, flight.model.adapter, self.max_norm)
        except PayloadError as error:
            raise PayloadError(f"quarantined: {error}") from error
        cost = self.spent(flight, reply, now)
        reports = {**(reply.reports or {}), **self._measured(task, reply, cost)}
        reports[MEMORY_ROUND] = float(flight.round if reply.own else 0)
        cost = plus(self._earlier_cycles.get(task.client, NOTHING), cost)
        table.waiting.remove(flight)
        table.done.append(ClientUpdate(task, values, flight.version, flight.started_at, now, cost, reports))

    def _measured(self, task: ClientTask, reply: Reply, cost: TaskCost) -> dict[str, float]:
        """Return the measured seconds by part, as the simulator reports them."""
        forward, backward = self.costs.compute_flops(task)
        share = forward / (forward + backward) if forward + backward else 0.0
        seconds = (reply.reports or {}).get("train_seconds", cost.compute_seconds)
        return {
            "forward_seconds": seconds * share,
            "backward_seconds": seconds * (1 - share),
            "upload_seconds": cost.upload_seconds,
            "download_seconds": cost.download_seconds,
        }

    def spent(self, flight: Flight, reply: Reply | None, now: float = 0.0) -> TaskCost:
        """Return what a task has cost: measured seconds, counted bits, computed joules.

        A client measures the seconds in its app (loading and training). What is left of the time between message and
        reply is the link and Flower; it is shared between the two directions by the seconds that their bits need at the
        measured rates, or by their bits where no rate is known. Of a task without a reply only the bits are known.
        """
        if reply is None or reply.payload is None:
            return TaskCost(0.0, 0.0, 0.0, 0, flight.bits_down, 0.0)
        client, up_bits = flight.task.client, reply.payload.bits
        total = max(now - flight.sent_at, 0.0)
        computing = min(reply.app_seconds, total)
        up_rate, down_rate = (float(rate[client]) for rate in self.rates)
        both = up_rate > 0 and down_rate > 0
        up, down = (up_bits / up_rate, flight.bits_down / down_rate) if both else (up_bits, flight.bits_down)
        upload = (total - computing) * (up / (up + down) if up + down else 0.5)
        download = total - computing - upload
        joules = self.costs.compute_joules(flight.task) + upload * flight.task.transmit_power
        joules += download * float(self.costs.fleet.receive_power[client])
        return TaskCost(download, computing, upload, up_bits, flight.bits_down, joules)

    def _strays(self, found: Mapping[str, Message]) -> None:
        """Put on record what nobody waits for any more: late replies, second replies."""
        for identity, message in found.items():
            client, earlier = self.abandoned.pop(identity, (-1, 0))
            if client >= 0 and not message.has_error():
                self._incident(client, f"late reply of round {earlier}")
        while self.mail.strays:
            identity = self.mail.strays.pop()
            known = [f for table in self._tables for f in table.waiting if f.message == identity]
            self._incident(known[0].task.client if known else -1, "second reply to one message")

    # -- deciding -----------------------------------------------------------------------------------------------------

    def _advance(self, table: _Table, now: float) -> None:
        """Begin the next cycle of a group whose members are all done with this one."""
        if table.waiting or table.last_cycle or table.ended:
            return
        assert table.group.combine is not None, "Plan.check lets no group with cycles pass without a way to combine"
        done, table.done = sorted(table.done, key=lambda update: update.task.client), []
        inner = RoundOutcome(Plan((table.group,)), self.costs.fleet, tuple(done), (), self.start, now)
        table.model, table.cycle = table.group.combine(table.model, inner), table.cycle + 1
        for update in done:
            self._earlier_cycles[update.task.client] = update.cost
            flight = self._flight(update.task, table.model, self.round, self.start)
            flight.version, flight.cycle = self.model.version, table.cycle
            self._dispatch(table, flight, now)

    def rename(self, names: Mapping[str, str]) -> None:
        """Replace the ids of messages that got their final one only when they were handed over."""
        self.mail.open = {names.get(name, name) for name in self.mail.open}
        for flight in (flight for table in self._tables for flight in table.waiting):
            flight.message = names.get(flight.message or "", flight.message)

    def over(self, now: float) -> bool:
        """Return whether the round has ended for all its groups."""
        return all(self._ended(table, now) for table in self._tables)

    def _ended(self, table: _Table, now: float) -> bool:
        cutoff = table.group.cutoff
        deadline = self.limit if cutoff.deadline is None else min(cutoff.deadline, self.limit)
        enough = cutoff.min_updates is not None and len(table.done) >= cutoff.min_updates
        finished = table.last_cycle and (enough or not table.waiting)
        table.ended = table.ended or finished or now >= self.start + deadline
        return table.ended

    def close(self) -> list[Flight]:
        """End the round: late tasks are lost, or stay under way; return those."""
        kept: list[Flight] = []
        for table in self._tables:
            if table.last_cycle:
                self.updates += table.done
            else:  # the group's time was over before its last cycle
                self.lost += [LostTask(update.task, "late", update.cost) for update in table.done]
            for flight in list(table.waiting):
                earlier = flight.round != self.round
                if earlier or (table.group.cutoff.late == "keep" and table.group.cycles == 1):
                    kept.append(flight)
                    continue
                if flight.message is not None:
                    self.abandoned[flight.message] = (flight.task.client, flight.round)
                self._lose(table, flight, "late")
        return kept

    def _lose(self, table: _Table, flight: Flight, reason: str) -> None:
        table.waiting.remove(flight)
        cost = plus(self._earlier_cycles.get(flight.task.client, NOTHING), self.spent(flight, None))
        self.lost.append(LostTask(flight.task, reason, cost))

    def _note(self, flight: Flight, what: str) -> None:
        self._incident(flight.task.client, what)

    def _incident(self, client: int, what: str) -> None:
        self.incidents.append({"client": client, "reason": what} if client >= 0 else {"reason": what})
        log.warning("round %s: client %s: %s", self.round, client, what)
