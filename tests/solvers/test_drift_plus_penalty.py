"""The priced round: feasible, never far from brute force or its bound, exact at the ends, and fast."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airtune.errors import InputError
from airtune.solvers.drift_plus_penalty import PricedRound, drift_plus_penalty
from airtune.solvers.latency_variants import client_queues, fixed_rate_choice
from airtune.wireless.rate import achievable_rate

NOISE, GAP, TOTAL = 4e-21, 1.3, 5e6


def random_round(size, rank, seed, *, queue=None, constant=1e5, equal_compute=False):
    """Return a round of SOFT: components of one size, measured profiles, gains as in a cell."""
    rng = np.random.default_rng(seed)
    distance = rng.uniform(0.05, 0.5, size)
    gain = 10 ** (-(128.1 + 37.6 * np.log10(distance)) / 10) * rng.exponential(size=size)
    squares = np.sort(rng.exponential(size=(size, rank)) ** 2, axis=1)[:, ::-1]
    tails = np.cumsum(squares[:, ::-1], axis=1)[:, ::-1]
    tails = np.concatenate([tails[:, 1:], np.zeros((size, 1))], axis=1)
    weights = rng.uniform(0.5, 1.5, size)
    errors = weights[:, None] * tails / (weights @ squares.sum(axis=1))
    compute = np.full(size, 0.5) if equal_compute else rng.uniform(0.0, 1.0, size)
    bits = 9.4e6 / rank * np.arange(1, rank + 1) + constant
    queue = rng.uniform(0.02, 0.6) if queue is None else queue
    return PricedRound.of(compute, bits, rng.uniform(0.1, 0.2, size), gain, NOISE, TOTAL, errors, queue, GAP)


def latency_of(p, choice, bandwidth):
    rate = achievable_rate(bandwidth, p.power, p.gain, NOISE, GAP)
    return float((p.compute_seconds + p.bits[choice] / rate).max())


def best_by_brute_force(p):
    choices = itertools.product(range(p.bits.size), repeat=p.compute_seconds.size)
    values = ((p.error(np.array(c)) + p.queue * p.finish(np.array(c)).objective, c) for c in choices)
    return min(values)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("size", "rank"), [(1, 8), (2, 8), (5, 16), (40, 8)])
def test_feasible_and_the_objective_is_that_of_the_value(size, rank, seed):
    p = random_round(size, rank, seed)
    found = drift_plus_penalty(p)
    choice, width, latency = found.value["choice"], found.value["bandwidth"], found.value["latency"]
    assert found.ok
    assert (width > 0.0).all() and width.sum() <= TOTAL * (1 + 1e-9)
    assert ((choice >= 0) & (choice < rank)).all()
    assert latency_of(p, choice, width) == pytest.approx(latency, rel=1e-9)
    assert found.objective == pytest.approx(p.error(choice) + p.queue * latency, rel=1e-12)
    assert found.value["bound"] <= found.objective * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(15))
@pytest.mark.parametrize(("size", "rank"), [(1, 16), (2, 8), (3, 5)])
def test_within_one_per_cent_of_the_best_whole_numbers(size, rank, seed):
    p = random_round(size, rank, seed)
    best, _ = best_by_brute_force(p)
    found = drift_plus_penalty(p)
    assert best * (1 - 1e-9) <= found.objective <= best * 1.01
    assert found.value["bound"] <= best * (1 + 2e-3)  # up to the resolution of the search over the latency


def test_most_small_rounds_are_solved_exactly():
    exact = 0
    for seed in range(100, 140):
        p = random_round(2, 6, seed)
        exact += drift_plus_penalty(p).objective <= best_by_brute_force(p)[0] * (1 + 1e-9)
    assert exact >= 38


@pytest.mark.parametrize("seed", range(10))
def test_deep_fades_are_not_asked_for_what_no_band_carries(seed):
    """At the latency that the rest needs, a client in a deep fade cannot send more however wide its band."""
    p = random_round(8, 8, seed, queue=0.3)
    p = replace(p, gain=p.gain * np.where(np.arange(8) == 3, 1e-4, 1.0))
    found = drift_plus_penalty(p)
    assert found.objective - found.value["bound"] <= float(-np.diff(p.errors, axis=1).max()) + 2e-3 * found.objective


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 30))
def test_many_clients_come_close_to_the_bound(seed, size):
    p = random_round(size, 8, seed)
    found = drift_plus_penalty(p)
    one = float(-np.diff(p.errors, axis=1).max())  # the rounding costs at most one component
    assert found.objective - found.value["bound"] <= one + 2e-3 * found.objective


@pytest.mark.parametrize(("size", "rank", "seed"), [(400, 32, 0), (1000, 16, 1), (1000, 8, 2)])
def test_large_rounds_sort_only_near_the_cut_and_find_the_same(size, rank, seed, monkeypatch):
    p = random_round(size, rank, seed, queue=0.02)
    p = replace(p, total_bandwidth=1e5 * size)
    found = drift_plus_penalty(p)
    monkeypatch.setattr("airtune.solvers.drift_plus_penalty._SORTED_AT_ONCE", 10**9)
    sorted_whole = drift_plus_penalty(p)
    np.testing.assert_array_equal(found.value["choice"], sorted_whole.value["choice"])
    assert found.value["bound"] == pytest.approx(sorted_whole.value["bound"], rel=1e-12)
    one = float(-np.diff(p.errors, axis=1).max())
    assert 0.0 <= found.objective - found.value["bound"] <= one + 2e-3 * found.objective
    assert 0 < found.value["choice"].mean() < rank - 1


def test_fewer_choices_on_the_grid_do_not_mislead():
    """The least bound is no worse than that of a fine grid with all choices."""
    from airtune.solvers.drift_plus_penalty import _Search

    for seed in range(15):
        p = random_round(12, 32, seed)
        found = drift_plus_penalty(p)
        low, high = p.finish(0).objective, p.finish(31).objective
        search = _Search(p, low, high)
        fine = min(search.at(float(t))[1] for t in np.geomspace(low, high, 400))
        assert found.value["bound"] <= fine * (1 + 2e-3)


@pytest.mark.parametrize("seed", range(5))
def test_a_free_latency_sends_everything_and_a_dear_one_almost_nothing(seed):
    free = drift_plus_penalty(random_round(6, 8, seed, queue=0.0))
    assert (free.value["choice"] == 7).all()
    assert free.objective == 0.0
    p = random_round(6, 8, seed, queue=1e6)
    dear = drift_plus_penalty(p)
    assert dear.value["latency"] == pytest.approx(p.finish(0).objective, rel=1e-6)


@pytest.mark.parametrize("rest", [0.5, 1e-3, 1e-5, 1e-7, 1e-9])
def test_the_solvers_own_inverse_gives_the_rate_back_at_the_extremes(rest):
    """R(needed) = rate to 1e-9, from a tiny part of the limit c / ln 2 to 1 - 1e-9 of it; beyond it none is enough."""
    p = random_round(1, 4, 0)
    p = replace(p, compute_seconds=np.zeros(1))
    limit = float(achievable_rate(np.inf, p.power, p.gain, NOISE, GAP)[0])
    for share in (1.0 - rest, 1e-3 * rest):
        seconds = p.bits[2] / (share * limit)
        width = p.needed(float(seconds))[0, 2]
        assert achievable_rate(width, p.power, p.gain, NOISE, GAP)[0] == pytest.approx(share * limit, rel=1e-9)
    assert p.needed(float(p.bits[2] / (1.0000001 * limit)))[0, 2] == np.inf


def test_latency_falls_and_error_rises_with_the_price():
    latencies, errors = [], []
    for queue in (0.0, 0.03, 0.1, 0.3, 1.0, 10.0):
        p = random_round(8, 8, 3, queue=queue)
        found = drift_plus_penalty(p)
        latencies.append(found.value["latency"])
        errors.append(p.error(found.value["choice"]))
    assert (np.diff(latencies) <= 1e-6).all() and latencies[-1] < 0.8 * latencies[0]
    assert (np.diff(errors) >= -1e-9).all()


@pytest.mark.parametrize("seed", range(6))
def test_a_warm_start_finds_the_same(seed):
    p = random_round(12, 8, seed)
    cold = drift_plus_penalty(p)
    for factor in (0.9, 1.0, 1.1, 5.0):
        warm = drift_plus_penalty(p, cold.value["latency"] * factor)
        assert warm.objective == pytest.approx(cold.objective, rel=3e-3)


def test_order_of_clients_does_not_matter_and_inputs_stay():
    p = random_round(10, 8, 5)
    order = np.random.default_rng(0).permutation(10)
    before = [a.copy() for a in (p.compute_seconds, p.bits, p.power, p.gain, p.errors)]
    shuffled = PricedRound.of(
        p.compute_seconds[order], p.bits, p.power[order], p.gain[order], NOISE, TOTAL, p.errors[order], p.queue, GAP
    )
    one, other = drift_plus_penalty(p), drift_plus_penalty(shuffled)
    np.testing.assert_array_equal(other.value["choice"], one.value["choice"][order])
    for now, then in zip((p.compute_seconds, p.bits, p.power, p.gain, p.errors), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_a_client_without_a_channel_is_named():
    p = random_round(4, 8, 1)
    p = replace(p, gain=p.gain * np.array([1.0, 1.0, 0.0, 1.0]))
    found = drift_plus_penalty(p)
    assert found.status == "infeasible"
    assert "client 2" in found.message


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("queue", {"queue": -1.0}),
        ("queue", {"queue": np.nan}),
        ("bits", {"bits": [2e6, 1e6]}),
        ("errors", {"errors": [[1.0, 0.0, 0.0]]}),
        ("errors", {"errors": [[np.nan, 0.0]]}),
        ("compute_seconds", {"compute_seconds": -1.0}),
        ("gain", {"gain": np.inf}),
    ],
)
def test_bad_numbers_are_input_errors_that_name_the_field(name, change):
    good = {
        "compute_seconds": 0.1,
        "bits": [1e6, 2e6],
        "power": 0.1,
        "gain": 1e-10,
        "noise_density": NOISE,
        "total_bandwidth": TOTAL,
        "errors": [[1.0, 0.0]],
        "queue": 1.0,
    }
    with pytest.raises(InputError, match=name):
        PricedRound.of(**{**good, **change})


# ---------------------------------------------------------------------------------------------------- fixed rates


@pytest.mark.parametrize("seed", range(10))
def test_fixed_rates_are_solved_exactly(seed):
    rng = np.random.default_rng(seed)
    seconds = np.cumsum(rng.uniform(0.1, 1.0, (3, 5)), axis=1)
    errors = np.sort(rng.uniform(size=(3, 5)), axis=1)[:, ::-1]
    queue = rng.uniform(0.05, 1.0)
    found = fixed_rate_choice(seconds, errors, queue)
    values = []
    for choice in itertools.product(range(5), repeat=3):
        rows = np.arange(3), np.array(choice)
        values.append(errors[rows].sum() + queue * seconds[rows].max())
    assert found.objective == pytest.approx(min(values), rel=1e-12)
    rows = np.arange(3), found.value["choice"]
    assert errors[rows].sum() + queue * seconds[rows].max() == pytest.approx(found.objective, rel=1e-12)


def test_fixed_rate_zero_is_infeasible_and_named():
    found = fixed_rate_choice([[1.0, 2.0], [np.inf, np.inf]], [[1.0, 0.0]] * 2, 1.0)
    assert found.status == "infeasible"
    assert "client 1" in found.message


# ---------------------------------------------------------------------------------------------------- client queues


def client_objective(p, queues, choice, width):
    rate = achievable_rate(width, p.power, p.gain, NOISE, GAP)
    return p.error(choice) + float((queues * (p.compute_seconds + p.bits[choice] / rate)).sum())


@pytest.mark.parametrize("seed", range(8))
def test_client_queues_are_feasible_and_neither_step_helps(seed):
    p = random_round(4, 8, seed)
    queues = np.random.default_rng(seed).uniform(0.02, 0.3, 4)
    found = client_queues(p, queues, rounds=50)
    choice, width = found.value["choice"], found.value["bandwidth"]
    assert width.sum() <= TOTAL * (1 + 1e-9)
    assert found.objective == pytest.approx(client_objective(p, queues, choice, width), rel=1e-9)
    for k, i in itertools.product(range(4), range(8)):
        other = choice.copy()
        other[k] = i
        assert client_objective(p, queues, other, width) >= found.objective * (1 - 1e-9)
    rng = np.random.default_rng(0)
    for _ in range(200):
        moved = width * np.exp(0.1 * rng.normal(size=4))
        moved *= TOTAL / moved.sum()
        assert client_objective(p, queues, choice, moved) >= found.objective * (1 - 1e-9)


def test_empty_client_queues_send_everything():
    p = random_round(5, 8, 2)
    found = client_queues(p, np.zeros(5))
    assert (found.value["choice"] == 7).all()
    one = np.zeros(5)
    one[3] = 50.0
    found = client_queues(p, one)
    assert found.value["choice"][3] < 7
    assert (np.delete(found.value["choice"], 3) == 7).all()
