"""The largest memory of one training step by depth, measured in two ways.

    OMP_NUM_THREADS=1 python benchmarks/activation_peak.py [--model minilm] [--rows 32] [--tokens 128] [--json FILE]

Each depth has a process of its own. Two numbers, both beyond what is held before the step (base, adapter, batch):

* resident: the peak of the process's resident memory, reset after a small first step (Linux: VmHWM), with D1;
* allocated: the highest sum of the allocations and releases that torch's profiler recorded, with D1 and with D2.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch.profiler import ProfilerActivity, profile

from airtune.lora import AdapterSlice
from airtune.training.loading import load_model
from airtune.training.shapes import ModelConfig
from airtune.types import ServerModel


def allocated_peak(step: Callable[[], None]) -> int:
    """Return the most bytes that torch held during a step beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def resident_peak(step: Callable[[], None]) -> int:
    """Return by how many bytes the resident memory rose at most during a step."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def one_depth(given: argparse.Namespace) -> dict[str, int]:
    """Measure one depth in this process."""
    torch.set_num_threads(1)
    model = load_model(ModelConfig(name=given.model), num_labels=4, precision="fp32")
    everything = AdapterSlice.everything(model.shape)

    def step(rows: int = given.rows, tokens: int = given.tokens) -> None:
        ids = torch.full((rows, tokens), 2000)
        model.logits(ids, torch.ones_like(ids)).square().mean().backward()

    def activate(outside: Literal["frozen", "absent"]) -> None:
        train = AdapterSlice.top_layers(model.shape, given.depth, outside)
        model.activate(ServerModel(model.initial_adapter(0)), train, everything if outside == "frozen" else train)
        step(1, 8)

    activate("frozen")
    found = {"depth": given.depth, "resident_d1": resident_peak(step), "allocated_d1": allocated_peak(step)}
    activate("absent")
    return {**found, "allocated_d2": allocated_peak(step), "layers": model.shape.num_layers}


def measured(given: argparse.Namespace, depth: int) -> dict[str, int]:
    """Measure one depth in a new process."""
    sizes = ["--model", given.model, "--rows", str(given.rows), "--tokens", str(given.tokens)]
    command = [sys.executable, __file__, *sizes, "--depth", str(depth)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    """Print a line per depth and write the table; with --depth: measure that one and print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--depth", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.depth is not None:
        print(json.dumps(one_depth(given)))
        return
    found: list[dict[str, int]] = []
    while not found or found[-1]["depth"] < found[-1]["layers"]:
        found.append(measured(given, len(found) + 1))
        line = (f"{name} {found[-1][name] / 1e6:.1f} MB" for name in ("resident_d1", "allocated_d1", "allocated_d2"))
        print(f"depth {found[-1]['depth']}: {', '.join(line)}", flush=True)
    if given.json:
        settings = {name: getattr(given, name) for name in ("model", "rows", "tokens")}
        given.json.write_text(json.dumps({"settings": settings, "peaks": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
