"""`airtune evaluate`: the model of a stored run, measured again."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from airtune.cli.arguments import Arguments


def evaluate(arguments: Arguments) -> int:
    """Measure a run's model on its test rows or on a file, over all rows and over clients."""
    from airtune.experiment.build import Workshop
    from airtune.experiment.evaluation import evaluate_run

    found = evaluate_run(Path(arguments.run_dir), arguments.data, Workshop())
    if arguments.json:
        print(json.dumps(found))
        return 0
    metric = "accuracy" if "accuracy" in found else "loss"
    table = Table(
        "", metric, title=f"{found['method']}, round {found['round']}, {found['rows']:,} rows of {found['data']}"
    )
    table.add_row("all rows", f"{found[metric]:.4f}")
    if found["clients"] is not None:
        clients = found["clients"]
        table.add_row(f"mean over {clients['clients']:.0f} clients", f"{clients['mean']:.4f}")
        table.add_row("mean over the worst 10 % of clients", f"{clients['worst_10_percent']:.4f}")
    if found["personal"] is not None:
        personal = found["personal"]
        table.add_row(f"own models of {personal['clients']} clients, each on its rows", f"{personal['own']:.4f}")
        table.add_row("the shared model on the same rows", f"{personal['shared']:.4f}")
    Console().print(table)
    return 0
