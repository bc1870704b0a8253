"""The offline stage: the keep ratio that fits the mean latency, and the rank of least bound, by brute force."""

import numpy as np
import pytest

from airtune.errors import InputError
from airtune.solvers.equal_finish import equal_finish
from airtune.solvers.structural_rank import components_sent, largest_keep_ratio, structural_rank

NOISE, TOTAL = 4e-21, 5e6


def cell(size=5, seed=0, draws=None):
    rng = np.random.default_rng(seed)
    distance = rng.uniform(0.05, 0.5, size)
    gain = 10 ** (-(128.1 + 37.6 * np.log10(distance)) / 10)
    if draws is not None:
        gain = gain * rng.gamma(3.0, 1 / 3, (draws, size))
    return rng.uniform(0.0, 0.5, size), np.full(size, 0.2), gain


def mean_latency(compute, power, gain, bits):
    return np.mean([equal_finish(compute, bits, power, row, NOISE, TOTAL).objective for row in np.atleast_2d(gain)])


@pytest.mark.parametrize("draws", [None, 8])
@pytest.mark.parametrize("rank", [2, 8, 32])
def test_the_keep_ratio_meets_the_limit_with_equality(rank, draws):
    compute, power, gain = cell(draws=draws)
    least, most = (mean_latency(compute, power, gain, s * 1e7 + 1e5) for s in (1 / rank, 1.0))
    limit = 0.5 * (least + most)
    found = largest_keep_ratio(compute, 1e7, 1e5, rank, power, gain, NOISE, TOTAL, limit)
    assert found.ok
    assert mean_latency(compute, power, gain, found.value * 1e7 + 1e5) == pytest.approx(limit, rel=1e-4)
    assert found.objective <= limit


def test_brute_force_over_components():
    compute, power, gain = cell(seed=3)
    for limit in np.linspace(0.5, 4.0, 8):
        fits = [i for i in range(1, 9) if mean_latency(compute, power, gain, i / 8 * 1e7 + 1e5) <= limit]
        found = largest_keep_ratio(compute, 1e7, 1e5, 8, power, gain, NOISE, TOTAL, limit)
        assert found.ok == bool(fits)
        if fits:
            assert components_sent(8, found.value + 1e-6) == max(fits)


def test_limits_that_are_loose_or_out_of_reach():
    compute, power, gain = cell()
    assert largest_keep_ratio(compute, 1e7, 0.0, 8, power, gain, NOISE, TOTAL, 1e3).value == 1.0
    tight = largest_keep_ratio(compute, 1e7, 0.0, 8, power, gain, NOISE, TOTAL, 0.3)
    assert tight.status == "infeasible"
    assert np.isnan(tight.value)


@pytest.mark.parametrize("seed", range(20))
def test_the_rank_of_least_bound_by_brute_force(seed):
    rng = np.random.default_rng(seed)
    ranks = (1, 2, 4, 8)
    ratios = np.where(rng.random(4) < 0.2, np.nan, rng.uniform(0.2, 1.0, 4))
    residual, covariance = np.sort(rng.random(4))[::-1], np.sort(rng.random(4))
    energies = np.sort(rng.random(8))[::-1]
    found = structural_rank(ranks, ratios, residual, covariance, energies)
    values = []
    for rank, s, e, c in zip(ranks, ratios, residual, covariance, strict=True):
        kept = max(1, int(s * rank + 1e-6)) if not np.isnan(s) else None
        values.append(np.inf if kept is None else e + c + sum(energies[i] for i in range(kept, rank)))
    if np.isinf(min(values)):
        assert found.status == "infeasible"
        return
    assert found.value["rank"] == ranks[int(np.argmin(values))]
    assert found.objective == pytest.approx(min(values))
    np.testing.assert_allclose(found.value["bound"], values)


def test_growing_covariance_stops_the_rank():
    """At fixed bits a larger rank only offers a larger pool: it is taken until the covariance outgrows the gain."""
    ranks, residual = (1, 2, 4, 8), [4.0, 2.0, 1.0, 0.5]
    ratios = [1.0, 1.0, 0.5, 0.25]
    energies = [4.0, 2.0, 0.4, 0.3, 0.1, 0.1, 0.1, 0.1]
    assert structural_rank(ranks, ratios, residual, [0.0, 0.0, 0.0, 0.0], energies).value["rank"] == 8
    assert structural_rank(ranks, ratios, residual, [0.0, 0.1, 0.2, 1.0], energies).value["rank"] == 4
    assert structural_rank(ranks, ratios, residual, [0.0, 0.1, 3.0, 9.0], energies).value["rank"] == 2


def test_no_rank_within_the_limit():
    found = structural_rank((1, 2), [np.nan, np.nan], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0])
    assert found.status == "infeasible"
    with pytest.raises(InputError, match="ranks"):
        structural_rank((1, 4), [1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0])
