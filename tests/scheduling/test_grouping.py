"""Near-IID groups: sizes, exchanges that never hurt, and labels much closer to everybody's than by chance."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from airtune.scheduling.grouping import GroupingProblem, divergence, near_iid_groups, placed, swapped


def skewed(clients: int, alpha: float, seed: int, classes: int = 4) -> np.ndarray:
    """Return label counts, [clients, classes]: each client's shares from a Dirichlet law."""
    rng = np.random.default_rng(seed)
    return np.round(rng.dirichlet(np.full(classes, alpha), clients) * rng.integers(50, 200, (clients, 1)))


def problem_of(clients: int, groups: int, seed: int, alpha: float = 0.1, weight: float = 0.7) -> GroupingProblem:
    seconds = np.exp(np.random.default_rng(seed + 1).uniform(0.0, 2.0, clients))
    return GroupingProblem(skewed(clients, alpha, seed) + 1.0, seconds, groups, weight)


def mean_divergence(problem: GroupingProblem, group: np.ndarray) -> float:
    everyone = problem.labels.sum(axis=0)
    return float(np.mean([divergence(problem.labels[group == g].sum(axis=0), everyone) for g in range(problem.groups)]))


def test_divergence_is_that_of_the_textbook_and_zero_for_equal_shares() -> None:
    p, q = np.array([0.5, 0.5]), np.array([0.25, 0.75])
    assert float(divergence(100 * p, 1000 * q)) == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3), abs=1e-5)
    assert float(divergence(p, 7 * p)) == pytest.approx(0.0, abs=1e-12)
    assert np.all(divergence(skewed(20, 0.1, 0), np.ones(4)) >= 0.0)


@given(clients=st.integers(1, 30), groups=st.integers(1, 8), seed=st.integers(0, 1000), weight=st.floats(0.0, 1.0))
def test_groups_are_disjoint_cover_all_and_differ_by_one_at_most(
    clients: int, groups: int, seed: int, weight: float
) -> None:
    problem = problem_of(clients, min(groups, clients), seed, weight=weight)
    for group in (placed(problem), near_iid_groups(problem)):
        assert group.shape == (clients,)
        sizes = np.bincount(group, minlength=problem.groups)
        assert sizes.sum() == clients
        assert sizes.max() - sizes.min() <= 1


@given(clients=st.integers(2, 24), groups=st.integers(2, 6), seed=st.integers(0, 1000))
def test_exchanges_never_raise_the_cost_and_nothing_is_left_to_exchange(clients: int, groups: int, seed: int) -> None:
    problem = problem_of(clients, min(groups, clients), seed)
    before = placed(problem)
    after = swapped(problem, before)
    total = problem.costs(after).sum()
    assert total <= problem.costs(before).sum() + 1e-12
    for one in range(clients):
        for other in range(one + 1, clients):
            if after[one] != after[other]:
                tried = after.copy()
                tried[[one, other]] = after[[other, one]]
                assert problem.costs(tried).sum() >= total - 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_divergence_is_at_least_five_times_below_random_groups(seed: int) -> None:
    """80 clients, 8 groups, Dirichlet 0.1; the greedy placement alone would not do it."""
    problem = problem_of(80, 8, seed)
    rng = np.random.default_rng(seed)
    by_chance = np.mean([mean_divergence(problem, rng.permutation(80) % 8) for _ in range(20)])
    assert by_chance >= 5.0 * mean_divergence(problem, near_iid_groups(problem))


def test_without_weight_on_labels_groups_are_of_like_speed() -> None:
    problem = problem_of(40, 4, 0, weight=0.0)
    group = near_iid_groups(problem)
    spread = np.mean([np.ptp(problem.seconds[group == g]) for g in range(4)])
    chance = np.mean([np.ptp(problem.seconds[np.arange(40) % 4 == g]) for g in range(4)])
    assert spread < 0.5 * chance
