"""What runs on a device: it says who it is, trains when it is asked, and keeps what is its own.

`Device` knows nothing of Flower's processes; `airtune.deploy.flower.client_app` calls it for each message. What a
device loads (base model, tokens) is kept while its process lives: Flower's simulation reuses processes, its deployment
starts one for each message, which is why there is a resident trainer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from flwr.app import RecordDict

from airtune.clock import host_seconds
from airtune.deploy.flower.codec import PayloadError
from airtune.deploy.flower.facts import Facts, identity_of, write_facts
from airtune.deploy.flower.memory import OwnState
from airtune.deploy.flower.options import DeviceOptions, ServerOptions, read_experiment_of, read_options
from airtune.deploy.flower.replies import DIVERGED, LOST_MEMORY, NEEDS_MODEL, OK, Reply, write_reply
from airtune.deploy.flower.requests import Request, model_of, read_request
from airtune.deploy.turn import take_turn
from airtune.errors import InputError, NoResultError
from airtune.experiment.build import Bench, Workshop, build
from airtune.experiment.calibration import calibrate
from airtune.federation import prepared
from airtune.lora import AdapterSlice, with_own
from airtune.training.local import LocalTrainer
from airtune.types import Payload, ServerModel, Trainer, TrainingJob

Plain = Mapping[str, bool | float | int | str]
REPEATS = 2  # timed trainings of four steps when a device measures its speed [our choice]


@dataclass(frozen=True)
class Device:
    """One client of an experiment on the machine that it is.

    Attributes
    ----------
    options : of the node. bench : the experiment's objects on this machine. start : the model that follows from the
        seed. trainer : trains this client's rows.
    """

    options: DeviceOptions
    bench: Bench
    start: ServerModel
    trainer: Trainer

    @property
    def client(self) -> int:
        """Return which client of the experiment this is."""
        return self.options.partition_id

    def facts(self, *, measure: bool) -> RecordDict:
        """Return the answer to the server's first question.

        measure : whether to time some real training where the node does not give the speed.
        """
        tokens, rows = self.bench.tokens.train, self.bench.clients[self.client]
        own = bool(self.options.data)
        facts = Facts(
            client=self.client,
            device=self.bench.cell.fleet.device[self.client] if not measure else _machine(),
            examples=len(rows),
            tokens=float(tokens.lengths[rows].mean()) if len(rows) else 0.0,
            own_data=own,
            memory_bytes=self.options.memory_gb * 1e9 or (_memory_bytes(self.bench) if measure else 0.0),
            flops_per_second=self.options.gflops * 1e9 or (self._speed() if measure and len(rows) else 0.0),
            uplink_rate=self.options.uplink_mbit_s * 1e6,
            downlink_rate=self.options.downlink_mbit_s * 1e6,
            identity=json.dumps(identity_of(self.bench, own_data=own), sort_keys=True),
        )
        return write_facts(facts)

    def _speed(self) -> float:
        return calibrate(self.bench.experiment, REPEATS, workshop()).flops_per_second

    def train(self, content: RecordDict, state: RecordDict, received_at: float) -> RecordDict:
        """Return the answer to a train message; the client's own state is changed in place.

        received_at : host seconds when the message came.

        Raises
        ------
        PayloadError : the message is not one of this version, or not for this client.
        """
        request = read_request(content)
        if request.task.client != self.client:
            raise PayloadError(f"the task is client {request.task.client}'s; this device is client {self.client}")
        reply = self._answer(request, OwnState(state, self._folder()))
        return write_reply(replace(reply, app_seconds=host_seconds() - received_at))

    def _answer(self, request: Request, own: OwnState) -> Reply:
        address = request.address
        empty = Reply("", self.client, address.round, address.cycle)
        model = model_of(request, own.model(self.start))
        if model is None:
            return replace(empty, status=NEEDS_MODEL)
        own.keep_model(model, request.task)
        memory = own.memory(address.memory_round) if address.keeps else {}
        if memory is None:
            return replace(empty, status=LOST_MEMORY)
        job = TrainingJob(request.task, model, address.round, address.cycle, memory)
        began = host_seconds()
        try:
            turn = take_turn(self.trainer, job, self.bench.experiment.seed)
        except NoResultError:
            return replace(empty, status=DIVERGED)
        if address.keeps and turn.memory:
            own.keep(address.round, address.memory_round, turn.memory)
        reports = {**turn.reports, "train_seconds": host_seconds() - began}
        return replace(empty, status=OK, payload=turn.payload, reports=reports, own=bool(turn.memory))

    def evaluate(self, content: RecordDict, state: RecordDict) -> RecordDict:
        """Return the metrics of the server's model with this client's own tensors, on the experiment's test rows.

        Errors as in `train`.
        """
        request = read_request(content)
        own, address = OwnState(state, self._folder()), request.address
        model, memory = model_of(request, self.start), own.memory(address.memory_round)
        if model is None or memory is None:
            return write_reply(Reply(LOST_MEMORY, self.client, address.round))
        adapter = with_own(model.adapter, AdapterSlice.everything(model.adapter.shape), memory)
        metrics = self.bench.evaluate(replace(model, adapter=adapter))
        return write_reply(Reply(OK, self.client, address.round, payload=Payload({}, 0), reports=dict(metrics)))

    def _folder(self) -> Path | None:
        if not self.options.state_folder:
            return None
        experiment = self.bench.experiment
        run = f"{experiment.name}-{experiment.label}-{experiment.seed}-client-{self.client}"
        return Path(self.options.state_folder).expanduser() / run


def device_of(run_config: Plain, node_config: Plain) -> Device:
    """Return the device that two configurations describe, made once per process.

    Raises
    ------
    InputError : a value that is not possible, or an experiment that cannot be built here.
    """
    return _made(read_options(ServerOptions, run_config), read_options(DeviceOptions, node_config))


@lru_cache(maxsize=64)
def _made(server: ServerOptions, options: DeviceOptions) -> Device:
    bench = _bench(server, replace(options, partition_id=0, state_folder="", device="", token_file=""))
    client, clients = options.partition_id, len(bench.clients)
    if client >= clients:
        raise InputError(f"partition-id: {client} is not below {clients}, the clients of the experiment")
    if options.data:
        everything = np.arange(len(bench.tokens.train))
        own = [everything if index == client else everything[:0] for index in range(clients)]
        bench = replace(bench, clients=own)
    trainer = LocalTrainer(bench.federated, bench.tokens.train, bench.clients, bench.experiment.seed)
    start = prepared(bench.experiment.method, bench.start)
    return Device(options, bench, start, trainer)


@lru_cache(maxsize=1)
def _bench(server: ServerOptions, options: DeviceOptions) -> Bench:
    """Return the experiment's objects; all clients of a process share the base model and the tokens."""
    experiment, _ = read_experiment_of(server, options)
    return build(experiment, workshop())


@lru_cache(maxsize=1)
def workshop() -> Workshop:
    """Return what the process has loaded."""
    return Workshop()


def _machine() -> str:
    return os.uname().nodename[:40]


def _memory_bytes(bench: Bench) -> float:
    """Return the bytes that training may use here: the experiment's share of the machine's memory."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return float(total) * bench.experiment.fleet.memory_share
