"""Costs to a common target from stored runs, as Markdown: seconds, bits, mean waiting time, and ratios to a reference.

    python benchmarks/target_table.py DIR... [--reference fedit] [--target X] [--without NAME,...]

DIR are folders of `airtune compare` or `airtune run`; runs of several folders are one comparison. The target is the
worst, over methods and seeds, of the best value reached, unless it is given. Waiting is what a client of a round waits
for the round's end, averaged over the clients and the rounds up to the target. Values are means and standard deviations
over seeds; a method that misses the target with some seed says how many reached it, and its means are over those.
Ratios are paired by seed: the geometric mean of the method's cost over the reference's. Where rounds record their
aggregation error ([evaluation] aggregation_error), its mean over the rounds is shown, too.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from airtune.report.load import load_runs
from airtune.report.records import Run
from airtune.report.tables import default_target, final_value, reached, spread

Row = dict[str, float | None]
COLUMNS = ("time, s", "wait, s", "uplink, Mbit", "downlink, Mbit", "energy, J", "final, %")
MORE = ("rounds", "aggregation error")
RATIOS = ("time, s", "wait, s", "uplink, Mbit", "energy, J")


def costs(run: Run, target: float) -> Row:
    """Return the costs of one run until its first evaluation at or beyond the target; None where it missed it."""
    found, final = reached(run, target), final_value(run)
    row: Row = dict.fromkeys((*COLUMNS, *MORE))
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
        if own and other:
            logs.append(math.log(own / other))
    return f"{math.exp(math.fsum(logs) / len(logs)):.2f}" if logs else "-"


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--reference", default="fedit")
    parser.add_argument("--target", type=float)
    parser.add_argument("--without", default="", help="methods that are left out, separated by commas")
    given = parser.parse_args()
    runs = [run for run in load_runs(given.folders) if run.method not in given.without.split(",")]
    target = default_target(runs) if given.target is None else given.target
    table: dict[str, dict[int, Row]] = {}
    for run in runs:
        table.setdefault(run.method, {})[run.seed] = costs(run, target)
    seeds = max(len(rows) for rows in table.values())
    print(f"Target {100 * target:.1f} %, {seeds} seeds.\n")
    measured = any(row["aggregation error"] is not None for rows in table.values() for row in rows.values())
    columns = (*COLUMNS, *MORE) if measured else COLUMNS
    print("| method | " + " | ".join(columns) + " |\n" + "| --- " * (len(columns) + 1) + "|")
    for name, rows in table.items():
        cells = [cell([row[column] for row in rows.values()], seeds) for column in columns]
        print(f"| `{name}` | " + " | ".join(cells) + " |")
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
