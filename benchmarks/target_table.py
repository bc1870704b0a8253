"""Costs to a common target from stored runs, as Markdown: seconds, bits, mean waiting time, and ratios to a reference.

    python benchmarks/target_table.py DIR... [--reference fedit] [--target X] [--without NAME,...]
        [--at rounds=8,mbit=10,seconds=5] [--short]

DIR are folders of `airtune compare` or `airtune run`; runs of several folders are one comparison. The target is the
worst, over methods and seeds, of the best value reached, unless it is given. Waiting is what a client of a round waits
for the round's end, averaged over the clients and the rounds up to the target. Values are means and standard deviations
over seeds; a method that misses the target with some seed says how many reached it, and its means are over those.
Ratios are paired by seed: the geometric mean of the method's cost over the reference's. Where rounds record their
aggregation error ([evaluation] aggregation_error), its mean over the rounds is shown, too. ``--at`` adds the value of
the last evaluation within so many rounds, megabits of uplink or fleet seconds; ``--short`` leaves out the rest.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from airtune.report.load import load_runs
from airtune.report.records import Run
from airtune.report.tables import default_target, final_value, paid, reached, spread

Row = dict[str, float | None]
COLUMNS = ("time, s", "wait, s", "uplink, Mbit", "downlink, Mbit", "energy, J", "final, %")
MORE = ("rounds", "aggregation error")
SMALLEST = 1e-9  # rounding, not a cost
RATIOS = ("time, s", "wait, s", "uplink, Mbit", "energy, J")


def within(run: Run, budget: str) -> float | None:
    """Return the value of the last evaluation within a budget such as "rounds=8", as a percentage."""
    name, _, amount = budget.partition("=")
    spent = {
        entry.round: {"rounds": entry.round, "mbit": entry.uplink_bits / 1e6, "seconds": entry.time_s}
        for entry in paid(run)
    }
    values = [value for line, value in run.evaluations() if spent[line.number][name] <= float(amount)]
    return 100 * values[-1] if values else None


def costs(run: Run, target: float, budgets: Sequence[str]) -> Row:
    """Return the costs of one run until its first evaluation at or beyond the target; None where it missed it."""
    found, final = reached(run, target), final_value(run)
    row: Row = dict.fromkeys((*COLUMNS, *MORE))
    row |= {budget: within(run, budget) for budget in budgets}
    row["final, %"] = None if final is None else 100 * final
    row["rounds"] = float(run.rounds[-1].number)
    errors = [line.diagnostics["aggregation_error"] for line in run.rounds if "aggregation_error" in line.diagnostics]
    row["aggregation error"] = math.fsum(errors) / len(errors) if errors else None
    if found is None:
        return row
    waits = [c.wait_s for line in run.rounds if 0 < line.number <= found.round for c in line.clients]
    values = (
        found.time_s,
        math.fsum(waits) / max(len(waits), 1),
        found.uplink_bits / 1e6,
        found.downlink_bits / 1e6,
        found.energy_j,
    )
    return {**row, **dict(zip(COLUMNS, values, strict=False))}


def cell(values: Sequence[float | None], of: int) -> str:
    """Return "mean ± sd", and of how many seeds if some are missing; "-" if all are (missed, or not defined)."""
    present = [value for value in values if value is not None]
    found = spread(present)
    if found is None:
        return "-"
    digits = 1 if abs(found.mean) >= 10 else 2 if abs(found.mean) >= 0.1 or found.mean == 0 else 4
    text = f"{found.mean:.{digits}f}" + ("" if found.deviation is None else f" ± {found.deviation:.{digits}f}")
    return text if len(present) == of else f"{text} ({len(present)} of {of})"


def ratio(method: dict[int, Row], reference: dict[int, Row], column: str) -> str:
    """Return the geometric mean of the paired ratios."""
    logs: list[float] = []
    for seed, row in method.items():
        own, other = row[column], reference.get(seed, {}).get(column)
        if own and other and min(own, other) > SMALLEST:
            logs.append(math.log(own / other))
    return f"{math.exp(math.fsum(logs) / len(logs)):.2f}" if logs else "-"


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--reference", default="fedit")
    parser.add_argument("--target", type=float)
    parser.add_argument("--without", default="", help="methods that are left out, separated by commas")
    parser.add_argument("--at", default="", help="budgets for columns of values: rounds=N, mbit=N, seconds=N")
    parser.add_argument("--short", action="store_true", help="no waiting, no ratios")
    given = parser.parse_args()
    budgets = tuple(filter(None, given.at.split(",")))
    runs = [run for run in load_runs(given.folders) if run.method not in given.without.split(",")]
    target = default_target(runs) if given.target is None else given.target
    table: dict[str, dict[int, Row]] = {}
    for run in runs:
        table.setdefault(run.method, {})[run.seed] = costs(run, target, budgets)
    seeds = max(len(rows) for rows in table.values())
    print(f"Target {100 * target:.1f} %, {seeds} seeds.\n")
    measured = any(row["aggregation error"] is not None for rows in table.values() for row in rows.values())
    columns = (*COLUMNS, *budgets, *MORE) if measured else (*COLUMNS, *budgets)
    columns = tuple(column for column in columns if not (given.short and column == "wait, s"))
    print("| method | " + " | ".join(columns) + " |\n" + "| --- " * (len(columns) + 1) + "|")
    for name, rows in table.items():
        cells = [cell([row[column] for row in rows.values()], seeds) for column in columns]
        print(f"| `{name}` | " + " | ".join(cells) + " |")
    if given.short:
        return
    print(
        f"\n| cost over that of `{given.reference}` | "
        + " | ".join(RATIOS)
        + " |\n"
        + "| --- " * (len(RATIOS) + 1)
        + "|"
    )
    for name, rows in table.items():
        if name != given.reference:
            print(f"| `{name}` | " + " | ".join(ratio(rows, table[given.reference], c) for c in RATIOS) + " |")


if __name__ == "__main__":
    main()
