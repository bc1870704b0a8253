"""The cohort engine against the readable twin: seconds per client-step, paired, with equal final losses.

    python benchmarks/cohort_against_twin.py [--case demo|overhead|both] [--threads 2] [--repeats 5] [--json FILE]

demo: MiniLM on Rotten Tomatoes, batches of 8 sentences. overhead: a random BERT of 2 layers x 128, batches of 4 x 16
tokens, 5 steps: hardly any arithmetic. The twin uses torch's own threads; the cohort engine does so, too ("torch
threads"), or trains blocks side by side with one thread each ("side by side", what experiments use).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from cohort_common import Setting, demo, finish, paired, parser_of, ratio, synthetic

from airtune.training.cohort.trainer import CohortTrainer
from airtune.training.local import LocalTrainer
from airtune.types import Trained, TrainingJob

Train = Callable[[Sequence[TrainingJob]], Sequence[Trained]]


def main() -> None:
    """Print a table and write JSON on request."""
    parser = parser_of(__doc__)
    parser.add_argument("--case", choices=("demo", "overhead", "both"), default="both")
    parser.add_argument("--clients", type=int, help="cohort; demo 8, overhead 32")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    result: dict[str, Any] = {}
    if given.case != "demo":
        clients = given.clients or 32
        settings = {p: synthetic(2, 128, clients, 20, 16, precision=p) for p in ("fp32", "bf16")}
        result["overhead"] = race(settings, 5, 4, given)
    if given.case != "overhead":
        clients = given.clients or 8
        settings = {p: demo(clients, precision=p) for p in ("fp32", "bf16")}
        result["demo"] = race(settings, 2, 8, given)
    finish(given, result)


def race(settings: dict[str, Setting], steps: int, batch: int, given: argparse.Namespace) -> dict[str, Any]:
    """Time all modes on one model."""
    losses: dict[str, float] = {}
    modes: dict[str, Callable[[], object]] = {}
    padding: dict[str, float] = {}
    engines: dict[str, CohortTrainer] = {}
    for precision, setting in settings.items():
        jobs = setting.jobs(steps, batch)
        parts = setting.model, setting.tokens, setting.clients, 0
        modes[f"twin {precision}"] = _run(f"twin {precision}", LocalTrainer(*parts).train, jobs, losses)
        for name, threads in (("torch threads", 1), ("side by side", given.threads)):
            mode = f"cohort {precision}, {name}"
            engines[mode] = CohortTrainer(*parts, 2**31, None, threads)
            modes[mode] = _run(mode, engines[mode].train, jobs, losses)
    times = paired(modes, given.repeats)
    padding = {mode: engine.work.padding_share for mode, engine in engines.items()}
    work = len(next(iter(settings.values())).clients) * steps
    for mode, found in times.items():
        found["client_steps_per_s"] = work / found["median_wall_s"]
        found["loss"] = losses[mode]
        found["padding_share"] = padding.get(mode)
        twin = f"twin {mode.split()[1].rstrip(',')}"
        found["times_the_twin"] = ratio(times, twin, mode)
        found["times_the_twin_in_processor_s"] = ratio(times, twin, mode, "processor_s")
        found["times_the_fp32_twin"] = ratio(times, "twin fp32", mode)
        print(
            f"{mode:34} {1e3 * found['median_wall_s'] / work:8.2f} ms  {1e3 * found['median_processor_s'] / work:8.2f} "
            f"processor-ms  {found['times_the_twin']:5.2f} x twin  {found['times_the_fp32_twin']:5.2f} x fp32 twin  "
            f"loss {losses[mode]:.5f}",
            flush=True,
        )
    reference = losses["twin fp32"]
    assert all(math.isclose(loss, reference, rel_tol=0.02) for loss in losses.values()), losses
    return times


def _run(mode: str, train: Train, jobs: Sequence[TrainingJob], losses: dict[str, float]) -> Callable[[], object]:
    def work() -> None:
        found = train(jobs)
        losses[mode] = sum(t.reports["loss"] for t in found) / len(found)

    return work


if __name__ == "__main__":
    main()
