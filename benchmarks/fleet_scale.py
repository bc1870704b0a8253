"""How observing a fleet and splitting a band grow with the number of devices, on one core.

    OMP_NUM_THREADS=1 python benchmarks/fleet_scale.py [--largest 1000000] [--repeats 5] [--json FILE]

Observed: true gains (drop, path loss, correlated shadowing, Rayleigh fading), availability (Bernoulli) and power modes.
Solved: every bandwidth problem. Reported is the best of the repeats, in wall-clock and in processor seconds (on a
machine that does other work the wall clock measures that too).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from airtune.devices.availability import Bernoulli, mode_at
from airtune.solvers.airtime import min_energy, min_latency_sum
from airtune.solvers.equal_finish import equal_finish
from airtune.solvers.joint_energy import joint_min_energy
from airtune.wireless.channel import Channel

MOST_SOLVED = 100_000
BAND = 20e6
TIME = 123_456.7


def best(work: Callable[[], object], repeats: int) -> dict[str, float]:
    """Return the least wall-clock and processor seconds of some repeats, after one that is not counted."""
    work()
    wall, processor = [], []
    for _ in range(repeats):
        begin, used = time.perf_counter(), time.process_time()
        work()
        wall.append(time.perf_counter() - begin)
        processor.append(time.process_time() - used)
    return {"wall_s": min(wall), "processor_s": min(processor)}


def observing(size: int) -> Callable[[], object]:
    channel, presence, clients = Channel(block=0.05), Bernoulli(), np.arange(size)

    def observe() -> object:
        gains = channel.gain(0, clients, TIME)
        return gains, presence.available(0, clients, TIME), mode_at(0, clients, TIME, 60.0, 2)

    return observe


def solving(size: int) -> dict[str, Callable[[], object]]:
    rng = np.random.default_rng(0)
    gain = Channel(block=0.05).gain(0, np.arange(size), TIME)
    link = (rng.uniform(0, 3, size), rng.uniform(1e6, 1e7, size), 0.2, gain, 1.3e-20, BAND)
    deadline = 1.2 * equal_finish(*link).objective
    return {
        "equal_finish": lambda: equal_finish(*link),
        "min_energy": lambda: min_energy(*link, deadline),
        "min_latency_sum": lambda: min_latency_sum(*link),
        "joint_min_energy": lambda: joint_min_energy(*link, deadline),
    }


def measure(largest: int, repeats: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    size = 100
    while size <= largest:
        row: dict[str, Any] = {"devices": size, "observe": best(observing(size), repeats)}
        if size <= MOST_SOLVED:
            row |= {name: best(work, repeats) for name, work in solving(size).items()}
        rows.append(row)
        print(f"{size:>9,}", *(f"{k} {1e3 * v['wall_s']:.2f} ms" for k, v in row.items() if k != "devices"), sep="  ")
        size *= 10
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    result = {"machine": machine, "versions": versions, "rows": measure(chosen.largest, chosen.repeats)}
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
