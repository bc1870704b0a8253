"""Figures of one run: rounds, participation, energy, the cell, rates, diagnostics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from airtune.report.figures import Figure, Json, axis, colour, log_axis, marker, rounded
from airtune.report.latency_figure import latency_limit_figure
from airtune.report.quantities import decibel, digits, energy_unit, rate_unit, time_unit
from airtune.report.records import PREDICTED, Curve, FleetClient, Round, Run
from airtune.report.round_view import spaced

POINTS_ON_MAP = 3000
BARS = 40
PANELS = 8
_LINES_FROM = 150


def run_figures(run: Run) -> dict[str, Figure]:
    """Return every figure that this run's data allows, by its place on the page."""
    trained = [line for line in run.rounds if line.number > 0]
    found: dict[str, Figure | None] = {
        "duration": duration_figure(trained),
        "participation": participation_figure(trained),
        "energy_rounds": energy_round_figure(trained),
        "energy_devices": energy_device_figure(run),
        "cell": cell_figure(run.fleet),
        "rates": rate_figure(achieved_rates(trained), "Bits over seconds of each transfer.", "transfers"),
        "diagnostics": panels_figure(
            "Aggregation diagnostics",
            "Measured at the server, for example the covariance that averaging A and B apart neglects.",
            [(line.number, line.diagnostics) for line in trained],
        ),
        "notes": notes_figure(trained),
        "latency_limit": latency_limit_figure(trained),
    }
    found |= {f"curve_{i}": curve_figure(curve) for i, curve in enumerate(run.curves)}
    return {name: figure for name, figure in found.items() if figure is not None}


def duration_figure(trained: Sequence[Round]) -> Figure | None:
    """Return each round's seconds, their running mean, and what the planner had predicted where it noted so."""
    if not trained:
        return None
    numbers = [line.number for line in trained]
    seconds = np.array([line.duration_s for line in trained])
    unit = time_unit(seconds)
    running = np.cumsum(seconds) / np.arange(1, len(seconds) + 1)
    traces: list[Json] = [_series("round", numbers, seconds / unit.factor, unit.name, "var(--series-1)")]
    predicted = [line.predicted_s for line in trained]
    if any(value is not None for value in predicted):
        many = len(trained) >= _LINES_FROM
        traces.append(
            {
                "type": "scatter",
                "mode": "lines" if many else "markers",
                "name": "predicted by the planner",
                "x": numbers,
                "y": rounded([None if value is None else value / unit.factor for value in predicted]),
                "marker": {"color": "var(--ink)", "size": 5, "symbol": "line-ew-open"},
                "line": {"color": "var(--series-7)", "width": 1},
                "hovertemplate": f"predicted %{{y:.4g}} {unit.name}<extra></extra>",
            }
        )
    traces.append(
        {
            "type": "scatter",
            "mode": "lines",
            "name": "mean so far",
            "x": numbers,
            "y": rounded(running / unit.factor),
            "line": {"color": "var(--series-2)", "width": 2.5},
            "hovertemplate": f"mean of rounds 1 to %{{x}}: %{{y:.4g}} {unit.name}<extra></extra>",
        }
    )
    layout: Json = {
        "xaxis": axis("Round"),
        "yaxis": axis(f"Length of a round, {unit.name}", rangemode="tozero"),
        "showlegend": True,
    }
    return Figure("How long rounds took", "", traces, layout, 280)


def participation_figure(trained: Sequence[Round]) -> Figure | None:
    """Return how many clients arrived in time and how many were lost, by round."""
    if not trained:
        return None
    numbers = [line.number for line in trained]
    arrived = np.array([float(len(line.arrived)) for line in trained])
    lost = np.array([float(len(line.dropped)) for line in trained])
    traces: list[Json] = []
    for name, counts, tint in (("arrived", arrived, "var(--series-1)"), ("dropped or late", lost, "var(--lost)")):
        traces.append(
            {
                "type": "bar",
                "name": name,
                "x": numbers,
                "y": rounded(counts),
                "marker": {"color": tint},
                "hovertemplate": f"round %{{x}}: %{{y}} {name}<extra></extra>",
            }
        )
    layout: Json = {"xaxis": axis("Round"), "yaxis": axis("Clients"), "barmode": "stack", "showlegend": True}
    layout["legend"] = {"traceorder": "normal"}
    return Figure("Who arrived", "", traces, layout, 280)


def energy_round_figure(trained: Sequence[Round]) -> Figure | None:
    """Return the devices' joules by round, work that was dropped included."""
    if not trained:
        return None
    joules = np.array([line.energy_j for line in trained])
    unit = energy_unit(joules)
    trace = _series("energy", [line.number for line in trained], joules / unit.factor, unit.name, "var(--series-6)")
    layout: Json = {"xaxis": axis("Round"), "yaxis": axis(f"Energy of a round, {unit.name}", rangemode="tozero")}
    return Figure("Energy by round", "All devices together, work that was dropped included.", [trace], layout, 280)


def energy_device_figure(run: Run) -> Figure | None:
    """Return each client's joules over the whole run, the thirstiest first, coloured by device."""
    totals: dict[int, float] = {}
    for line in run.rounds:
        for row in line.clients:
            if row.energy_j is not None:
                totals[row.client] = totals.get(row.client, 0.0) + row.energy_j
    if not totals:
        return None
    ranked = sorted(totals, key=lambda client: (-totals[client], client))[:BARS]
    unit = energy_unit(totals.values())
    devices = {item.client: item.device for item in run.fleet}
    kinds = sorted({devices.get(client, "device") for client in totals})
    traces: list[Json] = []
    for index, kind in enumerate(kinds):
        mine = [client for client in ranked if devices.get(client, "device") == kind]
        traces.append(
            {
                "type": "bar",
                "name": kind,
                "x": [f"{client}" for client in mine],
                "y": rounded([totals[client] / unit.factor for client in mine]),
                "marker": {"color": colour(index)},
                "hovertemplate": f"client %{{x}}, {kind}: %{{y:.4g}} {unit.name}<extra></extra>",
            }
        )
    order = [f"{client}" for client in ranked]
    layout: Json = {
        "xaxis": axis("Client", type="category", categoryorder="array", categoryarray=order, showgrid=False),
        "yaxis": axis(f"Energy, {unit.name}", rangemode="tozero"),
        "showlegend": len(kinds) > 1 or bool(devices),
        "barmode": "stack",
    }
    more = f" The {BARS} largest of {len(totals)} clients are shown." if len(totals) > BARS else ""
    return Figure("Energy by device", f"Joules over the whole run, largest first.{more}", traces, layout, 280)


def cell_figure(fleet: Sequence[FleetClient]) -> Figure | None:
    """Return the map of the cell: the base station at the origin, each client coloured by its channel gain."""
    placed = [item for item in fleet if item.x_m is not None and item.y_m is not None]
    if not placed:
        return None
    shown = spaced(placed, POINTS_ON_MAP)
    kinds = sorted({item.device for item in placed})
    gains = [decibel(item.gain) for item in placed if item.gain is not None and item.gain > 0]
    traces: list[Json] = []
    for index, kind in enumerate(kinds):
        traces.append(_map_trace(kind, [item for item in shown if item.device == kind], index, gains))
    traces.append(
        {
            "type": "scatter",
            "mode": "markers",
            "name": "base station",
            "x": [0],
            "y": [0],
            "marker": {"symbol": "star-triangle-up", "size": 15, "color": "var(--ink)"},
            "hovertemplate": "base station<extra></extra>",
        }
    )
    layout: Json = {
        "xaxis": axis("East, m", zeroline=False),
        "yaxis": axis("North, m", scaleanchor="x", zeroline=False),
        "showlegend": True,
        "legend": {"orientation": "h", "y": -0.16, "yanchor": "top", "x": 0},
    }
    if gains:
        layout["coloraxis"] = {
            "colorscale": "Cividis",
            "cmin": float(np.floor(min(gains))),
            "cmax": float(np.ceil(max(gains))),
            "colorbar": {
                "title": {"text": "Gain, dB", "side": "right", "font": {"size": 12, "color": "var(--muted)"}},
                "thickness": 10,
                "outlinewidth": 0,
            },
        }
    more = f" {len(shown):,} of {len(placed):,} clients are shown." if len(shown) < len(placed) else ""
    caption = f"Colour: channel power gain. Marker: device.{more}"
    return Figure("The cell", caption, traces, layout, 430)


def achieved_rates(trained: Sequence[Round]) -> dict[str, list[float]]:
    """Return bits over seconds of every transfer, by direction, in bit/s."""
    rows = [row for line in trained for row in line.clients]
    return {
        "uplink": [row.bits_up / row.upload_s for row in rows if row.bits_up and row.upload_s > 0],
        "downlink": [row.bits_down / row.download_s for row in rows if row.bits_down and row.download_s > 0],
    }


def rate_figure(rates: dict[str, list[float]], caption: str, noun: str) -> Figure | None:
    """Return the distribution functions of rates in bit/s by direction, on a logarithmic axis.

    noun : what has a rate, for example "transfers".
    """
    found = {name: np.sort(values) for name, values in rates.items() if values}
    if not found:
        return None
    unit = rate_unit([float(np.median(values)) for values in found.values()])
    traces: list[Json] = []
    for index, (name, values) in enumerate(found.items()):
        levels = np.linspace(0, 1, min(len(values), 300)) if len(values) > 1 else np.array([0.0, 1.0])
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": f"{name} (median {digits(float(np.median(values)) / unit.factor)} {unit.name})",
                "x": rounded(np.quantile(values, levels) / unit.factor),
                "y": rounded(100 * levels),
                "line": {"color": colour(index), "width": 2, "shape": "hv", "dash": ("solid", "dash")[index % 2]},
                "hovertemplate": f"%{{y:.0f}} % of {noun} below %{{x:.3g}} {unit.name}<extra></extra>",
            }
        )
    layout: Json = {
        "xaxis": log_axis(f"Rate, {unit.name}", [float(v[i]) / unit.factor for v in found.values() for i in (0, -1)]),
        "yaxis": axis(f"{noun.capitalize()} below, %", range=[0, 100]),
        "showlegend": True,
    }
    return Figure("Rates of the links", caption, traces, layout, 430)


def panels_figure(title: str, caption: str, rounds: Sequence[tuple[int, Mapping[str, float]]]) -> Figure | None:
    """Return named numbers over rounds, one panel a name, at most `PANELS`; None where there is no number."""
    names = sorted({name for _, values in rounds for name in values})
    if not names:
        return None
    shown = names[:PANELS]
    rows = (len(shown) + 1) // 2
    traces: list[Json] = []
    layout: Json = {
        "showlegend": False,
        "grid": {"rows": rows, "columns": min(2, len(shown)), "pattern": "independent"},
    }
    for index, name in enumerate(shown):
        tag = "" if index == 0 else str(index + 1)
        pairs = [(number, values[name]) for number, values in rounds if name in values]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(pairs) < 60 else "lines",
                "name": name,
                "x": [number for number, _ in pairs],
                "y": rounded([value for _, value in pairs]),
                "xaxis": f"x{tag}",
                "yaxis": f"y{tag}",
                "line": {"color": colour(0), "width": 2},
                "marker": {"size": 5},
                "hovertemplate": f"{name}, round %{{x}}: %{{y:.4g}}<extra></extra>",
            }
        )
        layout[f"xaxis{tag}"] = axis("Round")
        layout[f"yaxis{tag}"] = axis(name.replace("_", " "), rangemode="tozero")
    more = f" {PANELS} of {len(names)} are shown." if len(names) > PANELS else ""
    return Figure(title, caption + more, traces, layout, 70 + 200 * rows)


def notes_figure(trained: Sequence[Round]) -> Figure | None:
    """Return the planner's numbers that change over rounds; those that do not are told in the caption."""
    notes = _numeric_notes(trained)
    values = {name: {line[name] for line in notes if name in line} for line in notes for name in line}
    constant = {name: min(found) for name, found in values.items() if len(found) == 1}
    told = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in sorted(constant.items()))
    return panels_figure(
        "What the planner noted",
        "Numbers that the method recorded with its plans." + (f" The same in every round: {told}." if told else ""),
        [
            (line.number, {name: value for name, value in numbers.items() if name not in constant})
            for line, numbers in zip(trained, notes, strict=True)
        ],
    )


def curve_figure(curve: Curve) -> Figure:
    """Return a curve that a planner decided by, with its choice marked."""
    traces: list[Json] = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": curve.y_label,
            "x": rounded(curve.x),
            "y": rounded(curve.y),
            "line": {"color": colour(0), "width": 2},
        }
    ]
    if curve.chosen is not None and curve.x:
        nearest = int(np.argmin(np.abs(np.array(curve.x) - curve.chosen)))
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": f"chosen: {curve.chosen:g}",
                "x": rounded([curve.chosen]),
                "y": rounded([curve.y[nearest]]),
                "marker": {"color": colour(1), "size": 13, "symbol": "circle-open", "line": {"width": 3}},
            }
        )
    layout: Json = {"xaxis": axis(curve.x_label), "yaxis": axis(curve.y_label), "showlegend": len(traces) > 1}
    return Figure(curve.title, "", traces, layout, 300)


def _numeric_notes(trained: Sequence[Round]) -> list[dict[str, float]]:
    """Return each round's numbers among the planner's notes, without the prediction, which has its own plot."""
    return [
        {
            name: float(value)
            for name, value in line.notes.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and name not in PREDICTED
        }
        for line in trained
    ]


def _series(name: str, x: Sequence[int], y: Sequence[float] | np.ndarray, unit: str, tint: str) -> Json:
    """Return bars, or a line where there are too many for bars."""
    shape: Json = (
        {"type": "bar", "marker": {"color": tint}}
        if len(x) < _LINES_FROM
        else {"type": "scatter", "mode": "lines", "line": {"color": tint, "width": 1.2}}
    )
    hover = f"round %{{x}}: %{{y:.4g}} {unit}<extra></extra>"
    return {**shape, "name": name, "x": list(x), "y": rounded(np.asarray(y, dtype=float)), "hovertemplate": hover}


def _map_trace(kind: str, items: Sequence[FleetClient], index: int, gains: Sequence[float]) -> Json:
    texts = [f"client {item.client}, {item.device}<br>{_facts(item)}" for item in items]
    tint: object = colour(index)
    if gains:
        tint = rounded([decibel(i.gain) if i.gain is not None and i.gain > 0 else None for i in items])
    return {
        "type": "scatter",
        "mode": "markers",
        "name": kind,
        "x": rounded([item.x_m for item in items]),
        "y": rounded([item.y_m for item in items]),
        "text": texts,
        "marker": {
            "symbol": marker(index),
            "size": 10 if len(items) < 200 else 5,
            "color": tint,
            **({"coloraxis": "coloraxis"} if gains else {}),
            "line": {"width": 0.5, "color": "var(--ink)"},
        },
        "hovertemplate": "%{text}<extra></extra>",
    }


def _facts(item: FleetClient) -> str:
    distance = np.hypot(item.x_m or 0.0, item.y_m or 0.0)
    facts = [f"{distance:.0f} m"]
    if item.gain is not None and item.gain > 0:
        facts.append(f"gain {decibel(item.gain):.1f} dB")
    if item.examples is not None:
        facts.append(f"{item.examples:.0f} examples")
    return ", ".join(facts)
