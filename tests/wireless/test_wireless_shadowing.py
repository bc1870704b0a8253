"""Random maps: normal everywhere, correlated as asked, one world per seed."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from airtune.wireless.channel import Channel
from airtune.wireless.fading import NoFading
from airtune.wireless.path_loss import LogDistance
from airtune.wireless.shadowing import correlated_normal


def far_apart(distance, shift=(0.0, 0.0)):
    """Return 144 points that are 5 correlation distances apart: nearly independent values."""
    axis = np.arange(12) * 5.0 * distance
    return np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2) + np.asarray(shift)


@pytest.mark.parametrize("shift", [(0.0, 0.0), (3.1, 2.2), (-417.3, 91.7), (5000.0, -8000.0)])
def test_normal_at_points_on_and_off_the_grid(shift) -> None:
    values = np.concatenate([correlated_normal(s, "test", (), far_apart(50.0, shift), 50.0) for s in range(8)])
    assert stats.kstest(values, "norm").pvalue > 1e-3


@pytest.mark.parametrize("distance", [10.0, 50.0])
@pytest.mark.parametrize("angle", [0.0, 0.4, 0.785])
def test_correlation_falls_exponentially_in_every_direction(distance, angle) -> None:
    lags = np.array([0.0, 0.1, 0.3, 0.5, 1.0, 2.0]) * distance
    line = np.stack([lags * np.cos(angle), lags * np.sin(angle)], axis=-1)
    points = far_apart(distance, (7.3, -2.1))[:, None, :] + line
    values = np.concatenate([correlated_normal(seed, "test", (), points, distance) for seed in range(10)])
    measured = np.corrcoef(values, rowvar=False)[0]
    np.testing.assert_allclose(measured, np.exp(-lags / distance), atol=0.08)


def test_a_map_does_not_change_and_other_maps_are_independent() -> None:
    where = np.random.default_rng(0).uniform(-500, 500, (300, 2))
    first = correlated_normal(1, "a", (0,), where, 50.0)
    np.testing.assert_array_equal(first, correlated_normal(1, "a", (0,), where, 50.0))
    np.testing.assert_array_equal(first[7:9], correlated_normal(1, "a", (0,), where[7:9], 50.0))
    for other in (
        correlated_normal(2, "a", (0,), where, 50.0),
        correlated_normal(1, "b", (0,), where, 50.0),
        correlated_normal(1, "a", (1,), where, 50.0),
    ):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.5
        assert (first != other).all()


@pytest.mark.parametrize("distance", [0.0, 50.0])
def test_shadowing_of_a_channel_has_the_laws_deviation(distance) -> None:
    law = LogDistance(shadowing_db=8.0, shadowing_distance=distance)
    with_shadow, without = (Channel(path_loss=law, fading=NoFading(), shadowing=s) for s in (True, False))
    clients = np.arange(200)
    difference = np.concatenate(
        [10 * np.log10(with_shadow.gain(s, clients, 0.0) / without.gain(s, clients, 0.0)) for s in range(20)]
    )
    assert difference.std() == pytest.approx(8.0, rel=0.08)
    assert abs(difference.mean()) < 1.0
