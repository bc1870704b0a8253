"""Flower's messages through a resident trainer: the replies of the app process's own device, without torch in it."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="comes with the extra airtune[flower]")

from flwr.app import ConfigRecord, RecordDict

from airtune.compression.error_feedback import ErrorFeedback
from airtune.compression.topk import TopK
from airtune.deploy.device.address import UnixAddress
from airtune.deploy.device.client import Device, DeviceError
from airtune.deploy.device.relay import Relay, join, relay_of, split
from airtune.deploy.device.resident import Resident
from airtune.deploy.device.server import Server
from airtune.deploy.device.work import Work
from airtune.deploy.flower.device import device_of
from airtune.deploy.flower.replies import read_reply
from airtune.deploy.flower.requests import Address, write_request
from airtune.errors import InputError
from airtune.experiment.build import Bench, Workshop, build
from airtune.experiment.config import read_file
from airtune.lora import AdapterSlice
from airtune.types import ClientTask
from tiny_experiment import write_experiment


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_experiment(tmp_path_factory.mktemp("relay"))


@pytest.fixture(scope="module")
def bench(experiment: Path) -> Bench:
    return build(read_file(experiment).experiment(), Workshop())


@pytest.fixture(scope="module")
def address(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server in a thread of this process: torch is then the same, and there is nothing to wait for."""
    work = Work(bench)
    work.more["flower"] = Resident(work)
    listener, where = UnixAddress(tmp_path_factory.mktemp("s") / "s").listen()
    server = Server(listener, work.answer, None, work.largest_job, print)
    threading.Thread(target=server.serve, daemon=True).start()
    yield str(where)
    listener.close()
    where.leave()


def message(bench: Bench, round_index: int, memory_round: int = 0) -> RecordDict:
    whole = AdapterSlice.everything(bench.start.adapter.shape)
    compressor = ErrorFeedback(TopK(0.25))
    task = ClientTask(2, whole, whole, whole, bench.experiment.training, compressor, 1e6, 0.1)
    address = Address(round_index, memory_round=memory_round)
    return write_request(task, bench.start, address, held=bench.start.version).content


def test_replies_and_state_are_those_of_the_device_itself(bench: Bench, experiment: Path, address: str) -> None:
    run, node = {"experiment": str(experiment)}, {"partition-id": 2}
    own, relay = device_of(run, node), relay_of(run, {**node, "device": address})
    assert relay is not None
    mine, theirs = RecordDict(), RecordDict()
    for round_index in (1, 2):
        content = message(bench, round_index, round_index - 1)
        expected = read_reply(own.train(content, mine, 0.0))
        reply, theirs = relay.train(content, theirs, 0.0)
        found = read_reply(reply)
        assert found.status == expected.status == "ok"
        assert found.payload is not None and expected.payload is not None
        for name, array in expected.payload.arrays.items():
            assert found.payload.arrays[name].tobytes() == array.tobytes(), (round_index, name)
        assert found.reports is not None and expected.reports is not None
        assert found.reports["loss"] == expected.reports["loss"]
    for name, array in mine.array_records["airtune-own"].items():
        assert theirs.array_records["airtune-own"][name].data == array.data, name
    content = message(bench, 2, 2)
    found, expected = read_reply(relay.evaluate(content, theirs)), read_reply(own.evaluate(content, mine))
    assert found.reports == expected.reports and found.reports["accuracy"] >= 0.0
    facts, expected_facts = relay.facts(measure=False), own.facts(measure=False)
    assert dict(facts.config_records["facts"]) == dict(expected_facts.config_records["facts"])


def test_what_does_not_fit_is_refused(bench: Bench, experiment: Path, address: str, tmp_path: Path) -> None:
    run, node = {"experiment": str(experiment)}, {"partition-id": 2, "device": address}
    relay = Relay(Device(address), {**run, "overrides": "seed=5"}, node)
    with pytest.raises(InputError, match="seed or precision differ"):
        relay.train(message(bench, 1), RecordDict(), 0.0)
    with pytest.raises(InputError, match="partition-id"):
        Relay(Device(address), run, {**node, "partition-id": 99}).facts(measure=False)
    with pytest.raises(InputError, match="unknown kind 'dance'; valid: train, evaluate, facts"):
        Relay(Device(address), run, node)._ask("dance", RecordDict(), RecordDict())
    body, sizes = join([RecordDict({"x": ConfigRecord({"a": 1})}), RecordDict()])
    assert split(body, sizes, 2)[0].config_records["x"]["a"] == 1
    for wrong in ([len(body)], [len(body) + 1, -1], [1.0, 2.0], None, [sizes[0] - 1, sizes[1]]):
        with pytest.raises(InputError, match="sizes"):
            split(body, wrong, 2)
    with pytest.raises(InputError, match="cannot be read"):
        split(b"\xff\xff\xff", [3, 0], 2)
    with pytest.raises(InputError, match="--token-file"):
        relay_of(run, {**node, "token-file": str(tmp_path / "none")})
    with pytest.raises(DeviceError, match="start it: airtune device"):
        Relay(Device(f"unix:{tmp_path}/none"), run, node).facts(measure=False)
    assert relay_of(run, {"partition-id": 2}) is None


def test_the_app_process_needs_no_torch(address: str, experiment: Path) -> None:
    code = (
        "import sys; import airtune.deploy.flower.client_app; from airtune.deploy.device.relay import relay_of;"
        f"relay = relay_of({{'experiment': {str(experiment)!r}}}, {{'partition-id': 1, 'device': {address!r}}});"
        "assert relay.facts(measure=False).config_records['facts']['client'] == 1;"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == "[]", done.stderr
