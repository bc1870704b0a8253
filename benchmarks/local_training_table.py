"""The table of docs/results/local-training.md from the folders that `airtune compare --out` wrote.

    python benchmarks/local_training_table.py lt-lora lt-dora ... --reference lora

Means and standard deviations over seeds at the end of each run; `gain` is the difference of final accuracies to the
reference run of the same seed; `to` is the fleet seconds until `--accuracy`, over the seeds that reached it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np


def runs_of(folder: Path) -> list[dict[str, Any]]:
    """Return one entry per run: method, seed, tuned rate, totals and the evaluations."""
    found: list[dict[str, Any]] = []
    for path in sorted((folder / "runs").glob("*/run.json")):
        head = json.loads(path.read_text())
        lines = [json.loads(line) for line in (path.parent / "rounds.jsonl").read_text().splitlines()]
        rate = head["config"]["training"]["learning_rate"]
        curve = [(line["time_s"], line["accuracy"]) for line in lines if "accuracy" in line]
        found.append({"method": head["method"], "seed": head["seed"], "rate": rate, "curve": curve, **head["final"]})
    return found


def first_time(run: dict[str, Any], accuracy: float) -> float | None:
    """Return the fleet seconds of the first evaluation at or above an accuracy, None if there is none."""
    return next((time for time, value in run["curve"] if value >= accuracy), None)


def spread(values: list[float], digits: int = 1) -> str:
    """Return mean and standard deviation."""
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1) if len(values) > 1 else 0.0:.{digits}f}"


def main() -> None:
    """Print one line of a Markdown table for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--reference", default="lora")
    parser.add_argument("--accuracy", type=float, default=0.8)
    given = parser.parse_args()
    runs = [run for folder in given.folders for run in runs_of(folder)]
    base = {run["seed"]: run["accuracy"] for run in runs if run["method"] == given.reference}
    print(
        f"| option | rate | accuracy, % | gain, points | by seed | to {given.accuracy:.0%}, s | rounds | up, Mbit | J |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for method in dict.fromkeys(run["method"] for run in runs):
        mine = [run for run in runs if run["method"] == method]
        gains = [100 * (run["accuracy"] - base[run["seed"]]) for run in mine if run["seed"] in base]
        times = [time for time in (first_time(run, given.accuracy) for run in mine) if time is not None]
        cells = [
            method,
            f"{mine[0]['rate']:g}",
            spread([100 * run["accuracy"] for run in mine]),
            spread(gains) if gains else "-",
            ", ".join(f"{100 * run['accuracy']:.0f}" for run in mine),
            f"{np.mean(times):.1f} ({len(times)} of {len(mine)})" if times else f"- (0 of {len(mine)})",
            spread([run["rounds"] for run in mine]),
            spread([run["uplink_bits"] / 1e6 for run in mine], 0),
            spread([run["energy_j"] for run in mine], 0),
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
