"""Seconds of an independently sampled round: equal finish, bounds in their order, Monte Carlo against enumeration."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from airtune.errors import InputError
from airtune.solvers.sampling_time import (
    RoundTimes,
    Scenarios,
    additive_bound,
    every_cohort,
    expected_seconds,
    expected_slowest,
    lower_bound,
    slowest_bound,
    with_split,
)


def random_times(seed: int, size: int | None = None) -> tuple[RoundTimes, np.ndarray]:
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 9)) if size is None else size
    upload = rng.lognormal(0, 1, size) * (rng.random(size) > 0.15)
    fixed, idle = rng.choice([0.0, 0.5]), rng.choice([0.0, 2.0])
    times = RoundTimes.of(rng.lognormal(0, 1, size), upload, float(rng.lognormal(0, 1)), float(fixed), float(idle))
    return times, rng.uniform(0.02, 1.0, size)


@pytest.mark.parametrize("seed", range(30))
def test_all_of_a_cohort_finish_together_and_use_the_whole_band(seed: int) -> None:
    times, _ = random_times(seed, 6)
    cohorts = every_cohort(6)
    seconds = times.of_cohorts(cohorts) - times.fixed
    for members, total in zip(cohorts, seconds, strict=True):
        tau, t = times.compute[members], times.upload[members]
        if not members.any():
            assert total == pytest.approx(times.idle, abs=1e-12)
            continue
        sends = t > 0
        band = t[sends] / (total - tau[sends])
        slowest_silent = tau[~sends].max(initial=0.0)
        if total > slowest_silent * (1 + 1e-9):
            assert band.sum() == pytest.approx(times.bandwidth, rel=1e-9)
        else:  # someone with nothing to send computes longest: the band is not the limit
            assert band.sum() <= times.bandwidth * (1 + 1e-9)
        assert (tau + t / times.bandwidth <= total * (1 + 1e-12)).all()


@given(st.integers(0, 10**6))
def test_never_later_than_with_an_equal_split(seed: int) -> None:
    times, _ = random_times(seed)
    cohorts = every_cohort(times.size)
    assert (times.of_cohorts(cohorts) <= with_split(times, "equal").of_cohorts(cohorts) * (1 + 1e-12)).all()


@given(st.integers(0, 10**6))
def test_the_bounds_keep_their_order(seed: int) -> None:
    times, q = random_times(seed)
    exact = expected_seconds(times, q, Scenarios()).value
    assert additive_bound(times, q) >= slowest_bound(times, q) * (1 - 1e-12)
    assert slowest_bound(times, q) >= exact * (1 - 1e-12)
    assert exact >= lower_bound(times, q) * (1 - 1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_monte_carlo_agrees_with_enumeration_within_its_error(seed: int) -> None:
    times, q = random_times(seed, 8)
    exact = expected_seconds(times, q, Scenarios())
    assert exact.error == 0.0
    estimate = expected_seconds(times, q, Scenarios.draw(3000, 8, seed))
    assert abs(estimate.value - exact.value) <= 4.5 * estimate.error + 1e-9
    assert estimate.error < 0.05 * exact.value


def test_the_slowest_by_formula_and_by_enumeration() -> None:
    times, q = random_times(3, 7)
    cohorts, weight = Scenarios().cohorts(q)
    assert weight.sum() == pytest.approx(1.0)
    slowest = np.where(cohorts, times.compute, 0.0).max(axis=1)
    assert expected_slowest(times.compute, q) == pytest.approx(weight @ slowest)


def test_common_random_numbers_make_more_participation_never_faster() -> None:
    times, q = random_times(5, 20)
    scenarios = Scenarios.draw(200, 20)
    small, large = scenarios.cohorts(0.5 * q)[0], scenarios.cohorts(q)[0]
    assert (large | ~small).all()
    times = RoundTimes.of(times.compute, times.upload, times.bandwidth)
    assert (times.of_cohorts(large) >= times.of_cohorts(small) * (1 - 1e-12)).all()


def test_scenarios_are_a_pure_function_of_their_arguments() -> None:
    one, other = (Scenarios.draw(5, 7, seed=3).uniforms for _ in range(2))
    np.testing.assert_array_equal(one, other)
    assert not np.array_equal(one, Scenarios.draw(5, 7, seed=4).uniforms)
    assert Scenarios.all_or(256, 8).uniforms is None
    assert Scenarios.all_or(255, 8).uniforms is not None


def test_a_certain_cohort_has_no_randomness() -> None:
    times, _ = random_times(6, 30)
    estimate = expected_seconds(times, np.ones(30), Scenarios.draw(20, 30))
    assert estimate.value == pytest.approx(float(times.of_cohorts(np.ones((1, 30), bool))[0]))
    assert estimate.error < 1e-9


@pytest.mark.parametrize(
    ("field", "value"), [("compute", [-1.0]), ("upload", [np.nan]), ("bandwidth", 0.0), ("idle", -1.0), ("split", "x")]
)
def test_bad_numbers_are_refused(field: str, value) -> None:
    with pytest.raises(InputError, match=field):
        RoundTimes.of(**{"compute": [1.0], "upload": [1.0], "bandwidth": 1.0, field: value})
