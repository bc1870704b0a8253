"""The radio cell: positions, gains and transfer times as pure functions of (seed, client, time).

Nothing here remembers anything. A query costs the same at second 1 and at second 10^6, and two methods that are
compared with one seed meet the same channel at the same second.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri

from airtune.errors import InputError
from airtune.streams import uniform_field
from airtune.wireless.fading import Fading, Rayleigh
from airtune.wireless.geometry import Area, Disc, hexagonal_sites
from airtune.wireless.mobility import Mobility, Static
from airtune.wireless.path_loss import LogDistance, PathLoss
from airtune.wireless.radio import Direction as Direction
from airtune.wireless.radio import RadioChannel as RadioChannel
from airtune.wireless.radio import check_direction
from airtune.wireless.rate import achievable_rate
from airtune.wireless.retransmission import Retransmission, Transfer
from airtune.wireless.shadowing import correlated_normal
from airtune.wireless.transfer import integrate_blocks, seconds_at
from airtune.wireless.units import db_to_linear, quantity

Array = NDArray[np.float64]
Complex = NDArray[np.complex128]
Integers = NDArray[np.int64]
ROUND_GRID_SECONDS = 0.05
"""With block = "round" the fading is still a process in time: it is drawn on this grid, then held [our choice]."""

_CHUNK = 16_384

LARGE_SCALE_SECONDS = 1.0
"""Path loss and shadowing of moving devices are updated once in this time [our choice]."""


@dataclass(frozen=True)
class Channel:
    """A cell (or several) with path loss, shadowing, fading and motion. All fields in SI units.

    Parameters
    ----------
    area : where devices are dropped around each base station; a device that comes nearer to a base station than the
        area's nearest point has the path loss of that point.
    path_loss : the law, which also names its shadowing and line-of-sight probability.
    fading : the small-scale law.
    mobility : the law of motion.
    cells, inter_site_distance : base stations on a hexagonal grid, m; each device's home is drawn evenly and the
        strongest mean gain serves it.
    carrier_frequency : Hz.
    block : coherence time in s, over which fading is constant; a longer transfer integrates the rate. "round": the
        value at a transfer's start is held until it ends (the papers' block fading).
    uplink_bandwidth, downlink_bandwidth : Hz of the whole band.
    base_station_power : W, transmitted.
    base_antenna_gain, user_antenna_gain : linear.
    thermal_noise : W/Hz; -174 dBm/Hz is k T at 290 K.
    base_noise_figure, user_noise_figure : linear, of the receivers (5 and 9 dB as in 3GPP TR 36.814 table A.2.1.1-2).
    interference_margin : linear rise of the noise by other cells; 1 for none.
    snr_gap : linear gap to the Shannon rate, at least 1.
    shadowing : whether the path-loss law's shadowing applies.
    reciprocal : True: uplink and downlink share their fading (time division); False: they fade independently.
    transfer_limit : s; a transfer that takes longer counts as never done (infinite).
    retransmission : packets are lost and sent again; None: every packet arrives. Broadcasts are not repeated.
    """

    area: Area = field(default_factory=Disc)
    path_loss: PathLoss = field(default_factory=LogDistance)
    fading: Fading = field(default_factory=Rayleigh)
    mobility: Mobility = field(default_factory=Static)
    cells: int = 1
    inter_site_distance: float = quantity("500 m", "m")
    carrier_frequency: float = quantity("2 GHz", "Hz")
    block: float | Literal["round"] = "round"
    uplink_bandwidth: float = quantity("10 MHz", "Hz")
    downlink_bandwidth: float = quantity("10 MHz", "Hz")
    base_station_power: float = quantity("46 dBm", "W")
    base_antenna_gain: float = quantity("0 dB", "1")
    user_antenna_gain: float = quantity("0 dB", "1")
    thermal_noise: float = quantity("-174 dBm/Hz", "W/Hz")
    base_noise_figure: float = quantity("5 dB", "1")
    user_noise_figure: float = quantity("9 dB", "1")
    interference_margin: float = quantity("0 dB", "1")
    snr_gap: float = quantity("0 dB", "1")
    shadowing: bool = True
    reciprocal: bool = False
    transfer_limit: float = quantity("7 d", "s")
    retransmission: Retransmission | None = None

    def __post_init__(self) -> None:
        _check_channel(self)

    @property
    def block_seconds(self) -> float:
        """The time over which fading is constant, s."""
        return ROUND_GRID_SECONDS if self.block == "round" else float(self.block)

    @property
    def mean_log_fading(self) -> float:
        """E[ln |h|^2] of the small-scale fading."""
        return self.fading.mean_log_power()

    def noise_density(self, direction: Direction) -> float:
        """Return W/Hz at the receiver: thermal noise times noise figure times interference margin."""
        figure = self.base_noise_figure if check_direction(direction) == "uplink" else self.user_noise_figure
        return self.thermal_noise * figure * self.interference_margin

    def sites(self) -> Array:
        """Return the base stations' positions [cells, 2], m."""
        return hexagonal_sites(self.cells, self.inter_site_distance)

    def positions(self, seed: int, clients: ArrayLike, time: ArrayLike) -> Array:
        """Return positions [n, 2], m, of `clients` [n] at `time` (s; one number or [n])."""
        index, when = _query(clients, time)
        around = self.mobility.positions(seed, index, when, self.area)
        if self.cells == 1:
            return around
        home = np.minimum((uniform_field(seed, "home-cell", index) * self.cells).astype(np.int64), self.cells - 1)
        return around + self.sites()[home]

    def cell_gains(self, seed: int, clients: ArrayLike, time: ArrayLike) -> Array:
        """Return the mean gains [n, cells] to every base station, antennas included."""
        index, when = _query(clients, time)
        if self.mobility.moves:
            when = np.floor(when / LARGE_SCALE_SECONDS) * LARGE_SCALE_SECONDS
        positions = self.positions(seed, index, when)
        gains = [self._site_gain(seed, s, index, positions - site) for s, site in enumerate(self.sites())]
        return self.base_antenna_gain * self.user_antenna_gain * np.stack(gains, axis=-1)

    def serving_cell(self, seed: int, clients: ArrayLike, time: ArrayLike) -> Integers:
        """Return the index [n] of the base station with the largest mean gain."""
        return np.argmax(self.cell_gains(seed, clients, time), axis=-1)

    def mean_gain(self, seed: int, clients: ArrayLike, time: ArrayLike, direction: Direction = "uplink") -> Array:
        """Return path loss, shadowing and antennas to the strongest base station: linear gains [n], both directions."""
        return self.cell_gains(seed, clients, time).max(axis=-1)

    def coefficient(self, seed: int, clients: ArrayLike, time: ArrayLike, direction: Direction = "uplink") -> Complex:
        """Return the complex fading coefficient [n] at `time`, mean power 1."""
        index, when = _query(clients, time)
        first = np.floor(when / self.block_seconds).astype(np.int64)
        return self._coefficients(seed, index, first, 1, direction)[:, 0]

    def gain(self, seed: int, clients: ArrayLike, time: ArrayLike, direction: Direction = "uplink") -> Array:
        """Return the true linear power gain [n] at `time`: mean gain times fading power."""
        index, when = _query(clients, time)
        gains = np.empty(index.shape)
        for first in range(0, index.size, _CHUNK):  # the work arrays of a chunk stay in the processor's cache
            part = slice(first, first + _CHUNK)
            small = self.coefficient(seed, index[part], when[part], direction)
            gains[part] = self.mean_gain(seed, index[part], when[part]) * (small.real**2 + small.imag**2)
        return gains

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
        """Return the seconds [n] that a transfer takes, from its start until its last bit has arrived.

        Parameters
        ----------
        clients : [n].
        start_times : s; one number or [n].
        bits : one number or [n]; 0 takes no time.
        bandwidth : Hz; one number or [n].
        power : W at the transmitter; one number or [n].

        Returns
        -------
        [n], s; infinite where it never arrives: no bandwidth, power or gain, a packet given up, or not within
        `transfer_limit`. `transfer` tells more.
        """
        found = self.transfer(seed, clients, start_times, bits, bandwidth, power, direction)
        return np.where(found.delivered, found.seconds, np.inf)

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
        """Return what becomes of transfers, lost ones included; arguments as in `transfer_seconds`."""
        index, start = _query(clients, start_times)
        load, width, watt = (_per_client(v, index) for v in (bits, bandwidth, power))
        if self.retransmission is None:
            seconds = self._on_air(seed, index, start, load, width, watt, direction)
            return Transfer(seconds, np.isfinite(seconds), load)
        tried = self.retransmission.attempts_for(seed, check_direction(direction), index, start, load)
        seconds = self._on_air(seed, index, start, tried.bits_on_air, width, watt, direction) + tried.waiting
        return Transfer(seconds, tried.delivered & np.isfinite(seconds), tried.bits_on_air)

    def _on_air(
        self,
        seed: int,
        index: Integers,
        start: Array,
        load: Array,
        width: Array,
        watt: Array,
        direction: Direction,
    ) -> Array:
        """Return the seconds [n] that `load` bits are on the air."""
        noise = self.noise_density(direction)
        if self.block == "round":
            rate = achievable_rate(width, watt, self.gain(seed, index, start, direction), noise, self.snr_gap)
            return _within(seconds_at(rate, load), self.transfer_limit)
        silent = (width <= 0.0) | (watt <= 0.0)

        def rates(rows: Integers, first: Integers, count: int) -> Array:
            gains = self._block_gains(seed, index[rows], first, count, direction)
            return achievable_rate(width[rows, None], watt[rows, None], gains, noise, self.snr_gap)

        seconds = integrate_blocks(rates, start, np.where(silent, 0.0, load), self.block_seconds, self.transfer_limit)
        return np.where(silent & (load > 0.0), np.inf, seconds)

    def broadcast_seconds(
        self, seed: int, clients: ArrayLike, start_time: float, bits: float, bandwidth: float, power: float
    ) -> float:
        """Return the seconds until all of `clients` have the same `bits`: the rate is the worst client's at any time.

        Parameters
        ----------
        clients : [n].
        start_time : s.
        bits : of the broadcast.
        bandwidth, power : Hz and W of the base station.
        """
        index, start = _query(clients, start_time)
        noise, load = self.noise_density("downlink"), np.array([bits], dtype=np.float64)
        if self.block == "round":
            gain = self.gain(seed, index, start, "downlink").min(initial=np.inf)
            seconds = seconds_at(achievable_rate(bandwidth, power, gain, noise, self.snr_gap), load)
            return float(_within(seconds, self.transfer_limit)[0])
        if bits > 0.0 and (bandwidth <= 0.0 or power <= 0.0):
            return math.inf

        def rates(rows: Integers, first: Integers, count: int) -> Array:
            blocks = np.broadcast_to(first[0], index.shape)
            worst = self._block_gains(seed, index, blocks, count, "downlink").min(axis=0, initial=np.inf)
            return achievable_rate(bandwidth, power, worst[None, :], noise, self.snr_gap)

        limit = self.transfer_limit
        return float(integrate_blocks(rates, np.array([start_time]), load, self.block_seconds, limit)[0])

    def _block_gains(self, seed: int, clients: Integers, first: Integers, count: int, direction: Direction) -> Array:
        """Return the true gains [n, count] in consecutive blocks from `first` [n]."""
        small = self._coefficients(seed, clients, first, count, direction)
        power = small.real**2 + small.imag**2
        if not self.mobility.moves:
            return power * self.mean_gain(seed, clients, 0.0)[:, None]
        times = (first[:, None] + np.arange(count)) * self.block_seconds
        tick = np.floor(times / LARGE_SCALE_SECONDS).astype(np.int64)
        ticks = tick[:, :1] + np.arange(int((tick[:, -1] - tick[:, 0]).max(initial=0)) + 1)
        many = np.broadcast_to(clients[:, None], ticks.shape)
        mean = self.mean_gain(seed, many.ravel(), ticks.ravel() * LARGE_SCALE_SECONDS).reshape(ticks.shape)
        return power * np.take_along_axis(mean, tick - tick[:, :1], axis=1)

    def _coefficients(self, seed: int, clients: Integers, first: Integers, count: int, direction: Direction) -> Complex:
        check_direction(direction)
        link = "uplink" if self.reciprocal else direction
        return self.fading.coefficient(seed, link, clients, first, count, self.block_seconds, self.carrier_frequency)

    def _site_gain(self, seed: int, site: int, clients: Integers, offset: Array) -> Array:
        """Return the mean gain [n] to one base station at `offset` [n, 2], m, without antennas."""
        distance = np.maximum(np.hypot(offset[..., 0], offset[..., 1]), self.area.nearest)
        sight = self._line_of_sight(seed, site, clients, offset, distance)
        loss = self.path_loss.loss_db(distance, self.carrier_frequency, sight)
        if self.shadowing:
            deviation = self.path_loss.shadowing_deviation_db(distance, self.carrier_frequency, sight)
            if deviation.any():
                loss = loss - deviation * self._shadow(seed, site, clients, offset, sight)
        return db_to_linear(-loss)

    def _line_of_sight(
        self, seed: int, site: int, clients: Integers, offset: Array, distance: Array
    ) -> NDArray[np.bool_]:
        probability = self.path_loss.line_of_sight_probability(distance)
        if (probability >= 1.0).all():
            return np.ones(distance.shape, dtype=np.bool_)
        correlation = self.path_loss.line_of_sight_distance
        if correlation <= 0.0:
            return uniform_field(seed, "line-of-sight", site, clients) < probability
        return np.asarray(ndtr(correlated_normal(seed, "line-of-sight", (site,), offset, correlation)) < probability)

    def _shadow(self, seed: int, site: int, clients: Integers, offset: Array, sight: NDArray[np.bool_]) -> Array:
        """Return standard normal shadowing [n]; line of sight and its absence have maps of their own."""
        seen = self._shadow_map(seed, site, clients, offset, True)
        return seen if sight.all() else np.where(sight, seen, self._shadow_map(seed, site, clients, offset, False))

    def _shadow_map(self, seed: int, site: int, clients: Integers, offset: Array, sight: bool) -> Array:
        correlation = self.path_loss.correlation_distance(sight)
        if correlation <= 0.0:
            return np.asarray(ndtri(uniform_field(seed, "shadowing", site, int(sight), clients)))
        return correlated_normal(seed, "shadowing", (site, int(sight)), offset, correlation)


def _query(clients: ArrayLike, time: ArrayLike) -> tuple[Integers, Array]:
    index = np.atleast_1d(np.asarray(clients)).astype(np.int64)
    when = np.broadcast_to(np.asarray(time, dtype=np.float64), index.shape)
    if not (np.isfinite(when) & (when >= 0.0)).all():
        raise InputError("time: must be at least 0 and finite, in s")
    return index, when


def _per_client(value: ArrayLike, clients: Integers) -> Array:
    return np.broadcast_to(np.asarray(value, dtype=np.float64), clients.shape)


def _within(seconds: Array, limit: float) -> Array:
    return np.where(seconds > limit, np.inf, seconds)


def _check_channel(channel: Channel) -> None:
    positive: tuple[tuple[str, str], ...] = (
        ("carrier_frequency", "Hz"),
        ("uplink_bandwidth", "Hz"),
        ("downlink_bandwidth", "Hz"),
        ("base_station_power", "W"),
        ("base_antenna_gain", "linear"),
        ("user_antenna_gain", "linear"),
        ("thermal_noise", "W/Hz"),
        ("transfer_limit", "s"),
    )
    at_least_one = ("base_noise_figure", "user_noise_figure", "interference_margin", "snr_gap")
    _check_all(channel, [name for name, _ in positive], lambda v: v > 0.0, dict(positive), "positive")
    _check_all(channel, at_least_one, lambda v: v >= 1.0, dict.fromkeys(at_least_one, "linear"), "at least 1 (0 dB)")
    block = cast("object", channel.block)  # a configuration file may hold any text
    if block != "round" and not (isinstance(block, int | float) and 1e-4 <= block < math.inf):
        raise InputError(f'block: must be "round" or seconds of at least 0.0001; got {block!r}')
    sites = channel.sites()
    reach = channel.area.extent
    if channel.cells > 1:
        reach += float(np.hypot(*(sites[:, None] - sites[None, :]).T).max())
    ends = np.array([channel.area.nearest, reach])
    channel.path_loss.loss_db(ends, channel.carrier_frequency, np.array([True, True]))


def _check_all(
    channel: Channel,
    names: list[str] | tuple[str, ...],
    valid: Callable[[float], bool],
    unit: dict[str, str],
    rule: str,
) -> None:
    for name in names:
        value = getattr(channel, name)
        if not (math.isfinite(value) and valid(value)):
            raise InputError(f"{name}: must be {rule} and finite, in {unit[name]}; got {value:g}")
