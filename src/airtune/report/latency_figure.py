"""The mean round length against the limit that a planner keeps it within, and the queue that makes it do so."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from airtune.report.figures import Figure, Json, axis, rounded
from airtune.report.quantities import Unit, time_unit
from airtune.report.records import Round

LIMIT, QUEUE = "latency_limit_s", "queue_s"
"""What a planner notes: its limit on the mean round length, s, and the queue before the round, s."""


def latency_limit_figure(trained: Sequence[Round]) -> Figure | None:
    """Return the mean of the rounds so far against the limit, and the queue below; None where no plan notes a limit."""
    noted = [line for line in trained if _number(line, LIMIT) is not None]
    if not noted:
        return None
    numbers = [line.number for line in trained]
    seconds = np.array([line.duration_s for line in trained])
    limits = [_number(line, LIMIT) for line in trained]
    unit = time_unit(seconds)
    running = np.cumsum(seconds) / np.arange(1, len(seconds) + 1)
    traces = [
        _line("mean so far", numbers, [float(value) for value in running], unit, "var(--series-2)", width=2.5),
        _line("limit", numbers, limits, unit, "var(--muted)", width=1.5, dash="dash"),
    ]
    layout: Json = {
        "xaxis": axis("Round", anchor="y2" if _queues(trained) else "y"),
        "yaxis": axis(f"Mean round, {unit.name}", rangemode="tozero"),
        "showlegend": True,
    }
    if _queues(trained):
        queue = _line("queue", numbers, [_number(line, QUEUE) for line in trained], unit, "var(--series-1)", width=2)
        traces.append({**queue, "yaxis": "y2"})
        layout["yaxis"] = axis(f"Mean round, {unit.name}", rangemode="tozero", domain=[0.42, 1.0])
        layout["yaxis2"] = axis(f"Queue, {unit.name}", rangemode="tozero", domain=[0.0, 0.3])
    caption = (
        "The mean over all rounds so far should end at or below the limit. The queue, as it stood before each round, "
        "grows by what rounds take beyond the limit; the larger it is, the dearer a second."
    )
    return Figure("Mean round length against its limit", caption, traces, layout, 380)


def _queues(trained: Sequence[Round]) -> bool:
    return any(_number(line, QUEUE) is not None for line in trained)


def _number(line: Round, name: str) -> float | None:
    value = line.notes.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _line(
    name: str, x: Sequence[int], y: Sequence[float | None], unit: Unit, tint: str, *, width: float, dash: str = "solid"
) -> Json:
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(x) < 60 and dash == "solid" else "lines",
        "name": name,
        "x": list(x),
        "y": rounded([None if value is None else value / unit.factor for value in y]),
        "line": {"color": tint, "width": width, "dash": dash},
        "marker": {"size": 5},
        "hovertemplate": f"{name}, round %{{x}}: %{{y:.4g}} {unit.name}<extra></extra>",
    }
