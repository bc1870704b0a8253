"""How long one round of TSFA's decision takes, on one core, and how far it is from its bound.

    OMP_NUM_THREADS=1 python benchmarks/tsfa_solver.py [--repeats 7] [--clients 10,100,1000] [--seeds 0] [--json FILE]

`drift_plus_penalty` with measured profiles for 10 to 5,000 clients and ranks 8, 16 and 32: cold, and started near the
last round's latency. Reported is the best of the repeats, in processor and wall-clock seconds (on a machine that does
other work the wall clock measures that too), and the gap between the answer and the lower bound. Each seed is another
random round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from airtune.solvers.drift_plus_penalty import PricedRound, drift_plus_penalty

BAND_PER_CLIENT = 200e3  # Hz
NOISE = 4e-21


def random_round(clients: int, rank: int, seed: int = 0) -> PricedRound:
    """Return a round of a cell: 50-500 m, fading of fourfold diversity, 1.18 Mbit a component (ViT-B/16, q and v)."""
    rng = np.random.default_rng(seed)
    distance = rng.uniform(0.05, 0.5, clients)
    gain = 10 ** (-(128.1 + 37.6 * np.log10(distance)) / 10) * rng.gamma(4.0, 0.25, clients)
    squares = np.sort(rng.exponential(size=(clients, rank)) ** 2, axis=1)[:, ::-1]
    tails = np.concatenate([np.cumsum(squares[:, ::-1], axis=1)[:, ::-1][:, 1:], np.zeros((clients, 1))], axis=1)
    weights = rng.uniform(0.5, 1.5, clients)
    errors = weights[:, None] * tails / float(weights @ squares.sum(axis=1))
    bits = 1.18e6 * np.arange(1, rank + 1) + 1e5
    compute = rng.uniform(0.0, 3.0, clients)
    return PricedRound.of(compute, bits, 0.2, gain, NOISE, BAND_PER_CLIENT * clients, errors, queue=0.03)


def best(work: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Return the least processor and wall-clock seconds of some repeats, after one that is not counted."""
    work()
    processor, wall = [], []
    for _ in range(repeats):
        used, begin = time.process_time(), time.perf_counter()
        work()
        processor.append(time.process_time() - used)
        wall.append(time.perf_counter() - begin)
    return min(processor), min(wall)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--clients", default="10,100,1000,5000")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sizes, seeds = ([int(part) for part in text.split(",")] for text in (options.clients, options.seeds))
    rows = []
    print("clients  rank  seed  cold, cpu ms  cold, wall ms  warm, cpu ms  gap to the bound  mean share sent")
    for clients, rank, seed in itertools.product(sizes, (8, 16, 32), seeds):
        row = measured(clients, rank, seed, options.repeats)
        rows.append(row)
        times = f"{1e3 * row['cpu_s']:12.1f}  {1e3 * row['wall_s']:13.1f}  {1e3 * row['warm_cpu_s']:12.1f}"
        print(f"{clients:7d}  {rank:4d}  {seed:4d}  {times}  {row['gap']:16.2e}  {row['sent']:15.2f}", flush=True)
    if options.json:
        found = {"unit": "seconds, the least of the repeats, one core", "repeats": options.repeats, "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def measured(clients: int, rank: int, seed: int, repeats: int) -> dict[str, float]:
    """Return one row: seconds of a cold and of a warm decision, the gap to the bound and the mean share sent."""
    problem = random_round(clients, rank, seed)
    found = drift_plus_penalty(problem)
    start = 1.02 * found.value["latency"]
    cold, wall = best(lambda: drift_plus_penalty(problem), repeats)
    warm, _ = best(lambda: drift_plus_penalty(problem, start), repeats)
    return {
        "clients": clients,
        "rank": rank,
        "seed": seed,
        "cpu_s": cold,
        "wall_s": wall,
        "warm_cpu_s": warm,
        "gap": (found.objective - found.value["bound"]) / found.objective,
        "sent": float((found.value["choice"] + 1).mean()) / rank,
    }


if __name__ == "__main__":
    main()
