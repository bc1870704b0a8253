"""plan.html: the picture of what `airtune plan` predicts, before anything is trained.

The JSON is described in `plan_view`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from airtune.errors import InputError
from airtune.report.figures import Json, rounded
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
from airtune.report.plan_figures import QUANTITIES, plan_figures, predicted_unit, sweep_figure
from airtune.report.plan_view import PlannedClient, PlanView, read_plan
from airtune.report.quantities import counted, digits, time_unit
from airtune.report.round_view import CLIENTS_IN_VIEW, busy, client_columns
from airtune.report.run_tables import flat

PLAN_FILE = "plan.html"


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
        eyebrow=f"airtune plan · {counted(len(views), 'plan')} · nothing was trained",
        headline=plan_headline(views),
        lead=_lead(views),
        tiles=_tiles(views[0]) if len(views) == 1 else [],
        banners=_banners(views),
        sections=sections,
        figures={"sweep": sweep} if sweep else {},
        entries=[Entry(plan_figures(view), _view(view)) for view in views],
    )


def plan_headline(views: Sequence[PlanView]) -> str:
    """Return what is predicted in one sentence: seconds of a round and in all, the fastest first."""
    if views[0].sweep and len(views) > 1:
        texts: list[str] = []
        for method in dict.fromkeys(view.method for view in views):
            mine = [view for view in views if view.method == method]
            first, last = _seconds(mine[0], "round_s"), _seconds(mine[-1], "round_s")
            texts.append(f"{method}: {first} a round at {mine[0].point}, {last} at {mine[-1].point}")
        return "; ".join(texts[:4])
    ranked = sorted(views, key=lambda view: view.predicted.get("total_s", view.predicted.get("round_s", np.inf)))
    texts = [f"{view.name} needs {_seconds(view, 'round_s')} a round" + _in_all(view) for view in ranked[:4]]
    return "; ".join(texts)


def _seconds(view: PlanView, key: str) -> str:
    value = view.predicted.get(key)
    return "an unknown time" if value is None else time_unit([value]).show(value)


def _in_all(view: PlanView) -> str:
    return f", {_seconds(view, 'total_s')} in all" if "total_s" in view.predicted else ""


def _lead(views: Sequence[PlanView]) -> str:
    if len(views) > 1 and views[0].sweep:
        return f"Swept: {', '.join(field for field, _ in views[0].sweep)}."
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
        for key, (title, unit) in QUANTITIES.items()
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
    keys = [key for key in QUANTITIES if any(key in view.predicted for view in views)]
    units = {key: predicted_unit(views, key) for key in keys}
    rows = [
        [
            view.name,
            f"{view.predicted['rounds']:,.0f}" if "rounds" in view.predicted else "-",
            *(units[key].show(view.predicted[key]) if key in view.predicted else "-" for key in keys),
            str(view.solver.get("status", "-")),
        ]
        for view in views
    ]
    return Table(["Plan", "Rounds", *(QUANTITIES[key][0] for key in keys), "Solver"], rows)


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
                "titles": {"components": "Rank"} if all(client.is_rank for client in slowest) else {},
                **client_columns([client.record for client in slowest]),
                **_shares(slowest),
            }
        ],
    }


def _shares(clients: Sequence[PlannedClient]) -> Json:
    """Return probability and keep ratio where some client's differs from 1."""
    found: Json = {}
    for name in ("probability", "keep_ratio"):
        values: list[float | None] = [getattr(client, name) for client in clients]
        if any(value is not None and value != 1 for value in values):
            found[name] = rounded(values)
    return found
