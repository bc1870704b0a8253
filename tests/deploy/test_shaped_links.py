"""The links of benchmarks/predicted_vs_measured: a transfer takes what its rate says, and nothing is left behind."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "predicted_vs_measured_net.py"

SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], 7100)) as link:
    link.sendall(b"x" * int(sys.argv[2]))
    link.recv(1)
"""
RECEIVE = """
import json, socket, sys, time
with socket.create_server(("0.0.0.0", 7100)) as listener:
    print("ready", flush=True)
    link, _ = listener.accept()
    wanted, begun = int(sys.argv[1]), time.perf_counter()
    while wanted:
        wanted -= len(link.recv(min(65536, wanted)))
    print(json.dumps(time.perf_counter() - begun), flush=True)
    link.sendall(b"y")
"""


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("predicted_vs_measured_net", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


net = load()
pytestmark = pytest.mark.slow  # and timed: not for a machine with other work


@pytest.fixture(scope="module", autouse=True)
def _only_where_links_can_be_shaped() -> None:
    if reason := net.why_not():
        pytest.skip(reason)


def namespaces() -> list[str]:
    return [line for line in subprocess.check_output(["ip", "netns", "list"], text=True).splitlines() if line]


def seconds(links: object, source: str, target: str, host: str, size: int) -> float:
    """Return how long a transfer between two namespaces takes."""
    inside = links.inside  # type: ignore[attr-defined]
    command = [*inside(target), sys.executable, "-c", RECEIVE, str(size)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as receiver:
        assert receiver.stdout is not None and receiver.stdout.readline() == "ready\n"
        subprocess.run([*inside(source), sys.executable, "-c", SEND, host, str(size)], check=True, timeout=60)
        return float(json.loads(receiver.stdout.readline()))


def test_a_transfer_takes_what_its_rate_says() -> None:
    before = namespaces()
    with net.Links(2) as links:
        links.shape(0, up=2e6, down=8e6)
        links.shape(1, up=16e6, down=8e6)
        for device, rate, size in ((0, 2e6, 500_000), (1, 16e6, 2_000_000)):
            took = seconds(links, links.device(device), links.server, f"10.199.{device}.1", size)
            expected = 8 * size * 1514 / 1448 / rate  # with the headers of Ethernet, IP and TCP
            assert 0.95 * expected < took < 1.5 * expected, device  # never faster; slower on a busy machine
        took = seconds(links, links.server, links.device(0), "10.199.0.2", 1_000_000)
        assert 1.0 < took < 1.5
        links.shape(0, up=8e6, down=8e6)
        assert seconds(links, links.device(0), links.server, "10.199.0.1", 500_000) < 1.5
        outside = [*links.inside(links.device(0)), "ip", "route", "get", "192.0.2.1"]
        assert subprocess.run(outside, capture_output=True).returncode != 0  # no way out
    assert namespaces() == before


def test_a_quota_slows_and_is_removed() -> None:
    code = "import time; a = time.process_time(), time.perf_counter()\nwhile time.process_time() - a[0] < 0.2: pass\n"
    code += "print(time.perf_counter() - a[1])"
    with net.Quotas(f"atpvm-{os.getpid()}-quota") as quotas:
        group = quotas.group("slow", 0.2)
        took = subprocess.check_output(
            ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$0" -c "$1"', sys.executable, code], text=True
        )
        root = quotas.root
        assert root.exists()
    assert not root.exists()
    assert float(took) > 0.6  # 0.2 s of work at a fifth of a core
