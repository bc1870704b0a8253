"""Comparing runs: the target, what each run paid until it, spread over seeds, and paired ratios.

Rules of the comparison (the product's, stated so that a reader can check them by hand):

* the target defaults to the *worst*, over methods and seeds, of the best value that each run reached;
* a run reaches a target at its *first evaluation at or beyond it*; the time is that round's end, nothing is
  interpolated, and bits and joules are those of all rounds up to and including it;
* a run that misses is shown as missed and never dropped; means are over the runs that reached, with their number;
* ratios are paired by seed (both methods saw the same world), averaged as a geometric mean, with a bootstrap interval
  over seeds [choice: geometric mean, so that swapping the methods inverts the ratio; percentile interval].
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from airtune.errors import InputError
from airtune.report.files import write_text
from airtune.report.load import COMPARE_FILE
from airtune.report.records import CompareRun, CompareSummary, Run
from airtune.streams import stream

SCHEMA = 1
CSV_FILE = "compare.csv"
COSTS = ("time_to_target_s", "uplink_bits_to_target", "downlink_bits_to_target", "energy_j_to_target")


@dataclass(frozen=True)
class Paid:
    """What a run has paid at the end of one round, cumulative: seconds, bits, joules."""

    round: int
    time_s: float
    uplink_bits: float
    downlink_bits: float
    energy_j: float


@dataclass(frozen=True)
class Spread:
    """Mean and spread over seeds; `deviation` is the sample standard deviation, None for one value."""

    mean: float
    deviation: float | None
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class MethodRow:
    """One method of the comparison.

    Attributes
    ----------
    seeds : number of runs; reached : how many reached the target; failed : how many did not finish.
    costs : {name in `COSTS`: spread over the runs that reached, None where all missed}.
    final : spread of the final metric, None where no run was evaluated.
    """

    method: str
    seeds: int
    reached: int
    failed: int
    costs: Mapping[str, Spread | None]
    final: Spread | None


@dataclass(frozen=True)
class PairedRatio:
    """One method's cost over the reference's at equal seeds.

    `ratio` is the geometric mean, `low` and `high` the bootstrap interval (None below two pairs); all None where no
    seed has both. `pairs` of `seeds` had a positive cost in both runs.
    """

    method: str
    reference: str
    cost: str
    ratio: float | None
    low: float | None
    high: float | None
    pairs: int
    seeds: int


def paid(run: Run) -> tuple[Paid, ...]:
    """Return the cumulative costs at the end of each stored round."""
    up = np.cumsum([line.uplink_bits for line in run.rounds])
    down = np.cumsum([line.downlink_bits for line in run.rounds])
    joules = np.cumsum([line.energy_j for line in run.rounds])
    return tuple(
        Paid(line.number, line.time_s, float(up[i]), float(down[i]), float(joules[i]))
        for i, line in enumerate(run.rounds)
    )


def best_value(run: Run, metric: str | None = None, direction: str | None = None) -> float | None:
    """Return the best evaluated value of a run, None where nothing was evaluated."""
    values = [value for _, value in run.evaluations(metric)]
    if not values:
        return None
    return max(values) if (direction or run.direction) == "max" else min(values)


def final_value(run: Run) -> float | None:
    """Return the final metric: what run.json says, else the last evaluation."""
    if run.metric in run.final:
        return run.final[run.metric]
    values = run.evaluations()
    return values[-1][1] if values else None


def default_target(runs: Sequence[Run]) -> float:
    """Return the worst over runs of the best value reached.

    Runs that failed do not set the target while others finished [choice]; they are still measured against it.

    Raises
    ------
    InputError : no run was evaluated.
    """
    finished = [run for run in runs if run.status == "done"] or list(runs)
    best = [value for value in (best_value(run) for run in finished) if value is not None]
    if not best:
        raise InputError("target: no run holds an evaluation, so there is no default; valid: --target X")
    return min(best) if runs[0].direction == "max" else max(best)


def reached(run: Run, target: float) -> Paid | None:
    """Return the costs at the first evaluation at or beyond the target, None where the run missed it."""
    costs = {entry.round: entry for entry in paid(run)}
    for line, value in run.evaluations():
        if (value >= target) if run.direction == "max" else (value <= target):
            return costs[line.number]
    return None


def compare_summary(
    runs: Sequence[Run], target: float | None = None, *, out_dir: str | Path | None = None
) -> CompareSummary:
    """Return the content of compare.json.

    Parameters
    ----------
    runs : all runs, one metric and direction.
    target : accuracy in 0..1 or loss; None takes `default_target`.
    out_dir : where the summary will lie; `run_dir` is then relative to it where possible.

    Raises
    ------
    InputError : no run, or runs of different metrics.
    """
    if not runs:
        raise InputError("runs: nothing to compare; valid: at least one run")
    kinds = {(run.metric, run.direction) for run in runs}
    if len(kinds) > 1:
        names = ", ".join(f"{run.path.name}: {run.metric}" for run in runs)
        raise InputError(f"metric: the runs do not share one metric ({names}); valid: runs of one experiment")
    level = default_target(runs) if target is None else float(target)
    return {
        "schema": SCHEMA,
        "metric": runs[0].metric,
        "direction": runs[0].direction,
        "target": level,
        "target_source": "default" if target is None else "given",
        "runs": [_compare_run(run, level, out_dir) for run in runs],
    }


def write_compare_files(out_dir: str | Path, summary: CompareSummary) -> tuple[Path, Path]:
    """Write compare.json and compare.csv (one line a run, empty where missed) and return their paths."""
    folder = Path(out_dir)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(CompareRun.__annotations__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(cast("dict[str, object]", line) for line in summary["runs"])
    return (
        write_text(folder / COMPARE_FILE, json.dumps(summary, indent=2, allow_nan=False) + "\n"),
        write_text(folder / CSV_FILE, buffer.getvalue()),
    )


def method_names(summary: CompareSummary) -> list[str]:
    """Return the methods in the order of their first run; the first is the reference of the ratios."""
    return list(dict.fromkeys(line["method"] for line in summary["runs"]))


def spread(values: Sequence[float]) -> Spread | None:
    """Return mean and spread, None for no value."""
    if not values:
        return None
    data = np.asarray(values, dtype=np.float64)
    deviation = float(data.std(ddof=1)) if len(data) > 1 else None
    return Spread(float(data.mean()), deviation, float(data.min()), float(data.max()), len(data))


def method_rows(summary: CompareSummary) -> tuple[MethodRow, ...]:
    """Return one row a method: mean and spread over seeds of every cost and of the final metric."""
    rows: list[MethodRow] = []
    for method in method_names(summary):
        lines = [line for line in summary["runs"] if line["method"] == method]
        finals = [value for line in lines if (value := line["final_metric"]) is not None]
        rows.append(
            MethodRow(
                method=method,
                seeds=len(lines),
                reached=sum(line["time_to_target_s"] is not None for line in lines),
                failed=sum(line["status"] != "done" for line in lines),
                costs={cost: spread([v for line in lines if (v := cost_of(line, cost)) is not None]) for cost in COSTS},
                final=spread(finals),
            )
        )
    return tuple(rows)


def paired_ratios(
    summary: CompareSummary,
    reference: str | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[PairedRatio, ...]:
    """Return each other method's costs over the reference's, paired by seed.

    Parameters
    ----------
    reference : the method to divide by; None takes the first.
    confidence : of the percentile bootstrap interval; resamples : number of bootstrap samples.
    seed : of the bootstrap's own stream, so that the same runs give the same interval.
    """
    names = method_names(summary)
    base = names[0] if reference is None else reference
    if base not in names:
        raise InputError(f"reference: unknown method {base!r}; valid: {', '.join(names)}")
    return tuple(
        _ratio(summary, method, base, cost, confidence, stream(seed, "report-bootstrap", i, j), resamples)
        for i, method in enumerate(names)
        if method != base
        for j, cost in enumerate(COSTS)
    )


def _compare_run(run: Run, target: float, out_dir: str | Path | None) -> CompareRun:
    entry = reached(run, target)
    return {
        "method": run.method,
        "seed": run.seed,
        "status": run.status,
        "run_dir": _relative(run.path, out_dir),
        "time_to_target_s": None if entry is None else entry.time_s,
        "uplink_bits_to_target": None if entry is None else int(entry.uplink_bits),
        "downlink_bits_to_target": None if entry is None else int(entry.downlink_bits),
        "energy_j_to_target": None if entry is None else entry.energy_j,
        "final_metric": final_value(run),
        "rounds": max((line.number for line in run.rounds), default=0),
    }


def _relative(path: Path, out_dir: str | Path | None) -> str:
    if out_dir is None:
        return str(path)
    here, there = Path(out_dir).resolve(), path.resolve()
    return there.relative_to(here).as_posix() if there.is_relative_to(here) else str(path)


def cost_of(line: CompareRun, cost: str) -> float | None:
    """Return one of `COSTS` of a run, None where it missed the target."""
    return cast("float | None", line[cost])


def _ratio(
    summary: CompareSummary,
    method: str,
    base: str,
    cost: str,
    confidence: float,
    rng: np.random.Generator,
    resamples: int,
) -> PairedRatio:
    ours = {line["seed"]: cost_of(line, cost) for line in summary["runs"] if line["method"] == method}
    theirs = {line["seed"]: cost_of(line, cost) for line in summary["runs"] if line["method"] == base}
    seeds = sorted(ours.keys() & theirs.keys())
    pairs = [(a, b) for seed in seeds if (a := ours[seed]) and (b := theirs[seed])]
    if not pairs:
        return PairedRatio(method, base, cost, None, None, None, 0, len(seeds))
    logs = np.log([a / b for a, b in pairs])
    ratio = float(np.exp(logs.mean()))
    if len(pairs) == 1:
        return PairedRatio(method, base, cost, ratio, None, None, 1, len(seeds))
    means = logs[rng.integers(0, len(logs), size=(resamples, len(logs)))].mean(axis=1)
    tail = 50 * (1 - confidence)
    low, high = np.exp(np.percentile(means, [tail, 100 - tail]))
    return PairedRatio(method, base, cost, ratio, float(low), float(high), len(pairs), len(seeds))
