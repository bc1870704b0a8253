"""Real Flower processes on the loopback interface: their own FLWR_HOME and ports, ended by process id, time-bounded."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

APP = Path(__file__).resolve().parents[1] / "deploy" / "app"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass
class Federation:
    """A SuperLink and SuperNodes in a folder; use as a context manager."""

    folder: Path
    port: int = field(default_factory=free_port)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    socket: Path | None = None

    def __post_init__(self) -> None:
        home = self.folder / "home"
        home.mkdir(parents=True, exist_ok=True)
        text = (
            f'[superlink]\ndefault = "test"\n\n[superlink.test]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        (home / "config.toml").write_text(text)
        shutil.copytree(APP, self.folder / "app", dirs_exist_ok=True)

    @property
    def environment(self) -> dict[str, str]:
        own = {
            "FLWR_HOME": str(self.folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "OMP_NUM_THREADS": "1",
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(self.port),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        return {**os.environ, **own}

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Start a process in a session of its own; its output goes to NAME.log."""
        with open(self.folder / f"{name}.log", "ab") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self.folder, env=self.environment, start_new_session=True
            )
        self.running[name] = process
        return process

    def superlink(self, *options: str) -> None:
        address = ["--host", "127.0.0.1", "--port", str(self.port), "--database", str(self.folder / "state.db")]
        self.start("superlink", "flower-superlink", "--insecure", *address, *options)
        wait_for(lambda: _listens(self.port), 90, "the SuperLink")

    def resident(self, experiment: Path) -> None:
        """Start one resident trainer for all nodes: each of Flower's many processes then imports little."""
        self.socket = Path(tempfile.mkdtemp(prefix="airtune-")) / "device.sock"
        program = "import sys; from airtune.cli import main; sys.exit(main())"
        self.start("device", sys.executable, "-c", program, "device", str(experiment), "--socket", str(self.socket))
        wait_for(self.socket.exists, 300, "the resident trainer")

    def supernode(self, client: int, **config: Any) -> None:
        words = {"partition-id": client, **{key.replace("_", "-"): value for key, value in config.items()}}
        if self.socket is not None:
            words["device"] = f"unix:{self.socket}"
        self.start(
            f"node-{client}",
            "flower-supernode",
            "--insecure",
            "--superlink",
            f"127.0.0.1:{self.port}",
            "--port",
            str(free_port()),
            "--node-config",
            " ".join(f"{key}={_word(value)}" for key, value in words.items()),
        )

    def run(self, **config: Any) -> subprocess.Popen[bytes]:
        """Start `flwr run`."""
        words = " ".join(f"{key.replace('_', '-')}={_word(value)}" for key, value in config.items())
        return self.start("run", "flwr", "run", str(self.folder / "app"), "test", "--stream", "--run-config", words)

    def output(self, *command: str) -> str:
        """Return what a short command prints."""
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=self.folder, env=self.environment, timeout=90
        )
        return done.stdout + done.stderr

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def end(self, *names: str, number: int = signal.SIGTERM, seconds: float = 20.0) -> None:
        """End processes with their sessions: Flower's own children are in them."""
        processes = [self.running.pop(name) for name in names]
        for each, patience in ((number, seconds), (signal.SIGKILL, 10.0)):
            members = [member for process in processes for member in session_of(process.pid)]
            for member in members:
                _signal(member, each)
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline and any(_alive(member) for member in members):
                for process in processes:
                    process.poll()
                time.sleep(0.1)
        for process in processes:
            process.wait(timeout=10)

    def left_behind(self) -> list[int]:
        """Return the processes of this federation: those with its FLWR_HOME."""
        mark = f"FLWR_HOME={self.folder / 'home'}".encode()
        found: list[int] = []
        for entry in Path("/proc").iterdir():
            try:
                ours = entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if ours and _alive(int(entry.name)):
                found.append(int(entry.name))
        return found

    def find(self, program: str) -> int:
        """Return the one process of this federation that runs a program."""
        (found,) = [each for each in self.left_behind() if program in _command(each)]
        return found

    def simulate(self, count: int, **config: Any) -> subprocess.Popen[bytes]:
        """Start `flwr run` on a SuperLink with ``--simulation``, a number of nodes of one CPU each.

        `flwr run . local` would start one by itself, and give it 15 seconds, which a loaded machine exceeds.
        """
        words = " ".join(f"{key.replace('_', '-')}={_word(value)}" for key, value in config.items())
        shape = f"num-supernodes={count} client-resources-num-cpus=1 client-resources-num-gpus=0.0"
        app = str(self.folder / "app")
        return self.start(
            "run", "flwr", "run", app, "test", "--stream", "--federation-config", shape, "--run-config", words
        )

    def __enter__(self) -> Federation:
        return self

    def __exit__(self, *details: object) -> None:
        self.end(*self.running)
        for left in self.left_behind():  # Flower's local SuperLink, which `flwr run` starts in the background
            _signal(left, signal.SIGTERM)
        deadline = time.monotonic() + 20.0
        while time.monotonic() < deadline and self.left_behind():
            time.sleep(0.2)
        for left in self.left_behind():
            _signal(left, signal.SIGKILL)
        if self.socket is not None:
            shutil.rmtree(self.socket.parent)


def session_of(leader: int) -> list[int]:
    """Return the processes of a session, the leader first."""
    found = [leader]
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and int(entry.name) != leader:
            found.append(int(entry.name))
    return found


def wait_for(done: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.2)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _signal(process: int, number: int) -> None:
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return


def _command(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def _alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


Config = Mapping[str, Any]
