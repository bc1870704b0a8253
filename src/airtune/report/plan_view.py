"""Reading what `airtune plan --json` prints.

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

from collections.abc import Mapping
from dataclasses import dataclass

from airtune.report.fields import Fields
from airtune.report.load import read_curve
from airtune.report.records import ClientRecord, Curve, FleetClient


@dataclass(frozen=True)
class PlannedClient:
    """One client of a plan: its part in a round, and where it stands.

    `probability` : of being asked in a round. `keep_ratio` : share of components sent. `rate_bps` : bit/s.
    `is_rank` : the plan gives one rank for all modules instead of a number of components.
    """

    record: ClientRecord
    place: FleetClient
    probability: float | None
    keep_ratio: float | None
    rate_bps: float | None
    is_rank: bool


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
        record,
        place,
        item.maybe_number("probability"),
        item.maybe_number("keep_ratio"),
        item.maybe_number("rate_bps"),
        components is None,
    )
