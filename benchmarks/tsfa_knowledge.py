"""What TSFA loses where the channel is known badly or late, and what planning on a quantile of the rate gives back.

    OMP_NUM_THREADS=1 python benchmarks/tsfa_knowledge.py [--rounds 60] [--seeds 0,1,2] [--over-rounds] [--json FILE]

Planner and clock only, in the world of experiments/soft-tsfa/soft-tsfa.toml with one latency limit: nothing is trained,
so what dropping costs is the quadratic model, the weighted mean of (1 - share sent)^2 (a client in outage sends 0).
`latency`: mean round over the limit. `late`: uploads that end after the planned latency. `left out`: share of
client rounds in outage. Uploads meet the channel of the round's start (block fading). An estimate 0.9 s old has a
correlation of 0.9 with it: 2 pi Doppler delay = 0.66. The queue makes the mean meet the limit, so the loss shows as
error, not as latency. With `--over-rounds`: how the mean latency comes to the limit, for three weights of the error.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from airtune.devices.latency import TransformerShape
from airtune.experiment.config import Experiment, read_file
from airtune.experiment.world import cell_of, nominal_fleet
from airtune.lora import Adapter, LoraFactors
from airtune.methods.tsfa import TSFA
from airtune.simulation.cell import Cell
from airtune.simulation.costs import CostModel
from airtune.streams import stream
from airtune.training.catalogue import read_config
from airtune.training.shapes import adapter_shape, placement_of
from airtune.types import Pending, RoundOutcome, ServerModel
from airtune.wireless.knowledge import ChannelKnowledge

FILE = Path(__file__).parents[1] / "experiments" / "soft-tsfa" / "soft-tsfa.toml"
CLASSES, EXAMPLES, TOKENS = 8, 250, 16.0


@dataclass(frozen=True)
class Setting:
    """What the planner knows, and the fields of TSFA that answer it."""

    name: str
    knowledge: ChannelKnowledge = field(default_factory=ChannelKnowledge)
    fields: Mapping[str, Any] = field(default_factory=dict)


def settings() -> list[Setting]:
    """Return the rows of the table."""
    found = [Setting("perfect"), Setting("perfect, outage after 0.1 limits", fields={"outage_after": 0.1})]
    for variance in (0.05, 0.2):
        noisy = ChannelKnowledge(error_variance=variance)
        found.append(Setting(f"error variance {variance}", noisy))
        for quantile in (0.3, 0.1):
            robust = {"rate_quantile": quantile, "error_variance": variance}
            found.append(Setting(f"error variance {variance}, quantile {quantile}", noisy, robust))
    late = ChannelKnowledge(delay=0.9)
    found.append(Setting("0.9 s old", late))
    found.append(Setting("0.9 s old, quantile 0.1", late, {"rate_quantile": 0.1, "error_variance": 0.2}))
    return [*found, Setting("mean gain only", ChannelKnowledge(mode="mean"))]


def world(experiment: Experiment) -> tuple[Cell, ServerModel]:
    """Return the cell and a model of zeros of the right sizes."""
    config = read_config(experiment.model.name)
    shape = adapter_shape(config, experiment.model, CLASSES)
    clients = experiment.fleet.clients
    fleet = nominal_fleet(experiment.fleet, np.full(clients, EXAMPLES))
    network = TransformerShape.from_config(config)
    costs = CostModel(fleet, shape, network, np.full(clients, TOKENS), classes=CLASSES, value_bytes=2)

    def zeros(*size: int) -> Any:
        return np.broadcast_to(np.float32(0.0), size)

    factors = {
        name: LoraFactors(zeros(s.rank, s.in_features), zeros(s.out_features, s.rank), s.scaling)
        for name, s in shape.slots.items()
    }
    layers = {name: slot.layer for name, slot in shape.slots.items()}
    extras = {name: zeros(*size) for name, size in shape.extras.items()}
    return cell_of(experiment, costs), ServerModel(
        Adapter(factors, placement_of(shape), layers, shape.num_layers, extras)
    )


def played(setting: Setting, limit: float, seed: int, rounds: int) -> dict[str, list[float]]:
    """Return what each round of one seed had, by name."""
    cell, model = world(read_file(FILE, {}).experiment("tsfa", seed=seed))
    cell = replace(cell, knowledge=setting.knowledge)
    method = TSFA(latency_limit=limit, pilot_rounds=0, error_model="quadratic", **setting.fields)
    state, time, starts = method.init(model, cell.fleet), 0.0, ()
    rows: dict[str, list[float]] = {name: [] for name in ("latency", "error", "share", "late", "left out")}
    for index in range(1, rounds + 1):
        seen = cell.observe(index, time, Pending(round_starts=starts), model)
        plan = method.plan(state, seen, stream(seed, "plan", index))
        tasks = plan.tasks
        clients = np.array([task.client for task in tasks])
        begin = np.array([seen.costs.compute_seconds(task) for task in tasks])
        begin = begin + cell.download_seconds(clients, time, cell.costs.broadcast_bits(tasks), 0 * clients, 1.0)
        bits = np.array([seen.costs.uplink_bits(task) for task in tasks])
        band = np.array([task.bandwidth for task in tasks])
        power = np.array([task.transmit_power for task in tasks])
        ends = begin + cell.upload(clients, np.full(len(tasks), time), bits, band, power).seconds
        share = np.zeros(cell.fleet.size)
        share[clients] = [task.compressor.keep_ratio for task in tasks]
        rows["latency"].append(float(ends.max()) / limit)
        rows["error"].append(float(((1.0 - share) ** 2).mean()))
        rows["share"].append(float(share.mean()))
        rows["late"].append(float((ends > plan.notes["predicted_round_s"] * (1.0 + 1e-6)).mean()))
        rows["left out"].append(1.0 - len(tasks) / cell.fleet.size)
        outcome = RoundOutcome(plan, cell.fleet, (), (), time, time + float(ends.max()))
        state, starts, time = method.learn(state, outcome), (*starts, time), outcome.end_time
    return rows


def over_rounds(limit: float, seeds: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Print and return the mean latency of the first rounds over the limit, for three weights of the error."""
    marks, table = [mark for mark in (8, 25, 50, 150, 500, 2000) if mark <= rounds], []
    for weight in (0.3, 1.0, 10.0):
        setting = Setting(f"error_weight {weight:g}", fields={"error_weight": weight})
        found = [played(setting, limit, seed, rounds) for seed in seeds]
        means = [[float(np.mean(part["latency"][:mark])) for mark in marks] for part in found]
        errors = [float(np.mean(part["error"])) for part in found]
        table.append({"error_weight": weight, "rounds": marks, "mean_over_limit": means, "error": errors})
        columns = np.array(means)
        ends = zip(marks, columns.mean(axis=0), columns.std(axis=0, ddof=min(1, len(seeds) - 1)), strict=True)
        texts = [f"{mark} rounds {mean:.3f} ± {spread:.3f}" for mark, mean, spread in ends]
        print(f"{setting.name:36s} {'  '.join(texts)}  error {np.mean(errors):.3f}", flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--limit", type=float, default=2.5)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--over-rounds", action="store_true", help="perfect knowledge: the mean after 8, 25, ... rounds"
    )
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    table: list[dict[str, Any]] = []
    if options.over_rounds:
        table = over_rounds(options.limit, seeds, options.rounds)
    for setting in [] if options.over_rounds else settings():
        rounds = [played(setting, options.limit, seed, options.rounds) for seed in seeds]
        columns = {name: np.array([np.mean(part[name]) for part in rounds]) for name in rounds[0]}
        table.append({"setting": setting.name, **{name: values.tolist() for name, values in columns.items()}})
        spread = [f"{name} {v.mean():.3f} ± {v.std(ddof=min(1, len(v) - 1)):.3f}" for name, v in columns.items()]
        print(f"{setting.name:36s} {'  '.join(spread)}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
