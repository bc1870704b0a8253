"""The tables and texts of one run on its page: lost updates, devices, configuration, versions, the command."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import numpy as np

from airtune.report.html import Block, Details, Table
from airtune.report.quantities import digits, flops_unit
from airtune.report.records import CompareSummary, DroppedRecord, FleetClient, Run
from airtune.report.tables import method_names

DROPPED_SHOWN = 12
_ROUNDS_LISTED = 15


def first_value(run: Run) -> float | None:
    """Return the metric before training (round 0), None where round 0 was not evaluated."""
    return run.rounds[0].value(run.metric) if run.rounds and run.rounds[0].number == 0 else None


def gain_text(metric: str, direction: str, start: float, end: float, *, short: bool = False) -> str:
    """Return the gain over the start: points of accuracy, or how much lower a loss is."""
    gain = end - start if direction == "max" else start - end
    if metric == "accuracy":
        return f"{100 * gain:+.1f} points" if short else f"{100 * gain:+.1f} points of accuracy"
    return f"{-gain:+.3f}" if short else f"{-gain:+.3f} of loss"


def dropped_tables(run: Run, entry: int | None) -> list[Table]:
    """Return one table of who was dropped or late, why, and in which rounds; none where everybody arrived."""
    lost = [(item, line.number) for line in run.rounds for item in line.dropped]
    if not lost:
        return []
    devices = {item.client: item.device for item in run.fleet}
    rounds: dict[DroppedRecord, list[int]] = {}
    for item, number in lost:
        rounds.setdefault(item, []).append(number)
    ranked = sorted(rounds, key=lambda item: (-len(rounds[item]), item.client, item.reason))
    rows = [
        [f"{item.client}", devices.get(item.client, "-"), item.reason, f"{len(rounds[item])}", _listed(rounds[item])]
        for item in ranked[:DROPPED_SHOWN]
    ]
    more = f"; the {DROPPED_SHOWN} most frequent are listed" if len(ranked) > DROPPED_SHOWN else ""
    reasons = Counter(item.reason for item, _ in lost)
    counts = ", ".join(f"{reason}: {count:,}" for reason, count in reasons.most_common())
    caption = f"Dropped or late: {len(lost):,} in all ({counts}{more})"
    return [Table(["Client", "Device", "Reason", "Times", "Rounds"], rows, caption, align="left", entry=entry)]


def device_table(run: Run, entry: int | None) -> Table:
    """Return the fleet by device: how many, how fast, how much memory, how many examples."""
    kinds = sorted({item.device for item in run.fleet})
    rows = [[kind, *_device_cells([item for item in run.fleet if item.device == kind])] for kind in kinds]
    headings = ["Device", "Clients", "Speed (median)", "Memory (median)", "Examples"]
    return Table(headings, rows, "The fleet", entry=entry)


def configuration(run: Run, entry: int | None) -> list[Block]:
    """Return the resolved configuration, folded away: one table a section."""
    scalars = {key: value for key, value in run.config.items() if not isinstance(value, dict)}
    sections = {key: value for key, value in run.config.items() if isinstance(value, dict)}
    groups = [("experiment", scalars), *((key, cast("dict[str, object]", value)) for key, value in sections.items())]
    tables = [
        Table([], [[key, text] for key, text in flat(values)], name, align="left", plain=True)
        for name, values in groups
        if values
    ]
    return [Details("Resolved configuration", tables, entry)] if tables else []


def versions_table(run: Run, more: Sequence[Table], entry: int | None) -> Block:
    """Return versions, status and export, folded away, and further tables behind them."""
    rows = [["airtune", run.airtune], ["status", run.status], ["folder", run.path.name]]
    rows += [["git revision", run.git]] if run.git else []
    rows += [[key, text] for key, text in flat(run.versions) if key != "airtune"]
    if run.export is not None:
        rows += [[f"export {key}".strip(), text] for key, text in flat(run.export)]
    return Details("Versions and files", [Table([], rows, "", align="left", plain=True), *more], entry)


def host_table(run: Run) -> Table:
    """Return the host's own seconds: what the simulation cost here, which is not fleet time."""
    rows = [[name, f"{digits(seconds)} s"] for name, seconds in run.host_seconds.items()]
    return Table([], rows, "Seconds of this host (not fleet time)", align="left", plain=True)


def repeat_command(runs: Sequence[Run], summary: CompareSummary | None) -> str:
    """Return the command that repeats the runs: as stored, else put together from what run.json holds."""
    stored = {run.command for run in runs}
    if len(stored) == 1 and (command := stored.pop()) is not None:
        return command
    if summary is None:
        run = runs[0]
        return f"airtune run EXPERIMENT.toml --method {shlex.quote(run.method)} --seed {run.seed}"
    methods = ",".join(method_names(summary))
    seeds = ",".join(str(seed) for seed in dict.fromkeys(run.seed for run in runs))
    target = f" --target {summary['target']:g}" if summary["target_source"] == "given" else ""
    return f"airtune compare EXPERIMENT.toml --methods {shlex.quote(methods)} --seeds {seeds}{target}"


def _device_cells(items: Sequence[FleetClient]) -> list[str]:
    speeds = [item.flops_per_second for item in items if item.flops_per_second is not None]
    memories = [item.memory_bytes for item in items if item.memory_bytes is not None]
    examples = [item.examples for item in items if item.examples is not None]
    speed = float(np.median(speeds)) if speeds else None
    return [
        f"{len(items):,}",
        flops_unit([speed]).show(speed) if speed is not None else "-",
        f"{digits(float(np.median(memories)) / 2**30)} GiB" if memories else "-",
        f"{sum(examples):,.0f}" if examples else "-",
    ]


def _listed(numbers: Sequence[int]) -> str:
    text = ", ".join(str(number) for number in numbers[:_ROUNDS_LISTED])
    return text if len(numbers) <= _ROUNDS_LISTED else f"{text}, ..."


def flat(value: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, text) for every leaf; lists of plain values stay on one line."""
    if isinstance(value, Mapping):
        for key, inner in cast("Mapping[str, object]", value).items():
            yield from flat(inner, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in cast("list[object]", value)):
        for index, inner in enumerate(cast("list[object]", value)):
            yield from flat(inner, f"{prefix}[{index}]")
    elif isinstance(value, list):
        yield prefix, ", ".join(_leaf(item) for item in cast("list[object]", value))
    else:
        yield prefix, _leaf(value)


def _leaf(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)
