"""The processes of a race: how each framework is started, and how nothing of it is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MARK = "AIRTUNE_RACE"  # in the environment of every process that a race starts, however deep
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


@dataclass(frozen=True)
class Launch:
    """One process of a side: after `starts_after` answers on that port, if it is given."""

    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    after_port: int | None = None
    stays: bool = True  # False: it only hands the work over


@dataclass(frozen=True)
class Side:
    """A framework in one form."""

    name: str
    folder: Path
    launches: tuple[Launch, ...]
    versions: Mapping[str, str] = field(default_factory=dict)


def airtune_side(name: str, work: Path, folder: Path, engine: Mapping[str, Any]) -> Side:
    """Return airtune with the given fields of [training]."""
    threads = {} if engine.get("threads") is None else {"OMP_NUM_THREADS": str(engine["threads"])}
    command = (sys.executable, "-m", "race.airtune_side", str(work), str(folder), json.dumps(dict(engine)))
    return Side(name, folder, (Launch(command, threads),))


def pfl_side(name: str, work: Path, folder: Path, python: Path, processes: int, threads: int) -> Side:
    """Return pfl in one process, or in several that torch.distributed joins, as torchrun would start them."""
    port = str(free_port())
    launches = []
    for rank in range(processes):
        environment = {"RACE_THREADS": str(threads), "OMP_NUM_THREADS": str(threads), "PFL_PYTORCH_DEVICE": "cpu"}
        if processes > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "race"}
            environment |= {"LOCAL_WORLD_SIZE": str(processes), "GLOO_SOCKET_IFNAME": "lo"}
        launches.append(Launch((str(python), "-m", "race.pfl_side", str(work), str(folder)), environment))
    return Side(name, folder, tuple(launches))


def flower_side(name: str, work: Path, folder: Path, python: Path, *, cached: bool, actors: int) -> Side:
    """Return Flower's simulation runtime (SuperLink, Ray) with one actor per core."""
    port, home = free_port(), folder / "flwr"
    home.mkdir(parents=True)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "race"\n[superlink.race]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    path = f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {"FLWR_HOME": str(home), "PATH": path, "OMP_NUM_THREADS": "1"}
    link = ("flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess", "--host", "127.0.0.1")
    link += ("--port", str(port), "--control-api-address", f"127.0.0.1:{free_port()}")
    config = f'work="{work}" gate="{folder}" cached={str(cached).lower()}'
    clients = json.loads((work / "work.json").read_text())["clients"]
    resources = f"num-supernodes={clients} client-resources-num-cpus=1 client-resources-num-gpus=0.0"
    resources += f" init-args-num-cpus={actors}"
    submit = ("flwr", "run", str(HERE / "flower_app"), "race", "--run-config", config, "--federation-config", resources)
    binaries = python.parent
    return Side(
        name,
        folder,
        (
            Launch((str(binaries / link[0]), *link[1:]), environment),
            Launch((str(binaries / submit[0]), *submit[1:]), environment, after_port=port, stays=False),
        ),
    )


def free_port() -> int:
    """Return a port of localhost that nobody uses now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Processes:
    """All processes of a race; on leaving, none of them is left."""

    def __init__(self) -> None:
        """Choose the mark that tells them from all others."""
        self.mark = f"{os.getpid()}-{time.time_ns()}"
        self.started: list[tuple[Side, Launch, subprocess.Popen[bytes]]] = []

    def __enter__(self) -> Processes:
        """Return itself; from now on a polite end of this process is an exception, so that the others end too."""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        return self

    def __exit__(self, *_: object) -> None:
        """End every process that carries the mark: first politely, then for good. Nothing interrupts that."""
        for asked in (signal.SIGINT, signal.SIGTERM):
            signal.signal(asked, signal.SIG_IGN)
        for sent in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + 10
            for pid in self._marked():
                _signal(pid, sent)
            while self._marked() and time.monotonic() < deadline:
                for _, _, process in self.started:
                    process.poll()
                time.sleep(0.1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def start(self, side: Side) -> None:
        """Start a side's processes, their output into its folder."""
        side.folder.mkdir(parents=True, exist_ok=True)
        for number, launch in enumerate(side.launches):
            if launch.after_port is not None:
                _await_port(launch.after_port)
            environment = {**os.environ, **OFFLINE, MARK: f"{self.mark}/{side.name}", **launch.environment}
            environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *_inherited_path()])
            environment.pop("RAY_ADDRESS", None)
            with (side.folder / f"log-{number}.txt").open("wb") as log:
                process = subprocess.Popen(
                    launch.command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
            self.started.append((side, launch, process))

    def check(self) -> None:
        """Raise RuntimeError with the end of its log if a process failed."""
        for side, launch, process in self.started:
            code = process.poll()
            early = launch.stays and not (side.folder / "final").exists()
            if code is not None and (code != 0 or early):
                raise RuntimeError(f"{side.name} ended with {code}:\n{_logs(side)}")

    def cpu_seconds(self, side: Side) -> float:
        """Return the processor seconds that a side's processes have used, those of children that ended included."""
        ticks = 0
        for pid in self._marked(f"/{side.name}"):
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
                ticks += sum(int(value) for value in fields[11:15])  # user, system, and both of awaited children
        return ticks / os.sysconf("SC_CLK_TCK")

    def logs(self, side: Side) -> str:
        """Return the ends of a side's logs."""
        return _logs(side)

    def _marked(self, side: str = "") -> list[int]:
        """Return the processes of a side, or of all."""
        found = []
        begin, end = f"{MARK}={self.mark}/".encode(), side.encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
                    variables = (entry / "environ").read_bytes().split(b"\0") if state != "Z" else []
                    if any(variable.startswith(begin) and variable.endswith(end) for variable in variables):
                        found.append(int(entry.name))
                except OSError:
                    continue
        return found


def _inherited_path() -> list[str]:
    return [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]


def _signal(pid: int, sent: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, sent)


def _await_port(port: int, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError(f"nothing answers on port {port} after {seconds:g} s")


def _logs(side: Side) -> str:
    texts = [path.read_text(errors="replace") for path in sorted(side.folder.glob("log-*.txt"))]
    return "\n--\n".join(text[-2500:] for text in texts)
