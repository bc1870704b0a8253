"""Reading stored runs into frozen dataclasses: run.json, rounds.jsonl, timings.jsonl and compare.json.

The report knows a run by these files alone. It imports no training code, so a page can be made on any machine.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

from airtune.errors import InputError
from airtune.report.fields import Fields, read_lines, read_object
from airtune.report.records import (
    ClientRecord,
    CompareRun,
    CompareSummary,
    Curve,
    DroppedRecord,
    FleetClient,
    Round,
    Run,
)

RUN_FILE = "run.json"
ROUNDS_FILE = "rounds.jsonl"
TIMINGS_FILE = "timings.jsonl"
COMPARE_FILE = "compare.json"
RUNS_FOLDER = "runs"


def load_run(path: str | Path) -> Run:
    """Read one run folder.

    Raises
    ------
    InputError : the folder is not a run, or a file lacks a field; the message names file and field.
    """
    folder = Path(path)
    if not (folder / RUN_FILE).is_file():
        raise InputError(f"{folder}: not a run folder (no {RUN_FILE}); valid: a folder written by `airtune run`")
    head = read_object(folder / RUN_FILE)
    rounds, warnings = _read_rounds(folder / ROUNDS_FILE)
    host_seconds, more_warnings = _read_timings(folder / TIMINGS_FILE)
    metric, direction = _metric(head)
    return Run(
        path=folder,
        method=head.text("method"),
        seed=head.integer("seed"),
        status=head.text("status"),
        metric=metric,
        direction=direction,
        airtune=str(head.values.get("airtune", head.mapping("versions", required=False).get("airtune", "unknown"))),
        config=head.mapping("config"),
        versions=head.mapping("versions", required=False),
        final=head.numbers_of("final"),
        export=head.values.get("export"),
        command=_command(head),
        git=head.text("git", "") if head.values.get("git") else None,
        error=head.text("error", "") if head.values.get("error") else None,
        fleet=tuple(_fleet_client(item) for item in head.objects("fleet", required=False)),
        curves=tuple(read_curve(item) for item in head.objects("curves", required=False)),
        rounds=rounds,
        host_seconds=host_seconds,
        warnings=(*warnings, *more_warnings),
    )


def load_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Read run folders and compare folders (whose runs lie under ``runs/``), in the order given.

    Raises
    ------
    InputError : a path is neither, or nothing was given.
    """
    runs = [load_run(folder) for path in paths for folder in run_folders(path)]
    if not runs:
        raise InputError("DIR: no run given; valid: one or more folders of `airtune run` or `airtune compare`")
    return runs


def run_folders(path: str | Path) -> list[Path]:
    """Return the run folders that a path stands for: itself, or those under its ``runs/``.

    The order is that of compare.json where there is one (so that the first method stays the reference), then by name.
    """
    folder = Path(path)
    if (folder / RUN_FILE).is_file():
        return [folder]
    found = sorted(_folders_with_run(folder / RUNS_FOLDER)) if (folder / RUNS_FOLDER).is_dir() else []
    if not found:
        raise InputError(f"{folder}: holds no run (neither {RUN_FILE} nor {RUNS_FOLDER}/*/{RUN_FILE})")
    summary = load_summary(folder)
    order = {(folder / line["run_dir"]).resolve(): i for i, line in enumerate(summary["runs"])} if summary else {}
    return sorted(found, key=lambda item: (order.get(item.resolve(), len(order)), item))


def load_summary(path: str | Path) -> CompareSummary | None:
    """Return the compare.json of a compare folder, or None where the folder has none."""
    file = Path(path) / COMPARE_FILE
    if not file.is_file():
        return None
    head = read_object(file)
    summary: CompareSummary = {
        "schema": head.integer("schema"),
        "metric": head.text("metric"),
        "direction": head.text("direction"),
        "target": head.number("target"),
        "target_source": head.text("target_source"),
        "runs": [_compare_run(item) for item in head.objects("runs")],
    }
    tuned = Fields(f"{head.where}: tuned", head.mapping("tuned", required=False))
    if tuned.values:
        summary["tuned"] = {m: {k: str(v) for k, v in tuned.mapping(m).items()} for m in tuned.values}
    return summary


def read_curve(item: Fields) -> Curve:
    """Read one entry of the optional list `curves`."""
    x = tuple(Fields(item.where, {"x": value}).number("x") for value in item.items("x"))
    y = tuple(Fields(item.where, {"y": value}).number("y") for value in item.items("y"))
    if len(x) != len(y):
        raise InputError(f"{item.where}: x and y differ in length ({len(x)} and {len(y)})")
    return Curve(
        title=item.text("title"),
        x_label=item.text("x_label"),
        y_label=item.text("y_label"),
        x=x,
        y=y,
        chosen=item.maybe_number("chosen"),
    )


def _folders_with_run(folder: Path, depth: int = 3) -> Iterator[Path]:
    for child in sorted(folder.iterdir()):
        if not child.is_dir():
            continue
        if (child / RUN_FILE).is_file():
            yield child
        elif depth > 1:
            yield from _folders_with_run(child, depth - 1)


def _command(head: Fields) -> str | None:
    value = head.values.get("command")
    if isinstance(value, list):
        return shlex.join(str(part) for part in cast("list[object]", value))
    return value if isinstance(value, str) and value else None


def _metric(head: Fields) -> tuple[str, str]:
    metric, direction = head.text("metric"), head.text("direction")
    if metric not in ("accuracy", "loss"):
        raise InputError(f"{head.where}: metric: {metric!r}; valid: accuracy, loss")
    if direction not in ("max", "min"):
        raise InputError(f"{head.where}: direction: {direction!r}; valid: max, min")
    return metric, direction


def _read_rounds(path: Path) -> tuple[tuple[Round, ...], tuple[str, ...]]:
    if not path.is_file():
        raise InputError(f"{path}: missing; the run stopped before its first round or the folder is incomplete")
    lines, warnings = read_lines(path)
    rounds = tuple(_round(line) for line in lines)
    numbers = [line.number for line in rounds]
    if numbers != sorted(set(numbers)):
        raise InputError(f"{path}: round: numbers do not rise from line to line")
    return rounds, warnings


def _round(line: Fields) -> Round:
    duration, arrived = line.number("duration_s"), line.integers("arrived")
    return Round(
        number=line.integer("round"),
        time_s=line.number("time_s"),
        duration_s=duration,
        cohort=line.integers("cohort"),
        arrived=arrived,
        dropped=tuple(DroppedRecord(item.integer("client"), item.text("reason")) for item in line.objects("dropped")),
        uplink_bits=line.number("uplink_bits"),
        downlink_bits=line.number("downlink_bits"),
        energy_j=line.number("energy_j"),
        train_loss=line.maybe_number("train_loss"),
        accuracy=line.maybe_number("accuracy"),
        loss=line.maybe_number("loss"),
        clients=tuple(_client(item, duration, arrived) for item in line.objects("clients")),
        diagnostics=line.numbers_of("diagnostics"),
        notes=line.mapping("notes", required=False),
    )


def _client(item: Fields, duration: float, arrived: tuple[int, ...]) -> ClientRecord:
    client, start = item.integer("client"), item.maybe_number("start_s")
    seconds = [item.number(name) for name in ("download_s", "compute_s", "upload_s", "wait_s")]
    if start is None:
        start = duration - sum(seconds) if client in arrived and sum(seconds[:3]) > 0 else 0.0
        start = 0.0 if abs(start) < 1e-6 * duration else start
    return ClientRecord(
        client=client,
        components=item.maybe_number("components"),
        depth=item.maybe_number("depth"),
        bandwidth_hz=item.maybe_number("bandwidth_hz"),
        bits_up=item.maybe_number("bits_up"),
        bits_down=item.maybe_number("bits_down"),
        start_s=start,
        download_s=seconds[0],
        compute_s=seconds[1],
        upload_s=seconds[2],
        wait_s=seconds[3],
        energy_j=item.maybe_number("energy_j"),
    )


def _fleet_client(item: Fields) -> FleetClient:
    return FleetClient(
        client=item.integer("client"),
        device=item.text("device", "device"),
        flops_per_second=item.maybe_number("flops_per_second"),
        memory_bytes=item.maybe_number("memory_bytes"),
        x_m=item.maybe_number("x_m"),
        y_m=item.maybe_number("y_m"),
        gain=item.maybe_number("gain"),
        examples=item.maybe_number("examples"),
    )


def _compare_run(item: Fields) -> CompareRun:
    return {
        "method": item.text("method"),
        "seed": item.integer("seed"),
        "status": item.text("status"),
        "run_dir": item.text("run_dir"),
        "time_to_target_s": item.maybe_number("time_to_target_s"),
        "uplink_bits_to_target": item.maybe_number("uplink_bits_to_target"),
        "downlink_bits_to_target": item.maybe_number("downlink_bits_to_target"),
        "energy_j_to_target": item.maybe_number("energy_j_to_target"),
        "final_metric": item.maybe_number("final_metric"),
        "rounds": item.integer("rounds"),
    }


def _read_timings(path: Path) -> tuple[dict[str, float], tuple[str, ...]]:
    """Sum the host seconds of timings.jsonl by key; the file is optional and `round` is not a duration."""
    if not path.is_file():
        return {}, ()
    lines, warnings = read_lines(path)
    totals: dict[str, float] = {}
    for line in lines:
        for name, value in Fields(line.where, {"all": cast("object", dict(line.values))}).numbers_of("all").items():
            if name != "round":
                totals[name] = totals.get(name, 0.0) + value
    return totals, warnings
