"""What `airtune plan` shows of adaptive sampling: who joins how often, what each trains, and the fit of the pilots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

Plain = Mapping[str, Any]


def sampling_summary(found: Plain) -> str | None:
    """Return the expected rounds, seconds and gain over uniform sampling in two sentences; None for other methods."""
    notes = found["notes"]
    if "sampling" not in notes or "expected_round_s" not in notes:
        return None
    rounds, gain = notes["expected_rounds"], notes.get("gain_over_uniform")
    need = "the target is out of reach" if rounds is None else f"{rounds:.1f} rounds"
    total = "" if notes["expected_total_s"] is None else f" = {notes['expected_total_s']:.1f} s to the target"
    basis = "constants of pilots" if notes["round_model"]["from_pilot"] else "assumed constants: only ratios count"
    uniform = "" if gain is None else f"; uniform sampling takes {gain:.2f} times as long"
    solver, drawn = found["solver"], found["predicted"]["drawn"]
    return (
        f"{found['method']}: expected {need} of {notes['expected_round_s']:.2f} s{total}{uniform} "
        f"(seconds of a round: {notes['time_measure']}; branch {solver['branch']}, gap {_percent(solver['gap'])}, "
        f"{basis}). Drawn for round 1: {drawn['clients']} clients, {drawn['round_s']:.2f} s; energy and straggler are "
        "those of this cohort."
    )


def warnings_of(notes: Plain) -> list[str]:
    """Return what a reader of a plan or a run should know of how updates are weighted, a line each."""
    names = {"heuristic_scaling": "heuristic scaling", "departure": "departure", "unused": "not used"}
    return [f"{shown}: {notes[name]}" for name, shown in names.items() if name in notes]


def sampling_table(found: Plain, devices: Sequence[str]) -> Table | None:
    """Return one row a kind of device: joining probabilities and sketch sizes of the whole fleet.

    devices : [clients], names of profiles.
    """
    decided = found["notes"].get("sampling")
    if decided is None:
        return None
    q, kept, kinds = np.array(decided["probability"]), np.array(decided["kept"]), np.array(devices)
    table = Table("Device", title=f"{found['method']}: {q.sum():.1f} of {len(q):,} clients expected in a round")
    for heading in ("Clients", "Probability", "Least", "Most", "Components: clients"):
        table.add_column(heading, justify="left" if heading.startswith("Comp") else "right")
    for kind in dict.fromkeys(devices):
        ours = kinds == kind
        sizes, counts = np.unique(kept[ours], return_counts=True)
        shown = ", ".join(f"{size}: {count}" for size, count in zip(sizes.tolist(), counts.tolist(), strict=True))
        mean, low, high = (f"{value:.3f}" for value in (q[ours].mean(), q[ours].min(), q[ours].max()))
        table.add_row(kind, f"{int(ours.sum()):,}", mean, low, high, shown)
    return table


def pilot_table(pilot: Plain) -> Table:
    """Return the pilots with the rounds that they needed and those that the fit gives."""
    constants = pilot["constants"]
    title = (
        f"Pilots: rounds to a validation loss of {pilot['loss']:.3f}; form {constants['form']}, "
        f"alpha {constants['alpha']:.3g}, beta {constants['beta']:.3g}"
    )
    table = Table(title=title)
    for heading in ("Probability", "Sketch ratio", "Rounds", "Fitted", "Off"):
        table.add_column(heading, justify="right")
    for row in pilot["pilots"]:
        off = f"{row['fitted'] / row['rounds'] - 1.0:+.0%}"
        table.add_row(
            f"{row['probability']:.3f}", f"{row['ratio']:.3f}", f"{row['rounds']:.2f}", f"{row['fitted']:.2f}", off
        )
    return table


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0%}"
