"""What dropping components loses on adapters that clients really trained: pairs, separate masks, random ones, and SVD.

    OMP_NUM_THREADS=1 python benchmarks/drop_error.py [--seeds 0,1,2] [--rounds 3] [--json FILE]

In the world of experiments/soft-tsfa/penalties.toml each penalty trains uncompressed for some rounds; the adapters of
the next round's clients, before anything is dropped, are then coded by every codec at keep ratios 1/2 and 1/4.

Errors are squared and relative, summed over layers, averaged over clients. `zero`: what is not sent is zero, relative
to the product B A; the SVD is the optimum (Eckart and Young). `hold`: what is not sent keeps the server's value,
relative to the round's change of the product. `predicted` is the sum of the dropped (norm b times norm a)^2.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from airtune.aggregation.covariance import coherence, tail_energies
from airtune.compression.dense import Dense
from airtune.compression.lowrank import LowRank
from airtune.compression.soft import Soft
from airtune.compression.topk import RandomComponents, RowTopK, TopK
from airtune.experiment.build import Workshop, build
from airtune.experiment.config import read_file
from airtune.federation import begin, run
from airtune.lora import Adapter, AdapterSlice
from airtune.streams import stream
from airtune.types import Compressor

FILE = Path(__file__).parents[1] / "experiments" / "soft-tsfa" / "penalties.toml"
PENALTIES = ("no-penalty", "soft", "cosine-tenth", "mixed", "off-diagonal", "identity")


def trained_clients(penalty: str, seed: int, rounds: int, workshop: Workshop) -> Iterator[tuple[Adapter, Adapter]]:
    """Yield (server's adapter, client's adapter) of one round after some rounds without compression."""
    experiment = read_file(FILE, {}).experiment(penalty, seed=seed, stop__rounds=rounds)
    method: Any = replace(experiment.method, compressor=Dense())
    bench = build(replace(experiment, method=method), workshop)
    progress = begin(method, bench.start, bench.cell)
    parts = {"stop": bench.stop, "seed": seed, "evaluate": lambda model: {}}
    *_, (progress, _) = run(method, progress, bench.cell, bench.runner, **parts)
    index = progress.round + 1
    seen = bench.cell.observe(index, progress.time, progress.pending, progress.model)
    plan = method.plan(progress.state, seen, stream(seed, "plan", index))
    outcome, _ = bench.runner.run(plan, progress.model, progress.pending, round_index=index, time=progress.time)
    for update in outcome.updates:
        yield progress.model.adapter, update.values


def codecs(ratio: float, fill: str) -> dict[str, Compressor]:
    """Return the codecs by name; the SVD has no hold fill."""
    found: dict[str, Compressor] = {
        "paired (SOFT)": Soft(ratio, fill=fill),
        "separate rows": RowTopK(ratio, fill=fill),
        "separate elements": TopK(ratio, fill=fill),
        "random pairs": RandomComponents(ratio, fill=fill),
    }
    return found | ({"SVD": LowRank(ratio)} if fill == "zero" else {})


def error(codec: Compressor, start: Adapter, trained: Adapter, fill: str) -> float:
    """Return the relative squared error of the products that arrive."""
    part = AdapterSlice.everything(trained.shape)
    payload, _ = codec.encode(part, trained, start, {}, np.random.default_rng(0))
    arrived = codec.decode(part, payload, start)
    lost = size = 0.0
    for name, factors in trained.factors.items():
        wanted = factors.product()
        lost += float((arrived.factors[name].product() - wanted).square().sum())
        before = start.factors[name].product() if fill == "hold" else 0.0 * wanted
        size += float((wanted - before).square().sum())
    return lost / size


def measured(penalty: str, seed: int, rounds: int, workshop: Workshop) -> dict[str, float]:
    """Return the mean errors over clients, by "fill ratio codec", what norms predict, and the coherences."""
    rows: dict[str, list[float]] = {}
    for start, trained in trained_clients(penalty, seed, rounds, workshop):
        rank = trained.shape.max_rank
        tails = tail_energies(trained, rank)
        energy = sum(f.frobenius_norm() ** 2 for f in trained.factors.values())
        for ratio in (0.5, 0.25):
            for fill in ("zero", "hold"):
                for name, codec in codecs(ratio, fill).items():
                    rows.setdefault(f"{fill} {ratio} {name}", []).append(error(codec, start, trained, fill))
            rows.setdefault(f"zero {ratio} predicted", []).append(float(tails[int(ratio * rank)]) / energy)
        for side, columns in (("B", lambda f: f.B), ("A", lambda f: f.A.T)):
            found = float(np.mean([coherence(columns(f)) for f in trained.factors.values()]))
            rows.setdefault(f"coherence {side}", []).append(found)
    return {name: float(np.mean(values)) for name, values in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--penalties", default=",".join(PENALTIES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    workshop, rows = Workshop(), []
    for penalty in options.penalties.split(","):
        found = [measured(penalty, int(s), options.rounds, workshop) for s in options.seeds.split(",")]
        rows.append({"penalty": penalty, "seeds": found})
        print(penalty, flush=True)
        for name in found[0]:
            values = np.array([entry[name] for entry in found])
            print(f"  {name:30s} {values.mean():.3f} ± {values.std(ddof=min(1, len(values) - 1)):.3f}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
