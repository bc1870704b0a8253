"""What `airtune deploy init` writes, with real Flower processes: strangers stay out, the right nodes get in."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from airtune import cli
from tiny_experiment import lines_of, write_experiment

BIN = Path(sys.executable).parent
APP = Path(__file__).resolve().parents[2] / "deploy" / "app"
CLI = "import sys; from airtune.cli import main; sys.exit(main())"
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
PATIENCE = 240.0  # s: a Flower process may take a minute to start on a busy machine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BIN / "flower-superlink").exists(), reason="flwr comes with the extra airtune[flower]"),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.5)


@contextlib.contextmanager
def running(log: Path, *command: str, home: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**ENVIRONMENT, "FLWR_HOME": str(home), **environment},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its own group: what it started ends with it
        process.wait()


def nodes(folder: Path) -> dict[str, str]:
    """Return node id -> status, as the server lists them."""
    done = subprocess.run(
        ["flwr", "supernode", "list", "airtune", "--format", "json"],
        env={**ENVIRONMENT, "FLWR_HOME": str(folder / "flwr")},
        capture_output=True, text=True, timeout=PATIENCE, check=True,
    )  # fmt: skip
    return {node["node-id"]: node["status"] for node in json.loads(done.stdout)["nodes"]}


def test_strangers_stay_out_and_the_right_nodes_get_in(tmp_path: Path) -> None:
    folder, other, port = tmp_path / "d", tmp_path / "other", free_port()
    for each in (folder, other):
        assert cli.main(["deploy", "init", str(each), "--port", str(port)]) == 0
    log = tmp_path / "superlink.log"
    with running(log, "sh", str(folder / "start-superlink.sh"), home=folder / "flwr"):
        until(lambda: "Uvicorn running" in log.read_text(), "the SuperLink does not start")
        subprocess.run(["sh", str(folder / "register-nodes.sh")], env=ENVIRONMENT, timeout=2 * PATIENCE, check=True)
        _plain_text_and_other_authorities_get_nothing(folder, other, port)
        _strangers_are_turned_away(tmp_path, folder, other, port)
        assert set(nodes(folder).values()) == {"registered"}
        experiment = write_experiment(tmp_path / "task")
        trainer = [sys.executable, "-c", CLI, "device", str(experiment), "--socket", str(tmp_path / "s")]
        first, second = ((tmp_path / f"node-{i}.log", folder / "nodes" / f"node-{i}" / "start.sh") for i in range(2))
        ports = [str(free_port()), str(free_port())]
        resident = {"AIRTUNE_NODE_CONFIG": f'device="unix:{tmp_path}/s"'}
        with (
            running(tmp_path / "trainer.log", *trainer, home=tmp_path),
            running(first[0], "sh", str(first[1]), home=tmp_path / "h0", AIRTUNE_NODE_PORT=ports[0], **resident),
            running(second[0], "sh", str(second[1]), home=tmp_path / "h1", AIRTUNE_NODE_PORT=ports[1], **resident),
        ):
            until(lambda: all("SuperNode ID" in each[0].read_text() for each in (first, second)), "nodes do not join")
            assert set(nodes(folder).values()) == {"online"}
            _a_run_ends_with_an_adapter(tmp_path, folder)


def _a_run_ends_with_an_adapter(tmp_path: Path, folder: Path) -> None:
    """Train a round over TLS with both nodes, whose messages go to one resident trainer."""
    until(lambda: "ready at" in (tmp_path / "trainer.log").read_text(), "the resident trainer does not start")
    words = {
        "experiment": str(tmp_path / "task" / "tiny.toml"),
        "out": str(tmp_path / "run"),
        "overrides": "method.cohort_size=2 stop.rounds=1",
        "observe": "simulated",
        "measure": False,
        "nodes": 2,
    }
    config = " ".join(f"{key}={json.dumps(value)}" for key, value in words.items())
    command = ["flwr", "run", str(APP), "airtune", "--stream", "--run-config", config]
    done = subprocess.run(
        command,
        env={**ENVIRONMENT, "FLWR_HOME": str(folder / "flwr")},
        capture_output=True, text=True, timeout=2 * PATIENCE,
    )  # fmt: skip
    lines = lines_of(tmp_path / "run")
    assert [line["arrived"] for line in lines[1:]] == [[0, 1]], done.stdout + done.stderr
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def _plain_text_and_other_authorities_get_nothing(folder: Path, other: Path, port: int) -> None:
    plain = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with pytest.raises((http.client.HTTPException, OSError)):
        plain.request("POST", "/v1/fleet/activate-node")
        plain.getresponse()
    plain.close()

    def status(authority: Path) -> int:
        trust = ssl.create_default_context(cafile=authority)
        connection = http.client.HTTPSConnection("localhost", port, timeout=30, context=trust)
        with contextlib.closing(connection):
            connection.request("GET", "/")
            return connection.getresponse().status

    with pytest.raises(ssl.SSLCertVerificationError):
        status(other / "ca.crt")
    assert status(folder / "ca.crt") >= 200


def _strangers_are_turned_away(tmp_path: Path, folder: Path, other: Path, port: int) -> None:
    """Start three nodes that must not get in: a wrong authority, an unknown key, no TLS at all."""
    wrong, unknown = tmp_path / "wrong", tmp_path / "unknown"
    for copy in (wrong, unknown):
        shutil.copytree(folder / "nodes" / "node-1", copy)
    shutil.copy(other / "ca.crt", wrong / "ca.crt")
    shutil.copy(other / "nodes" / "node-1" / "node.key", unknown / "node.key")
    short = ("--max-retries", "2")
    commands = {
        "wrong": ("sh", str(wrong / "start.sh"), *short),
        "unknown": ("sh", str(unknown / "start.sh"), *short),
        "plain": ("flower-supernode", "--insecure", "--superlink", f"localhost:{port}", "--port", "0", *short),
    }
    with contextlib.ExitStack() as stack:
        started = {
            name: stack.enter_context(
                running(
                    tmp_path / f"{name}.log",
                    *command,
                    home=tmp_path / f"home-{name}",
                    AIRTUNE_NODE_PORT=str(free_port()),
                )
            )
            for name, command in commands.items()
        }
        until(lambda: all(process.poll() is not None for process in started.values()), "a stranger still tries")
        for name, process in started.items():
            assert "SuperNode ID" not in (tmp_path / f"{name}.log").read_text(), name
            assert process.returncode != 0, name
