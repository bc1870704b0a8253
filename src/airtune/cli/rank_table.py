"""What `airtune plan` prints of TSFA's offline stage: each candidate rank, what it could send, and its bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

Plain = Mapping[str, Any]


def rank_table(found: Plain) -> Table | None:
    """Return one row a candidate rank; None for a plan without a rank to choose.

    With pilots (`rank_pilot`) the bound decided; without, no bound is known and no rank is chosen yet.
    """
    pilot = found.get("rank_pilot")
    offline = found["notes"].get("offline") if pilot is None else pilot["offline"]
    if offline is None:
        return None
    ranks: Sequence[int] = offline["ranks"]
    limit = found["notes"]["latency_limit_s"] if pilot is None else pilot["latency_limit_s"]
    bounds: Sequence[float | None] = [None] * len(ranks) if pilot is None else pilot["bounds"]
    chosen = None if pilot is None else pilot["structural_rank"]
    table = Table(title=_title(found["method"], limit, chosen))
    for heading in ("Rank", "Components within the limit", "All of them take", "Bound", "Chosen"):
        table.add_column(heading, justify="right")
    rows = zip(ranks, offline["keep_ratios"], offline["full_latency_s"], bounds, strict=True)
    for rank, ratio, seconds, bound in rows:
        sent = "none" if ratio is None else f"{ratio * rank:.2f}"
        full, value = _number(seconds, " s"), _number(bound, "")
        table.add_row(str(rank), sent, full, value, "yes" if rank == chosen else "")
    return table


def _title(method: str, limit: float, chosen: int | None) -> str:
    if chosen is None:
        return f"{method}: limit {limit:.4g} s; the rank is chosen after the pilot rounds (to run them now: --pilot)"
    return f"{method}: rank {chosen}, by the bound of the pilot; limit {limit:.4g} s"


def _number(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.4g}{unit}"
