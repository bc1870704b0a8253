"""Where a client-step's processor time goes, in the twin and in the cohort engine: torch's profiler on one thread.

    OMP_NUM_THREADS=1 python benchmarks/cohort_profile.py [--clients 8] [--json FILE]

Two cases, those of cohort_against_twin.py. Shares are of the operators' own time; what Python spends between them is
the rest of the wall time. The profiler itself costs time, so absolute figures are upper bounds.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from cohort_common import Setting, demo, finish, parser_of, synthetic
from torch.profiler import ProfilerActivity, profile

from airtune.training.cohort.trainer import CohortTrainer
from airtune.training.local import LocalTrainer

# group -> beginnings of the operators' names, without "aten::"; the first that fits counts
GROUPS = {
    "products of the base": ("addmm", "mm", "mkldnn_linear", "linear"),
    "attention and adapters": ("bmm", "baddbmm", "matmul", "_scaled_dot", "scaled_dot", "_flash", "einsum"),
    "GELU": ("gelu",),
    "layer norm": ("native_layer_norm", "layer_norm"),
    "softmax": ("_softmax", "softmax", "_log_softmax", "log_softmax", "nll"),
    "copies": (
        "copy_",
        "_to_copy",
        "to",
        "clone",
        "contiguous",
        "cat",
        "index",
        "gather",
        "fill_",
        "zero_",
        "embedding",
    ),
    "element by element": ("add", "mul", "sub", "div", "sum", "mean", "tanh", "neg", "where", "masked", "pow", "sqrt"),
    "optimizer": ("_foreach", "_fused", "addcdiv", "addcmul", "lerp"),
}


def group_of(operator: str) -> str:
    """Return the group of an operator."""
    name = operator.removeprefix("aten::")
    for group in ("optimizer", *GROUPS):
        if any(name == start or name.startswith((f"{start}_", start + "v")) for start in GROUPS[group]):
            return group
    return "the rest"


def profiled(train: Callable[[], object], client_steps: int) -> dict[str, Any]:
    """Return wall and operator milliseconds, operators and shares by group, for one client-step."""
    train()  # warm
    began = time.perf_counter()
    train()
    plain = time.perf_counter() - began
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        train()
    own: defaultdict[str, float] = defaultdict(float)
    count = 0
    for event in recorded.key_averages():
        own[group_of(event.key)] += event.self_cpu_time_total
        count += event.count
    total = sum(own.values())
    return {
        "wall_ms": 1e3 * plain / client_steps,
        "operator_ms": 1e-3 * total / client_steps,
        "operators": count / client_steps,
        "share": {group: own[group] / total for group in (*GROUPS, "the rest")},
    }


def case(setting: Setting, steps: int, batch: int) -> dict[str, Any]:
    """Profile both engines on the same jobs."""
    jobs = setting.jobs(steps, batch)
    parts = setting.model, setting.tokens, setting.clients, 0
    work = len(jobs) * steps
    return {
        "twin": profiled(lambda: LocalTrainer(*parts).train(jobs), work),
        "cohort": profiled(lambda: CohortTrainer(*parts, 2**31, None, 1).train(jobs), work),
    }


def main() -> None:
    """Print a table for each case and write JSON on request."""
    parser = parser_of(__doc__)
    parser.add_argument("--clients", type=int, default=8, help="of the demo; overhead has four times as many")
    given = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    for precision in ("fp32", "bf16"):
        few: Any = {"precision": precision}
        result[f"demo {precision}"] = case(demo(given.clients, **few), 2, 8)
        result[f"overhead {precision}"] = case(synthetic(2, 128, 4 * given.clients, 20, 16, **few), 5, 4)
    for name, engines in result.items():
        print(f"\n{name:22} {'twin':>10} {'cohort':>10}")
        for key in ("wall_ms", "operator_ms", "operators"):
            print(f"{key:22} " + " ".join(f"{engines[engine][key]:10.2f}" for engine in ("twin", "cohort")))
        for group in engines["twin"]["share"]:
            print(f"{group:22} " + " ".join(f"{engines[e]['share'][group]:10.1%}" for e in ("twin", "cohort")))
    finish(given, result)


if __name__ == "__main__":
    main()
