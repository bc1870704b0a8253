"""The simulated world: planners see estimates, the runner the truth, and both follow from (seed, client, time)."""

from __future__ import annotations

import numpy as np
import pytest

from airtune.devices.availability import Bernoulli
from airtune.devices.profiles import load_profile
from airtune.errors import InputError
from airtune.methods.fedit import FedIT
from airtune.simulation.fleet import modes_of
from airtune.streams import stream
from airtune.types import InFlight, Pending, TaskCost
from airtune.wireless.channel import Channel
from airtune.wireless.knowledge import ChannelKnowledge
from small_world import make_adapter, make_cell, make_model, make_runner, make_task


def test_perfect_knowledge_is_the_truth() -> None:
    cell = make_cell()
    seen = cell.observe(1, 5.0, Pending(), make_model())
    np.testing.assert_array_equal(seen.links.uplink_gain, cell.channel.gain(0, np.arange(4), 5.0, "uplink"))
    np.testing.assert_array_equal(seen.links.downlink_gain, cell.channel.gain(0, np.arange(4), 5.0, "downlink"))
    assert seen.links.downlink_noise_density == cell.channel.noise_density("downlink")


def test_same_estimates_and_another_truth_give_the_same_plan_and_other_arrivals() -> None:
    known = ChannelKnowledge(mode="mean")
    fading, flat = make_cell(knowledge=known), make_cell(knowledge=known, channel=Channel(reciprocal=True))
    model, method = make_model(), FedIT(cohort_size=3)
    plans = [method.plan(None, cell.observe(1, 0.0, Pending(), model), stream(0, "plan", 1)) for cell in (fading, flat)]
    assert [(t.client, t.bandwidth) for t in plans[0].tasks] == [(t.client, t.bandwidth) for t in plans[1].tasks]
    ends = [
        make_runner(cell).run(plan, model, Pending(), round_index=1, time=0.0)[0].end_time
        for cell, plan in zip((fading, flat), plans, strict=True)
    ]
    assert ends[0] != ends[1]


def test_delayed_knowledge_needs_and_uses_the_rounds_that_were() -> None:
    cell = make_cell(knowledge=ChannelKnowledge(delay_rounds=1))
    seen = cell.observe(2, 40.0, Pending(round_starts=(10.0,)), make_model())
    np.testing.assert_array_equal(seen.links.uplink_gain, cell.channel.gain(0, np.arange(4), 10.0, "uplink"))


def test_clients_without_data_in_flight_or_away_are_not_idle() -> None:
    cell = make_cell(num_examples=[5, 0, 5, 5])
    flight = InFlight(make_task(2, make_adapter(), bandwidth=3e6), 0, 0.0, 9.0, 1, TaskCost(1, 1, 7, 1, 1, 1.0))
    seen = cell.observe(2, 1.0, Pending(in_flight=(flight,)), make_model())
    assert seen.idle.tolist() == [0, 3] and seen.in_flight.tolist() == [2]
    assert seen.free_bandwidth == cell.channel.uplink_bandwidth - 3e6
    away = make_cell(clients=200, availability=Bernoulli(0.25))
    there = away.observe(1, 0.0, Pending(), make_model()).idle
    assert 20 < len(there) < 80
    np.testing.assert_array_equal(there, away.observe(3, 0.0, Pending(), make_model()).idle)


def test_power_modes_change_with_time_only() -> None:
    profiles = [load_profile("jetson-tx2")] * 30
    cell = make_cell(clients=30, modes=modes_of(profiles, period=100.0))
    speeds = [cell.fleet_at(t).flops_per_second for t in (0.0, 99.0, 101.0)]
    np.testing.assert_array_equal(speeds[0], speeds[1])
    assert np.any(speeds[1] != speeds[2])
    nominal = cell.nominal.flops_per_second
    assert set(np.round(speeds[0] / nominal, 9)) <= {round(mode.speed, 9) for mode in profiles[0].modes}


def test_a_slower_mode_costs_power_over_speed() -> None:
    profile = load_profile("jetson-tx2")
    modes = modes_of([profile])
    for column, mode in enumerate(profile.modes):
        watts = modes.energy[0, column] * modes.speed[0, column] * profile.energy_per_flop * profile.flops_per_second
        assert watts == pytest.approx(mode.power)


def test_a_fleet_without_devices_is_refused() -> None:
    with pytest.raises(InputError, match="fleet"):
        make_cell(clients=0)
    with pytest.raises(InputError, match=r"wireless\.downlink.*broadcast, unicast"):
        make_cell(downlink="multicast")
