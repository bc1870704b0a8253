"""The comparison as text: cells that the page and the terminal share, and the terminal's tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from airtune.report.quantities import Unit, bit_unit, counted, digits, energy_unit, metric_text, time_unit
from airtune.report.records import CompareSummary
from airtune.report.tables import COSTS, MethodRow, PairedRatio, Spread, cost_of, method_rows, paired_ratios

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

COST_TITLES = {
    "time_to_target_s": "Time to target",
    "uplink_bits_to_target": "Uplink to target",
    "downlink_bits_to_target": "Downlink to target",
    "energy_j_to_target": "Energy to target",
}
_SHORT = dict(zip(COSTS, ("Time", "Up", "Down", "Energy"), strict=True))
_UNITS = {
    "time_to_target_s": time_unit,
    "uplink_bits_to_target": bit_unit,
    "downlink_bits_to_target": bit_unit,
    "energy_j_to_target": energy_unit,
}


def cost_units(summary: CompareSummary) -> dict[str, Unit]:
    """Return the unit in which each cost's column is shown; uplink and downlink share one."""
    values = {cost: [v for line in summary["runs"] if (v := cost_of(line, cost)) is not None] for cost in COSTS}
    both = values["uplink_bits_to_target"] + values["downlink_bits_to_target"]
    values["uplink_bits_to_target"] = values["downlink_bits_to_target"] = both
    return {cost: _UNITS[cost](values[cost]) for cost in COSTS}


def cost_text(row: MethodRow, cost: str, unit: Unit) -> str:
    """Return a cell: ``"812 ± 20 s"``, ``"missed"``, or ``"812 s (2 of 3)"`` where some seeds missed."""
    found = row.costs[cost]
    if found is None:
        return "missed"
    text = spread_text(found, unit)
    return text if row.reached == row.seeds else f"{text} ({row.reached} of {row.seeds})"


def spread_text(found: Spread, unit: Unit) -> str:
    """Return ``"mean ± deviation unit"``; the deviation has two significant digits and is left out for one value."""
    if found.deviation is None:
        return unit.show(found.mean)
    mean, deviation = found.mean / unit.factor, found.deviation / unit.factor
    if deviation == 0:
        return f"{digits(mean)} ± 0 {unit.name}"
    decimals = min(9, max(0, 1 - math.floor(math.log10(deviation))))
    return f"{mean:,.{decimals}f} ± {deviation:,.{decimals}f} {unit.name}"


def final_text(metric: str, found: Spread | None) -> str:
    """Return the final metric's cell, in per cent for accuracies."""
    if found is None:
        return "-"
    if found.deviation is None:
        return metric_text(metric, found.mean)
    if metric == "accuracy":
        return f"{100 * found.mean:.1f} ± {100 * found.deviation:.1f} %"
    return f"{found.mean:.3f} ± {found.deviation:.3f}"


def ratio_text(found: PairedRatio) -> str:
    """Return ``"0.50 [0.45, 0.55]"``, with the number of pairs where seeds are missing."""
    if found.ratio is None:
        return "-"
    text = f"{found.ratio:.2f}"
    if found.low is not None and found.high is not None:
        text += f" [{found.low:.2f}, {found.high:.2f}]"
    return text if found.pairs == found.seeds else f"{text} ({found.pairs} of {found.seeds})"


def render_table(summary: CompareSummary) -> Group:
    """Return the comparison as rich tables for the terminal: costs to the target, then paired ratios."""
    from rich.console import Group
    from rich.text import Text

    units = cost_units(summary)
    metric = summary["metric"]
    headings = [f"{_SHORT[cost]}, {units[cost].name}" for cost in COSTS]
    last = "Accuracy, %" if metric == "accuracy" else "Loss"
    table = _table(f"{target_sentence(summary)}; means over seeds", ["Reached", *headings, last])
    for row in method_rows(summary):
        cells = [Text(_bare(row.costs[cost], units[cost])) for cost in COSTS]
        done = f"{row.reached} of {row.seeds}" + (f", {row.failed} unfinished" if row.failed else "")
        table.add_row(Text(row.method), Text(done), *cells, Text(final_text(metric, row.final).removesuffix(" %")))
    if notes := early_notes(summary):
        table.caption, table.caption_justify = " ".join(notes), "left"
    ratios = paired_ratios(summary)
    if not ratios:
        return Group(table)
    return Group(table, "", _ratio_table(ratios))


def target_sentence(summary: CompareSummary) -> str:
    """Return what the target is and where it comes from."""
    source = {"default": "the worst run's best", "given": "as given"}.get(
        summary["target_source"], summary["target_source"]
    )
    sign = "at least" if summary["direction"] == "max" else "at most"
    return f"Target: {summary['metric']} {sign} {metric_text(summary['metric'], summary['target'])} ({source})"


def early_notes(summary: CompareSummary) -> list[str]:
    """Return the warning that the target says little, where runs stood at it before any training."""
    early = sum(line["time_to_target_s"] == 0 for line in summary["runs"])
    if not early:
        return []
    of = counted(len(summary["runs"]), "run")
    note = f"{early} of {of} met the target before training (round 0), so the costs to it say little about them"
    return [f"{note}; give another one with --target." if summary["target_source"] == "default" else f"{note}."]


def _bare(found: Spread | None, unit: Unit) -> str:
    return "missed" if found is None else spread_text(found, unit).removesuffix(f" {unit.name}")


def _table(title: str, headings: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    table.add_column("Method", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _ratio_table(ratios: Sequence[PairedRatio]) -> Table:
    from rich.text import Text

    title = f"Cost over that of {ratios[0].reference}, paired by seed [95 % bootstrap interval]"
    table = _table(title, [_SHORT[cost] for cost in COSTS])
    for method in dict.fromkeys(item.method for item in ratios):
        cells = {item.cost: ratio_text(item) for item in ratios if item.method == method}
        table.add_row(Text(method), *(Text(cells[cost].replace(", ", ",")) for cost in COSTS))
    return table
