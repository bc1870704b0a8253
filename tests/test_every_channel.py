"""One table of channels, each held to the same promises: a world that is a function of (seed, client, time)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from airtune.errors import InputError
from airtune.wireless.channel import Channel
from airtune.wireless.fading import NoFading, Rayleigh, Rician
from airtune.wireless.geometry import Annulus, Disc, Hexagon, UniformDistance
from airtune.wireless.knowledge import ChannelKnowledge
from airtune.wireless.mobility import GaussMarkov, RandomWaypoint
from airtune.wireless.path_loss import FreeSpace, LogDistance, Table
from airtune.wireless.rate import achievable_rate
from airtune.wireless.tr38901 import IndoorOffice, RuralMacro, UrbanMacro, UrbanMicro
from airtune.wireless.trace import TraceChannel

CLIENTS = np.arange(4)
POWER, WIDTH = 0.2, 1e6


@dataclass(frozen=True)
class Row:
    """A channel and which of the promises do not hold for it, with the reason."""

    name: str
    channel: Any
    block: float | None = 0.05  # s; None: held for a transfer, so that splitting it in two changes its time
    seeded: bool = True  # a measured trace knows no seed

    def __str__(self) -> str:
        return self.name


INDOOR = Disc(60.0, 2.0)
TABLE = [
    Row("defaults, block by the round", Channel(), block=None),
    Row("defaults, 50 ms blocks", Channel(block=0.05)),
    Row("10 ms blocks, slow fading", Channel(block=0.01, fading=Rayleigh(speed=0.1)), block=0.01),
    Row("sum of waves", Channel(block=0.05, fading=Rayleigh(correlation="jakes"))),
    Row("independent blocks", Channel(block=0.05, fading=Rayleigh(correlation="none"))),
    Row("frozen fading", Channel(block=0.05, fading=Rayleigh(speed=0.0))),
    Row("rician", Channel(block=0.05, fading=Rician())),
    Row("no fading, no shadowing", Channel(block=0.05, fading=NoFading(), shadowing=False)),
    Row("time division", Channel(block=0.05, reciprocal=True)),
    Row("independent shadows", Channel(block=0.05, path_loss=LogDistance(shadowing_distance=0.0))),
    Row("free space", Channel(block=0.05, path_loss=FreeSpace(), area=Annulus())),
    Row("table", Channel(block=0.05, path_loss=Table((10.0, 1000.0), (70.0, 140.0)), area=UniformDistance())),
    Row("uma", Channel(block=0.05, path_loss=UrbanMacro(), carrier_frequency=3.5e9)),
    Row("umi", Channel(block=0.05, path_loss=UrbanMicro(), carrier_frequency=3.5e9, area=Disc(200.0, 10.0))),
    Row("rma", Channel(block=0.05, path_loss=RuralMacro(), carrier_frequency=0.7e9, area=Disc(3000.0, 35.0))),
    Row("inh mixed", Channel(block=0.05, path_loss=IndoorOffice(), carrier_frequency=5e9, area=INDOOR)),
    Row("inh open", Channel(block=0.05, path_loss=IndoorOffice("open"), carrier_frequency=28e9, area=INDOOR)),
    Row("seven cells", Channel(block=0.05, cells=7, area=Hexagon(), path_loss=UrbanMacro())),
    Row("walking", Channel(block=0.05, mobility=RandomWaypoint())),
    Row("walking, by the round", Channel(mobility=RandomWaypoint()), block=None),
    Row("drifting between cells", Channel(block=0.05, mobility=GaussMarkov(), cells=3, area=Hexagon())),
    Row("trace", TraceChannel(), block=10.0, seeded=False),
    Row("trace, held", TraceChannel(after_end="hold"), block=10.0, seeded=False),
]
every = pytest.mark.parametrize("row", TABLE, ids=str)
changing = pytest.mark.parametrize("row", [r for r in TABLE if r.block is not None], ids=str)
held = pytest.mark.parametrize("row", [r for r in TABLE if r.block is None], ids=str)
both = pytest.mark.parametrize("direction", ["uplink", "downlink"])


@every
@both
def test_gain_is_mean_gain_times_fading(row, direction) -> None:
    for time in (0.0, 7.77, 3600.0):
        gain = row.channel.gain(1, CLIENTS, time, direction)
        small = row.channel.coefficient(1, CLIENTS, time, direction)
        mean = row.channel.mean_gain(1, CLIENTS, time, direction)
        np.testing.assert_allclose(gain, mean * np.abs(small) ** 2, rtol=1e-12)
        assert np.isfinite(gain).all()
        assert (gain >= 0).all()


@every
@both
def test_a_query_depends_on_its_own_client_and_time_only(row, direction) -> None:
    """Whoever else is asked, in whatever order, at whatever times before: the answer is the same, bit for bit."""
    times = np.array([12.3, 4.56, 12.3, 7000.1])
    together = row.channel.gain(3, CLIENTS, times, direction)
    alone = [row.channel.gain(3, [c], times[c], direction)[0] for c in CLIENTS[::-1]][::-1]
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(row.channel.gain(3, CLIENTS[::-1], times[::-1], direction), together[::-1])
    np.testing.assert_array_equal(
        type(row.channel)(**_fields(row.channel)).gain(3, CLIENTS, times, direction), together
    )


def _fields(channel) -> dict[str, Any]:
    return {name: getattr(channel, name) for name, f in channel.__dataclass_fields__.items() if f.init}


@every
def test_another_seed_is_another_world(row) -> None:
    first, second = row.channel.gain(1, CLIENTS, 5.0), row.channel.gain(2, CLIENTS, 5.0)
    assert (first != second).all() == row.seeded


@changing
@both
def test_a_transfer_takes_as_long_as_stepping_through_it(row, direction) -> None:
    start = np.array([0.0, 3.141, 39.999, 1234.567])
    bits = np.array([1e6, 2e5, 3e6, 5e5])
    took = row.channel.transfer_seconds(4, CLIENTS, start, bits, WIDTH, POWER, direction)
    noise = row.channel.noise_density(direction)
    for c in CLIENTS:
        now, left = start[c], bits[c]
        for _ in range(20_000):
            index = np.floor(now / row.block + 1e-9)
            end = (index + 1) * row.block
            gain = row.channel.gain(4, [c], (index + 0.5) * row.block, direction)
            rate = achievable_rate(WIDTH, POWER, gain, noise, row.channel.snr_gap)[0]
            if rate * (end - now) >= left:
                now += left / rate
                break
            left -= rate * (end - now)
            now = end
        assert took[c] == pytest.approx(now - start[c], rel=1e-6)


@held
@both
def test_a_held_gain_gives_bits_over_rate(row, direction) -> None:
    took = row.channel.transfer_seconds(4, CLIENTS, 9.9, 1e6, WIDTH, POWER, direction)
    gain = row.channel.gain(4, CLIENTS, 9.9, direction)
    rate = achievable_rate(WIDTH, POWER, gain, row.channel.noise_density(direction), row.channel.snr_gap)
    np.testing.assert_allclose(took, 1e6 / rate, rtol=1e-12)


@changing
def test_two_transfers_one_after_the_other_take_as_long_as_one(row) -> None:
    first = row.channel.transfer_seconds(4, CLIENTS, 2.0, 3e5, WIDTH, POWER)
    second = row.channel.transfer_seconds(4, CLIENTS, 2.0 + first, 7e5, WIDTH, POWER)
    whole = row.channel.transfer_seconds(4, CLIENTS, 2.0, 1e6, WIDTH, POWER)
    np.testing.assert_allclose(first + second, whole, rtol=1e-6)


@every
@both
def test_more_bits_take_longer_and_more_band_or_power_shorter(row, direction) -> None:
    def took(bits=1e6, width=WIDTH, power=POWER):
        return row.channel.transfer_seconds(4, CLIENTS, 2.0, bits, width, power, direction)

    assert (took(bits=2e6) > took()).all()
    assert (took(width=2 * WIDTH) < took()).all()
    assert (took(power=2 * POWER) < took()).all()
    assert (took(bits=0.0) == 0.0).all()
    assert np.isinf(took(width=0.0)).all()
    assert np.isinf(took(power=0.0)).all()


@every
def test_a_broadcast_waits_for_the_worst_and_alone_it_is_a_transfer(row) -> None:
    c = row.channel
    args = (2e6, c.downlink_bandwidth, c.base_station_power)
    own = c.transfer_seconds(4, CLIENTS, 3.0, *args, "downlink")
    together = c.broadcast_seconds(4, CLIENTS, 3.0, *args)
    assert together >= own.max() * (1 - 1e-9)
    alone = [c.broadcast_seconds(4, [i], 3.0, *args) for i in CLIENTS]
    np.testing.assert_allclose(alone, own, rtol=1e-6)


@every
def test_perfect_knowledge_is_the_truth_and_imperfect_is_not(row) -> None:
    truth = row.channel.gain(4, CLIENTS, 8.0)
    np.testing.assert_array_equal(ChannelKnowledge().estimate(row.channel, 4, CLIENTS, 8.0, 1), truth)
    noisy = ChannelKnowledge(error_variance=0.3)
    seen = noisy.estimate(row.channel, 4, CLIENTS, 8.0, 1)
    assert (seen != truth).all()
    np.testing.assert_array_equal(noisy.estimate(row.channel, 4, CLIENTS, 8.0, 1), seen)
    assert (noisy.estimate(row.channel, 4, CLIENTS, 8.0, 2) != seen).all()
    old = ChannelKnowledge(delay_rounds=2).estimate(
        row.channel, 4, CLIENTS, 500.0, 9, "uplink", [0.0, 100.0, 8.0, 300.0]
    )
    np.testing.assert_array_equal(old, truth)


@every
@pytest.mark.parametrize("time", [-1.0, np.nan, np.inf])
def test_times_that_are_none_are_refused(row, time) -> None:
    with pytest.raises(InputError, match="time"):
        row.channel.gain(0, CLIENTS, time)


@every
def test_an_unknown_direction_is_refused(row) -> None:
    with pytest.raises(InputError, match=r"direction.*downlink, uplink"):
        row.channel.gain(0, CLIENTS, 0.0, "sidelink")


@every
def test_a_late_second_is_as_reachable_as_an_early_one(row) -> None:
    """No replay of the past: a query at 10^8 s answers, and its neighbours in the same block agree with it."""
    late = 1e8 + 0.001
    np.testing.assert_array_equal(row.channel.gain(0, CLIENTS, late), row.channel.gain(0, CLIENTS, late + 0.002))
