"""Figures as plain plotly JSON: the learning curves and the comparison.

A figure is data, not a picture: dictionaries in plotly's schema that the page draws. Colours are names of the page's
CSS variables (``"var(--series-1)"``), resolved in the browser, so that a page follows the reader's light or dark theme.
The series colours are those of Okabe and Ito (distinct for colour-blind readers); markers differ as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from airtune.report.cells import COST_TITLES, cost_units
from airtune.report.quantities import Unit, bit_unit, metric_text, time_unit
from airtune.report.records import CompareSummary, Run
from airtune.report.tables import COSTS, Paid, cost_of, method_names, method_rows, paid, paired_ratios

Json = dict[str, object]
SERIES = 8
_MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "pentagon")
_GRID_POINTS = 200


@dataclass(frozen=True)
class Figure:
    """One plot of the page: a title that says what is seen, a caption that says how to read it, plotly JSON."""

    title: str
    caption: str
    traces: list[Json]
    layout: Json = field(default_factory=dict[str, object])
    height: int = 320

    def json(self) -> Json:
        """Return what the page's script draws."""
        return {
            "title": self.title,
            "caption": self.caption,
            "data": self.traces,
            "layout": self.layout,
            "height": self.height,
        }


def colour(index: int) -> str:
    """Return the colour of the index-th series."""
    return f"var(--series-{index % SERIES + 1})"


def band_colour(index: int) -> str:
    """Return the translucent colour of the index-th series' band."""
    return f"var(--band-{index % SERIES + 1})"


def marker(index: int) -> str:
    """Return the marker of the index-th series."""
    return _MARKERS[index % len(_MARKERS)]


def axis(title: str, **more: object) -> Json:
    """Return an axis with a title."""
    return {"title": {"text": title}, **more}


def log_axis(title: str, values: Iterable[float], **more: object) -> Json:
    """Return a logarithmic axis over positive values with ticks at 1, 2, 5 times powers of ten, and 0.7, 1.5 near 1."""
    found = [value for value in values if value > 0] or [1.0]
    low, high = min(found) / 1.12, max(found) * 1.12
    ticks = [m * 10.0**e for e in range(-12, 13) for m in (1, 2, 5)]
    if high / low < 12:
        ticks = sorted({*ticks, *(m * 10.0**e for e in range(-12, 13) for m in (1.5, 3, 4, 7))})
    shown = [tick for tick in ticks if low <= tick <= high]
    span = [math.log10(low), math.log10(high)]
    return axis(title, type="log", range=span, tickvals=shown, ticktext=[f"{t:,.6g}" for t in shown], **more)


def rounded(values: Sequence[float | None] | NDArray[np.float64]) -> list[float | None]:
    """Return numbers with six significant digits, None for what is not finite: the page holds no more than it shows."""
    return [float(f"{v:.6g}") if v is not None and np.isfinite(v) else None for v in values]


def learning_figure(runs: Sequence[Run], metric: str, over: str, target: float | None = None) -> Figure | None:
    """Return a metric against fleet seconds (``over = "time"``) or bits sent both ways (``"bits"``).

    One run is drawn as it is. Several runs of a method are drawn thin, with their mean (linear between evaluations,
    where all seeds have one before and after) and the range between the lowest and the highest seed. None where no
    run evaluated the metric.
    """
    runs = [run for run in runs if run.evaluations(metric)]
    if not runs:
        return None
    unit = _over_unit(runs, over)
    scale = 100.0 if metric == "accuracy" else 1.0
    methods = list(dict.fromkeys(run.method for run in runs))
    traces: list[Json] = []
    for index, method in enumerate(methods):
        curves = [_curve(run, metric, over, unit.factor, scale) for run in runs if run.method == method]
        traces += _method_traces(index, method, curves, unit, metric)
    if metric == "loss" and len(runs) == 1:
        traces += _train_loss_trace(runs[0], over, unit.factor)
    label = "Accuracy, %" if metric == "accuracy" else "Loss"
    what = "Fleet time" if over == "time" else "Sent up and down"
    layout: Json = {
        "xaxis": axis(f"{what}, {unit.name}", rangemode="tozero"),
        "yaxis": axis(label),
        "showlegend": len(traces) > 1,
        "shapes": [_target_line(target, scale)] if target is not None else [],
        "annotations": [_target_note(target, scale, metric)] if target is not None else [],
    }
    name = "Accuracy" if metric == "accuracy" else "Loss"
    return Figure(f"{name} against {'fleet time' if over == 'time' else 'bits sent'}", "", traces, layout)


def mean_curve(
    curves: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return (x, mean, lowest, highest) over curves, on the x where every curve is defined.

    curves : pairs x [points] rising, y [points]. Between points a curve is linear. Empty arrays where the curves share
    no x.
    """
    first = max(float(x[0]) for x, _ in curves)
    last = min(float(x[-1]) for x, _ in curves)
    grid = np.unique(np.concatenate([x for x, _ in curves]))
    grid = grid[(grid >= first) & (grid <= last)]
    if len(grid) > _GRID_POINTS:
        grid = np.linspace(first, last, _GRID_POINTS)
    if not len(grid):
        return grid, grid, grid, grid
    values = np.stack([np.interp(grid, x, y) for x, y in curves])
    return grid, values.mean(axis=0), values.min(axis=0), values.max(axis=0)


def cost_figure(summary: CompareSummary) -> Figure:
    """Return what each method paid until the target: a bar for the mean, a dot for each seed, or "missed"."""
    units, rows, names = cost_units(summary), method_rows(summary), method_names(summary)
    traces: list[Json] = []
    notes: list[Json] = []
    layout: Json = {"showlegend": False, "barmode": "overlay", "margin": {"l": 110, "t": 34}}
    for column, cost in enumerate(COSTS):
        tag, unit = _tag(column), units[cost]
        means = [None if (found := row.costs[cost]) is None else found.mean / unit.factor for row in rows]
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "x": rounded(means),
                "y": names,
                "xaxis": f"x{tag}",
                "marker": {"color": [band_colour(i) for i in range(len(names))]},
                "hovertemplate": f"%{{y}}: mean %{{x:.4g}} {unit.name}<extra></extra>",
            }
        )
        traces.append(_seed_dots(summary, cost, names, unit, tag))
        left = column / len(COSTS)
        layout[f"xaxis{tag}"] = axis(unit.name, domain=[left, left + 0.22], rangemode="tozero", nticks=5)
        notes.append(heading(COST_TITLES[cost].removesuffix(" to target"), f"x{tag}"))
        notes += [_missed(row.method, f"x{tag}") for row, mean in zip(rows, means, strict=True) if mean is None]
    layout["yaxis"] = {"autorange": "reversed", "showgrid": False, "type": "category", "categoryarray": names}
    layout["annotations"] = notes
    caption = "Bar: mean over the seeds that reached the target. Dot: one seed."
    return Figure("What it took to reach the target", caption, traces, layout, 110 + 44 * len(names))


def ratio_figure(summary: CompareSummary) -> Figure | None:
    """Return the paired ratios with their intervals on a logarithmic axis; None where there is nothing to pair."""
    ratios = [item for item in paired_ratios(summary) if item.ratio is not None]
    if not ratios:
        return None
    names = method_names(summary)
    traces: list[Json] = []
    others = [name for name in names if any(item.method == name for item in ratios)]
    for method in others:
        mine = [item for item in ratios if item.method == method]
        points = [item.ratio or 1.0 for item in mine]
        index = names.index(method)
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": method,
                "x": rounded(points),
                "y": [COST_TITLES[item.cost].removesuffix(" to target") for item in mine],
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": rounded([(i.high or p) - p for i, p in zip(mine, points, strict=True)]),
                    "arrayminus": rounded([p - (i.low or p) for i, p in zip(mine, points, strict=True)]),
                    "color": colour(index),
                    "thickness": 2,
                    "width": 5,
                },
                "marker": {"color": colour(index), "symbol": marker(index), "size": 10},
                "hovertemplate": f"{method}, %{{y}}: %{{x:.3g}} times {names[0]}<extra></extra>",
            }
        )
    ends = [end for item in ratios for end in (item.ratio, item.low, item.high) if end is not None]
    layout: Json = {
        "xaxis": log_axis(f"times the cost of {names[0]}", [*ends, 1.0]),
        "yaxis": {"range": [len(COSTS) - 0.5, -0.5], "showgrid": False},
        "scattermode": "group",
        "shapes": [_line(x0=1, x1=1, y0=0, y1=1, yref="paper", dash="dot")],
        "margin": {"l": 110},
        "showlegend": True,
    }
    caption = "Geometric mean over seeds with its 95 % bootstrap interval. Left of 1 is cheaper."
    return Figure(f"Costs relative to {names[0]}", caption, traces, layout, 150 + 30 * len(others) * 2)


def _over_unit(runs: Sequence[Run], over: str) -> Unit:
    ends = [paid(run)[-1] for run in runs]
    return time_unit(end.time_s for end in ends) if over == "time" else bit_unit(_both(end) for end in ends)


def _both(entry: Paid) -> float:
    return entry.uplink_bits + entry.downlink_bits


def _curve(
    run: Run, metric: str, over: str, factor: float, scale: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    costs = {entry.round: entry.time_s if over == "time" else _both(entry) for entry in paid(run)}
    pairs = run.evaluations(metric)
    x = np.array([costs[line.number] for line, _ in pairs]) / factor
    return x, np.array([value for _, value in pairs]) * scale


def _method_traces(
    index: int,
    method: str,
    curves: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]],
    unit: Unit,
    metric: str,
) -> list[Json]:
    per_cent = " %" if metric == "accuracy" else ""
    hover = f"{method}<br>%{{x:.4g}} {unit.name}: %{{y:.4g}}{per_cent}<extra></extra>"
    if len(curves) == 1:
        x, y = curves[0]
        return [_line_trace(method, x, y, index, hover=hover, mode="lines+markers")]
    grid, mean, low, high = mean_curve(curves)
    seeds: list[Json] = [
        _line_trace(method, x, y, index, width=1, opacity=0.35, showlegend=False, hover="skip") for x, y in curves
    ]
    band: Json = {
        "type": "scatter",
        "mode": "lines",
        "x": rounded(np.concatenate([grid, grid[::-1]])),
        "y": rounded(np.concatenate([high, low[::-1]])),
        "fill": "toself",
        "fillcolor": band_colour(index),
        "line": {"width": 0},
        "hoverinfo": "skip",
        "showlegend": False,
        "legendgroup": method,
    }
    return [band, *seeds, _line_trace(method, grid, mean, index, hover=hover, width=2.5)]


def _line_trace(
    name: str,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    index: int,
    *,
    hover: str,
    mode: str = "lines",
    width: float = 2,
    opacity: float = 1,
    showlegend: bool = True,
) -> Json:
    return {
        "type": "scatter",
        "mode": mode,
        "name": name,
        "legendgroup": name,
        "showlegend": showlegend,
        "x": rounded(x),
        "y": rounded(y),
        "opacity": opacity,
        "cliponaxis": False,
        "line": {"color": colour(index), "width": width},
        "marker": {"color": colour(index), "symbol": marker(index), "size": 6},
        **({"hoverinfo": "skip"} if hover == "skip" else {"hovertemplate": hover}),
    }


def _train_loss_trace(run: Run, over: str, factor: float) -> list[Json]:
    costs = [entry.time_s if over == "time" else _both(entry) for entry in paid(run)]
    pairs = [(x, line.train_loss) for x, line in zip(costs, run.rounds, strict=True) if line.train_loss is not None]
    if not pairs:
        return []
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "training loss of the cohort",
            "x": rounded([x / factor for x, _ in pairs]),
            "y": rounded([loss for _, loss in pairs]),
            "line": {"color": "var(--muted)", "width": 1.5, "dash": "dot"},
            "hovertemplate": "training loss %{y:.4g}<extra></extra>",
        }
    ]


def _seed_dots(summary: CompareSummary, cost: str, names: Sequence[str], unit: Unit, tag: str) -> Json:
    found = [(line, value) for line in summary["runs"] if (value := cost_of(line, cost)) is not None]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": rounded([value / unit.factor for _, value in found]),
        "y": [line["method"] for line, _ in found],
        "xaxis": f"x{tag}",
        "text": [f"seed {line['seed']}" for line, _ in found],
        "marker": {"color": [colour(names.index(line["method"])) for line, _ in found], "size": 8},
        "hovertemplate": f"%{{y}}, %{{text}}: %{{x:.4g}} {unit.name}<extra></extra>",
    }


def _tag(column: int) -> str:
    return "" if column == 0 else str(column + 1)


def heading(text: str, xref: str) -> Json:
    """Return an annotation that stands over one panel, left-aligned with it."""
    return {
        "text": text,
        "xref": f"{xref} domain",
        "yref": "paper",
        "x": 0,
        "y": 1,
        "yanchor": "bottom",
        "xanchor": "left",
        "yshift": 6,
        "showarrow": False,
        "font": {"color": "var(--ink)", "size": 13},
    }


def _missed(method: str, xref: str) -> Json:
    return {
        "text": "missed",
        "xref": f"{xref} domain",
        "x": 0.02,
        "y": method,
        "xanchor": "left",
        "showarrow": False,
        "font": {"color": "var(--muted)"},
    }


def _line(**where: object) -> Json:
    dash = where.pop("dash", "solid")
    return {"type": "line", "line": {"color": "var(--muted)", "width": 1, "dash": dash}, "layer": "below", **where}


def _target_line(target: float, scale: float) -> Json:
    return _line(x0=0, x1=1, xref="paper", y0=target * scale, y1=target * scale, dash="dash")


def _target_note(target: float, scale: float, metric: str) -> Json:
    return {
        "text": f"target {metric_text(metric, target)}",
        "xref": "paper",
        "x": 1,
        "y": target * scale,
        "xanchor": "right",
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"color": "var(--muted)", "size": 11},
    }
