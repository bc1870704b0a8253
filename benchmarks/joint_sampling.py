"""Seconds of the joint solver's branches against the size of the fleet: a table, and JSON on request.

    OMP_NUM_THREADS=1 python benchmarks/joint_sampling.py [--json FILE] [--largest 100000]

Fleets: lognormal speeds and links (standard deviation 0.8 of the logarithm), Dirichlet data shares, sizes 1/8, 1/4,
1/2 and 1 of the rank, computation that grows with the size so that all 64 thresholds of the deadline branch differ.
CPU seconds of this process on one core, the least of three runs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from airtune.solvers.joint_problem import JointProblem, Judge
from airtune.solvers.joint_sampling import additive, deadline, least_seconds, slowest, solve
from airtune.solvers.round_bound import RoundModel

SIZES = (30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
RATIO = np.array([0.125, 0.25, 0.5, 1.0])
REPEATS = 3


def fleet(size: int, seed: int = 0) -> JointProblem:
    """Return a random fleet of which about 8 clients are expected in a round."""
    rng = np.random.default_rng(seed)
    weight = rng.dirichlet(np.full(size, 5.0))
    compute = rng.lognormal(0.0, 0.8, (size, 1)) * np.cumsum(rng.uniform(0.1, 1.0, (size, 4)), axis=1)
    slowest_first = compute[:, :1].max()
    late = rng.random((size, 3)) < 0.5  # larger sizes that lie above the least feasible threshold
    compute[:, 1:] += np.where(late, slowest_first * rng.uniform(0.5, 3.0, (size, 3)), 0.0)
    compute = np.maximum.accumulate(compute, axis=1)
    upload = rng.lognormal(0.0, 0.8, (size, 1)) * RATIO
    beta = float((weight**2).sum()) + 0.25
    return JointProblem.of(weight, compute, upload, RATIO, 8.0, RoundModel(12.5, beta), idle=1.0)


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the least CPU seconds of several runs, and the last result."""
    times: list[float] = []
    result: Any = None
    for _ in range(REPEATS):
        start = time.process_time()
        result = work()
        times.append(time.process_time() - start)
    return min(times), result


def measure(size: int) -> dict[str, Any]:
    """Return seconds and objectives of every branch at one size of the fleet."""
    problem = fleet(size)
    judge = Judge.of(problem)
    row: dict[str, Any] = {"clients": size}
    row["additive_s"], first = cpu_seconds(lambda: additive(problem, judge))
    row["deadline_s"], second = cpu_seconds(lambda: deadline(problem, judge))
    row["branches_s"] = row["additive_s"] + row["deadline_s"]
    row["slowest_s"], third = cpu_seconds(lambda: slowest(problem, judge, second))
    row["bound_s"], bound = cpu_seconds(lambda: least_seconds(problem))
    if size <= 1000:
        row["solve_s"], answer = cpu_seconds(lambda: solve(problem, baselines=False))
        row["polished"], row["branch"] = answer.solution.objective, answer.branch
    row.update(additive=first.total_seconds, deadline=second.total_seconds, slowest=third.total_seconds, bound=bound)
    return row


def main() -> None:
    """Measure all sizes, print them, and write them if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--largest", type=int, default=SIZES[-1])
    options = parser.parse_args()
    rows = [measure(size) for size in SIZES if size <= options.largest]
    print(f"{'clients':>8} {'additive':>9} {'deadline':>9} {'both':>9} {'slowest':>9} {'bound':>9} {'with polish':>12}")
    for row in rows:
        shown = (row[name] for name in ("additive_s", "deadline_s", "branches_s", "slowest_s", "bound_s"))
        polish = f"{row['solve_s']:12.3f}" if "solve_s" in row else f"{'-':>12}"
        print(f"{row['clients']:8d} " + " ".join(f"{value:9.4f}" for value in shown) + f" {polish}")
    if options.json is not None:
        options.json.write_text(json.dumps({"unit": "CPU seconds, one core", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
