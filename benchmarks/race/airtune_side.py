"""airtune's side: the experiment of the race through the product's own round loop, with virtual clock and all.

python -m race.airtune_side WORK GATE ENGINE_JSON
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(folder: Path, gate_folder: Path, engine: dict) -> None:
    """Run all rounds, waiting at the gate before each, and write the final adapter."""
    from safetensors.torch import load_file

    from airtune.experiment.build import Workshop, build
    from airtune.experiment.config import read_experiment
    from airtune.federation import begin, run
    from airtune.training.export import export_adapter
    from race.gate import Gate
    from race.peft_client import save
    from race.work import Size, experiment_of

    stored = json.loads((folder / "work.json").read_text())
    size = Size(**{key: stored[key] for key in Size.__dataclass_fields__})
    bench = build(read_experiment(experiment_of(size, folder, engine)), Workshop())
    experiment, gate = bench.experiment, Gate(gate_folder)
    rounds = run(
        experiment.method,
        begin(experiment.method, bench.start, bench.cell),
        bench.cell,
        bench.runner,
        stop=bench.stop,
        seed=experiment.seed,
        evaluate=lambda model: {},  # the judge measures every side
        evaluate_every=experiment.evaluation.every,
    )
    progress, _ = next(rounds)
    for _ in range(stored["all_rounds"]):
        gate.wait()
        progress, record = next(rounds)
        if len(record.arrived) != size.clients:
            raise RuntimeError(f"{len(record.arrived)} of {size.clients} updates arrived")
    gate.close()
    export_adapter(bench.federated, progress.model, gate_folder / "adapter")
    save(load_file(gate_folder / "adapter" / "adapter_model.safetensors"), gate_folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
