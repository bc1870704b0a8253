"""The achievable rate, its derivative and its inverse."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import lambertw

from airtune.wireless.rate import (
    achievable_rate,
    bandwidth_for_rate,
    power_for_rate,
    rate_derivative,
    snr_for_efficiency,
)
from airtune.wireless.units import dbm_to_watt

NOISE = 4e-21

links = st.tuples(
    st.floats(1e3, 1e9),  # bandwidth
    st.floats(1e-3, 1e2),  # power
    st.floats(1e-16, 1e-4),  # gain
    st.floats(1.0, 10.0),  # gap
)


def test_the_scale_of_a_known_link() -> None:
    """300 m of a macro cell, 1 MHz, 23 dBm, -174 dBm/Hz: 28.6 dB and 9.5 Mbit/s."""
    gain = 10 ** (-(128.1 + 37.6 * np.log10(0.3)) / 10)
    noise = dbm_to_watt(-174.0)
    power = dbm_to_watt(23.0)
    assert 10 * np.log10(power * gain / (noise * 1e6)) == pytest.approx(28.6, abs=0.1)
    assert achievable_rate(1e6, power, gain, noise) == pytest.approx(9.5e6, rel=0.01)


@given(links)
def test_inverse_undoes_the_rate(link) -> None:
    width, power, gain, gap = link
    rate = achievable_rate(width, power, gain, NOISE, gap)
    c = power * gain / (NOISE * gap)
    conditioning = 1.0 / max(1.0 - float(rate) * np.log(2) / c, 1e-16)
    assert bandwidth_for_rate(rate, power, gain, NOISE, gap) == pytest.approx(width, rel=1e-14 * conditioning + 1e-12)


@given(links)
def test_power_undoes_the_rate(link) -> None:
    width, power, gain, gap = link
    rate = achievable_rate(width, power, gain, NOISE, gap)
    assert power_for_rate(rate, width, gain, NOISE, gap) == pytest.approx(power, rel=1e-9)


@given(links)
def test_derivative_is_that_of_the_rate(link) -> None:
    width, power, gain, gap = link
    with mpmath.workdps(50):
        c = mpmath.mpf(power) * gain / (mpmath.mpf(gap) * NOISE)
        exact = mpmath.diff(lambda w: w * mpmath.log(1 + c / w) / mpmath.log(2), width)
    assert rate_derivative(width, power, gain, NOISE, gap) == pytest.approx(float(exact), rel=1e-9)


@given(links, st.floats(1.01, 100.0))
def test_rate_is_increasing_concave_and_bounded(link, factor) -> None:
    width, power, gain, gap = link
    low, high = (float(achievable_rate(w, power, gain, NOISE, gap)) for w in (width, factor * width))
    limit = float(achievable_rate(np.inf, power, gain, NOISE, gap))
    assert low <= high * (1 + 1e-12)
    assert high <= limit * (1 + 1e-12)
    assert high / factor <= low * (1 + 1e-12)
    assert limit == pytest.approx(power * gain / (gap * NOISE) / np.log(2))


def test_edges() -> None:
    assert achievable_rate(0.0, 1.0, 1e-10, NOISE) == 0.0
    assert achievable_rate(1e6, 0.0, 1e-10, NOISE) == 0.0
    assert achievable_rate(1e6, 1.0, 0.0, NOISE) == 0.0
    assert bandwidth_for_rate(0.0, 1.0, 1e-10, NOISE) == 0.0
    assert bandwidth_for_rate(1.0, 1.0, 0.0, NOISE) == np.inf
    limit = achievable_rate(np.inf, 1.0, 1e-10, NOISE)
    assert bandwidth_for_rate(limit, 1.0, 1e-10, NOISE) == np.inf
    assert bandwidth_for_rate(2 * limit, 1.0, 1e-10, NOISE) == np.inf
    assert power_for_rate(0.0, 0.0, 0.0, NOISE) == 0.0
    assert power_for_rate(1.0, 0.0, 1.0, NOISE) == np.inf


def test_against_scipys_lambert_w_where_it_is_exact() -> None:
    y = np.concatenate([10.0 ** np.linspace(-12, -0.3, 500), np.linspace(0.5, 0.9, 100)])
    lambert = -np.real(lambertw(-y * np.exp(-y), -1)) / y - 1.0
    np.testing.assert_allclose(snr_for_efficiency(y), lambert, rtol=1e-13)


@pytest.mark.parametrize("rest", [1e-1, 1e-2, 1e-4, 1e-6, 1e-8, 1e-10, 1e-12])
def test_near_the_limit_where_scipys_lambert_w_fails(rest) -> None:
    y = 1.0 - rest
    with mpmath.workdps(60):
        exact = mpmath.findroot(lambda x: mpmath.log(1 + x) - mpmath.mpf(y) * x, (1.9 * rest, 2.5 * rest))
    assert snr_for_efficiency(y) == pytest.approx(float(exact), rel=1e-14 / rest + 1e-14)


@pytest.mark.parametrize("rest", [0.5, 1e-3, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9])
@pytest.mark.parametrize("gap", [1.0, 3.0])
def test_the_rate_of_the_inverse_is_the_rate_at_the_extremes(rest, gap) -> None:
    """R(R^-1(rate)) = rate to 1e-9 up to 1 - 1e-9 of the limit c / ln 2, and down to 1e-12 of it."""
    power, gain = 0.2, 1e-12
    limit = float(achievable_rate(np.inf, power, gain, NOISE, gap))
    for rate in (limit * (1.0 - rest), limit * rest * 1e-3):
        back = achievable_rate(bandwidth_for_rate(rate, power, gain, NOISE, gap), power, gain, NOISE, gap)
        assert back == pytest.approx(rate, rel=1e-9)


def test_shapes_broadcast() -> None:
    rate = achievable_rate(np.ones((3, 1)) * 1e6, 0.2, np.full(4, 1e-12), NOISE)
    assert rate.shape == (3, 4)
    assert bandwidth_for_rate(rate, 0.2, 1e-12, NOISE).shape == (3, 4)
