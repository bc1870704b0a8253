"""plan.html: the picture of what `airtune plan` predicts, before anything is trained.

A plan is one object of ``airtune plan --json``::

    {schema, method,
     predicted: {rounds, round_s, total_s, uplink_bits, energy_j},
     clients: [{client, probability, rank | components, depth, keep_ratio, bandwidth_hz, compute_s, upload_s}],
     solver: {status, objective, iterations, branch, gap},
     notes}

Optional keys that this page shows when they are there:

* ``clients[]``: ``device`` (text), ``download_s``, ``energy_j`` (joules of one round), ``rate_bps`` (uplink, bit/s),
  ``x_m``, ``y_m`` (metres from the base station), ``gain_db`` (channel power gain, dB);
* ``sweep``: [{field, value}], the swept fields of this plan; the plans of a sweep are given together, in order;
* ``curves``: [{title, x_label, y_label, x: [...], y: [...], chosen}], what a planner decided by (a bound over ranks).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from airtune.errors import InputError
from airtune.report.fields import Fields
from airtune.report.figures import Figure, Json, axis, colour, marker, rounded
from airtune.report.html import (
    Block,
    Chooser,
    Details,
    Entry,
    FigureSlot,
    Page,
    RoundView,
    Section,
    Table,
    Tile,
    write_page,
)
from airtune.report.load import ClientRecord, Curve, FleetClient, read_curve
from airtune.report.quantities import Unit, bit_unit, digits, energy_unit, frequency_unit, time_unit
from airtune.report.run_figures import (
    CLIENTS_IN_VIEW,
    busy,
    cell_figure,
    client_columns,
    curve_figure,
    rate_figure,
    spaced,
)
from airtune.report.run_tables import flat

PLAN_FILE = "plan.html"
_QUANTITIES = {
    "round_s": ("One round", time_unit),
    "total_s": ("Until the end", time_unit),
    "uplink_bits": ("Uplink", bit_unit),
    "energy_j": ("Energy", energy_unit),
}
_PROFILE_POINTS = 400


@dataclass(frozen=True)
class PlannedClient:
    """One client of a plan: its part in a round, and where it stands.

    `probability` : of being asked in a round. `keep_ratio` : share of components sent. `rate_bps` : bit/s.
    """

    record: ClientRecord
    place: FleetClient
    probability: float | None
    keep_ratio: float | None
    rate_bps: float | None


@dataclass(frozen=True)
class PlanView:
    """One plan as the page shows it; `predicted` holds SI values by the names of the JSON."""

    method: str
    predicted: dict[str, float]
    clients: tuple[PlannedClient, ...]
    solver: dict[str, object]
    notes: object
    sweep: tuple[tuple[str, str], ...]
    curves: tuple[Curve, ...]

    @property
    def name(self) -> str:
        """The method and, in a sweep, the swept value."""
        return f"{self.method}, {self.point}" if self.sweep else self.method

    @property
    def point(self) -> str:
        """The swept values as text."""
        return ", ".join(value for _, value in self.sweep)


def write_plan_page(out_dir: str | Path, plans: Sequence[Mapping[str, object]]) -> Path:
    """Write ``out_dir/plan.html`` from objects of ``airtune plan --json`` and return its path.

    Raises
    ------
    InputError : no plan, or a plan lacks a key; the message names plan and key.
    """
    return write_page(Path(out_dir) / PLAN_FILE, plan_page(plans))


def plan_page(plans: Sequence[Mapping[str, object]]) -> Page:
    """Return the page of one plan, of several methods' plans, or of a sweep."""
    if not plans:
        raise InputError("plans: nothing to show; valid: at least one plan")
    views = [read_plan(plan, f"plan {index + 1}") for index, plan in enumerate(plans)]
    sweep = sweep_figure(views)
    sections: list[Section] = []
    if len(views) > 1:
        figure = [FigureSlot("sweep", wide=True)] if sweep else []
        sections.append(Section("plans", "Plans", [_plans_table(views), *figure], "Predicted; nothing was trained."))
    sections += _sections(views)
    return Page(
        title=f"{', '.join(dict.fromkeys(view.method for view in views))}: airtune plan",
        eyebrow=f"airtune plan · {len(views)} plan{'s' if len(views) > 1 else ''} · nothing was trained",
        headline=plan_headline(views),
        lead=_lead(views),
        tiles=_tiles(views[0]) if len(views) == 1 else [],
        banners=_banners(views),
        sections=sections,
        figures={"sweep": sweep} if sweep else {},
        entries=[Entry(plan_figures(view), _view(view)) for view in views],
    )


def read_plan(plan: Mapping[str, object], where: str) -> PlanView:
    """Return one object of ``airtune plan --json`` as a typed view; errors name `where` and the key."""
    head = Fields(where, plan)
    return PlanView(
        method=head.text("method"),
        predicted=head.numbers_of("predicted"),
        clients=tuple(_client(item) for item in head.objects("clients")),
        solver=head.mapping("solver", required=False),
        notes=plan.get("notes"),
        sweep=tuple(
            (item.text("field"), str(item.values.get("value"))) for item in head.objects("sweep", required=False)
        ),
        curves=tuple(read_curve(item) for item in head.objects("curves", required=False)),
    )


def plan_figures(view: PlanView) -> dict[str, Figure]:
    """Return every figure that a plan's data allows."""
    rates = [client.rate_bps for client in view.clients if client.rate_bps]
    found: dict[str, Figure | None] = {
        "profile": profile_figure(view.clients),
        "band": band_figure(view.clients),
        "cell": cell_figure([client.place for client in view.clients]),
        "rates": rate_figure({"uplink": rates}),
    }
    found |= {f"curve_{index}": curve_figure(curve) for index, curve in enumerate(view.curves)}
    return {name: figure for name, figure in found.items() if figure is not None}


def profile_figure(clients: Sequence[PlannedClient]) -> Figure | None:
    """Return every client's seconds, stacked and sorted: readable for any size of fleet. None below two clients."""
    if len(clients) < 2:
        return None
    records = spaced(sorted((client.record for client in clients), key=busy), _PROFILE_POINTS)
    unit = time_unit(busy(record) for record in records)
    share = np.linspace(0, 100, len(records))
    traces: list[Json] = []
    for name in ("download", "compute", "upload"):
        seconds = [float(getattr(record, f"{name}_s")) / unit.factor for record in records]
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
    return Figure("Where the time goes", f"All {len(clients):,} clients, sorted by when they are done.", traces, layout)


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
    quantities = [key for key in _QUANTITIES if any(key in view.predicted for view in swept)]
    if not swept or not quantities:
        return None
    methods = list(dict.fromkeys(view.method for view in swept))
    points = list(dict.fromkeys(view.point for view in swept))
    layout: Json = {"showlegend": len(methods) > 1, "margin": {"t": 60, "l": 40}, "legend": {"y": 1.12}}
    traces: list[Json] = []
    notes: list[Json] = []
    for column, key in enumerate(quantities):
        tag = "" if column == 0 else str(column + 1)
        unit = _predicted_unit(swept, key)
        left, width = column / len(quantities), 1 / len(quantities) - 0.06
        fields = " and ".join(dict.fromkeys(field for field, _ in swept[0].sweep))
        layout[f"xaxis{tag}"] = axis(
            fields if column == 0 else "", type="category", categoryarray=points, domain=[left, left + width]
        )
        layout[f"yaxis{tag}"] = {"anchor": f"x{tag}", "rangemode": "tozero"}
        notes.append(
            {
                "text": f"{_QUANTITIES[key][0]}, {unit.name}",
                "xref": f"x{tag} domain",
                "yref": "paper",
                "x": 0,
                "y": 1,
                "yanchor": "bottom",
                "xanchor": "left",
                "yshift": 6,
                "showarrow": False,
                "font": {"color": "var(--ink)", "size": 13},
            }
        )
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


def plan_headline(views: Sequence[PlanView]) -> str:
    """Return what is predicted in one sentence: seconds of a round and in all, the fastest first."""
    if views[0].sweep and len(views) > 1:
        ends = [views[0], views[-1]]
        texts = [f"{view.name}: {_seconds(view, 'round_s')} a round" for view in ends]
        return " … ".join(texts)
    ranked = sorted(views, key=lambda view: view.predicted.get("total_s", view.predicted.get("round_s", np.inf)))
    texts = [f"{view.name} needs {_seconds(view, 'round_s')} a round" + _in_all(view) for view in ranked[:4]]
    return "; ".join(texts)


def _seconds(view: PlanView, key: str) -> str:
    value = view.predicted.get(key)
    return "an unknown time" if value is None else time_unit([value]).show(value)


def _in_all(view: PlanView) -> str:
    return f", {_seconds(view, 'total_s')} in all" if "total_s" in view.predicted else ""


def _lead(views: Sequence[PlanView]) -> str:
    if len(views) > 1 or not views[0].clients:
        return ""
    slowest = max(views[0].clients, key=lambda client: busy(client.record))
    record = slowest.record
    parts = {"downloading": record.download_s, "computing": record.compute_s, "uploading": record.upload_s}
    most = max(parts, key=lambda name: parts[name])
    name = f"client {record.client}" + (f" ({slowest.place.device})" if slowest.place.device else "")
    return (
        f"The straggler is {name}: done after {digits(busy(record))} s, "
        f"{100 * parts[most] / max(busy(record), 1e-12):.0f} % of it {most}."
    )


def _tiles(view: PlanView) -> list[Tile]:
    tiles = [
        Tile(title, unit([view.predicted[key]]).show(view.predicted[key]), "predicted")
        for key, (title, unit) in _QUANTITIES.items()
        if key in view.predicted
    ]
    if "rounds" in view.predicted:
        tiles.insert(1, Tile("Rounds", f"{view.predicted['rounds']:,.0f}", "predicted"))
    tiles.append(Tile("Clients", f"{len(view.clients):,}", "in the plan"))
    return tiles


def _banners(views: Sequence[PlanView]) -> list[str]:
    fine = {"optimal", "ok", "done", "converged", "success", "feasible", "none"}
    return [
        f"{view.name}: the solver's status is {view.solver['status']!r}."
        for view in views
        if view.solver.get("status") is not None and str(view.solver["status"]).lower() not in fine
    ]


def _plans_table(views: Sequence[PlanView]) -> Table:
    keys = [key for key in _QUANTITIES if any(key in view.predicted for view in views)]
    units = {key: _predicted_unit(views, key) for key in keys}
    rows = [
        [
            view.name,
            digits(view.predicted["rounds"]) if "rounds" in view.predicted else "-",
            *(units[key].show(view.predicted[key]) if key in view.predicted else "-" for key in keys),
            str(view.solver.get("status", "-")),
        ]
        for view in views
    ]
    return Table(["Plan", "Rounds", *(_QUANTITIES[key][0] for key in keys), "Solver"], rows)


def _predicted_unit(views: Sequence[PlanView], key: str) -> Unit:
    return _QUANTITIES[key][1]([view.predicted[key] for view in views if key in view.predicted])


def _sections(views: Sequence[PlanView]) -> list[Section]:
    several = len(views) > 1
    have = {key for view in views for key in plan_figures(view)}

    def slots(*keys: str) -> list[FigureSlot]:
        return [FigureSlot(key, "entry") for key in keys if key in have]

    chooser: list[Block] = [Chooser("Plan", [view.name for view in views])] if several else []
    details: list[Block] = []
    for index, view in enumerate(views):
        tables = [Table([], [[k, t] for k, t in flat(view.solver)], "Solver", align="left", plain=True)]
        tables.append(Table([], [[k or "note", t] for k, t in flat(view.notes)], "Notes", align="left", plain=True))
        shown = [table for table in tables if table.rows]
        if shown:
            details.append(Details("Solver and notes", shown, index if several else None))
    curves = sorted(key for key in have if key.startswith("curve_"))
    text = "Everything below is about the chosen plan." if several else ""
    sections = [
        Section("round", "One round", [*chooser, RoundView("What each client does"), *slots("profile", "band")], text),
        Section("cell", "Fleet and radio", slots("cell", "rates")),
        Section("inside", "Inside the planner", [*slots(*curves), *details]),
    ]
    return [section for section in sections if section.blocks]


def _view(view: PlanView) -> Json:
    """Return the plan as the one round of the round view, the slowest clients last (at the top)."""
    asked = [client for client in view.clients if client.probability is None or client.probability > 0]
    slowest = sorted(asked, key=lambda client: (busy(client.record), client.record.client))[-CLIENTS_IN_VIEW:]
    if not slowest:
        return {"of_rounds": 0, "rounds": []}
    end = view.predicted.get("round_s", max(busy(client.record) for client in slowest))
    return {
        "of_rounds": 1,
        "rounds": [
            {
                "round": None,
                "duration_s": end,
                "time_s": end,
                "cohort": len(asked),
                "arrived": None,
                "dropped": [],
                "lost": 0,
                "predicted_s": None,
                "of_clients": len(asked),
                "device": [client.place.device for client in slowest],
                **client_columns([client.record for client in slowest]),
            }
        ],
    }


def _client(item: Fields) -> PlannedClient:
    gain_db = item.maybe_number("gain_db")
    number = item.integer("client")
    components = item.maybe_number("components")
    record = ClientRecord(
        client=number,
        components=item.maybe_number("rank") if components is None else components,
        depth=item.maybe_number("depth"),
        bandwidth_hz=item.maybe_number("bandwidth_hz"),
        bits_up=None,
        bits_down=None,
        start_s=0.0,
        download_s=item.maybe_number("download_s") or 0.0,
        compute_s=item.maybe_number("compute_s") or 0.0,
        upload_s=item.maybe_number("upload_s") or 0.0,
        wait_s=0.0,
        energy_j=item.maybe_number("energy_j"),
    )
    place = FleetClient(
        client=number,
        device=item.text("device", ""),
        flops_per_second=None,
        memory_bytes=None,
        x_m=item.maybe_number("x_m"),
        y_m=item.maybe_number("y_m"),
        gain=None if gain_db is None else 10 ** (gain_db / 10),
        examples=None,
    )
    return PlannedClient(
        record, place, item.maybe_number("probability"), item.maybe_number("keep_ratio"), item.maybe_number("rate_bps")
    )
