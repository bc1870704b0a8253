"""Figures of plans: where the time goes, the split of the band, the cell, the rates, a sweep."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from airtune.report.figures import Figure, Json, axis, colour, heading, marker, rounded
from airtune.report.plan_view import PlannedClient, PlanView
from airtune.report.quantities import Unit, bit_unit, energy_unit, frequency_unit, time_unit
from airtune.report.round_view import CLIENTS_IN_VIEW, busy, spaced
from airtune.report.run_figures import cell_figure, curve_figure, rate_figure

QUANTITIES = {
    "round_s": ("One round", time_unit),
    "total_s": ("Until the end", time_unit),
    "uplink_bits": ("Uplink", bit_unit),
    "energy_j": ("Energy", energy_unit),
}
_PROFILE_POINTS = 150


def plan_figures(view: PlanView) -> dict[str, Figure]:
    """Return every figure that a plan's data allows."""
    rates = [client.rate_bps for client in view.clients if client.rate_bps]
    found: dict[str, Figure | None] = {
        "profile": profile_figure(view.clients),
        "band": band_figure(view.clients),
        "cell": cell_figure([client.place for client in view.clients]),
        "rates": rate_figure({"uplink": rates}, "Each client at its part of the band.", "clients"),
    }
    found |= {f"curve_{index}": curve_figure(curve) for index, curve in enumerate(view.curves)}
    return {name: figure for name, figure in found.items() if figure is not None}


def profile_figure(clients: Sequence[PlannedClient]) -> Figure | None:
    """Return every client's seconds, stacked and sorted: readable for any size of fleet. None below two clients."""
    if len(clients) < 2:
        return None
    records = sorted((client.record for client in clients), key=busy)
    groups = np.array_split(np.arange(len(records)), min(len(records), _PROFILE_POINTS))
    unit = time_unit([busy(records[-1])])
    share = np.linspace(0, 100, len(groups))
    traces: list[Json] = []
    for name in ("download", "compute", "upload"):
        every = np.array([float(getattr(record, f"{name}_s")) for record in records]) / unit.factor
        seconds = np.array([every[group].mean() for group in groups])
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": name.capitalize(),
                "stackgroup": "seconds",
                "x": rounded(share),
                "y": rounded(seconds),
                "line": {"width": 0.5, "color": f"var(--stage-{name})"},
                "fillcolor": f"var(--stage-{name})",
                "hovertemplate": f"{name} %{{y:.3g}} {unit.name}<extra></extra>",
            }
        )
    layout: Json = {
        "xaxis": axis("Clients, fastest to slowest, %", showgrid=False),
        "yaxis": axis(f"Seconds of a round, {unit.name}" if unit.name != "s" else "Time in a round, s"),
        "showlegend": True,
        "hovermode": "x unified",
    }
    means = "" if len(groups) == len(records) else f" Means of {len(groups)} groups."
    caption = f"All {len(clients):,} clients, sorted by when they are done.{means}"
    return Figure("Where the time goes", caption, traces, layout)


def band_figure(clients: Sequence[PlannedClient]) -> Figure | None:
    """Return how the uplink band is split: clients from the widest to the narrowest share."""
    widths = sorted((client.record.bandwidth_hz or 0.0 for client in clients), reverse=True)
    if not any(widths):
        return None
    unit = frequency_unit(widths)
    shown = spaced(widths, _PROFILE_POINTS)
    positions = [1 + round(i * (len(widths) - 1) / max(1, len(shown) - 1)) for i in range(len(shown))]
    few = len(widths) <= CLIENTS_IN_VIEW
    trace: Json = {
        **({"type": "bar"} if few else {"type": "scatter", "mode": "lines", "fill": "tozeroy"}),
        "x": positions,
        "y": rounded([width / unit.factor for width in shown]),
        "marker": {"color": "var(--series-1)"},
        "line": {"color": "var(--series-1)"} if not few else {},
        "hovertemplate": f"%{{y:.3g}} {unit.name}<extra></extra>",
    }
    if few:
        trace.pop("line")
    total = sum(widths)
    layout: Json = {
        "xaxis": axis("Clients, widest share first", showgrid=False),
        "yaxis": axis(f"Bandwidth, {unit.name}", rangemode="tozero"),
    }
    caption = f"{frequency_unit([total]).show(total)} over {len(widths):,} clients."
    return Figure("How the band is split", caption, [trace], layout)


def sweep_figure(views: Sequence[PlanView]) -> Figure | None:
    """Return what a sweep changes: one panel a predicted quantity, one line a method; None without a sweep."""
    swept = [view for view in views if view.sweep]
    quantities = [key for key in QUANTITIES if any(key in view.predicted for view in swept)]
    if not swept or not quantities:
        return None
    methods = list(dict.fromkeys(view.method for view in swept))
    points = list(dict.fromkeys(view.point for view in swept))
    layout: Json = {"showlegend": len(methods) > 1, "margin": {"t": 60, "l": 40}, "legend": {"y": 1.12}}
    traces: list[Json] = []
    notes: list[Json] = []
    for column, key in enumerate(quantities):
        tag = "" if column == 0 else str(column + 1)
        unit = predicted_unit(swept, key)
        left, width = column / len(quantities), 1 / len(quantities) - 0.06
        fields = " and ".join(dict.fromkeys(field for field, _ in swept[0].sweep))
        layout[f"xaxis{tag}"] = axis(
            fields if column == 0 else "", type="category", categoryarray=points, domain=[left, left + width]
        )
        layout[f"yaxis{tag}"] = {"anchor": f"x{tag}", "rangemode": "tozero"}
        notes.append(heading(f"{QUANTITIES[key][0]}, {unit.name}", f"x{tag}"))
        for index, method in enumerate(methods):
            mine = [view for view in swept if view.method == method and key in view.predicted]
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": method,
                    "legendgroup": method,
                    "showlegend": column == 0,
                    "x": [view.point for view in mine],
                    "y": rounded([view.predicted[key] / unit.factor for view in mine]),
                    "xaxis": f"x{tag}",
                    "yaxis": f"y{tag}",
                    "line": {"color": colour(index), "width": 2},
                    "marker": {"symbol": marker(index), "size": 8},
                    "hovertemplate": f"{method}, %{{x}}: %{{y:.4g}} {unit.name}<extra></extra>",
                }
            )
    layout["annotations"] = notes
    return Figure("Sweep", "Predicted by the planner for each value.", traces, layout, 360)


def predicted_unit(views: Sequence[PlanView], key: str) -> Unit:
    """Return the unit in which a predicted quantity of these plans is shown."""
    return QUANTITIES[key][1]([view.predicted[key] for view in views if key in view.predicted])
