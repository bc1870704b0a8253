"""What adaptive sampling loses when its knowledge is old, noisy or wrong: fleet seconds against perfect knowledge.

    OMP_NUM_THREADS=1 python benchmarks/sampling_robustness.py [--seeds 0,1,2] [--only fading] [--json FILE]

The fleet of experiments/adaptive-sampling (40 devices) with unbalanced data, the product's own method and clock, and no
training: a round with probabilities q and sizes k is worth ``(beta - V) / (Gamma alpha)`` of the way to the target,
the round model with fixed constants (not fitted: only ratios of seconds mean something), and seconds are added up until
the way is done. Where clients come and go, V is that of the probability q times the part of the time that they are
there. The reference of each block is the first row, the best knowledge that there can be in it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from airtune.experiment.assumptions import assume
from airtune.experiment.config import read_file
from airtune.experiment.planning import planned_world
from airtune.lora import Adapter, LoraFactors
from airtune.methods.adaptive_sampling import AdaptiveSampling
from airtune.scheduling.joint_cohort import RoundConstants
from airtune.simulation.cell import Cell
from airtune.simulation.runner import SimulatedRunner
from airtune.solvers.round_bound import RoundModel
from airtune.streams import stream
from airtune.types import Pending, ServerModel, Trained, TrainingJob

FILE = Path(__file__).parents[1] / "experiments" / "adaptive-sampling" / "reuters-r8.toml"
MOST_ROUNDS = 400
ROUNDS = 12.0  # that full participation takes: alpha = 3 with beta 1/4 above its noise

HELD = {"wireless.fading": "rayleigh", "wireless.block": "round"}
FAST = {"wireless.fading": "rayleigh", "wireless.block": "0.05"}
MODES = {"fleet.mode_period": "10 s"}
THERE = 2.0 / 3.0
AWAY = {"fleet.availability": {"type": "markov", "mean_on": 20.0, "mean_off": 10.0, "anchor": 3600.0}}


@dataclass(frozen=True)
class Case:
    """One row: the world and what the planner knows of it; `every` None: decided once."""

    name: str
    every: int | None
    world: Mapping[str, Any]
    there: float = 1.0


def noisy(variance: float, delay: int = 0) -> dict[str, Any]:
    """Return the override for a channel estimate."""
    return {"wireless.knowledge": {"mode": "instant", "error_variance": variance, "delay_rounds": delay}}


BLOCKS: dict[str, tuple[Case, ...]] = {
    "fading": (
        Case("gains of the round known, new decision every round", 1, HELD),
        Case("known, every 5 rounds", 5, HELD),
        Case("known, decided once", None, HELD),
        Case("estimates, error variance 0.1, every 5 rounds", 5, {**HELD, **noisy(0.1)}),
        Case("estimates, error variance 0.5, every 5 rounds", 5, {**HELD, **noisy(0.5)}),
        Case("estimates one round old, every 5 rounds", 5, {**HELD, **noisy(0.0, 1)}),
        Case("mean gains only, every 5 rounds", 5, {**HELD, "wireless.knowledge": {"mode": "mean"}}),
        Case("mean gains only, decided once", None, {**HELD, "wireless.knowledge": {"mode": "mean"}}),
    ),
    "fast fading": (
        Case("long-run rates known, decided once", None, {**FAST, "wireless.knowledge": {"mode": "ergodic"}}),
        Case("mean gains, every 5 rounds", 5, {**FAST, "wireless.knowledge": {"mode": "mean"}}),
        Case("gain at the start of the round, every 5 rounds", 5, FAST),
        Case("gain at the start of the round, decided once", None, FAST),
    ),
    "power modes": (
        Case("speeds known, every round", 1, MODES),
        Case("every 5 rounds", 5, MODES),
        Case("decided once", None, MODES),
    ),
    "churn": (
        Case("everyone there, decided once", None, {}),
        Case("there for 20 s, away for 10 s, decided once", None, AWAY, THERE),
        Case("the same, every 5 rounds", 5, AWAY, THERE),
    ),
}


@dataclass(frozen=True)
class NoTraining:
    """A trainer that returns what it was given: only the clock is of interest."""

    def train(self, jobs: Sequence[TrainingJob]) -> list[Trained]:
        """Return unchanged adapters."""
        return [Trained(job.task.train.take(job.model.adapter), {"loss": 1.0}) for job in jobs]


def with_tensors(model: ServerModel) -> ServerModel:
    """Return the model with zeros as tensors."""

    def zeros(value: Any) -> torch.Tensor:
        return torch.zeros(tuple(value.shape))

    adapter = model.adapter
    factors = {name: LoraFactors(zeros(f.A), zeros(f.B), f.scaling) for name, f in adapter.factors.items()}
    extras = {name: zeros(value) for name, value in adapter.extras.items()}
    return ServerModel(Adapter(factors, adapter.placement, adapter.layer, adapter.num_layers, extras))


def shares(clients: int, seed: int) -> np.ndarray:
    """Return unbalanced numbers of examples, [clients], 5,000 in all."""
    parts = stream(seed, "benchmark-examples").dirichlet(np.full(clients, 0.8))
    return np.maximum(np.round(5000 * parts), 8.0)


def seconds_to_target(case: Case, seed: int) -> tuple[float, int]:
    """Return the fleet seconds and rounds until the round model's way is done."""
    experiment = read_file(FILE, case.world).experiment("adaptive-sampling", seed=seed)
    examples = shares(experiment.fleet.clients, seed)
    cell, sizes = planned_world(experiment, assume(experiment), examples)
    model, weight = with_tensors(sizes), cell.fleet.data_weight
    bound = RoundModel(ROUNDS * 0.25, float((weight**2).sum()) + 0.25)
    constants = RoundConstants(bound.alpha, bound.beta, bound.form)
    method = experiment.method
    assert isinstance(method, AdaptiveSampling)
    method = replace(method, constants=constants, replan_every=case.every, polish_evaluations=0)
    return _clock(method, cell, model, bound, case.there, seed)


def _clock(
    method: AdaptiveSampling, cell: Cell, model: ServerModel, bound: RoundModel, there: float, seed: int
) -> tuple[float, int]:
    runner = SimulatedRunner(cell, cell.costs, NoTraining(), seed)
    state, pending, time, way = method.init(model, cell.fleet), Pending(), 0.0, 0.0
    for index in range(1, MOST_ROUNDS + 1):
        seen = cell.observe(index, time, pending, model)
        plan = method.plan(state, seen, stream(seed, "plan", index))
        outcome, pending = runner.run(plan, model, pending, round_index=index, time=time)
        state, time = method.learn(state, outcome), outcome.end_time
        q, ratio = state.probability * there, state.kept / model.adapter.shape.max_rank
        rounds = bound.rounds(cell.fleet.data_weight, 1.0, np.maximum(q, 1e-12), ratio)
        way += 1.0 / rounds
        if way >= 1.0:
            return time, index
    return float("inf"), MOST_ROUNDS


def main() -> None:
    """Print one table for each block."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", choices=list(BLOCKS))
    parser.add_argument("--json", type=Path, help="where seconds and rounds of every seed are written")
    options = parser.parse_args()
    seeds = [int(text) for text in options.seeds.split(",")]
    stored: list[dict[str, Any]] = []
    for block in [options.only] if options.only else BLOCKS:
        print(f"\n| {block} | seconds | rounds | over the first row |\n| --- | --- | --- | --- |")
        first: np.ndarray | None = None
        for case in BLOCKS[block]:
            found = np.array([seconds_to_target(case, seed) for seed in seeds])
            seconds, first = found[:, 0], found[:, 0] if first is None else first
            ratio = seconds / first
            row = {"seeds": seeds, "seconds": seconds.tolist(), "rounds": found[:, 1].tolist(), "ratio": ratio.tolist()}
            stored.append({"block": block, "case": case.name, **row})
            print(
                f"| {case.name} | {seconds.mean():.0f} ± {seconds.std(ddof=1):.0f} | {found[:, 1].mean():.0f} | "
                f"{ratio.mean():.2f} ± {ratio.std(ddof=1):.2f} |",
                flush=True,
            )
            if options.json is not None:
                options.json.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
