"""A channel from measured rates: a CSV file of time, client, uplink and downlink bit/s."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from airtune.errors import InputError, unknown_name
from airtune.wireless.radio import Direction, check_direction
from airtune.wireless.rate import achievable_rate
from airtune.wireless.retransmission import Transfer
from airtune.wireless.transfer import seconds_at
from airtune.wireless.units import quantity

Array = NDArray[np.float64]
Complex = NDArray[np.complex128]
Integers = NDArray[np.int64]

COLUMNS = ("time_s", "client", "uplink_bit_per_s", "downlink_bit_per_s")

EXAMPLE = "example"
"""The name of the small trace that comes with airtune (written by hand, not measured)."""


@dataclass(frozen=True)
class StepTable:
    """Step functions of time, one row per client.

    Attributes
    ----------
    starts : [clients, steps], s from which a value holds; rows are padded with infinity.
    values : column -> [clients, steps].
    period : [clients], s after which a row repeats; infinite: its last value holds for ever.
    """

    starts: Array
    values: Mapping[str, Array]
    period: Array

    def phase(self, clients: Integers, time: Array) -> Array:
        """Return the time [n] within the period."""
        period = self.period[clients]
        with np.errstate(invalid="ignore"):
            return np.where(np.isinf(period), time, np.mod(time, period))

    def at(self, column: str, clients: Integers, time: Array) -> Array:
        """Return the values [n] that hold at `time` [n], s."""
        late = (self.starts[clients] <= self.phase(clients, time)[:, None]).sum(axis=1) - 1
        return self.values[column][clients, late]


@dataclass(frozen=True)
class TraceChannel:
    """Links whose rates were measured, for use where a `Channel` is.

    A measured rate r counts as what a link with `reference_bandwidth` B and the reference power P carries, so the link
    has the gain g = (2^(r / B) - 1) Gamma N0 B / P, and another share of the band or another power changes the rate
    as the achievable rate does. At the references the link carries exactly the measured rate.

    Parameters
    ----------
    path : a CSV file with the columns time_s, client, uplink_bit_per_s, downlink_bit_per_s, or "example". Each
        client's first time is 0; a value holds until the client's next one.
    after_end : "repeat": a client's trace starts again when as much time has passed after its last row as between its
        last two; "hold": the last value stays.
    clients : number of clients expected; None: as many as the file names. Others in the file are an error.
    reference_bandwidth : Hz at which rates were measured.
    reference_power, base_station_power : W in the uplink and the downlink.
    uplink_bandwidth, downlink_bandwidth : Hz of the whole band that is shared.
    noise : W/Hz at the receivers; it only scales the gains.
    snr_gap : linear, at least 1.
    transfer_limit : s; a transfer that takes longer counts as never done (infinite).
    """

    path: str = EXAMPLE
    after_end: Literal["repeat", "hold"] = "repeat"
    clients: int | None = None
    reference_bandwidth: float = quantity("1 MHz", "Hz")
    reference_power: float = quantity("23 dBm", "W")
    base_station_power: float = quantity("46 dBm", "W")
    uplink_bandwidth: float = quantity("10 MHz", "Hz")
    downlink_bandwidth: float = quantity("10 MHz", "Hz")
    noise: float = quantity("-169 dBm/Hz", "W/Hz")
    snr_gap: float = quantity("0 dB", "1")
    transfer_limit: float = quantity("7 d", "s")
    mean_log_fading: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if self.after_end not in ("repeat", "hold"):
            raise unknown_name("after_end", self.after_end, ("repeat", "hold"))
        for name in (
            "reference_bandwidth",
            "reference_power",
            "base_station_power",
            "uplink_bandwidth",
            "downlink_bandwidth",
            "noise",
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0.0):
                raise InputError(f"{name}: must be positive and finite; got {value:g}")
        _ = self.table  # read now: a bad file is reported at once

    @cached_property
    def table(self) -> StepTable:
        """The file's contents."""
        return read_steps(self.path, COLUMNS[2:], self.after_end == "repeat", self.clients)

    def noise_density(self, direction: Direction) -> float:
        """Return `noise`, W/Hz."""
        check_direction(direction)
        return self.noise

    def measured_rate(self, clients: ArrayLike, time: ArrayLike, direction: Direction = "uplink") -> Array:
        """Return the measured bit/s [n] at `time` (s)."""
        index, when = self._query(clients, time)
        return self.table.at(f"{check_direction(direction)}_bit_per_s", index, when)

    def gain(self, seed: int, clients: ArrayLike, time: ArrayLike, direction: Direction = "uplink") -> Array:
        """Return the gain [n] that carries the measured rate at the references; the seed plays no part."""
        return self._gain_of(self.measured_rate(clients, time, direction), direction)

    def mean_gain(self, seed: int, clients: ArrayLike, time: ArrayLike, direction: Direction = "uplink") -> Array:
        """Return the same as `gain`: a measured rate has no small-scale part of its own."""
        return self.gain(seed, clients, time, direction)

    def coefficient(self, seed: int, clients: ArrayLike, time: ArrayLike, direction: Direction = "uplink") -> Complex:
        """Return ones [n]."""
        return np.ones(self._query(clients, time)[0].shape, dtype=np.complex128)

    def transfer(
        self,
        seed: int,
        clients: ArrayLike,
        start_times: ArrayLike,
        bits: ArrayLike,
        bandwidth: ArrayLike,
        power: ArrayLike,
        direction: Direction = "uplink",
    ) -> Transfer:
        """Return the transfers; nothing is repeated, as a measured rate already holds what repetitions cost."""
        seconds = self.transfer_seconds(seed, clients, start_times, bits, bandwidth, power, direction)
        load = np.broadcast_to(np.asarray(bits, dtype=np.float64), seconds.shape)
        return Transfer(seconds, np.isfinite(seconds), load)

    def transfer_seconds(
        self,
        seed: int,
        clients: ArrayLike,
        start_times: ArrayLike,
        bits: ArrayLike,
        bandwidth: ArrayLike,
        power: ArrayLike,
        direction: Direction = "uplink",
    ) -> Array:
        """Return the seconds [n] that `bits` take: the integral of the rate over the trace, exactly.

        Arguments as in `airtune.wireless.channel.Channel.transfer_seconds`.
        """
        index, start = self._query(clients, start_times)
        load, width, watt = (
            np.broadcast_to(np.asarray(v, dtype=np.float64), index.shape) for v in (bits, bandwidth, power)
        )
        gains = self._gain_of(self.table.values[f"{check_direction(direction)}_bit_per_s"][index], direction)
        rates = achievable_rate(width[:, None], watt[:, None], gains, self.noise, self.snr_gap)
        seconds = _invert(self.table, index, start, rates, load)
        return np.where(seconds > self.transfer_limit, np.inf, seconds)

    def broadcast_seconds(
        self, seed: int, clients: ArrayLike, start_time: float, bits: float, bandwidth: float, power: float
    ) -> float:
        """Return the seconds of a broadcast at the rate that the worst client has at its start."""
        gains = self.gain(seed, clients, start_time, "downlink")
        rate = achievable_rate(bandwidth, power, gains.min(initial=np.inf), self.noise, self.snr_gap)
        return float(seconds_at(rate, np.asarray(bits, dtype=np.float64)))

    def _gain_of(self, rate: Array, direction: Direction) -> Array:
        power = self.reference_power if direction == "uplink" else self.base_station_power
        snr = np.expm1(rate / self.reference_bandwidth * math.log(2.0))
        return snr * (self.snr_gap * self.noise * self.reference_bandwidth / power)

    def _query(self, clients: ArrayLike, time: ArrayLike) -> tuple[Integers, Array]:
        index = np.atleast_1d(np.asarray(clients)).astype(np.int64)
        known = self.table.starts.shape[0]
        unknown = (index < 0) | (index >= known)
        if unknown.any():
            raise InputError(f"{self.path}: no rows for client {index[unknown][0]}; valid: 0 to {known - 1}")
        when = np.broadcast_to(np.asarray(time, dtype=np.float64), index.shape)
        if not (np.isfinite(when) & (when >= 0.0)).all():
            raise InputError("time: must be at least 0 and finite, in s")
        return index, when


def read_steps(path: str, columns: Sequence[str], repeat: bool, clients: int | None) -> StepTable:
    """Return the step functions of a CSV file with the columns time_s, client and `columns` (numbers >= 0).

    Raises
    ------
    InputError : names the file, the row (the header is row 1) and the field: a missing or additional column, a value
        that is no number, NaN, negative, a client that is no index or is not expected, times of a client that do not
        start at 0 or do not increase, a client without rows, no rows at all.
    """
    rows: dict[int, list[tuple[float, ...]]] = {}
    for number, record in _records(path, ("time_s", "client", *columns)):
        client = _client(record["client"], clients, f"{path}: row {number}")
        values = tuple(_number(record[c], f"{path}: row {number}: {c}") for c in ("time_s", *columns))
        earlier = rows.setdefault(client, [])
        if not earlier and values[0] != 0.0:
            raise InputError(f"{path}: row {number}: time_s: client {client} must start at 0; got {values[0]:g}")
        if earlier and values[0] <= earlier[-1][0]:
            last = f"client {client} has {earlier[-1][0]:g} before"
            raise InputError(f"{path}: row {number}: time_s: must increase; {last}, got {values[0]:g}")
        earlier.append(values)
    if not rows:
        raise InputError(f"{path}: has no rows; valid: at least one per client")
    expected = clients if clients is not None else max(rows) + 1
    for client in range(expected):
        if client not in rows:
            raise InputError(f"{path}: client: no rows for client {client}; valid: rows for 0 to {expected - 1}")
    return _steps([np.array(rows[c]) for c in range(expected)], columns, repeat)


def _steps(tables: list[Array], columns: Sequence[str], repeat: bool) -> StepTable:
    longest = max(len(table) for table in tables)
    starts = np.full((len(tables), longest), np.inf)
    values = {column: np.zeros((len(tables), longest)) for column in columns}
    period = np.full(len(tables), np.inf)
    for i, table in enumerate(tables):
        starts[i, : len(table)] = table[:, 0]
        for j, column in enumerate(columns):
            values[column][i, : len(table)] = table[:, j + 1]
        if repeat and len(table) > 1:
            period[i] = 2.0 * table[-1, 0] - table[-2, 0]
    return StepTable(starts, values, period)


def _records(path: str, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    if path == EXAMPLE:
        text = (files("airtune.wireless") / "data" / "trace_example.csv").read_text(encoding="utf-8")
    else:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise InputError(f"{path}: cannot be read: {problem}") from None
    reader = csv.reader(text.splitlines())
    header = [name.strip() for name in next(reader, [])]
    if sorted(header) != sorted(columns):
        raise InputError(f"{path}: row 1: columns are {', '.join(header) or 'missing'}; valid: {', '.join(columns)}")
    records: list[tuple[int, dict[str, str]]] = []
    for number, row in enumerate(reader, start=2):
        if not row:
            continue
        if len(row) != len(header):
            raise InputError(f"{path}: row {number}: has {len(row)} fields; valid: {len(header)}")
        records.append((number, dict(zip(header, row, strict=True))))
    return records


def _client(text: str, clients: int | None, where: str) -> int:
    try:
        client = int(text)
    except ValueError:
        client = -1
    if client < 0 or (clients is not None and client >= clients):
        valid = f"0 to {clients - 1}" if clients is not None else "0, 1, 2 ..."
        raise InputError(f"{where}: client: unknown client {text.strip()!r}; valid: {valid}")
    return client


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0.0):
        raise InputError(f"{where}: must be a number of at least 0; got {text.strip()!r}")
    return value


def _invert(table: StepTable, clients: Integers, start: Array, rates: Array, bits: Array) -> Array:
    """Return the seconds [n] from `start` until step rates [n, steps] have carried `bits` [n]."""
    starts, period = table.starts[clients], table.period[clients]
    ends = np.concatenate([starts[:, 1:], np.full((clients.size, 1), np.inf)], axis=1)
    ends = np.minimum(ends, period[:, None])
    real = np.isfinite(starts)
    with np.errstate(invalid="ignore"):
        length = np.where(real, ends - np.where(real, starts, 0.0), 0.0)
        carried = np.where(length > 0.0, np.where(rates > 0.0, rates * length, 0.0), 0.0)
    before = np.concatenate([np.zeros((clients.size, 1)), np.cumsum(carried, axis=1)], axis=1)
    phase = table.phase(clients, start)
    step = (starts <= phase[:, None]).sum(axis=1) - 1
    row = np.arange(clients.size)
    target = before[row, step] + rates[row, step] * (phase - starts[row, step]) + bits
    whole = before[:, -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        laps = np.where(np.isfinite(whole) & (whole > 0.0), np.ceil(target / whole) - 1.0, 0.0)
        rest = np.where(laps > 0.0, target - laps * whole, target)
        last = np.argmax(before[:, 1:] >= rest[:, None], axis=1)
        reached = (before[:, 1:] >= rest[:, None]).any(axis=1)
        inside = (rest - before[row, last]) / rates[row, last]
        lap_time = np.where(laps > 0.0, laps * period, 0.0)
        finish = lap_time + starts[row, last] + np.where(rest > before[row, last], inside, 0.0)
        seconds = np.where(reached, finish - phase, np.inf)
    return np.where(bits > 0.0, seconds, 0.0)
