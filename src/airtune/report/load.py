"""Reading stored runs into frozen dataclasses: run.json, rounds.jsonl, timings.jsonl and compare.json.

The report knows a run by these files alone. It imports no training code, so a page can be made on any machine.
All quantities are SI: seconds, bits, joules, hertz, metres. `uplink_bits`, `downlink_bits` and `energy_j` of a line of
rounds.jsonl belong to that round; `time_s` is cumulative.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

from airtune.errors import InputError
from airtune.report.fields import Fields, read_lines, read_object

RUN_FILE = "run.json"
ROUNDS_FILE = "rounds.jsonl"
TIMINGS_FILE = "timings.jsonl"
COMPARE_FILE = "compare.json"
RUNS_FOLDER = "runs"


@dataclass(frozen=True)
class ClientRecord:
    """What one client did in one round. A quantity that the line does not give is None.

    Attributes
    ----------
    client : the client's number in the fleet.
    components : trained rank components, summed over modules; depth : trained transformer layers.
    bandwidth_hz : its part of the uplink band, Hz.
    bits_up, bits_down : payload, bits.
    start_s : when its work began, seconds after the round's start (optional key; negative for work in flight).
    download_s, compute_s, upload_s, wait_s : seconds.
    energy_j : joules of this device in this round.
    """

    client: int
    components: float | None
    depth: float | None
    bandwidth_hz: float | None
    bits_up: float | None
    bits_down: float | None
    start_s: float
    download_s: float
    compute_s: float
    upload_s: float
    wait_s: float
    energy_j: float | None


@dataclass(frozen=True)
class DroppedRecord:
    """One client whose work did not count in a round, and why."""

    client: int
    reason: str


@dataclass(frozen=True)
class Round:
    """One line of rounds.jsonl. Round 0 is the evaluation before training.

    `time_s` is cumulative fleet seconds at the round's end; bits and joules are of this round alone.
    `accuracy` and `loss` are None in rounds that were not evaluated.
    """

    number: int
    time_s: float
    duration_s: float
    cohort: tuple[int, ...]
    arrived: tuple[int, ...]
    dropped: tuple[DroppedRecord, ...]
    uplink_bits: float
    downlink_bits: float
    energy_j: float
    train_loss: float | None
    accuracy: float | None
    loss: float | None
    clients: tuple[ClientRecord, ...]
    diagnostics: dict[str, float]
    notes: dict[str, object]

    def value(self, metric: str) -> float | None:
        """Return the evaluated value of ``"accuracy"`` or ``"loss"``."""
        return self.accuracy if metric == "accuracy" else self.loss


@dataclass(frozen=True)
class FleetClient:
    """One client of the fleet, from the optional list `fleet` of run.json. Absent quantities are None.

    `x_m`, `y_m` : metres from the base station. `gain` : channel power gain, linear (mean over fading).
    """

    client: int
    device: str
    flops_per_second: float | None
    memory_bytes: float | None
    x_m: float | None
    y_m: float | None
    gain: float | None
    examples: float | None


@dataclass(frozen=True)
class Curve:
    """A curve that a planner decided by, for example its bound over ranks; `chosen` is the x it took.

    Optional key `curves` of run.json and of a plan: [{title, x_label, y_label, x: [...], y: [...], chosen}].
    """

    title: str
    x_label: str
    y_label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    chosen: float | None


@dataclass(frozen=True)
class Run:
    """One stored run.

    Attributes
    ----------
    path : the run's folder.
    metric, direction : ``"accuracy"`` or ``"loss"``; ``"max"`` or ``"min"``.
    config : the resolved configuration, nested plain data.
    final : the totals that run.json holds.
    command : the command line that made the run (optional key `command`: a text, or a list of texts).
    rounds : every readable line of rounds.jsonl, in order.
    host_seconds : total host seconds by name, summed over timings.jsonl.
    warnings : what could not be read although the run as a whole can, one sentence each.
    """

    path: Path
    method: str
    seed: int
    status: str
    metric: str
    direction: str
    airtune: str
    config: dict[str, object]
    versions: dict[str, object]
    final: dict[str, float]
    export: object
    command: str | None
    fleet: tuple[FleetClient, ...]
    curves: tuple[Curve, ...]
    rounds: tuple[Round, ...]
    host_seconds: dict[str, float]
    warnings: tuple[str, ...]

    def evaluations(self, metric: str | None = None) -> tuple[tuple[Round, float], ...]:
        """Return the rounds that evaluated a metric (default: the run's own) with their values."""
        name = metric or self.metric
        pairs = ((line, line.value(name)) for line in self.rounds)
        return tuple((line, value) for line, value in pairs if value is not None)


class CompareRun(TypedDict):
    """One run of compare.json; seconds, bits and joules are None where the target was missed."""

    method: str
    seed: int
    status: str
    run_dir: str
    time_to_target_s: float | None
    uplink_bits_to_target: float | None
    downlink_bits_to_target: float | None
    energy_j_to_target: float | None
    final_metric: float | None
    rounds: int


class CompareSummary(TypedDict):
    """The content of compare.json. `target_source` is ``"given"`` or ``"default"`` (see `tables.default_target`)."""

    schema: int
    metric: str
    direction: str
    target: float
    target_source: str
    runs: list[CompareRun]


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
    """Return the run folders that a path stands for: itself, or those under its ``runs/`` in order of name."""
    folder = Path(path)
    if (folder / RUN_FILE).is_file():
        return [folder]
    found = sorted(_folders_with_run(folder / RUNS_FOLDER)) if (folder / RUNS_FOLDER).is_dir() else []
    if not found:
        raise InputError(f"{folder}: holds no run (neither {RUN_FILE} nor {RUNS_FOLDER}/*/{RUN_FILE})")
    return found


def load_summary(path: str | Path) -> CompareSummary | None:
    """Return the compare.json of a compare folder, or None where the folder has none."""
    file = Path(path) / COMPARE_FILE
    if not file.is_file():
        return None
    head = read_object(file)
    return {
        "schema": head.integer("schema"),
        "metric": head.text("metric"),
        "direction": head.text("direction"),
        "target": head.number("target"),
        "target_source": head.text("target_source"),
        "runs": [_compare_run(item) for item in head.objects("runs")],
    }


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
    return Round(
        number=line.integer("round"),
        time_s=line.number("time_s"),
        duration_s=line.number("duration_s"),
        cohort=line.integers("cohort"),
        arrived=line.integers("arrived"),
        dropped=tuple(DroppedRecord(item.integer("client"), item.text("reason")) for item in line.objects("dropped")),
        uplink_bits=line.number("uplink_bits"),
        downlink_bits=line.number("downlink_bits"),
        energy_j=line.number("energy_j"),
        train_loss=line.maybe_number("train_loss"),
        accuracy=line.maybe_number("accuracy"),
        loss=line.maybe_number("loss"),
        clients=tuple(_client(item) for item in line.objects("clients")),
        diagnostics=line.numbers_of("diagnostics"),
        notes=line.mapping("notes", required=False),
    )


def _client(item: Fields) -> ClientRecord:
    return ClientRecord(
        client=item.integer("client"),
        components=item.maybe_number("components"),
        depth=item.maybe_number("depth"),
        bandwidth_hz=item.maybe_number("bandwidth_hz"),
        bits_up=item.maybe_number("bits_up"),
        bits_down=item.maybe_number("bits_down"),
        start_s=item.maybe_number("start_s") or 0.0,
        download_s=item.number("download_s"),
        compute_s=item.number("compute_s"),
        upload_s=item.number("upload_s"),
        wait_s=item.number("wait_s"),
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
