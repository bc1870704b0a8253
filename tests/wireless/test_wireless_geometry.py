"""Areas, sites and motion."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from airtune.errors import InputError
from airtune.wireless.channel import Channel
from airtune.wireless.fading import NoFading
from airtune.wireless.geometry import Annulus, Disc, Hexagon, UniformDistance, hexagonal_sites
from airtune.wireless.mobility import GaussMarkov, RandomWaypoint, Static, mean_distance

AREAS = [Disc(), Disc(300.0, 0.0), Annulus(), UniformDistance(), Hexagon(), Hexagon(1000.0, 0.0)]
MOVING = [RandomWaypoint(), RandomWaypoint(pause=0.0, slowest=1.0, fastest=1.0), GaussMarkov()]
N = 20_000
CLIENTS = np.arange(N)


def drop(area, seed=0):
    return Static().positions(seed, CLIENTS, np.zeros(N), area)


@pytest.mark.parametrize("area", AREAS, ids=str)
def test_drops_lie_in_the_area(area) -> None:
    where = drop(area)
    distance = np.hypot(*where.T)
    assert area.contains(where).all()
    assert distance.max() <= area.extent * (1 + 1e-9)
    assert distance.min() >= area.nearest * (1 - 1e-9)
    assert distance.max() > 0.97 * area.extent
    assert not area.contains(np.array([[2 * area.extent, 0.0]]))[0]


@pytest.mark.parametrize("area", [Disc(), Annulus()], ids=str)
def test_a_ring_is_filled_evenly(area) -> None:
    distance = np.hypot(*drop(area).T)
    inner, outer = area.nearest, area.extent
    law = (distance**2 - inner**2) / (outer**2 - inner**2)
    assert stats.kstest(law, "uniform").pvalue > 1e-3


def test_uniform_distance_is_uniform_in_distance() -> None:
    assert stats.kstest(np.hypot(*drop(UniformDistance()).T), stats.uniform(50, 450).cdf).pvalue > 1e-3


def test_a_hexagon_is_filled_evenly() -> None:
    """Each of the six triangles gets a sixth, and the mean squared distance is 5/12 side squared."""
    area = Hexagon(1000.0, 0.0)
    where = drop(area)
    sector = np.floor((np.arctan2(where[:, 1], where[:, 0]) + np.pi / 6) / (np.pi / 3)).astype(int) % 6
    assert stats.chisquare(np.bincount(sector)).pvalue > 1e-3
    side = 1000.0 / np.sqrt(3)
    assert (where**2).sum(axis=1).mean() == pytest.approx(5 / 12 * side**2, rel=0.02)


def test_hexagonal_sites() -> None:
    for count, rings in ((1, 0), (7, 1), (19, 2)):
        sites = hexagonal_sites(count, 500.0)
        assert sites.shape == (count, 2)
        assert np.hypot(*sites.T).max() == pytest.approx(500.0 * rings)
    near = np.hypot(*(hexagonal_sites(19, 500.0)[:, None] - hexagonal_sites(19, 500.0)[None]).T)
    assert near[near > 0].min() == pytest.approx(500.0)


def test_mean_distance_of_a_disc_is_the_textbooks() -> None:
    assert mean_distance(Disc(100.0, 0.0)) == pytest.approx(128 / (45 * np.pi) * 100.0, rel=0.01)


@pytest.mark.parametrize("law", MOVING, ids=str)
def test_motion_is_continuous_bounded_in_speed_and_stays_in_the_area(law) -> None:
    area = Disc(500.0, 0.0)
    clients = np.arange(100)
    times = np.arange(0.0, law.anchor - 1.0, law.anchor / 60)
    path = np.array([law.positions(0, clients, np.full(100, t), area) for t in times])
    assert (np.hypot(path[..., 0], path[..., 1]) <= 500.0 * (1 + 1e-9)).all()
    speed = np.hypot(*np.moveaxis(np.diff(path, axis=0), -1, 0)) / np.diff(times)[:, None]
    fastest = law.fastest if isinstance(law, RandomWaypoint) else 6 * law.speed
    assert speed.max() <= fastest * (1 + 1e-9)
    assert speed.max() > 0.5 * fastest * (1 if isinstance(law, RandomWaypoint) else 0.4)


@pytest.mark.parametrize("law", MOVING, ids=str)
def test_the_law_of_positions_is_stationary(law) -> None:
    """Just after an anchor, in the middle and just before the next one: the same distribution."""
    area = Disc(500.0, 0.0)
    samples = [
        np.hypot(*law.positions(0, CLIENTS, np.full(N, t), area).T)
        for t in (0.0, 0.37 * law.anchor, 0.999 * law.anchor, 5.5 * law.anchor)
    ]
    for other in samples[1:]:
        assert abs(other.mean() / samples[0].mean() - 1) < 0.02
        if isinstance(law, RandomWaypoint):
            assert stats.ks_2samp(samples[0], other).pvalue > 1e-3


def test_waypoint_walkers_crowd_the_middle_as_theory_says() -> None:
    """Without pauses the density of random waypoint is 0 at the edge: a known property a uniform drop lacks."""
    law = RandomWaypoint(pause=0.0)
    distance = np.hypot(*law.positions(0, CLIENTS, np.full(N, 100.0), Disc(500.0, 0.0)).T)
    assert (distance < 250).mean() > 0.35
    assert (distance > 490).mean() < 0.005


def test_walkers_pause_as_long_as_they_should() -> None:
    law = RandomWaypoint(slowest=1.0, fastest=1.0, pause=300.0)
    area = Disc(500.0, 0.0)
    now, then = (law.positions(0, CLIENTS, np.full(N, t), area) for t in (1000.0, 1000.001))
    paused = (now == then).all(axis=1).mean()
    assert paused == pytest.approx(300.0 / (300.0 + mean_distance(area)), abs=0.015)


def test_gauss_markov_speed_and_memory() -> None:
    law = GaussMarkov(speed=2.0, memory=0.8)
    area = Disc(5e4, 0.0)
    where = np.array([law.positions(0, CLIENTS, np.full(N, 5.0 * k), area) for k in range(8)])
    velocity = np.diff(where, axis=0) / 5.0
    assert np.hypot(velocity[..., 0], velocity[..., 1]).mean() == pytest.approx(2.0, rel=0.02)
    for lag in (1, 2, 3):
        correlation = (velocity[lag + 1] * velocity[1]).mean() / (velocity[1] ** 2).mean()
        assert correlation == pytest.approx(0.8**lag, abs=0.03)


def test_the_strongest_cell_serves() -> None:
    channel = Channel(cells=7, area=Hexagon(), fading=NoFading())
    clients = np.arange(500)
    every_cell = channel.cell_gains(0, clients, 0.0)
    serving = channel.serving_cell(0, clients, 0.0)
    np.testing.assert_array_equal(channel.mean_gain(0, clients, 0.0), every_cell[clients, serving])
    assert set(serving) == set(range(7))
    quiet = Channel(cells=7, area=Hexagon(), fading=NoFading(), shadowing=False)
    nearest = np.hypot(*(quiet.positions(0, clients, 0.0)[:, None] - quiet.sites()).transpose(2, 0, 1)).argmin(axis=1)
    np.testing.assert_array_equal(quiet.serving_cell(0, clients, 0.0), nearest)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Disc(10.0, 20.0), "minimum_distance"),
        (lambda: Disc(-1.0, 0.0), "radius"),
        (lambda: Disc(float("nan")), "radius"),
        (lambda: Annulus(5.0, 5.0), "inner"),
        (lambda: Hexagon(0.0), "inter_site_distance"),
        (lambda: hexagonal_sites(0, 500.0), "cells"),
        (lambda: Channel(cells=3, inter_site_distance=0.0), "inter_site_distance"),
        (lambda: RandomWaypoint(slowest=0.0), "mobility.slowest"),
        (lambda: RandomWaypoint(pause=-1.0), "mobility.pause"),
        (lambda: RandomWaypoint(anchor=0.0), "mobility.anchor"),
        (lambda: GaussMarkov(memory=1.0), "mobility.memory"),
        (lambda: GaussMarkov(step=700.0), "mobility.step"),
    ],
)
def test_bad_fields_are_refused(make, words) -> None:
    with pytest.raises(InputError, match=words):
        make()
