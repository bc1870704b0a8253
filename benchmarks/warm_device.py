"""What a resident trainer saves: rounds of one device over Flower on loopback, with and without it.

Each round trains a single local step, so that its seconds are those of Flower, of starting the app's process, and of
loading the model. The first round is left out: it also finds the device. Whole rounds count, server side included.

    python benchmarks/warm_device.py --json warm.json       (as root: a control group gives it the processor first)
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from predicted_vs_measured import APP, CLI, EXPERIMENT, PORT, Run, interrupt
from predicted_vs_measured_net import Links, Quotas, why_not


def rounds_of(run: Run, experiment: Path, name: str, count: int) -> list[dict[str, Any]]:
    """Run `count` rounds of one client and return their lines."""
    words = {
        "experiment": str(experiment),
        "out": str(run.folder / name),
        "overrides": f"stop.rounds={count} method.cohort_size=1",
        "observe": "simulated",
        "measure": False,
        "poll-seconds": 0.1,
    }
    config = " ".join(f"{key}={json.dumps(value)}" for key, value in words.items())
    process = run.start(
        f"{name}-run", "flwr", "run", str(APP), "b", "--stream", "--run-config", config, group=run.server
    )
    run.finish(process, f"{name}-run", 1500)
    lines = (run.folder / name / "rounds.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines][2:]  # without the zeroth and the first round


def summary(lines: list[dict[str, Any]]) -> dict[str, float]:
    seconds = [line["duration_s"] for line in lines]
    inside = [client["compute_s"] for line in lines for client in line["clients"]]
    return {
        "rounds": len(lines),
        "round_s_median": statistics.median(seconds),
        "round_s_min": min(seconds),
        "round_s_max": max(seconds),
        "app_s_median": statistics.median(inside),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    if reason := why_not():
        print(f"skipped: {reason}")
        return 0
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupt)
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    with Quotas(f"warm-{os.getpid()}") as quotas:
        run = Run(folder, Links(0), quotas)
        try:
            found = measure(run, arguments.rounds)
        finally:
            run.end()
    print(json.dumps(found, indent=1))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n")
    shutil.rmtree(folder)
    return 0


def measure(run: Run, rounds: int) -> dict[str, Any]:
    experiment = run.folder / "warm.toml"
    experiment.write_text(EXPERIMENT.format(devices="{ jetson-tx2 = 1 }", steps=1))
    (run.folder / "flwr").mkdir()
    (run.folder / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "b"\n[superlink.b]\naddress = "127.0.0.1:{PORT}"\ninsecure = true\n'
    )
    run.start("superlink", "flower-superlink", "--insecure", "--port", str(PORT), group=run.server)
    run.wait_for("superlink", "Uvicorn running")
    socket = run.folder / "device.sock"
    run.start("trainer", *CLI, "device", str(experiment), "--socket", str(socket), group=run.server)
    run.wait_for("trainer", "ready at")
    found: dict[str, Any] = {}
    for name, extra in (("cold", ""), ("warm", f' device="unix:{socket}"')):
        node = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{PORT}", "--port", str(PORT + 1094)]
        process = run.start(f"{name}-node", *node, "--node-config", f"partition-id=0{extra}", group=run.server)
        found[name] = summary(rounds_of(run, experiment, name, rounds))
        run.end(process)
    return found


if __name__ == "__main__":
    sys.exit(main())
