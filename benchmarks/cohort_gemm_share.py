"""How much of the machine's matrix throughput the cohort engine reaches: executed FLOP/s over measured GEMM FLOP/s.

    python benchmarks/cohort_gemm_share.py [--tokens 512,1024,2048] [--repeats 5] [--json FILE]

MiniLM, one client-step after another of 8 x 32 tokens without padding, micro-batches of so many tokens, one thread. The
FLOPs of a step (network, adapters, backward pass) are counted by torch while they run. The GEMM throughput is that of
this network's largest products, [tokens, 384] x [384, 1536], in the same precision, with a warm cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cohort_common import demo, finish, paired, parser_of
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from airtune.training.cohort.trainer import CohortTrainer

LENGTH, BATCH, WIDTH, INNER = 32, 8, 384, 1536
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Print a table and write JSON on request."""
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", default="512,1024,2048")
    given = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [int(size) for size in given.tokens.split(",")]
    rows: list[dict[str, Any]] = []
    for precision in ("fp32", "bf16"):
        clients = max(sizes) // (LENGTH * BATCH)
        setting = demo(clients, precision=precision, rows=BATCH * clients, fixed=LENGTH)
        jobs = setting.jobs(1, BATCH)
        for size in sizes:
            engine = CohortTrainer(setting.model, setting.tokens, setting.clients, 0, 2**31, size)
            flops = count(setting, engine, jobs)
            gemm, gemm_flops = products(size, precision)
            times = paired({"engine": lambda e=engine, j=jobs: e.train(j), "gemm": gemm}, given.repeats)
            speed = {kind: _speed(times, kind, flops, gemm_flops) for kind in ("wall_s", "processor_s")}
            rows.append({"precision": precision, "tokens": size, "flops": flops, **speed, "times": times})
            both = speed["processor_s"]
            print(
                f"{precision} {size:5d} tokens  {both['engine'] / 1e9:7.1f} of {both['gemm'] / 1e9:7.1f} GFLOP/s: "
                f"{both['share']:.2f} in processor time, {speed['wall_s']['share']:.2f} in wall time",
                flush=True,
            )
    finish(given, {"rows": rows})


def count(setting: Any, engine: CohortTrainer, jobs: Any) -> float:
    """Return the FLOPs of a cohort's step; fused attention hides its products from the counter."""
    before = setting.model.network.config._attn_implementation
    setting.model.network.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        engine.train(jobs)
    setting.model.network.set_attn_implementation(before)
    return float(counter.get_total_flops())


def products(tokens: int, precision: str) -> tuple[Callable[[], object], float]:
    """Return forward and backward products of one feed-forward layer, ten times, and their FLOPs."""
    x, y = (torch.randn(tokens, width, dtype=TYPES[precision]) for width in (WIDTH, INNER))
    weight = torch.randn(INNER, WIDTH, dtype=TYPES[precision])

    def work() -> None:
        for _ in range(10):
            functional.linear(x, weight)
            torch.mm(y, weight)

    return work, 10 * 2 * 2.0 * tokens * WIDTH * INNER


def _speed(times: dict[str, dict[str, Any]], kind: str, flops: float, gemm_flops: float) -> dict[str, float]:
    engine = flops / times["engine"][f"median_{kind}"]
    gemm = gemm_flops / times["gemm"][f"median_{kind}"]
    return {"engine": engine, "gemm": gemm, "share": engine / gemm}


if __name__ == "__main__":
    main()
