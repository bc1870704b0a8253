"""The split round count: equal to brute force over all sizes with an independent solver for q, and refused in time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import minimize

from airtune.errors import InputError, NoResultError
from airtune.solvers.joint_problem import JointProblem, Judge
from airtune.solvers.joint_sampling import solve
from airtune.solvers.round_bound import Form, RoundModel, split_rounds
from airtune.solvers.sampling_baselines import split_decision
from airtune.solvers.split_sampling import SplitChoices, best_split

RATIO = np.array([0.25, 0.5, 1.0])


def instance(seed: int, form: Form, size: int = 3, constant: float = 0.3) -> tuple[SplitChoices, np.ndarray]:
    rng = np.random.default_rng(seed)
    weight = rng.dirichlet(np.full(size, 4.0))
    cost = rng.lognormal(0.0, 0.8, (size, 1)) + rng.lognormal(0.0, 0.8, (size, 1)) * RATIO
    beta = float(8.0 * size * (weight**2).max())
    return SplitChoices.of(RoundModel(20.0, beta, form), weight, cost, RATIO, constant=constant), weight


def best_q(problem: SplitChoices, choice: np.ndarray) -> float:
    """Return the least R M for given sizes, by SLSQP in log q from several starts."""
    limit = problem.limit[np.arange(len(choice)), choice]
    if (limit >= 1.0).any():
        return float("inf")
    least = float("inf")
    for share in (0.3, 0.7):
        start = np.log(limit ** (1.0 - share))
        bounds = [(float(np.log(one * 1.0001)), 0.0) for one in limit]
        found = minimize(
            lambda x: np.log(problem.value(np.exp(x), choice)), start, bounds=bounds, method="SLSQP", tol=1e-12
        )
        least = min(least, float(np.exp(found.fun)))
    return least


@pytest.mark.parametrize("form", ["V", "S", "V+S"])
@pytest.mark.parametrize("seed", range(3))
def test_it_equals_brute_force_over_all_sizes(form: Form, seed: int) -> None:
    problem, _ = instance(seed, form)
    found = best_split(problem)
    brute = min(best_q(problem, np.array(sizes)) for sizes in itertools.product(range(3), repeat=3))
    assert found.objective == pytest.approx(brute, rel=1e-5)
    assert problem.value(found.value["probability"], found.value["choice"]) == pytest.approx(found.objective)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["V", "S", "V+S"])
@pytest.mark.parametrize("size", [4, 5])
def test_it_equals_brute_force_for_more_clients(form: Form, size: int) -> None:
    problem, _ = instance(10 + size, form, size)
    brute = min(best_q(problem, np.array(sizes)) for sizes in itertools.product(range(3), repeat=size))
    assert best_split(problem).objective == pytest.approx(brute, rel=1e-5)


def test_as_a_baseline_it_is_judged_by_the_same_time_and_keeps_to_the_memories() -> None:
    rng = np.random.default_rng(0)
    weight, allowed = np.array([0.3, 0.0, 0.4, 0.3]), np.array([[True, True, False]] * 2 + [[True] * 3] * 2)
    compute, upload = rng.lognormal(0, 1, (4, 1)) * (1 + RATIO), rng.lognormal(0, 1, (4, 1)) * RATIO
    model = RoundModel(20.0, 8.0, "V")
    problem = JointProblem.of(weight, compute, upload, RATIO, 2.0, model, allowed=allowed)
    judge = Judge.of(problem)
    found = split_decision(problem, judge)
    assert found.choice.tolist() == [1, 1, 2, 2]  # form V with additive time: the largest that fits
    assert found.probability[1] == 0.0
    used = weight > 0.0
    cost = np.where(allowed, compute + upload / 2.0, np.inf)[used]
    expected = best_split(SplitChoices.of(model, weight[used], cost, RATIO)).value["probability"]
    np.testing.assert_allclose(found.probability[used], expected)
    best = solve(problem, baselines=False).decision
    assert best.total_seconds <= judge.decision(found.probability, found.choice).total_seconds == found.total_seconds
    with pytest.raises(NoResultError, match="split form"):
        split_decision(JointProblem.of(weight, compute, upload, RATIO, 2.0, RoundModel(1.0, 0.4)), judge)


def test_its_rounds_are_those_of_the_bound_and_never_below_the_unsplit_ones() -> None:
    problem, weight = instance(1, "V+S", constant=0.0)
    found = best_split(problem)
    q, choice = found.value["probability"], found.value["choice"]
    seconds = float(q @ problem.cost[np.arange(3), choice])
    rounds = split_rounds(problem.model, weight, 1.0, q, RATIO[choice])
    assert found.objective == pytest.approx(rounds * seconds)
    unsplit = RoundModel(problem.model.alpha, problem.model.beta, "V").rounds(weight, 1.0, q, RATIO[choice])
    assert split_rounds(RoundModel(20.0, problem.model.beta, "V"), weight, 1.0, q, RATIO[choice]) >= unsplit


def test_more_components_are_always_better_under_form_v() -> None:
    for seed in range(5):
        assert (best_split(instance(seed, "V", size=7)[0]).value["choice"] == 2).all()


def test_a_client_that_no_size_helps_is_named() -> None:
    problem = SplitChoices.of(RoundModel(1.0, 1.0, "V"), [0.9, 0.1], 1.0, RATIO)
    found = best_split(problem)
    assert not found.ok
    assert "0" in found.message


@pytest.mark.parametrize("change", [{"cost": -1.0}, {"ratio": [0.5, 1.5]}, {"weight": [0.5, -0.5]}])
def test_bad_problems_are_refused(change: dict[str, object]) -> None:
    fields: dict[str, object] = {"weight": [0.5, 0.5], "cost": 1.0, "ratio": RATIO, **change}
    with pytest.raises(InputError):
        SplitChoices.of(RoundModel(1.0, 1.0), **fields)  # type: ignore[arg-type]
