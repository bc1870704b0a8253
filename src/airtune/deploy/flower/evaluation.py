"""How the model of a run on real devices is measured: on the server, or on the clients where models are personal."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import Message

from airtune.clock import WallClock
from airtune.compression.dense import Dense
from airtune.deploy.flower.codec import PayloadError
from airtune.deploy.flower.nodes import pause
from airtune.deploy.flower.replies import OK, read_reply
from airtune.deploy.flower.requests import Address, write_request
from airtune.deploy.flower.runner import FlowerRunner
from airtune.federation import Evaluate
from airtune.lora import AdapterSlice
from airtune.types import ClientTask, LocalTraining, ServerModel

log = logging.getLogger("flwr")
EVALUATE = "evaluate"


@dataclass
class FlowerEvaluation:
    """An `airtune.federation.Evaluate`.

    Where clients keep factors of their own (FedSA-LoRA) the server has no model to measure. It sends the clients that
    have some the whole adapter, they measure it with their own part on the experiment's test rows, and the mean of the
    answers counts, as in simulation. Time and bits of measuring are not the federation's.

    Attributes
    ----------
    central : measures a model here. runner : knows who has a model of its own. seconds : to wait for answers.
    """

    central: Evaluate
    runner: FlowerRunner
    seconds: float = 600.0

    def __call__(self, model: ServerModel) -> Mapping[str, float]:
        """Return the metrics; none if all clients that have models of their own are away."""
        if not self.runner.owners:
            return self.central(model)
        asked = self._ask(model, self.runner.owners)
        found = self._answers(asked)
        if not found:
            log.warning("no client measured its own model: %s asked", len(asked))
            return {}
        return {name: sum(metrics[name] for metrics in found) / len(found) for name in found[0]}

    def _ask(self, model: ServerModel, owners: Mapping[int, int]) -> dict[str, int]:
        """Send the model to those who are there, and return message -> client."""
        asked: dict[str, int] = {}
        whole = AdapterSlice.everything(model.adapter.shape)
        for client, memory_round in sorted(owners.items()):
            node = self.runner.environment.nodes.node_of(client)
            if node is None:
                continue
            task = ClientTask(client, whole, whole, whole, LocalTraining(), Dense(), 0.0, 0.0)
            sent = write_request(task, model, Address(memory_round, 0, memory_round), held=0, whole=True)
            message = self.runner.mail.send(node, EVALUATE, sent.content, "evaluate", self.seconds)
            if message is not None:
                asked[message] = client
        return asked

    def _answers(self, asked: Mapping[str, int]) -> list[Mapping[str, float]]:
        clock: WallClock[None] = WallClock()
        found: dict[int, Mapping[str, float]] = {}
        waiting = set(asked)
        while waiting and clock.now < self.seconds:
            for message, answer in self.runner.mail.collect(waiting).items():
                waiting.remove(message)
                self._read(asked[message], answer, found)
            if waiting:
                pause(clock, self.runner.poll_seconds)
        for message in waiting:
            self.runner.mail.forget(message)
        return [metrics for _, metrics in sorted(found.items())]

    @staticmethod
    def _read(client: int, answer: Message, found: dict[int, Mapping[str, float]]) -> None:
        try:
            if answer.has_error():
                raise PayloadError(answer.error.reason)
            reply = read_reply(answer.content)
            if reply.status != OK or reply.client != client or not reply.reports:
                raise PayloadError(reply.status)
            found[client] = reply.reports
        except PayloadError as error:
            log.warning("client %s did not measure its own model: %s", client, error)
