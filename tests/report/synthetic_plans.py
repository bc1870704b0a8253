"""Made-up objects of ``airtune plan --json`` with the optional keys, for tests of the report alone."""

from __future__ import annotations

import numpy as np

from airtune.streams import stream
from report.synthetic_runs import fleet


def make_plan(
    method: str, clients: int = 24, *, speed: float = 1.0, sweep: str | None = None, curve: bool = False
) -> dict:
    rng = stream(0, "test-plan")
    rows = []
    for item in fleet(0, clients):
        compute = (2.0 if method == "fedit" else 1.2) * 1e12 / item["flops_per_second"]
        rows.append(
            {
                "client": item["client"],
                "device": item["device"],
                "probability": 1.0,
                "rank": int(rng.integers(4, 16)),
                "depth": int(rng.integers(1, 7)),
                "keep_ratio": 1.0,
                "bandwidth_hz": 5e6 * speed / clients * float(rng.uniform(0.5, 1.5)),
                "download_s": 0.1,
                "compute_s": compute,
                "upload_s": float(rng.uniform(0.5, 3)) / speed,
                "energy_j": 6 * compute,
                "rate_bps": 1e6 * speed * float(rng.lognormal()),
                "x_m": item["x_m"],
                "y_m": item["y_m"],
                "gain_db": 10 * float(np.log10(item["gain"])),
            }
        )
    end = max(row["download_s"] + row["compute_s"] + row["upload_s"] for row in rows)
    plan: dict = {
        "schema": 1,
        "method": method,
        "predicted": {
            "rounds": 40,
            "round_s": end,
            "total_s": 40 * end,
            "uplink_bits": 4e8,
            "energy_j": sum(row["energy_j"] for row in rows),
        },
        "clients": rows,
        "solver": {"status": "optimal", "objective": end, "iterations": 31, "branch": None, "gap": 0.0},
        "notes": {"bound": 0.3, "assumption": "fixed path loss"},
    }
    if sweep is not None:
        plan["sweep"] = [{"field": "wireless.uplink_bandwidth", "value": sweep}]
    if curve:
        values = {"x": [1, 2, 4, 8, 16, 32], "y": [9.0, 5.0, 3.1, 2.8, 3.4, 5.2], "chosen": 8}
        plan["curves"] = [{"title": "Bound over ranks", "x_label": "Rank", "y_label": "Bound", **values}]
    return plan
