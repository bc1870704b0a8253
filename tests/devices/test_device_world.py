"""Availability, power modes, batteries, energy and memory."""

from __future__ import annotations

import numpy as np
import pytest

from airtune.devices.availability import (
    AVAILABILITIES,
    Always,
    Bernoulli,
    Diurnal,
    Markov,
    TraceAvailability,
    mode_at,
)
from airtune.devices.battery import Battery
from airtune.devices.energy import compute_energy, receive_energy, switching_energy, transmit_energy
from airtune.devices.latency import KINDS, TransformerShape
from airtune.devices.memory import activation_bytes, lora_parameters, training_bytes
from airtune.errors import InputError

MANY = np.arange(20_000)
LAWS = [Always(), Bernoulli(), Bernoulli(0.0), Bernoulli(1.0), Markov(), Diurnal()]


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_a_query_depends_on_its_own_client_and_time_only(law) -> None:
    times = np.random.default_rng(0).uniform(0, 1e6, 200)
    clients = np.arange(200)
    together = law.available(1, clients, times)
    assert together.dtype == np.bool_
    np.testing.assert_array_equal(law.available(1, clients[::-1], times[::-1]), together[::-1])
    for c in (0, 17, 199):
        assert law.available(1, [c], times[c])[0] == together[c]


@pytest.mark.parametrize("law", [Bernoulli(0.3), Markov(), Diurnal()], ids=str)
def test_another_seed_is_another_world(law) -> None:
    first, second = (law.available(seed, MANY, 5000.0) for seed in (1, 2))
    assert 0.05 < (first != second).mean() < 0.95


@pytest.mark.parametrize("time", [0.0, 100.0, 5 * 3600.0, 6 * 3600.0 - 1, 6 * 3600.0, 1e7])
def test_markov_is_stationary(time) -> None:
    law = Markov(mean_on=1800.0, mean_off=600.0)
    assert law.available(0, MANY, time).mean() == pytest.approx(0.75, abs=0.015)


@pytest.mark.parametrize("lag", [60.0, 300.0, 1200.0])
def test_markov_forgets_exponentially(lag) -> None:
    """P(on at t + d | on at t) = p + (1 - p) exp(-d (1/on + 1/off))."""
    law = Markov(mean_on=1800.0, mean_off=600.0)
    now, then = law.available(0, MANY, 3000.0), law.available(0, MANY, 3000.0 + lag)
    expected = 0.75 + 0.25 * np.exp(-lag * (1 / 1800 + 1 / 600))
    assert then[now].mean() == pytest.approx(expected, abs=0.02)


def test_markov_durations_are_exponential_with_the_right_mean() -> None:
    law = Markov(mean_on=300.0, mean_off=300.0, anchor=1e4)
    clients, times = np.meshgrid(np.arange(30), np.arange(0.0, 9990.0, 5.0), indexing="ij")
    states = law.available(0, clients.ravel(), times.ravel()).reshape(clients.shape)
    changes = (np.diff(states.astype(int), axis=1) != 0).sum()
    assert changes == pytest.approx(30 * 1e4 / 300.0, rel=0.08)


def test_bernoulli_holds_for_its_period() -> None:
    law = Bernoulli(0.3, period=60.0)
    start, end, after = (law.available(0, MANY, t) for t in (120.0, 179.9, 180.1))
    np.testing.assert_array_equal(start, end)
    assert start.mean() == pytest.approx(0.3, abs=0.015)
    assert np.corrcoef(start, after)[0, 1] == pytest.approx(0.0, abs=0.03)


def test_diurnal_follows_the_clock() -> None:
    law = Diurnal(lowest=0.1, highest=0.8, best_time=7200.0, spread=0.0)
    shares = [law.available(0, MANY, 3600.0 * hour).mean() for hour in range(48)]
    assert shares[2] == pytest.approx(0.8, abs=0.02)
    assert shares[14] == pytest.approx(0.1, abs=0.02)
    np.testing.assert_allclose(shares[:24], shares[24:], atol=0.02)
    spread = Diurnal(lowest=0.1, highest=0.8, best_time=7200.0, spread=8 * 3600.0)
    assert spread.available(0, MANY, 7200.0).mean() < 0.7


def test_trace_availability(tmp_path) -> None:
    path = tmp_path / "on.csv"
    path.write_text("time_s,client,available\n0,0,1\n10,0,0\n0,1,0\n", encoding="utf-8")
    law = TraceAvailability(str(path))
    times = [0.0, 9.9, 10.0, 19.9, 20.0]
    assert [bool(law.available(0, [0], t)[0]) for t in times] == [True, True, False, False, True]
    assert not law.available(0, [1], 1e6)[0]
    with pytest.raises(InputError, match="no rows for client 2"):
        law.available(0, [2], 0.0)
    path.write_text("time_s,client,available\n0,0,2\n", encoding="utf-8")
    with pytest.raises(InputError, match="available: must be 0 or 1; got 2"):
        TraceAvailability(str(path))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Bernoulli(1.5),
        lambda: Bernoulli(period=0.0),
        lambda: Markov(mean_on=-1.0),
        lambda: Markov(mean_off=0.001),
        lambda: Diurnal(lowest=0.9, highest=0.1),
        lambda: Diurnal(day=0.0),
    ],
)
def test_bad_laws_are_refused(make) -> None:
    with pytest.raises(InputError, match=r"availability\."):
        make()


def test_every_law_is_registered() -> None:
    assert {type(law) for law in LAWS} | {TraceAvailability} == set(AVAILABILITIES.values())


def test_modes_are_drawn_evenly_and_hold_for_their_period() -> None:
    modes = mode_at(0, MANY, 125.0, 60.0, 3)
    np.testing.assert_array_equal(modes, mode_at(0, MANY, 179.0, 60.0, 3))
    assert (np.abs(np.bincount(modes) / MANY.size - 1 / 3) < 0.015).all()
    assert (mode_at(0, MANY, 185.0, 60.0, 3) != modes).mean() == pytest.approx(2 / 3, abs=0.02)
    assert (mode_at(0, MANY, 125.0, 60.0, MANY % 4 + 1) <= MANY % 4).all()
    assert (mode_at(0, MANY, 125.0, np.inf, 3) == 0).all()
    with pytest.raises(InputError, match="mode_period_s"):
        mode_at(0, MANY, 0.0, 0.0, 3)


def test_energy_adds_up() -> None:
    assert compute_energy(1e12, 2e-11) == pytest.approx(20.0)
    assert switching_energy(1e9, 1e9, 1e-28) == pytest.approx(0.1)
    assert transmit_energy(0.2, 10.0) == pytest.approx(2.0)
    assert transmit_energy(0.2, 10.0, amplifier_efficiency=0.4, circuit_power=0.1) == pytest.approx(6.0)
    np.testing.assert_allclose(receive_energy([0.9, 0.5], [10.0, 2.0]), [9.0, 1.0])


def test_a_battery_drains_charges_and_keeps_its_reserve() -> None:
    battery = Battery(capacity=1000.0, charging_power=10.0, reserve=0.2)
    np.testing.assert_allclose(
        battery.after([500.0, 500.0, 990.0, 5.0], [100.0, 100.0, 0.0, 50.0], 20.0, [False, True, True, False]),
        [400.0, 600.0, 1000.0, 0.0],
    )
    np.testing.assert_array_equal(battery.allows([300.0, 300.0], [99.0, 101.0]), [True, False])
    start = battery.initial(0, MANY)
    assert start.min() >= 300.0
    assert start.max() <= 1000.0
    assert start.mean() == pytest.approx(650.0, rel=0.01)
    for fields in ({"capacity": 0.0}, {"reserve": 1.0}, {"emptiest": 0.9, "fullest": 0.1}, {"charging_power": -1.0}):
        with pytest.raises(InputError, match=r"battery\."):
            Battery(**fields)


BASE = TransformerShape(12, 768, 3072, 12, 12, 64, 30522, 512, dense_head="frozen", token_types=2)


def ranks(depth, rank=8):
    table = np.zeros((12, len(KINDS)))
    table[12 - depth :, [0, 2]] = rank
    return table


def test_parameters_of_bert_base_and_its_lora() -> None:
    assert BASE.parameters == pytest.approx(109_482_240, rel=1e-3)
    assert lora_parameters(BASE, ranks(12)) == 294_912


def test_activations_are_korthikantis_34_sbh_plus_5_as2b() -> None:
    s, b, h, a = 128, 16, 768, 12
    assert activation_bytes(BASE, s, b, 2) == pytest.approx(34 * s * b * h + 5 * a * s * s * b)
    assert activation_bytes(BASE, s, b, 4) == pytest.approx(2 * (34 * s * b * h + 5 * a * s * s * b))


def test_memory_grows_with_depth_by_the_activations_of_a_layer() -> None:
    deep, shallow = (training_bytes(BASE, ranks(k), 128, 16) for k in (12, 4))
    adapters = 16 * (lora_parameters(BASE, ranks(12)) - lora_parameters(BASE, ranks(4)))
    assert deep - shallow == pytest.approx(8 * activation_bytes(BASE, 128, 16, 4) + adapters)
    assert shallow > 4 * BASE.parameters
    assert training_bytes(BASE, ranks(12), 128, 16, value_bytes=2) < 0.6 * deep
    both = training_bytes(BASE, np.stack([ranks(4), ranks(12)]), [128, 128], [16, 16])
    np.testing.assert_allclose(both, [shallow, deep])


def test_memory_of_frozen_parts_and_of_logits() -> None:
    frozen = training_bytes(BASE, ranks(4), 128, 16, frozen_ranks=ranks(12) - ranks(4))
    extra = 4 * (lora_parameters(BASE, ranks(12)) - lora_parameters(BASE, ranks(4)))
    assert frozen - training_bytes(BASE, ranks(4), 128, 16) == pytest.approx(extra)
    causal = training_bytes(BASE, ranks(4), 128, 16, "causal")
    assert causal - training_bytes(BASE, ranks(4), 128, 16, "none") == pytest.approx(8 * 30522 * 128 * 16)


def test_memory_refuses_wrong_shapes() -> None:
    with pytest.raises(InputError, match="ranks"):
        training_bytes(BASE, np.zeros((11, len(KINDS))), 128, 16)
    with pytest.raises(InputError, match="value_bytes"):
        training_bytes(BASE, ranks(2), 128, 16, value_bytes=8)
