"""Which devices are there, and which client each of them is.

Flower names a node by a random number; which client it is only its own process knows. So every node that appears is
asked once, and asked again when it comes back. A node whose model, data or version is not the server's is refused with
the names of what differs; of two nodes that say they are the same client, the one that was there first counts.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, Message, RecordDict

from airtune.clock import WallClock
from airtune.deploy.flower.codec import PayloadError
from airtune.deploy.flower.facts import Facts, differences, read_facts
from airtune.deploy.flower.mail import Mail
from airtune.deploy.flower.probe import PROBE, Probe
from airtune.errors import NoResultError

log = logging.getLogger("flwr")
QUERY = "query.facts"


@dataclass
class Nodes:
    """The devices of a run.

    Attributes
    ----------
    mail : for questions. clients : number of clients of the experiment.
    identity : what a device must have in common with the server.
    measure : whether devices measure themselves. wait_seconds : until a question is dropped.
    known : node -> what it said. refused : node -> why. asked : id of our question -> node.
    probes : node -> the measurement of its link that is under way. clock : times it.
    """

    mail: Mail
    clients: int
    identity: Mapping[str, str]
    measure: bool = True
    wait_seconds: float = 600.0
    known: dict[int, Facts] = field(default_factory=dict[int, Facts])
    refused: dict[int, str] = field(default_factory=dict[int, str])
    asked: dict[str, int] = field(default_factory=dict[str, int])
    probes: dict[int, Probe] = field(default_factory=dict[int, Probe])
    clock: WallClock[None] = field(default_factory=lambda: WallClock[None]())

    def update(self) -> None:
        """Look who is there, ask who is new, read who answered, forget who has left."""
        present = set(self.mail.carrier.get_node_ids())
        self.known = {node: facts for node, facts in self.known.items() if node in present}
        self.refused = {node: reason for node, reason in self.refused.items() if node in present}
        self.probes = {node: probe for node, probe in self.probes.items() if node in present}
        for question in [q for q, node in self.asked.items() if node not in present]:
            self.mail.forget(question)
            del self.asked[question]
        for node in sorted(present - set(self.known) - set(self.refused) - set(self.asked.values())):
            self._ask(node, QUERY, RecordDict({"query": ConfigRecord({"measure": self.measure})}))

    def _ask(self, node: int, kind: str, content: RecordDict) -> None:
        question = self.mail.send(node, kind, content, "facts", self.wait_seconds)
        if question is not None:
            self.asked[question] = node

    def read(self, answers: Mapping[str, Message]) -> Mapping[str, Message]:
        """Take the answers to our questions out of what was collected, and return the rest."""
        rest: dict[str, Message] = {}
        for question, answer in answers.items():
            node = self.asked.pop(question, None)
            if node is None:
                rest[question] = answer
            else:
                self._read(node, answer)
        return rest

    def _read(self, node: int, answer: Message) -> None:
        try:
            if answer.has_error():
                raise PayloadError(first_line(answer.error.reason))
            probe = self.probes.pop(node, None)
            facts = read_facts(answer.content) if probe is None else probe.facts
            self._check(facts)
        except PayloadError as error:
            self.refused[node] = str(error)
            log.warning("node %s is refused: %s", node, error)
            return
        if probe is not None:
            probe.answered(self.clock.now)
        elif self.measure:
            probe = Probe(facts)
        if probe is not None and probe.wanted and not probe.done:
            self.probes[node] = probe
            self._ask(node, PROBE, probe.question(self.clock.now))
            return
        facts = probe.result() if probe is not None and probe.done else facts
        self.known[node] = facts
        log.info("client %s is node %s: %s, %s examples", facts.client, node, facts.device, facts.examples)

    def _check(self, facts: Facts) -> None:
        if facts.client >= self.clients:
            raise PayloadError(f"partition-id {facts.client}: the experiment has clients 0 to {self.clients - 1}")
        others = [*self.known.items(), *((node, probe.facts) for node, probe in self.probes.items())]
        if other := [node for node, found in others if found.client == facts.client]:
            raise PayloadError(f"partition-id {facts.client}: node {other[0]} is this client already")
        if found := differences(self.identity, facts.identity):
            raise PayloadError(f"its {', '.join(found)} differ from the server's")

    def node_of(self, client: int) -> int | None:
        """Return the node that is a client; None: it is not there."""
        return next((node for node, facts in self.known.items() if facts.client == client), None)

    def facts(self) -> dict[int, Facts]:
        """Return client -> facts of those that are there, by client."""
        return {facts.client: facts for facts in sorted(self.known.values(), key=lambda facts: facts.client)}

    def wait(self, count: int, poll_seconds: float, at_least: int | None = None) -> None:
        """Wait until that many clients have answered.

        at_least : go on with so many when `wait_seconds` are over; None: `count`.

        Raises
        ------
        NoResultError : fewer are there then; the message names who is missing and who was refused.
        """
        clock: WallClock[None] = WallClock()
        while True:
            self.update()
            self.read(self.mail.collect(set(self.asked)))
            if len(self.known) >= count:
                return
            if clock.now > self.wait_seconds and at_least is not None and len(self.known) >= at_least:
                log.warning("going on with %s of %s clients", len(self.known), count)
                return
            if clock.now > self.wait_seconds:
                missing = sorted(set(range(self.clients)) - set(self.facts()))
                refused = "; ".join(f"node {node}: {reason}" for node, reason in self.refused.items())
                raise NoResultError(
                    f"nodes: {len(self.known)} of {count} clients reported within {self.wait_seconds:g} s; "
                    f"missing {missing[:8]}{'; refused: ' + refused if refused else ''}"
                )
            pause(clock, poll_seconds)


def pause(clock: WallClock[None], seconds: float) -> None:
    """Wait on a clock."""
    clock.schedule(clock.now + seconds, None)
    clock.step()


def first_line(reason: str | None) -> str:
    """Return what an error of Flower says in its last line of text, without colour codes: that is the exception's."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", reason or "no reason given")
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    return (lines[-1] if lines else "no reason given")[:200]
