"""Network namespaces with shaped links, and processor quotas: the parts of the benchmark that need root."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

QUEUE = 4_000_000  # bytes that wait at a link; large, so that nothing is dropped and TCP keeps the link full
CGROUP = Path("/sys/fs/cgroup")
PERIOD = 100_000  # microseconds


def why_not() -> str | None:
    """Return why the benchmark cannot run here, None if it can."""
    if os.geteuid() != 0:
        return "needs root: network namespaces, traffic shaping, processor quotas"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"the command {tool} is not installed (package iproute2)"
    name = f"atpvm-{os.getpid()}-probe"
    try:
        _run("ip", "netns", "add", name)
        _run("ip", "-n", name, "link", "add", "name", "probe0", "type", "veth", "peer", "name", "probe1")
        _run("tc", "-n", name, "qdisc", "replace", "dev", "probe0", "root", *_tbf(1e6))
    except subprocess.CalledProcessError as error:
        return f"no network namespace with a shaped link: {error.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return None if quota_kind() else "no cgroup controller for processor time that may be written"


def quota_kind() -> str:
    """Return "v1", "v2", or "" where there is no processor quota."""
    if (CGROUP / "cpu" / "cpu.cfs_quota_us").exists() and os.access(CGROUP / "cpu", os.W_OK):
        return "v1"
    controllers = CGROUP / "cgroup.controllers"
    return "v2" if controllers.exists() and "cpu" in controllers.read_text().split() else ""


@dataclass
class Links:
    """One namespace for the server, one for each device, and a link from each device to the server.

    The server is 10.199.K.1 and device K is 10.199.K.2 on their link; no namespace has any other way out.
    """

    devices: int
    prefix: str = field(default_factory=lambda: f"atpvm-{os.getpid()}")

    @property
    def server(self) -> str:
        return f"{self.prefix}-server"

    def device(self, index: int) -> str:
        return f"{self.prefix}-{index}"

    def inside(self, namespace: str) -> list[str]:
        """Return what runs a command in a namespace."""
        return ["ip", "netns", "exec", namespace]

    def __enter__(self) -> Links:
        try:
            _run("ip", "netns", "add", self.server)
            _run("ip", "-n", self.server, "link", "set", "lo", "up")
            for index in range(self.devices):
                self._add(index)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _add(self, index: int) -> None:
        own, far, near = self.device(index), f"s{index}", "up0"
        _run("ip", "netns", "add", own)
        _run("ip", "-n", own, "link", "set", "lo", "up")
        _run("ip", "-n", self.server, "link", "add", "name", far, "type", "veth", "peer", "name", near, "netns", own)
        for namespace, name, host in ((self.server, far, 1), (own, near, 2)):
            _run("ip", "-n", namespace, "addr", "add", f"10.199.{index}.{host}/30", "dev", name)
            _run("ip", "-n", namespace, "link", "set", name, "up")

    def shape(self, index: int, up: float, down: float) -> None:
        """Set the rates of one device's link, bit/s."""
        shape(self.prefix, index, up, down)

    def __exit__(self, *_: object) -> None:
        for index in range(self.devices):
            subprocess.run(["ip", "netns", "del", self.device(index)], capture_output=True)
        subprocess.run(["ip", "netns", "del", self.server], capture_output=True)


def shape(prefix: str, index: int, up: float, down: float) -> None:
    """Set the rates of the link of device `index`, bit/s, with a token bucket at each end."""
    _run("tc", "-n", f"{prefix}-{index}", "qdisc", "replace", "dev", "up0", "root", *_tbf(up))
    _run("tc", "-n", f"{prefix}-server", "qdisc", "replace", "dev", f"s{index}", "root", *_tbf(down))


def _tbf(rate: float) -> list[str]:
    burst = max(3 * 1514, int(rate / 8 * 0.01))  # 10 ms: large enough for the timer, small against a payload
    return ["tbf", "rate", f"{round(rate)}bit", "burst", str(burst), "limit", str(QUEUE)]


@dataclass
class Quotas:
    """Control groups under one parent, each with its share of processor time.

    The parent has a large weight, so that the quotas are there even if the machine has other work.
    """

    prefix: str
    made: list[Path] = field(default_factory=list[Path])

    @property
    def root(self) -> Path:
        return (CGROUP / "cpu" if quota_kind() == "v1" else CGROUP) / self.prefix

    def __enter__(self) -> Quotas:
        if quota_kind() == "v2":
            (CGROUP / "cgroup.subtree_control").write_text("+cpu")
        self._make(self.root)
        if quota_kind() == "v1":
            (self.root / "cpu.shares").write_text("65536")
        else:
            (self.root / "cpu.weight").write_text("10000")
            (self.root / "cgroup.subtree_control").write_text("+cpu")
        return self

    def group(self, name: str, cores: float | None) -> Path:
        """Return a new group that may use so many cores; None: no limit."""
        path = self._make(self.root / name)
        if cores is not None:
            quota = round(cores * PERIOD)
            if quota_kind() == "v1":
                (path / "cpu.cfs_period_us").write_text(str(PERIOD))
                (path / "cpu.cfs_quota_us").write_text(str(quota))
            else:
                (path / "cpu.max").write_text(f"{quota} {PERIOD}")
        return path

    def _make(self, path: Path) -> Path:
        path.mkdir()
        self.made.append(path)
        return path

    def __exit__(self, *_: object) -> None:
        for path in reversed(self.made):
            end = time.monotonic() + 20
            while True:
                try:
                    path.rmdir()
                    break
                except OSError:
                    if time.monotonic() > end:
                        raise
                    for process in (path / "cgroup.procs").read_text().split():  # only what we put there
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(int(process), signal.SIGKILL)
                    time.sleep(0.2)


def enter(group: Path, process: int) -> None:
    """Move a process, with all that it will start, into a group."""
    (group / "cgroup.procs").write_text(str(process))


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    except subprocess.CalledProcessError as error:
        error.add_note(error.stderr.strip())
        raise
