"""Broadcasts, retransmissions, what planners know, and the channel's own fields."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from airtune.errors import InputError
from airtune.wireless.channel import Channel
from airtune.wireless.fading import NoFading, Rayleigh, Rician
from airtune.wireless.knowledge import ChannelKnowledge
from airtune.wireless.rate import achievable_rate
from airtune.wireless.retransmission import Retransmission

CLIENTS = np.arange(20)
MANY = np.arange(20_000)


@pytest.mark.parametrize("block", ["round", 0.05])
def test_a_broadcast_is_as_slow_as_its_worst_client_allows(block) -> None:
    channel = Channel(block=block)
    band = channel.downlink_bandwidth, channel.base_station_power
    together = channel.broadcast_seconds(0, CLIENTS, 4.0, 8e6, *band)
    assert together == channel.broadcast_seconds(0, CLIENTS[::-1], 4.0, 8e6, *band)
    assert together >= channel.broadcast_seconds(0, CLIENTS[:7], 4.0, 8e6, *band)
    assert channel.broadcast_seconds(0, CLIENTS, 4.0, 0.0, *band) == 0.0
    assert np.isinf(channel.broadcast_seconds(0, CLIENTS, 4.0, 1.0, 0.0, 1.0))


def test_a_broadcast_of_one_held_block_is_bits_over_the_worst_rate() -> None:
    channel = Channel()
    gain = channel.gain(0, CLIENTS, 4.0, "downlink").min()
    band = channel.downlink_bandwidth, channel.base_station_power
    rate = achievable_rate(*band, gain, channel.noise_density("downlink"))
    assert channel.broadcast_seconds(0, CLIENTS, 4.0, 8e6, *band) == pytest.approx(8e6 / rate)


def test_noise_is_thermal_noise_times_figure_times_margin() -> None:
    channel = Channel(interference_margin=2.0)
    assert 10 * np.log10(channel.noise_density("uplink")) == pytest.approx(-174 - 30 + 5 + 3.0103, abs=1e-3)
    assert 10 * np.log10(channel.noise_density("downlink")) == pytest.approx(-174 - 30 + 9 + 3.0103, abs=1e-3)


def test_antennas_add_their_gain_and_time_division_shares_fading() -> None:
    plain, directed = Channel(), Channel(base_antenna_gain=10.0, user_antenna_gain=2.0)
    np.testing.assert_allclose(directed.gain(0, CLIENTS, 1.0), 20.0 * plain.gain(0, CLIENTS, 1.0))
    shared = Channel(reciprocal=True)
    np.testing.assert_array_equal(shared.gain(0, CLIENTS, 1.0), shared.gain(0, CLIENTS, 1.0, "downlink"))
    assert (plain.gain(0, CLIENTS, 1.0) != plain.gain(0, CLIENTS, 1.0, "downlink")).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("uplink_bandwidth", 0.0),
        ("downlink_bandwidth", -1.0),
        ("carrier_frequency", float("nan")),
        ("base_station_power", 0.0),
        ("snr_gap", 0.5),
        ("base_noise_figure", 0.9),
        ("interference_margin", 0.0),
        ("block", 0.0),
        ("block", 1e-6),
        ("block", float("inf")),
        ("block", "rounds"),
        ("cells", 0),
    ],
)
def test_bad_fields_are_named(field, value) -> None:
    with pytest.raises(InputError, match=field):
        Channel(**{field: value})


def test_a_transfer_longer_than_the_limit_counts_as_never_done() -> None:
    for block in ("round", 0.05):
        channel = Channel(block=block, transfer_limit=2.0)
        seconds = channel.transfer_seconds(0, CLIENTS, 0.0, 15e6, 1e6, 0.2)
        free = Channel(block=block).transfer_seconds(0, CLIENTS, 0.0, 15e6, 1e6, 0.2)
        np.testing.assert_array_equal(np.isinf(seconds), free > 2.0)
        assert 0 < np.isinf(seconds).sum() < 20


def test_integrated_rates_tend_to_the_ergodic_rate() -> None:
    """A long transfer over many blocks of a static device: its mean rate is E[log2(1 + snr x)], x exponential."""
    channel = Channel(block=0.05, shadowing=False, fading=Rayleigh(correlation="none"))
    bits = 4e8
    seconds = channel.transfer_seconds(0, CLIENTS, 0.0, bits, 1e6, 0.2)
    snr = 0.2 * channel.mean_gain(0, CLIENTS, 0.0) / (channel.noise_density("uplink") * 1e6)
    x = stats.expon.ppf((np.arange(20_000) + 0.5) / 20_000)
    ergodic = 1e6 * np.log2(1.0 + snr[:, None] * x).mean(axis=1)
    np.testing.assert_allclose(bits / seconds, ergodic, rtol=0.03)


@pytest.mark.parametrize("law", [NoFading(), Rayleigh(), Rician()], ids=str)
def test_ergodic_knowledge_predicts_long_transfers_at_high_snr(law) -> None:
    channel = Channel(block=0.05, shadowing=False, fading=law, base_antenna_gain=1e4)
    gain = ChannelKnowledge(mode="ergodic").estimate(channel, 0, CLIENTS, 0.0, 1)
    predicted = 4e8 / achievable_rate(1e6, 0.2, gain, channel.noise_density("uplink"))
    np.testing.assert_allclose(channel.transfer_seconds(0, CLIENTS, 0.0, 4e8, 1e6, 0.2), predicted, rtol=0.02)


@pytest.mark.parametrize("variance", [0.0, 0.1, 0.5, 1.0])
def test_estimates_keep_the_mean_power_and_lose_correlation(variance) -> None:
    channel = Channel(shadowing=False)
    truth = channel.gain(0, MANY, 0.0) / channel.mean_gain(0, MANY, 0.0)
    seen = ChannelKnowledge(error_variance=variance).estimate(channel, 0, MANY, 0.0, 3) / channel.mean_gain(
        0, MANY, 0.0
    )
    assert seen.mean() == pytest.approx(1.0, abs=0.03)
    assert stats.kstest(seen, "expon").pvalue > 1e-3
    assert np.corrcoef(truth, seen)[0, 1] == pytest.approx(1 - variance, abs=0.03)


def test_mean_knowledge_sees_no_fading_and_delays_look_back() -> None:
    channel = Channel()
    mean = ChannelKnowledge(mode="mean").estimate(channel, 0, CLIENTS, 9.0, 1)
    np.testing.assert_array_equal(mean, channel.mean_gain(0, CLIENTS, 9.0))
    old = ChannelKnowledge(delay=4.0).estimate(channel, 0, CLIENTS, 9.0, 1)
    np.testing.assert_array_equal(old, channel.gain(0, CLIENTS, 5.0))
    first = ChannelKnowledge(delay=40.0).estimate(channel, 0, CLIENTS, 9.0, 1)
    np.testing.assert_array_equal(first, channel.gain(0, CLIENTS, 0.0))
    late = ChannelKnowledge(delay_rounds=1)
    np.testing.assert_array_equal(
        late.estimate(channel, 0, CLIENTS, 9.0, 3, "uplink", [0.0, 3.0]), channel.gain(0, CLIENTS, 3.0)
    )
    np.testing.assert_array_equal(late.estimate(channel, 0, CLIENTS, 0.0, 1), channel.gain(0, CLIENTS, 0.0))
    with pytest.raises(InputError, match="delay_rounds"):
        late.estimate(channel, 0, CLIENTS, 9.0, 3)


@pytest.mark.parametrize(
    "fields", [{"mode": "oracle"}, {"error_variance": 1.5}, {"delay_rounds": -1}, {"delay": -1.0}], ids=str
)
def test_bad_knowledge_is_refused(fields) -> None:
    with pytest.raises(InputError, match=r"knowledge\."):
        ChannelKnowledge(**fields)


QUIET = {"fading": NoFading(), "shadowing": False}


@pytest.mark.parametrize("packets", [1, 10, 64, 65, 400])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_attempts_have_the_geometric_mean_and_variance(packets, p) -> None:
    law = Retransmission(packet_bits=1000.0, error_probability=p, attempts=60)
    sent = Channel(**QUIET, retransmission=law).transfer(0, MANY, 0.0, 1000.0 * packets, 1e6, 0.2)
    tries = sent.bits_on_air / 1000.0
    assert sent.delivered.all()
    assert (tries >= packets).all()
    deviation = np.sqrt(packets * p) / (1 - p)
    assert tries.mean() == pytest.approx(packets / (1 - p), abs=5 * deviation / np.sqrt(MANY.size))
    assert tries.std() == pytest.approx(deviation, rel=0.05)


def test_losing_packets_for_good_happens_as_often_as_it_should_and_is_told() -> None:
    law = Retransmission(packet_bits=1000.0, error_probability=0.1, attempts=2)
    channel = Channel(**QUIET, retransmission=law)
    sent = channel.transfer(0, MANY, 0.0, 30_000.0, 1e6, 0.2)
    assert (~sent.delivered).mean() == pytest.approx(1 - 0.99**30, abs=0.012)
    assert (sent.bits_on_air[~sent.delivered] >= 2000.0).all()
    assert np.isfinite(sent.seconds).all()
    arrival = channel.transfer_seconds(0, MANY, 0.0, 30_000.0, 1e6, 0.2)
    np.testing.assert_array_equal(np.isinf(arrival), ~sent.delivered)
    np.testing.assert_array_equal(arrival[sent.delivered], sent.seconds[sent.delivered])


def test_retransmissions_take_air_and_waiting_time_and_none_take_none() -> None:
    plain = Channel(block=0.05)
    perfect = replace(plain, retransmission=Retransmission(error_probability=0.0))
    lossy = replace(plain, retransmission=Retransmission(error_probability=0.2, feedback=0.01))
    args = (0, CLIENTS, 2.0, 5e6, 1e6, 0.2)
    np.testing.assert_allclose(perfect.transfer_seconds(*args), plain.transfer_seconds(*args), rtol=1e-9)
    sent = lossy.transfer(*args)
    assert (sent.seconds > plain.transfer_seconds(*args)).all()
    np.testing.assert_array_equal(sent.seconds, lossy.transfer(*args).seconds)
    np.testing.assert_array_equal(sent.seconds[3:5], lossy.transfer(0, CLIENTS[3:5], *args[2:]).seconds)
    air = plain.transfer_seconds(0, CLIENTS, 2.0, sent.bits_on_air, 1e6, 0.2)
    repeats = sent.bits_on_air / 5e6 * 417 - 417
    np.testing.assert_allclose(sent.seconds, air + 0.01 * repeats, atol=1e-6)
    assert (lossy.transfer(0, CLIENTS, 3.0, *args[3:]).bits_on_air != sent.bits_on_air).any()
    nothing = lossy.transfer(0, CLIENTS, 2.0, 0.0, 1e6, 0.2)
    assert (nothing.seconds == 0.0).all()
    assert nothing.delivered.all()
    assert not lossy.transfer(0, CLIENTS, 2.0, 1e6, 0.0, 0.2).delivered.any()


@pytest.mark.parametrize(
    "fields", [{"packet_bits": 0.0}, {"error_probability": 1.0}, {"attempts": 0}, {"feedback": -1.0}], ids=str
)
def test_bad_retransmission_is_refused(fields) -> None:
    with pytest.raises(InputError, match=f"retransmission.{next(iter(fields))}"):
        Retransmission(**fields)
