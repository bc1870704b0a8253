"""The preset of 80 devices is what its page says: devices, power modes, spread of speeds, links."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from airtune.experiment.config import Experiment, read_file
from airtune.simulation.fleet import modes_of

FILE = Path(__file__).parents[2] / "experiments" / "fleet-of-80" / "fleet-of-80.toml"
MODES = {"tx2-4-modes": (30, 4), "xavier-nx-8-modes": (40, 8), "agx-xavier-8-modes": (10, 8)}


def experiment(seed: int = 0) -> Experiment:
    return read_file(FILE, {"seed": str(seed)}).experiment("fedit")


def test_thirty_forty_and_ten_devices_with_four_and_eight_modes() -> None:
    profiles = experiment().fleet.profiles()
    assert Counter(p.name for p in profiles) == {name: count for name, (count, _) in MODES.items()}
    assert {(p.name, len(p.modes)) for p in profiles} == {(name, modes) for name, (_, modes) in MODES.items()}
    assert modes_of(profiles).count.tolist() == [len(p.modes) for p in profiles]


def test_the_best_agx_mode_is_about_a_hundred_times_faster_than_the_worst_tx2_mode() -> None:
    speeds = {p.name: [p.flops_per_second * mode.speed for mode in p.modes] for p in experiment().fleet.profiles()}
    spread = max(speeds["agx-xavier-8-modes"]) / min(speeds["tx2-4-modes"])
    assert spread == pytest.approx(100, rel=0.05)
    assert spread == max(map(max, speeds.values())) / min(map(min, speeds.values()))


def test_modes_are_redrawn_every_period_and_all_of_them_occur() -> None:
    fleet = experiment().fleet
    modes = modes_of(fleet.profiles(), fleet.mode_period)
    periods = [modes.factors(0, index * fleet.mode_period)[0] for index in range(40)]
    assert np.array_equal(modes.factors(0, 0.999 * fleet.mode_period)[0], periods[0])
    changed = np.mean([one != other for one, other in pairwise(periods)])
    assert changed == pytest.approx((30 * 3 / 4 + 50 * 7 / 8) / 80, abs=0.03)
    assert all(len(np.unique([p[client] for p in periods])) == modes.count[client] for client in (0, 30, 79))


@pytest.mark.parametrize("seed", range(3))
def test_links_carry_one_to_thirty_megabits_but_for_deep_fades(seed: int) -> None:
    """Equal shares of the band for all 80, forty rounds."""
    made = experiment(seed)
    channel, power = made.wireless.channel, np.array([p.transmit_power for p in made.fleet.profiles()])
    share, clients = channel.uplink_bandwidth / 80, np.arange(80)
    noise = share * channel.noise_density("uplink") * channel.snr_gap
    gains = np.stack([channel.gain(seed, clients, 30.0 * index, "uplink") for index in range(40)])
    rate = share * np.log2(1.0 + power * gains / noise)
    assert 25e6 < rate.max() <= 30e6
    assert (rate >= 1e6).mean() > 0.99
    assert 10e6 < np.median(rate) < 20e6
