"""`airtune plan`: what rounds would cost. Imports neither torch nor transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from airtune.cli.arguments import Arguments, listed
from airtune.cli.files import experiment_file
from airtune.cli.output import say
from airtune.errors import InputError
from airtune.experiment.planning import plan_round
from airtune.experiment.store import make_output_folder
from airtune.experiment.sweep import changes, combinations, parse_settings
from airtune.files import write_atomically

Plain = dict[str, Any]


def plan(arguments: Arguments) -> int:
    """Predict seconds, bits and joules of a round for methods and swept values."""
    if arguments.method is not None and arguments.methods is not None:
        raise InputError("--methods: given beside --method; valid: one of the two")
    file = experiment_file(arguments)
    chosen = (
        listed(arguments.methods) if arguments.methods is not None else (arguments.method or file.default_method(),)
    )
    file.check_overrides([file.label(method) for method in chosen])
    sweep = parse_settings(arguments.sweep, "--sweep")
    if arguments.out is not None:
        make_output_folder(Path(arguments.out))
    plans: list[Plain] = []
    for values in combinations(sweep):
        for method in chosen:
            found = plan_round(file.experiment(method, **changes(values)))
            if values:
                found["sweep"] = [{"field": name, "value": value} for name, value in values.items()]
            plans.append(found)
    if arguments.json:
        print(json.dumps(plans[0] if len(plans) == 1 else plans))
    else:
        Console().print(_table(plans, tuple(sweep)))
        for note in dict.fromkeys(note for found in plans for note in found["notes"]["assumed"]):
            say(f"assumed: {note}")
    if arguments.out is not None:
        _write(Path(arguments.out), plans)
    return 0


def _write(folder: Path, plans: list[Plain]) -> None:
    from airtune.report.plan_page import write_plan_page

    write_atomically(
        folder / "plan.json", (json.dumps(plans[0] if len(plans) == 1 else plans, indent=1) + "\n").encode()
    )
    say(f"done: {write_plan_page(folder, plans)}")


def _table(plans: list[Plain], fields: tuple[str, ...]) -> Table:
    from airtune.report.quantities import bit_unit, energy_unit, time_unit

    table = Table("Method", *(name.rpartition(".")[2] for name in fields))
    for heading in ("Clients", "One round", "Uplink", "Energy", "Straggler"):
        table.add_column(heading, justify="left" if heading == "Straggler" else "right")
    predicted = [found["predicted"] for found in plans]
    seconds = time_unit([entry["round_s"] for entry in predicted])
    bits = bit_unit([entry["uplink_bits"] for entry in predicted])
    joules = energy_unit([entry["energy_j"] for entry in predicted])
    for found, entry in zip(plans, predicted, strict=True):
        slowest = entry["straggler"]
        table.add_row(
            found["method"],
            *(item["value"] for item in found.get("sweep", [])),
            f"{len(found['clients']):,}",
            seconds.show(entry["round_s"]),
            bits.show(entry["uplink_bits"]),
            joules.show(entry["energy_j"]),
            "-" if slowest is None else f"{slowest['device']} {slowest['client']}: {slowest['longest']}",
        )
    return table
