"""Server seconds and memory of one aggregation, against clients, rank and width, on one core.

    python benchmarks/server_cost.py [--quick]
    python benchmarks/server_cost.py --sweep [OUT.json]

Each case runs in its own process with one thread. Seconds are CPU seconds of the aggregation alone; memory is the
process's peak, torch (about 0.3 GB) and the clients' uploads included. The factors share a common part and a drift per
client, like those of real rounds, so that spectra fall. Bars: RoBERTa-large with 20 clients below 5 s, with 100 clients
(stacked rank above the width) below 30 s; LLaMA-7B with 10 clients below 60 s and 4 GB.

The sweep varies clients, rank and width one at a time around a middle point, one process for each point, and stores CPU
seconds for one square module: the smallest of three rounds of two modules, halved. LoRA-FAIR's published iteration is
measured for 10 of its 1000 steps and scaled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

CASES = {  # name: (modules, width, rank, clients, bar in seconds, bar in GB)
    "roberta-large, 20 clients": (48, 1024, 16, 20, 5.0, None),
    "roberta-large, 100 clients": (48, 1024, 16, 100, 30.0, None),
    "llama-7b, 10 clients": (64, 4096, 16, 10, 60.0, 4.0),
}
QUICK = {"small, 5 clients": (4, 128, 8, 5, 5.0, None)}
METHODS = {
    "fedit": ("mean", {}),
    "flora": ("stacking", {}),
    "flexlora": ("truncation", {}),
    "florist": ("energy-threshold", {}),
    "fedex-lora": ("residual-merge", {}),
    "lora-fair": ("ridge-correction", {}),
    "fedmomentum": ("principal-split", {"energy": 0.99}),
    "fedsvd": ("refactoring", {}),
    "ffa-lora": ("frozen-a", {}),
    "rolora": ("alternating", {}),
    "fedsa-lora": ("shared-factor", {}),
    "rac-lora": ("merge-and-redraw", {}),
    "galore-avg": ("merge-and-redraw", {"drawn": "B"}),
    "fed-sb": ("shared-core", {}),
}
STEPS, PUBLISHED_STEPS = 10, 1000
PUBLISHED = ("ridge-correction", {"correction": "published", "iterations": STEPS})
MIDDLE = {"clients": 10, "rank": 16, "width": 1024}
SWEEP = {"clients": (5, 10, 40, 100), "rank": (4, 16, 64), "width": (512, 1024, 2048)}


def measure(aggregator: str, fields: dict, modules: int, width: int, rank: int, clients: int) -> dict:
    """Aggregate one round and return CPU seconds and peak bytes."""
    import resource

    import torch

    torch.set_num_threads(1)
    from airtune.aggregation.declaring import exchange_of
    from airtune.aggregation.registry import AGGREGATORS
    from airtune.federation import prepared

    rule = AGGREGATORS[aggregator](**fields)
    model = prepared(rule, _model(modules, width, rank))
    outcome = _round(model, clients, exchange_of(rule, 1).send)
    before = time.process_time()
    after = rule(model, outcome)
    seconds = time.process_time() - before
    if after.version != 1:
        raise RuntimeError("nothing was aggregated")
    return {"seconds": seconds, "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def measure_point(clients: int, rank: int, width: int) -> dict[str, float]:
    """Return the CPU seconds of every rule for one module."""
    import torch

    torch.set_num_threads(1)
    from airtune.aggregation.declaring import exchange_of
    from airtune.aggregation.registry import AGGREGATORS
    from airtune.federation import prepared

    found: dict[str, float] = {}
    for name, (aggregator, fields) in {**METHODS, "lora-fair, published": PUBLISHED}.items():
        rule = AGGREGATORS[aggregator](**fields)
        model = prepared(rule, _model(2, width, rank))
        outcome = _round(model, clients, exchange_of(rule, 1).send)
        times = []
        for _ in range(3):
            before = time.process_time()
            rule(model, outcome)
            times.append(time.process_time() - before)
        scale = PUBLISHED_STEPS / STEPS if "published" in name else 1.0
        found[name] = round(min(times) / 2 * scale, 5)
    return found


def sweep(out: Path) -> int:
    """Measure every point of the sweep in a process of its own and store them."""
    points = []
    for axis, values in SWEEP.items():
        for value in values:
            point = {**MIDDLE, axis: value}
            if point not in [known["point"] for known in points]:
                found = _in_process("--point", json.dumps(list(point.values())))
                points.append({"point": point, "seconds_per_module": found})
                print(point, found, flush=True)
    stored = {"schema": 1, "unit": "CPU s for one module", "middle": MIDDLE, "points": points}
    out.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    return 0


def _in_process(flag: str, job: str) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, __file__, flag, job]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def _model(modules: int, width: int, rank: int):
    import torch

    from airtune.lora import Adapter, LoraFactors
    from airtune.types import ServerModel

    draw = torch.Generator().manual_seed(0)
    factors = {
        f"module{m}": LoraFactors(
            torch.randn(rank, width, generator=draw) * width**-0.5, torch.randn(width, rank, generator=draw) * 0.01, 2.0
        )
        for m in range(modules)
    }
    return ServerModel(Adapter(factors, {n: (n,) for n in factors}, dict.fromkeys(factors, 0), 1))


def _round(model, clients: int, tensors: frozenset):
    from dataclasses import replace

    import numpy as np
    import torch

    from airtune.compression.dense import Dense
    from airtune.lora import AdapterSlice
    from airtune.types import ClientTask, ClientUpdate, Fleet, Group, LocalTraining, Plan, RoundOutcome, TaskCost

    ones = np.ones(clients)
    examples = np.arange(1, clients + 1)
    fleet = Fleet(("device",) * clients, ones, ones, ones, ones, ones, examples)
    send = replace(AdapterSlice.everything(model.adapter.shape), tensors=tensors)
    updates = []
    for client in range(clients):
        draw = torch.Generator().manual_seed(client + 1)
        factors = {}
        for name, f in model.adapter.factors.items():
            a = f.A + 0.2 * f.A.std() * torch.randn(f.A.shape, generator=draw) if "A" in tensors else f.A
            b = f.B + 0.004 * torch.randn(f.B.shape, generator=draw) if "B" in tensors else f.B
            core = None if f.core is None else f.core + 0.1 * torch.randn(f.core.shape, generator=draw)
            factors[name] = replace(f, A=a, B=b, core=core)
        task = ClientTask(client, send, send, send, LocalTraining(), Dense(), 1.0, 1.0)
        values = model.adapter.with_factors(factors)
        updates.append(ClientUpdate(task, values, 0, 0.0, 1.0, TaskCost(0, 0, 0, 0, 0, 0), {}))
    plan = Plan((Group(tuple(u.task for u in updates)),))
    return RoundOutcome(plan, fleet, tuple(updates), (), 0.0, 1.0)


def main() -> int:
    """Run every case in a process of its own and print the table; return 1 if a bar is missed."""
    cases = QUICK if "--quick" in sys.argv else CASES
    missed = False
    print(f"{'case':28} {'method':12} {'CPU s':>8} {'peak GB':>8}  bar")
    for case, (modules, width, rank, clients, seconds_bar, memory_bar) in cases.items():
        for method, (aggregator, fields) in METHODS.items():
            job = json.dumps([aggregator, fields, modules, width, rank, clients])
            found = _in_process("--job", job)
            gigabytes = found["bytes"] / 1e9
            ok = found["seconds"] < seconds_bar and (memory_bar is None or gigabytes < memory_bar)
            missed |= not ok
            print(
                f"{case:28} {method:12} {found['seconds']:8.2f} {gigabytes:8.2f}  {'ok' if ok else 'MISSED'}",
                flush=True,
            )
    return int(missed)


if __name__ == "__main__":
    if "--job" in sys.argv:
        print(json.dumps(measure(*json.loads(sys.argv[sys.argv.index("--job") + 1]))))
    elif "--point" in sys.argv:
        print(json.dumps(measure_point(*json.loads(sys.argv[sys.argv.index("--point") + 1]))))
    elif "--sweep" in sys.argv:
        given = [argument for argument in sys.argv[1:] if argument.endswith(".json")]
        sys.exit(sweep(Path(given[0] if given else Path(__file__).with_name("server_cost_sweep.json"))))
    else:
        sys.exit(main())
