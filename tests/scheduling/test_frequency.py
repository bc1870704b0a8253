"""The joint choice of frequency and depth per group, against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from airtune.scheduling.frequency import FrequencyProblem, choose_frequencies


def problem_of(seed: int, groups: int = 3, most: int = 4, depths: int = 4) -> FrequencyProblem:
    rng = np.random.default_rng(seed)
    frequencies = np.arange(1, most + 1)
    cycle = np.cumsum(rng.uniform(0.1, 1.0, (groups, depths)), axis=1)
    seconds = frequencies[None, :, None] * cycle[:, None, :]
    cap = rng.integers(1, depths + 1, groups)
    seconds = np.where(np.arange(depths)[None, None, :] < cap[:, None, None], seconds, np.inf)
    share = rng.dirichlet(np.ones(groups))
    energy = np.cumsum(rng.dirichlet(np.ones(depths)))
    return FrequencyProblem(seconds, frequencies, energy, rng.exponential(0.1, groups), share)


@given(seed=st.integers(0, 3000), groups=st.integers(1, 4))
def test_limits_deadline_and_the_most_gain_within_it(seed: int, groups: int) -> None:
    problem = problem_of(seed, groups)
    choice = choose_frequencies(problem)
    gain = problem.gain()
    for g in range(groups):
        f, d = int(choice.frequency[g]), int(choice.depth[g])
        assert 1 <= f <= 4
        assert choice.seconds[g] == problem.seconds[g, f - 1, d - 1] <= choice.deadline
        possible = gain[g][problem.seconds[g] <= choice.deadline]
        assert gain[g, f - 1, d - 1] == possible.max()


@given(seed=st.integers(0, 3000))
def test_the_deadline_is_the_best_of_all_by_brute_force(seed: int) -> None:
    problem = problem_of(seed)
    gain = np.maximum(problem.gain(), 0.0)

    def rate(deadline: float) -> float:
        best = [float(gain[g][problem.seconds[g] <= deadline].max()) for g in range(3)]
        return float(problem.share @ best) / deadline

    floor = max(float(problem.seconds[g].min()) for g in range(3))
    finite = problem.seconds[np.isfinite(problem.seconds)]
    best = max(rate(float(deadline)) for deadline in finite if deadline >= floor)
    assert rate(choose_frequencies(problem).deadline) == pytest.approx(best)


@given(seed=st.integers(0, 3000), factor=st.floats(1.0, 10.0))
def test_more_divergence_never_gives_more_aggregations(seed: int, factor: float) -> None:
    """At equal times, energies and b, and one deadline."""
    problem = problem_of(seed)
    f = problem.frequencies[None, :, None].astype(float)
    deadline = float(problem.deadlines()[-1])

    def frequencies(delta: np.ndarray) -> np.ndarray:
        gain = f * problem.energy_share - problem.drift() * f**2 * delta[:, None, None]
        gain = np.where(problem.seconds <= deadline, gain, -np.inf)
        return gain.max(axis=2).argmax(axis=1)

    less = frequencies(problem.divergence)
    assert np.all(less == problem.within(deadline)[0])
    assert np.all(frequencies(problem.divergence * factor) <= less)


def test_equal_groups_all_take_the_least_frequency() -> None:
    """The specification's remark: gain per second falls with f if the global exchange takes no time."""
    cycle = np.cumsum(np.ones(4)) + 4.0
    frequencies = np.arange(1, 6)
    seconds = np.broadcast_to(frequencies[None, :, None] * cycle[None, None, :], (3, 5, 4))
    problem = FrequencyProblem(seconds, frequencies, np.arange(1, 5) / 4, np.full(3, 0.05), np.full(3, 1 / 3))
    assert choose_frequencies(problem).frequency.tolist() == [1, 1, 1]


def test_a_wait_limit_lowers_the_wait_or_gives_the_least_there_is() -> None:
    lowered = 0
    for seed in range(100):
        problem = problem_of(seed)
        free = choose_frequencies(problem)
        limited = choose_frequencies(problem, wait_seconds=0.5 * free.mean_wait)
        assert limited.mean_wait <= free.mean_wait + 1e-12
        lowered += limited.mean_wait <= 0.5 * free.mean_wait
    assert lowered > 20


def test_depth_wins_ties() -> None:
    for f, d in itertools.product((1, 3), (1, 4)):
        problem = FrequencyProblem(np.ones((1, f, d)), np.arange(1, f + 1), np.ones(d), np.full(1, 1e-9), np.ones(1))
        assert choose_frequencies(problem).depth.tolist() == [d]
