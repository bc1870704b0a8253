"""report.html for one run and for a comparison of runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from airtune.errors import InputError
from airtune.report.cells import (
    COST_TITLES,
    cost_text,
    cost_units,
    early_notes,
    final_text,
    ratio_text,
    target_sentence,
)
from airtune.report.figures import Figure, cost_figure, learning_figure, ratio_figure
from airtune.report.html import Chooser, Code, Entry, FigureSlot, Page, RoundView, Section, Table, Tile, write_page
from airtune.report.load import load_runs, load_summary
from airtune.report.quantities import bit_unit, counted, digits, energy_unit, metric_text, time_unit
from airtune.report.records import CompareSummary, Run
from airtune.report.round_view import round_view
from airtune.report.run_figures import run_figures
from airtune.report.run_tables import (
    configuration,
    device_table,
    dropped_tables,
    first_value,
    gain_text,
    host_table,
    repeat_command,
    versions_table,
)
from airtune.report.tables import (
    COSTS,
    MethodRow,
    PairedRatio,
    best_value,
    compare_summary,
    final_value,
    method_rows,
    paid,
    paired_ratios,
    spread,
)

REPORT_FILE = "report.html"
_NAMED_IN_HEADLINE = 5


def write_report(paths: Sequence[str | Path], out_dir: str | Path | None = None, target: float | None = None) -> Path:
    """Write the report for what `airtune report DIR...` names and return its path.

    One run folder gives that run's page. A compare folder, or several folders, give the comparison's page; a stored
    compare.json keeps its target unless another is given.

    Parameters
    ----------
    paths : run folders and compare folders.
    out_dir : where to write; None takes the folder named, which must then be a single one.

    Raises
    ------
    InputError : a folder holds no run, or several folders are named without `out_dir`.
    """
    runs = load_runs(paths)
    if len(paths) == 1 and runs[0].path == Path(paths[0]):
        return write_page(Path(out_dir or paths[0]) / REPORT_FILE, run_page(runs[0]))
    if out_dir is None and len(paths) > 1:
        raise InputError("--out: several folders are named, so the page needs a place; valid: --out DIR")
    folder = Path(out_dir or paths[0])
    stored = load_summary(paths[0]) if len(paths) == 1 else None
    if target is None and stored is not None and stored["target_source"] == "given":
        target = stored["target"]
    summary = compare_summary(runs, target, out_dir=folder)
    if stored is not None and "tuned" in stored:
        summary["tuned"] = stored["tuned"]
    return write_compare_report(folder, runs, summary)


def write_run_report(run_dir: str | Path) -> Path:
    """Write ``run_dir/report.html`` from the stored files of one run and return its path."""
    return write_report([run_dir])


def write_compare_report(out_dir: str | Path, runs: Sequence[Run], summary: CompareSummary) -> Path:
    """Write ``out_dir/report.html``: the comparison, then every run by choice. `summary` is of these runs."""
    return write_page(Path(out_dir) / REPORT_FILE, compare_page(runs, summary))


def run_page(run: Run) -> Page:
    """Return the page of one run."""
    return Page(
        title=f"{run.method}, seed {run.seed}: airtune run",
        eyebrow=f"airtune run · {run.method} · seed {run.seed} · {run.status}",
        headline=run_headline(run),
        lead=_run_lead(run),
        tiles=_run_tiles(run),
        banners=_banners([run]),
        figures=_learning([run], None),
        entries=[_entry(run, 1)],
        sections=[_learning_section([run], "One point is one evaluation on the test set."), *_run_sections([run])],
    )


def compare_page(runs: Sequence[Run], summary: CompareSummary) -> Page:
    """Return the page of a comparison."""
    figures = _learning(runs, summary["target"]) | {"costs": cost_figure(summary)}
    ratios = ratio_figure(summary)
    tuned = summary.get("tuned", {})
    blocks: list[FigureSlot | Table] = [_compare_table(runs, summary), FigureSlot("costs", wide=True)]
    if ratios is not None:
        figures["ratios"] = ratios
        blocks += [_ratio_table(summary), FigureSlot("ratios", wide=True)]
    if tuned:
        rows = [[f"{method} {field}", value] for method, chosen in tuned.items() for field, value in chosen.items()]
        blocks.append(Table([], rows, "Chosen by --tune on validation rows", align="left", plain=True))
    seeds = len({run.seed for run in runs})
    curves = (
        f"Strong line: mean over {seeds} seeds. Thin lines: the seeds. Band: lowest to highest seed. "
        "The mean ends where the shortest seed ends."
        if seeds > 1
        else "One point is one evaluation on the test set."
    )
    return Page(
        title=f"{', '.join(row.method for row in method_rows(summary))}: airtune compare",
        eyebrow=" · ".join(
            [
                "airtune compare",
                counted(len(method_rows(summary)), "method"),
                counted(seeds, "seed"),
                counted(len(runs), "run"),
            ]
        ),
        headline=compare_headline(summary),
        lead=_compare_lead(runs, summary),
        banners=[*_banners(runs), *early_notes(summary)],
        figures=figures,
        entries=[_entry(run, len(runs)) for run in runs],
        sections=[
            Section("result", "Result", blocks, f"{target_sentence(summary)}. {_rule()}"),
            _learning_section(runs, curves),
            *_run_sections(runs, summary),
        ],
    )


def run_headline(run: Run) -> str:
    """Return the result of a run in one sentence."""
    value = final_value(run)
    if value is None or not run.rounds:
        return f"{run.method} has no evaluation yet"
    end = paid(run)[-1]
    when = time_unit([end.time_s]).show(end.time_s)
    if run.metric == "accuracy":
        return f"{run.method} reached {metric_text('accuracy', value)} accuracy in {when} of fleet time"
    return f"{run.method} brought the loss to {metric_text('loss', value)} in {when} of fleet time"


def compare_headline(summary: CompareSummary) -> str:
    """Return who reached the target when, the fastest first, and who missed it."""
    rows, unit = method_rows(summary), cost_units(summary)["time_to_target_s"]
    level = metric_text(summary["metric"], summary["target"])
    level = level if summary["metric"] == "accuracy" else f"a loss of {level}"
    done = sorted((row for row in rows if row.reached), key=_mean_time)
    missed = [row.method for row in rows if not row.reached]
    if not done:
        return f"No method reached {level}"
    texts = [_when(row, unit.show(_mean_time(row))) for row in done[:_NAMED_IN_HEADLINE]]
    texts[0] = texts[0].replace(" in ", f" reached {level} in ", 1)
    rest = len(done) - len(texts)
    ending = f", {rest} more later" if rest else ""
    ending += f"; {', '.join(missed)} missed it" if missed else ""
    return ", ".join(texts) + ending


def _mean_time(row: MethodRow) -> float:
    found = row.costs["time_to_target_s"]
    return float("inf") if found is None else found.mean


def _when(row: MethodRow, time: str) -> str:
    return f"{row.method} in {time}" + ("" if row.reached == row.seeds else f" ({row.reached} of {row.seeds} seeds)")


def _run_lead(run: Run) -> str:
    start, end = first_value(run), final_value(run)
    if start is None or end is None:
        return ""
    before = metric_text(run.metric, start)
    return f"{gain_text(run.metric, run.direction, start, end)} against the {before} before training (round 0)."


def _run_tiles(run: Run) -> list[Tile]:
    if not run.rounds:
        return []
    end, start, final, best = paid(run)[-1], first_value(run), final_value(run), best_value(run)
    trained = [line for line in run.rounds if line.number > 0]
    asked = sum(len(line.cohort) for line in trained)
    lost = sum(len(line.dropped) for line in trained)
    mean = end.time_s / max(1, len(trained))
    tiles = [
        Tile(f"Final {run.metric}", metric_text(run.metric, final), f"best {metric_text(run.metric, best)}"),
        Tile("Before training", metric_text(run.metric, start), "zero-shot, round 0"),
    ]
    if start is not None and final is not None:
        tiles.append(Tile("Gain", gain_text(run.metric, run.direction, start, final, short=True), "over round 0"))
    return [
        *tiles,
        Tile(
            "Fleet time",
            time_unit([end.time_s]).show(end.time_s),
            f"{counted(len(trained), 'round')} of {digits(mean)} s",
        ),
        Tile("Uplink", bit_unit([end.uplink_bits]).show(end.uplink_bits), "sent by the devices"),
        Tile("Downlink", bit_unit([end.downlink_bits]).show(end.downlink_bits), "sent to the devices"),
        Tile("Energy", energy_unit([end.energy_j]).show(end.energy_j), "devices only"),
        Tile("Lost updates", f"{lost:,}", f"of {asked:,} asked for"),
    ]


def _banners(runs: Sequence[Run]) -> list[str]:
    found: list[str] = []
    for run in runs:
        name = f"{run.method}, seed {run.seed}: " if len(runs) > 1 else ""
        if run.status != "done":
            found.append(f"{name}the run's status is {run.status!r}{_why(run)}; what follows is what it left behind.")
        found += [f"{name}{warning}." for warning in run.warnings]
    return found


def _why(run: Run) -> str:
    return f" ({run.error})" if run.error else ""


def _learning(runs: Sequence[Run], target: float | None) -> dict[str, Figure]:
    metric = runs[0].metric
    figures = {
        f"{name}_{over}": learning_figure(runs, name, over, target if name == metric else None)
        for name in ("accuracy", "loss")
        for over in ("time", "bits")
    }
    return {key: figure for key, figure in figures.items() if figure is not None}


def _learning_section(runs: Sequence[Run], text: str) -> Section:
    names = ("accuracy", "loss") if runs[0].metric == "accuracy" else ("loss", "accuracy")
    shown = [name for name in names if any(run.evaluations(name) for run in runs)]
    slots = [FigureSlot(f"{name}_{over}") for name in shown for over in ("time", "bits")]
    return Section("learning", "Learning", slots, text)


def _entry(run: Run, share: int) -> Entry:
    return Entry(run_figures(run), round_view(run, share))


def _run_sections(runs: Sequence[Run], summary: CompareSummary | None = None) -> list[Section]:
    """Return the sections about single runs; with several runs each holds what belongs to the chosen one."""
    names = [f"{run.method}, seed {run.seed}" for run in runs]
    several = len(runs) > 1
    chooser = [Chooser("Run", names)] if several else []
    have = {key for run in runs for key in run_figures(run)}

    def slots(*keys: str, wide: bool = False) -> list[FigureSlot]:
        return [FigureSlot(key, "entry", wide) for key in keys if key in have]

    def each(index: int) -> int | None:
        return index if several else None

    rounds = [*chooser, RoundView("Timeline of one round"), *slots("duration", "participation")]
    dropped = [table for i, run in enumerate(runs) for table in dropped_tables(run, each(i))]
    curves = sorted(key for key in have if key.startswith("curve_"))
    cell = [*slots("cell", "rates"), *(device_table(run, each(i)) for i, run in enumerate(runs) if run.fleet)]
    planner = [*slots(*curves), *slots("latency_limit", "notes", "diagnostics", wide=True)]
    repeat = [Code("Command", repeat_command(runs, summary))]
    for i, run in enumerate(runs):
        host = [host_table(run)] if run.host_seconds else []
        repeat_blocks = configuration(run, each(i))
        repeat += [*repeat_blocks, *([versions_table(run, host, each(i))])]
    chosen = "Everything below is about the chosen run." if several else ""
    sections = [
        Section("rounds", "Rounds", [*rounds, *dropped], chosen),
        Section("energy", "Energy", slots("energy_rounds", "energy_devices")),
        Section("cell", "Fleet and radio", cell),
        Section("inside", "Inside the method", planner),
        Section("repeat", "Repeat it", repeat),
    ]
    return [section for section in sections if section.blocks]


def _compare_table(runs: Sequence[Run], summary: CompareSummary) -> Table:
    units, metric = cost_units(summary), summary["metric"]
    headings = ["Method", "Reached", *COST_TITLES.values(), "Before training", f"Final {metric}", "Gain"]
    rows: list[list[str]] = []
    for row in method_rows(summary):
        start = _mean([first_value(run) for run in runs if run.method == row.method])
        end = row.final.mean if row.final else None
        gain = "-" if start is None or end is None else gain_text(metric, summary["direction"], start, end, short=True)
        rows.append(
            [
                row.method,
                f"{row.reached} of {row.seeds}" + (f", {row.failed} unfinished" if row.failed else ""),
                *(cost_text(row, cost, units[cost]) for cost in COSTS),
                metric_text(metric, start),
                final_text(metric, row.final),
                gain,
            ]
        )
    return Table(headings, rows, "Mean ± standard deviation over seeds")


def _ratio_table(summary: CompareSummary) -> Table:
    ratios = paired_ratios(summary)
    headings = ["Method", *(title.removesuffix(" to target") for title in COST_TITLES.values())]
    rows = [
        [method, *(ratio_text(item) for cost in COSTS for item in ratios if (item.method, item.cost) == (method, cost))]
        for method in dict.fromkeys(item.method for item in ratios)
    ]
    return Table(headings, rows, _ratio_caption(ratios))


def _ratio_caption(ratios: Sequence[PairedRatio]) -> str:
    pairs = min(item.pairs for item in ratios)
    rough = "; with so few seeds the interval is a rough guide" if 1 < pairs < 5 else ""
    return f"Cost over that of {ratios[0].reference}, paired by seed [95 % bootstrap interval{rough}]"


def _compare_lead(runs: Sequence[Run], summary: CompareSummary) -> str:
    metric, direction = summary["metric"], summary["direction"]
    seeds = len({run.seed for run in runs})
    start = _mean([first_value(run) for run in runs])
    if start is None:
        return ""
    gains = [
        f"{row.method} {gain_text(metric, direction, start, row.final.mean, short=True)}"
        for row in method_rows(summary)[:_NAMED_IN_HEADLINE]
        if row.final is not None
    ]
    mean = f"Means over {seeds} seeds. " if seeds > 1 else ""
    return f"{mean}Before training: {metric_text(metric, start)}. Gained by the end: {', '.join(gains)}."


def _rule() -> str:
    return (
        "A run reaches the target at its first evaluation at or beyond it, at that round's end; "
        "a run that never does is shown as missed."
    )


def _mean(values: Sequence[float | None]) -> float | None:
    found = spread([value for value in values if value is not None])
    return None if found is None else found.mean
