"""Each fading law against its closed-form statistics."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from airtune.errors import InputError
from airtune.wireless.fading import NoFading, Rayleigh, Rician, gauss_markov, jakes_coefficient

BLOCK, CARRIER = 0.05, 2e9
MANY = np.arange(20_000)

RAYLEIGHS = [
    Rayleigh(),
    Rayleigh(speed=0.0),
    Rayleigh(speed=0.2),
    Rayleigh(speed=30.0),
    Rayleigh(correlation="jakes"),
    Rayleigh(correlation="none"),
]


def coefficients(law, clients=MANY, first=0, count=1, seed=0, link="uplink"):
    start = np.broadcast_to(np.asarray(first, dtype=np.int64), clients.shape)
    return law.coefficient(seed, link, clients, start, count, BLOCK, CARRIER)


@pytest.mark.parametrize("law", RAYLEIGHS, ids=str)
@pytest.mark.parametrize("block", [0, 1, 7, 8, 123_456_789])
def test_rayleigh_power_is_exponential_and_phase_uniform(law, block) -> None:
    h = coefficients(law, first=block)[:, 0]
    assert stats.kstest(np.abs(h) ** 2, "expon").pvalue > 1e-3
    assert stats.kstest(np.angle(h), stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > 1e-3
    assert stats.kstest(np.abs(h), stats.rayleigh(scale=np.sqrt(0.5)).cdf).pvalue > 1e-3


@pytest.mark.parametrize("k", [0.0, 0.5, 4.0, 20.0])
@pytest.mark.parametrize("correlation", ["gauss-markov", "jakes"])
def test_rician_envelope_follows_rice(k, correlation) -> None:
    law = Rician(k_factor=k, correlation=correlation)
    h = coefficients(law, first=11)[:, 0]
    scale = np.sqrt(0.5 / (k + 1))
    assert stats.kstest(np.abs(h), stats.rice(np.sqrt(2 * k), scale=scale).cdf).pvalue > 1e-3
    assert np.mean(np.abs(h) ** 2) == pytest.approx(1.0, abs=0.03)


def test_ks_would_notice_another_law() -> None:
    """The statistic has the power to tell Rician of K = 0.5 from Rayleigh at this sample size."""
    h = coefficients(Rician(k_factor=0.5))[:, 0]
    assert stats.kstest(np.abs(h) ** 2, "expon").pvalue < 1e-6


@pytest.mark.parametrize("speed", [0.05, 0.2, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("first", [0, 1000])
def test_gauss_markov_correlation_is_jakes_coefficient_to_the_lag(speed, first) -> None:
    law = Rayleigh(speed=speed)
    rho = float(jakes_coefficient(speed * CARRIER / 299_792_458.0, BLOCK))
    h = coefficients(law, first=first, count=10)
    for i in (0, 3):
        for lag in range(1, 6):
            measured = np.mean(h[:, i + lag] * h[:, i].conj())
            assert abs(measured - rho**lag) < 0.03


def test_gauss_markov_is_first_order() -> None:
    """Given its neighbour, a value knows nothing more about the one before: partial correlation 0."""
    h = gauss_markov(0, "x", MANY, np.zeros(MANY.size, dtype=np.int64), 8, 0.8)
    for i in range(6):
        residual = h[:, i + 2] - 0.8 * h[:, i + 1]
        assert abs(np.mean(residual * h[:, i].conj())) < 0.02
        assert np.mean(np.abs(residual) ** 2) == pytest.approx(1 - 0.8**2, rel=0.05)


@pytest.mark.parametrize("rho", [0.0, 1e-10, 0.3, -0.4, 0.99, 0.999999, 1.0])
@pytest.mark.parametrize("start", [0, 1, 31, 32, 1000, 10**12])
def test_a_stretch_equals_single_queries(rho, start) -> None:
    clients = np.arange(3)
    first = np.array([start, start + 5, start + 64])
    stretch = gauss_markov(1, "x", clients, first, 40, rho)
    for j in (0, 1, 17, 39):
        np.testing.assert_array_equal(stretch[:, j], gauss_markov(1, "x", clients, first + j, 1, rho)[:, 0])


@pytest.mark.parametrize("speed", [0.5, 1.0, 3.0])
def test_sum_of_waves_has_the_bessel_correlation(speed) -> None:
    h = coefficients(Rayleigh(speed=speed, correlation="jakes"), first=500, count=12)
    lags = np.arange(12)
    measured = np.array([np.mean(h[:, lag] * h[:, 0].conj()) for lag in lags])
    wanted = jakes_coefficient(speed * CARRIER / 299_792_458.0, lags * BLOCK)
    np.testing.assert_allclose(measured.real, wanted, atol=0.03)
    np.testing.assert_allclose(measured.imag, 0.0, atol=0.03)


def test_frozen_fading_does_not_change() -> None:
    h = coefficients(Rayleigh(speed=0.0), first=3, count=50)
    assert (h == h[:, :1]).all()


def test_links_clients_and_seeds_fade_independently() -> None:
    base = coefficients(Rayleigh())[:, 0]
    for other in (coefficients(Rayleigh(), link="downlink"), coefficients(Rayleigh(), seed=1)):
        assert abs(np.mean(base * other[:, 0].conj())) < 0.03
    assert abs(np.mean(base[:-1] * base[1:].conj())) < 0.03


@pytest.mark.parametrize("law", [NoFading(), Rayleigh(), Rician(k_factor=0.0), Rician(k_factor=1.0), Rician()], ids=str)
def test_mean_log_power_is_that_of_the_law(law) -> None:
    power = np.abs(coefficients(law, clients=np.arange(200_000))[:, 0]) ** 2
    assert law.mean_log_power() == pytest.approx(np.log(power).mean(), abs=0.02)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Rayleigh(speed=-1.0), "speed"),
        (lambda: Rayleigh(speed=float("nan")), "speed"),
        (lambda: Rayleigh(correlation="jake"), "did you mean 'jakes'"),
        (lambda: Rayleigh(sinusoids=31), "sinusoids"),
        (lambda: Rician(k_factor=-0.1), "k_factor"),
    ],
)
def test_bad_fields_are_refused(make, field) -> None:
    with pytest.raises(InputError, match=field):
        make()
