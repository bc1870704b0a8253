"""`airtune plan`: what rounds would cost. Imports neither torch nor transformers, unless pilots are asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from airtune.cli.arguments import Arguments, listed, numbers
from airtune.cli.files import experiment_file
from airtune.cli.output import say
from airtune.cli.rank_table import rank_table
from airtune.cli.sampling_table import pilot_table, sampling_summary, sampling_table, warnings_of
from airtune.devices.profiles import DeviceProfile
from airtune.errors import InputError
from airtune.experiment.config import Experiment, ExperimentFile
from airtune.experiment.pilot_file import PILOT_FILE
from airtune.experiment.planning import plan_round
from airtune.experiment.store import make_output_folder
from airtune.experiment.sweep import changes, combinations, parse_settings
from airtune.files import write_atomically

Plain = dict[str, Any]
Settings = Mapping[str, Sequence[str]]


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
    if arguments.pilot:
        plans, out = [_piloted(arguments, file, chosen, sweep)], _pilot_folder(arguments, file.experiment(chosen[0]))
    else:
        if arguments.pilot_rounds is not None:
            raise InputError("--pilot-rounds: there are no pilots; valid: beside --pilot")
        plans, out = _plans(arguments, file, chosen, sweep), None if arguments.out is None else Path(arguments.out)
    if arguments.json:
        print(json.dumps(plans[0] if len(plans) == 1 else plans))
    else:
        _show(plans, tuple(sweep), file.experiment(chosen[0]).fleet.profiles())
    if out is not None:
        _write(out, plans)
    return 0


def _plans(arguments: Arguments, file: ExperimentFile, chosen: Sequence[str], sweep: Settings) -> list[Plain]:
    if arguments.out is not None:
        make_output_folder(Path(arguments.out))
    plans: list[Plain] = []
    for values in combinations(sweep):
        for method in chosen:
            found = plan_round(file.experiment(method, **changes(values)))
            if values:
                found["sweep"] = [{"field": name, "value": value} for name, value in values.items()]
            plans.append(found)
    return plans


def _show(plans: list[Plain], fields: tuple[str, ...], profiles: Sequence[DeviceProfile]) -> None:
    console = Console()
    console.print(_table(plans, fields))
    for found in plans:
        summary = sampling_summary(found)
        if summary is not None:
            console.print(summary, soft_wrap=True, highlight=False)
    if len(plans) == 1:
        devices = sampling_table(plans[0], [profile.name for profile in profiles])
        pilots = pilot_table(plans[0]["pilot"]) if "pilot" in plans[0] else None
        for table in (devices, pilots, rank_table(plans[0])):
            if table is not None:
                console.print(table)
    for text in dict.fromkeys(f"{found['method']}: {text}" for found in plans for text in warnings_of(found["notes"])):
        say(text)
    for note in dict.fromkeys(note for found in plans for note in found["notes"]["assumed"]):
        say(f"assumed: {note}")


# -------------------------------------------------------------------------------------------------------------- pilots


def _pilot_folder(arguments: Arguments, experiment: Experiment) -> Path:
    if arguments.out is not None:
        return Path(arguments.out)
    return Path("runs") / f"{experiment.name}-{experiment.label}-{experiment.seed}-pilot"


def _piloted(arguments: Arguments, file: ExperimentFile, chosen: Sequence[str], sweep: Settings) -> Plain:
    """Run pilots, and return the plan that stands on their constants."""
    if len(chosen) != 1 or sweep:
        raise InputError("--pilot: takes one method and no --sweep; valid: --method NAME")
    experiment = file.experiment(chosen[0])
    rounds = () if arguments.pilot_rounds is None else numbers(arguments.pilot_rounds, "--pilot-rounds")
    if len(rounds) > 1:
        raise InputError("--pilot-rounds: takes one number; valid: like 12")
    folder = _pilot_folder(arguments, experiment)
    from airtune.cli.progress import Display
    from airtune.experiment.build import Workshop
    from airtune.experiment.pilots import ROUNDS, pilot_summary, planned_with, run_pilots
    from airtune.experiment.rank_pilot import run_rank_pilot
    from airtune.experiment.run import Session
    from airtune.methods.tsfa import TSFA

    display = Display()
    try:
        session = Session(Workshop(), display, arguments.line, Path(arguments.experiment))
        if isinstance(experiment.method, TSFA):
            return run_rank_pilot(experiment, folder, session, rounds=rounds[0] if rounds else None)
        found = run_pilots(experiment, folder, session, rounds=rounds[0] if rounds else ROUNDS)
    finally:
        display.close()
    say(f"pilots: off by at most {found.fit.best.largest:.0%}; to use them: --method.constants {folder / PILOT_FILE}")
    plan = plan_round(planned_with(experiment, found.constants), found.examples)
    return {**plan, "pilot": pilot_summary(found, experiment.seed)}


# -------------------------------------------------------------------------------------------------------------- output


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
