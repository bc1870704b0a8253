"""The resident trainer's side of Flower: the same `Device` as in an app process, kept with its loaded model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

from flwr.app import RecordDict

from airtune.clock import host_seconds
from airtune.deploy.device.frames import Frame, Head
from airtune.deploy.device.relay import QUESTION, Kind, join, split
from airtune.deploy.device.work import Work, fingerprint
from airtune.deploy.flower.device import Device, device_of
from airtune.deploy.flower.options import DeviceOptions, ServerOptions, read_experiment_of, read_options
from airtune.errors import InputError


@dataclass(frozen=True)
class Resident:
    """Answers Flower's messages with the objects of one experiment.

    work : of the resident trainer; its fingerprint must be that of the messages' experiment.
    """

    work: Work

    def __call__(self, question: Frame) -> Frame:
        """Return the answer to one message; InputError names what does not fit."""
        words = question.head
        run, node = words.get("run"), words.get("node")
        if not isinstance(run, dict) or not isinstance(node, dict):
            raise InputError(f"{QUESTION}: run and node must be tables")
        server, options = read_options(ServerOptions, run), read_options(DeviceOptions, node)
        experiment, _ = read_experiment_of(server, replace(options, data=""))
        if fingerprint(experiment) != fingerprint(self.work.bench.experiment):
            raise InputError(f"{QUESTION}: model, data, clients, seed or precision differ from the resident trainer's")
        device = device_of(run, {key: value for key, value in node.items() if key not in ("device", "token-file")})
        content, state = split(question.body, words.get("sizes"), 2)
        reply = self._reply(device, words, content, state)
        body, sizes = join([reply, state])
        return Frame({"sizes": sizes}, body)

    def _reply(self, device: Device, words: Head, content: RecordDict, state: RecordDict) -> RecordDict:
        kind = words.get("kind")
        if kind == "facts":
            return device.facts(measure=bool(words.get("measure")))
        if kind == "evaluate":
            return device.evaluate(content, state)
        if kind != "train":
            raise InputError(f"{QUESTION}: unknown kind {kind!r}; valid: {', '.join(get_args(Kind))}")
        self.work.done += 1
        return device.train(content, state, float(words.get("received_at", host_seconds())))
