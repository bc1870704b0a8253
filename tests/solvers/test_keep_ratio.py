"""Continuous keep ratios: one price per Hz inside, and Nelder-Mead finds nothing better."""

import itertools
import math

import mpmath
import numpy as np
import pytest
from scipy.optimize import minimize

from airtune.errors import InputError
from airtune.solvers.drift_plus_penalty import PricedRound, drift_plus_penalty
from airtune.solvers.keep_ratio import (
    PowerError,
    ProfileError,
    RatioProblem,
    best_keep_ratios,
    snr_for_rate_slope,
)

NOISE, TOTAL, RANK, BITS = 4e-21, 5e6, 8, 9.4e6
MODELS = ("linear", "quadratic", "cubic", "profile")


def random_problem(size, seed, model, *, constant=1e4, queue=None):
    rng = np.random.default_rng(seed)
    distance = rng.uniform(0.05, 0.5, size)
    gain = 10 ** (-(128.1 + 37.6 * np.log10(distance)) / 10) * rng.exponential(size=size)
    weights = rng.uniform(0.5, 1.5, size)
    weights /= weights.sum()
    squares = np.sort(rng.exponential(size=(size, RANK)) ** 2, axis=1)[:, ::-1]
    tail = np.concatenate([np.cumsum(squares[:, ::-1], axis=1)[:, ::-1], np.zeros((size, 1))], axis=1)
    scale = rng.uniform(0.5, 1.5, size)
    error = ProfileError(tail / float(weights @ tail[:, 0]))
    if model != "profile":
        error = PowerError(scale, {"linear": 1.0, "quadratic": 2.0, "cubic": 3.0}[model])
    return RatioProblem(
        compute_seconds=rng.uniform(0.0, 1.0, size),
        power=rng.uniform(0.1, 0.2, size),
        gain=gain,
        noise_density=NOISE,
        total_bandwidth=TOTAL,
        bits=BITS,
        constant_bits=constant,
        least_ratio=1 / RANK,
        weights=weights,
        error=error,
        queue=rng.uniform(0.02, 0.5) if queue is None else queue,
    )


def error_of(p, k, s):
    """Return one client's weighted error, written a second time."""
    s = min(s, 1.0)
    if isinstance(p.error, PowerError):
        return p.weights[k] * p.error.scale[k] * (1.0 - s) ** p.error.exponent
    place = s * RANK
    i = min(int(place), RANK - 1)
    low, high = p.error.tail[k, i], p.error.tail[k, i + 1]
    return p.weights[k] * (low + (place - i) * (high - low))


def objective(p, shares, latency):
    """Return V sum p e + Q tau for a split in shares of the band; a large value outside the constraints."""
    total, violation = p.queue * latency, 0.0
    for k, share in enumerate(shares):
        w = share * TOTAL
        rate = w * math.log2(1.0 + p.power[k] * p.gain[k] / (NOISE * w)) if w > 0.0 else 0.0
        s = ((latency - p.compute_seconds[k]) * rate - p.constant_bits) / BITS
        violation += max(p.least_ratio - s, 0.0)
        total += error_of(p, k, max(s, p.least_ratio))
    return total + 1e2 * violation + (1.0 if violation > 1e-9 else 0.0)


def nelder_mead(p, found, starts, seed):
    """Return the best objective of several starts, of which the first is the answer itself."""
    size, rng = p.compute_seconds.size, np.random.default_rng(seed)

    def value(z):
        shares = np.exp(z[:-1] - z[:-1].max())
        return objective(p, shares / shares.sum(), math.exp(z[-1]))

    best = math.inf
    for index in range(starts):
        latency = p.finish(rng.uniform(1 / RANK, 1.0)).objective * 1.05
        z = np.append(rng.normal(size=size), math.log(latency))
        if index == 0:
            z = np.append(np.log(found.value["bandwidth"]), math.log(found.value["latency"] * (1 + 1e-9)))
        options = {"maxiter": 1500, "maxfev": 1500, "xatol": 1e-7, "fatol": 1e-11}
        best = min(best, minimize(value, z, method="Nelder-Mead", options=options).fun)
    return best


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_feasible_and_the_objective_is_that_of_the_value(model, size):
    p = random_problem(size, 10 + size, model)
    found = best_keep_ratios(p, grid=20)
    s, w, latency = (found.value[name] for name in ("keep_ratio", "bandwidth", "latency"))
    assert w.sum() <= TOTAL * (1 + 1e-9)
    assert ((s >= 1 / RANK) & (s <= 1.0)).all()
    assert objective(p, w / TOTAL * (1 + 1e-12), latency * (1 + 1e-12)) == pytest.approx(found.objective, rel=1e-6)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("seed", range(2))
def test_certificate_no_exchange_of_band_and_no_other_latency_helps(model, seed):
    p = random_problem(4, seed, model)
    found = best_keep_ratios(p, grid=20)
    w, latency, best = found.value["bandwidth"], found.value["latency"], found.objective
    for i, j in itertools.permutations(range(4), 2):
        for step in (1e-2, 1e-4):
            moved = w + step * TOTAL * (np.eye(4)[i] - np.eye(4)[j])
            if moved[j] > 0.0:
                assert objective(p, moved / TOTAL, latency) >= best * (1 - 1e-9)
    for factor in (0.98, 0.999, 1.001, 1.02):
        other = latency * factor
        if p.finish(1 / RANK).objective <= other <= p.finish(1.0).objective:
            assert p.inner(other).objective + p.queue * other >= best * (1 - 1e-7)


@pytest.mark.parametrize("model", ["quadratic", "cubic"])
def test_one_price_equalises_the_marginal_gains_of_clients_off_their_bounds(model):
    p = random_problem(5, 3, model)
    found = best_keep_ratios(p, grid=20)
    s, w, latency = (found.value[name] for name in ("keep_ratio", "bandwidth", "latency"))
    with mpmath.workdps(40):
        slope = []
        for k in range(5):
            peak = p.power[k] * p.gain[k] / NOISE

            def error(v, k=k, peak=peak):
                rate = v * mpmath.log(1 + peak / v) / mpmath.log(2)
                ratio = ((latency - p.compute_seconds[k]) * rate - p.constant_bits) / BITS
                return p.weights[k] * p.error.scale[k] * (1 - ratio) ** p.error.exponent

            slope.append(-float(mpmath.diff(error, w[k])))
    free = (s > 1 / RANK + 1e-6) & (s < 1 - 1e-6)
    prices = np.array(slope)[free]
    assert free.sum() >= 2
    assert np.ptp(prices) < 1e-6 * prices.max()


@pytest.mark.parametrize("model", MODELS)
def test_nelder_mead_finds_nothing_better(model):
    for seed in range(2):
        p = random_problem(3, 50 + seed, model)
        found = best_keep_ratios(p, grid=20)
        assert found.objective <= nelder_mead(p, found, 3, seed) * (1 + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_nelder_mead_finds_nothing_better_in_100_instances(model):
    for seed in range(25):
        p = random_problem(2 + seed % 3, 1000 + seed, model, constant=(0.0, 1e4, 1e6)[seed % 3])
        found = best_keep_ratios(p)
        assert found.objective <= nelder_mead(p, found, 6, seed) * (1 + 1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_a_free_latency_keeps_everything(model):
    found = best_keep_ratios(random_problem(4, 5, model, queue=0.0))
    np.testing.assert_allclose(found.value["keep_ratio"], 1.0, atol=1e-9)


def test_whole_components_are_close_to_their_relaxation():
    """The relaxation is never above the whole numbers, and these never far above it."""
    for seed in range(3):
        p = random_problem(4, seed, "profile")
        relaxed = best_keep_ratios(p, grid=25)
        bits = BITS * np.arange(1, RANK + 1) / RANK + p.constant_bits
        errors = p.weights[:, None] * p.error.tail[:, 1:]
        link = (p.compute_seconds, bits, p.power, p.gain, NOISE, TOTAL)
        whole = drift_plus_penalty(PricedRound.of(*link, errors, p.queue))
        assert relaxed.objective <= whole.objective * (1 + 1e-6)
        assert whole.objective <= relaxed.objective * 1.1


def test_profile_error_is_the_tail_with_straight_lines_between():
    tail = np.array([[4.0, 1.0, 0.0], [3.0, 2.0, 0.0]])
    profile = ProfileError(tail)
    np.testing.assert_allclose(profile.error(np.array([0.25, 0.75])), [2.5, 1.0])
    np.testing.assert_allclose(profile.slope(np.array([0.0, 0.5])), [6.0, 4.0])
    np.testing.assert_allclose(profile.slope(np.array([1.0, 1.0])), [0.0, 0.0])


def test_the_inverse_of_the_rates_slope():
    y = np.geomspace(1e-9, 50.0, 60)
    with mpmath.workdps(60):
        for wanted, x in zip(y, snr_for_rate_slope(y), strict=True):
            x = mpmath.mpf(float(x))
            assert float((mpmath.log(1 + x) - x / (1 + x)) / mpmath.mpf(float(wanted)) - 1) == pytest.approx(
                0, abs=1e-9
            )
    assert snr_for_rate_slope(0.0) == 0.0


def test_bad_prices_are_refused_and_dead_links_named():
    p = random_problem(3, 1, "quadratic", queue=-1.0)
    with pytest.raises(InputError, match="queue"):
        best_keep_ratios(p)
    dead = random_problem(3, 1, "quadratic")
    dead.gain[1] = 0.0
    assert "client 1" in best_keep_ratios(dead).message
