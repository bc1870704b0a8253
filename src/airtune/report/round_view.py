"""The data of the round view: for each selectable round, what every client did, column by column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from airtune.report.figures import Json, rounded
from airtune.report.records import ClientRecord, Round, Run

Item = TypeVar("Item")
ROUNDS_IN_VIEW = 400
CLIENTS_IN_VIEW = 40


def round_view(run: Run, share: int = 1) -> Json:
    """Return the data of the round view: the rounds that can be selected, column by column.

    At most `ROUNDS_IN_VIEW` / `share` evenly spaced rounds (first and last included) and, in each, the
    `CLIENTS_IN_VIEW` clients that took longest; `of_rounds` and `of_clients` tell how many there are.
    """
    trained = [line for line in run.rounds if line.clients]
    shown = spaced(trained, max(10, ROUNDS_IN_VIEW // share))
    devices = {item.client: item.device for item in run.fleet}
    return {"of_rounds": len(trained), "rounds": [_round_json(line, devices) for line in shown]}


def client_columns(rows: Sequence[ClientRecord]) -> Json:
    """Return clients' quantities column by column; a column that no client has is left out."""
    columns: Json = {"client": [row.client for row in rows]}
    for name in ("start_s", "download_s", "compute_s", "upload_s", "wait_s"):
        columns[name] = rounded([float(getattr(row, name)) for row in rows])
    for name in ("bandwidth_hz", "components", "depth", "energy_j", "bits_up", "bits_down"):
        values: list[float | None] = [getattr(row, name) for row in rows]
        if any(value is not None for value in values):
            columns[name] = rounded(values)
    return columns


def busy(row: ClientRecord) -> float:
    """Return when a client was done, seconds after the round's start."""
    return row.start_s + row.download_s + row.compute_s + row.upload_s


def spaced(items: Sequence[Item], most: int) -> list[Item]:
    """Return at most `most` items, evenly spaced, the first and the last included."""
    if len(items) <= most:
        return list(items)
    return [items[int(i)] for i in np.unique(np.linspace(0, len(items) - 1, most).round())]


def _round_json(line: Round, devices: dict[int, str]) -> Json:
    slowest = sorted(line.clients, key=lambda row: (busy(row), row.client))[-CLIENTS_IN_VIEW:]
    return {
        "round": line.number,
        "duration_s": line.duration_s,
        "time_s": line.time_s,
        "cohort": len(line.cohort),
        "arrived": len(line.arrived),
        "dropped": [{"client": item.client, "reason": item.reason} for item in line.dropped[:CLIENTS_IN_VIEW]],
        "lost": len(line.dropped),
        "predicted_s": line.predicted_s,
        "of_clients": len(line.clients),
        "device": [devices.get(row.client, "") for row in slowest],
        **client_columns(slowest),
    }
