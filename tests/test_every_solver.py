"""One table of solvers, each held to certificates of optimality, brute force and an independent optimiser."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import mpmath
import numpy as np
import pytest
from scipy.optimize import minimize

from airtune.errors import InputError
from airtune.solvers.airtime import min_energy, min_latency_sum
from airtune.solvers.equal_finish import equal_finish
from airtune.solvers.joint_energy import joint_min_energy
from airtune.solvers.solution import Solution

NOISE = 4e-21
GAP = 1.6


@dataclass(frozen=True)
class Problem:
    compute: np.ndarray
    bits: np.ndarray
    power: np.ndarray
    gain: np.ndarray
    total: float
    deadline: float = np.inf

    @property
    def link(self) -> tuple:
        return self.compute, self.bits, self.power, self.gain, NOISE, self.total

    @property
    def size(self) -> int:
        return self.bits.size

    def permuted(self, order) -> Problem:
        fields = (getattr(self, name)[order] for name in ("compute", "bits", "power", "gain"))
        return Problem(*fields, self.total, self.deadline)

    def with_total(self, total: float) -> Problem:
        return Problem(self.compute, self.bits, self.power, self.gain, total, self.deadline)


def random_problem(size: int, seed: int) -> Problem:
    rng = np.random.default_rng(seed)
    distance = rng.uniform(0.05, 0.5, size)
    gain = 10 ** (-(128.1 + 37.6 * np.log10(distance)) / 10) * rng.exponential(size=size)
    problem = Problem(rng.uniform(0, 3, size), rng.uniform(1e6, 1e7, size), rng.uniform(0.05, 0.2, size), gain, 20e6)
    earliest = equal_finish(*problem.link, GAP).objective
    return Problem(problem.compute, problem.bits, problem.power, gain, 20e6, 1.25 * earliest)


def seconds(p: Problem, n: int, w, power=None):
    """Return upload seconds of client n, written a second time and in whatever arithmetic w has."""
    watt = p.power[n] if power is None else power
    log2 = mpmath.log(1 + watt * p.gain[n] / (GAP * NOISE * w)) / mpmath.log(2)
    return p.bits[n] / (w * log2)


def needed_power(p: Problem, n: int, w):
    """Return the power with which client n just meets the deadline."""
    exponent = p.bits[n] / ((p.deadline - p.compute[n]) * w)
    return (mpmath.mpf(2) ** exponent - 1) * w * GAP * NOISE / p.gain[n]


def finish_cost(p: Problem, w) -> float:
    return max(p.compute[n] + float(seconds(p, n, w[n])) for n in range(p.size))


def energy_cost(p: Problem, w) -> float:
    if finish_cost(p, w) > p.deadline * (1 + 1e-9):
        return np.inf
    return sum(p.power[n] * float(seconds(p, n, w[n])) for n in range(p.size))


def latency_cost(p: Problem, w) -> float:
    return sum(p.compute[n] + float(seconds(p, n, w[n])) for n in range(p.size))


def joint_cost(p: Problem, w) -> float:
    powers = [float(needed_power(p, n, w[n])) for n in range(p.size)]
    if any(powers[n] > p.power[n] * (1 + 1e-9) for n in range(p.size)):
        return np.inf
    return sum(powers[n] * (p.deadline - p.compute[n]) for n in range(p.size))


@dataclass(frozen=True)
class Row:
    name: str
    solve: Callable[..., Solution]
    cost: Callable[[Problem, np.ndarray], float]
    term: Callable | None  # one client's share of a separable cost, for the price certificate

    def __str__(self) -> str:
        return self.name


TABLE = [
    Row("equal-finish", lambda p, **k: equal_finish(*p.link, GAP, **k), finish_cost, None),
    Row(
        "min-energy",
        lambda p, **k: min_energy(*p.link, p.deadline, GAP, **k),
        energy_cost,
        lambda p, n, w: p.power[n] * seconds(p, n, w),
    ),
    Row("min-latency-sum", lambda p, **k: min_latency_sum(*p.link, 1.0, GAP, **k), latency_cost, seconds),
    Row(
        "joint-min-energy",
        lambda p, **k: joint_min_energy(*p.link, p.deadline, GAP, **k),
        joint_cost,
        lambda p, n, w: needed_power(p, n, w) * (p.deadline - p.compute[n]),
    ),
]
SIZES = [1, 2, 4, 40]
every = pytest.mark.parametrize("row", TABLE, ids=str)


def bandwidth(solution: Solution) -> np.ndarray:
    return solution.value["bandwidth"] if isinstance(solution.value, dict) else solution.value


@every
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_feasible_and_the_objective_is_that_of_the_value(row, size, seed) -> None:
    p = random_problem(size, seed)
    found = row.solve(p)
    w = bandwidth(found)
    assert found.status == "optimal"
    assert (w > 0).all()
    assert w.sum() <= p.total * (1 + 1e-12)
    assert row.cost(p, w) == pytest.approx(found.objective, rel=1e-9)


@every
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_certificate_of_optimality(row, size, seed) -> None:
    """Equal finish times, or one price: the residual of the optimality conditions is below 1e-8."""
    p = random_problem(size, seed)
    w = bandwidth(row.solve(p))
    assert w.sum() == pytest.approx(p.total, rel=1e-9)
    if row.term is None:
        finish = [p.compute[n] + float(seconds(p, n, w[n])) for n in range(size)]
        assert np.ptp(finish) < 1e-8 * max(finish)
        return
    with mpmath.workdps(40):
        slope = np.array([-float(mpmath.diff(lambda v, n=n: row.term(p, n, v), w[n])) for n in range(size)])
    at_bound = np.zeros(size, dtype=bool)
    if row.name != "min-latency-sum":  # a client at its lower bound just meets the deadline at full power
        at_bound = np.array([p.compute[n] + float(seconds(p, n, w[n])) > p.deadline * (1 - 1e-9) for n in range(size)])
    free = slope[~at_bound]
    if free.size:
        assert np.ptp(free) < 1e-8 * free.max()
        assert (slope[at_bound] <= free.max() * (1 + 1e-8)).all()


@every
@pytest.mark.parametrize("seed", range(4))
def test_no_split_of_three_clients_on_a_grid_is_better(row, seed) -> None:
    p = random_problem(3, seed)
    best = row.solve(p).objective
    parts = 40
    for a, b in itertools.product(range(1, parts), repeat=2):
        if a + b < parts:
            w = p.total * np.array([a, b, parts - a - b]) / parts
            assert row.cost(p, w) >= best * (1 - 1e-9)


@every
@pytest.mark.parametrize("seed", range(3))
def test_scipy_finds_nothing_better(row, seed) -> None:
    """SLSQP with logarithmic variables, started from the equal split and from the answer itself."""
    p = random_problem(4, seed)
    found = row.solve(p)

    def cost(z):
        value = row.cost(p, p.total * np.exp(z) / np.exp(z).sum())
        return value / found.objective if np.isfinite(value) else 1e3

    for start in (np.zeros(4), np.log(bandwidth(found) / p.total)):
        reference = minimize(cost, start, method="SLSQP", options={"maxiter": 200})
        assert reference.fun >= 1 - 1e-7


@every
def test_order_of_clients_does_not_matter_and_inputs_stay(row) -> None:
    p = random_problem(20, 7)
    before = [a.copy() for a in (p.compute, p.bits, p.power, p.gain)]
    order = np.random.default_rng(0).permutation(20)
    w, other = bandwidth(row.solve(p)), bandwidth(row.solve(p.permuted(order)))
    np.testing.assert_allclose(other, w[order], rtol=1e-7)
    for now, then in zip((p.compute, p.bits, p.power, p.gain), before, strict=True):
        np.testing.assert_array_equal(now, then)


@every
def test_a_wider_band_is_never_worse(row) -> None:
    p = random_problem(10, 3)
    costs = [row.solve(p.with_total(p.total * f)).objective for f in (1.0, 1.1, 1.5, 3.0, 10.0)]
    assert (np.diff(costs) < 0).all()


@every
def test_a_client_with_nothing_to_send_gets_nothing(row) -> None:
    p = random_problem(5, 1)
    p.bits[2] = 0.0
    w = bandwidth(row.solve(p))
    assert w[2] == 0.0
    assert w.sum() == pytest.approx(p.total)


@every
@pytest.mark.parametrize("seed", range(3))
def test_bounds_are_kept_and_cost(row, seed) -> None:
    p = random_problem(6, seed)
    free = row.solve(p)
    low, high = 0.4 * p.total / 6, np.maximum(1.5 * p.total / 6, 1.05 * bandwidth(free).min())
    found = row.solve(p, minimum=low, maximum=high)
    if not found.ok:
        assert found.status == "infeasible"
        assert "client" in found.message
        return
    w = bandwidth(found)
    assert ((w >= low * (1 - 1e-12)) & (w <= high * (1 + 1e-12))).all()
    assert found.objective >= free.objective * (1 - 1e-9)
    for i, j in itertools.permutations(range(6), 2):  # no small exchange between two clients helps
        step = 1e-4 * p.total
        other = w + step * (np.eye(6)[i] - np.eye(6)[j])
        if other[i] <= high and other[j] >= low:
            assert row.cost(p, other) >= found.objective * (1 - 1e-9)


@every
@pytest.mark.parametrize("seed", range(3))
def test_whole_resource_blocks_are_optimal_among_whole_numbers(row, seed) -> None:
    p = random_problem(3, seed)
    block, blocks = p.total / 14, 14
    found = row.solve(p, resource_block=block)
    splits = [c for c in itertools.product(range(1, blocks), repeat=3) if sum(c) <= blocks]
    best = min(row.cost(p, block * np.array(c, dtype=float)) for c in splits)
    if not np.isfinite(best):
        assert found.status == "infeasible"
        return
    assert found.objective == pytest.approx(best, rel=1e-9)
    count = bandwidth(found) / block
    np.testing.assert_allclose(count, np.rint(count), atol=1e-9)
    assert np.rint(count).sum() <= blocks
    assert found.objective >= row.solve(p).objective * (1 - 1e-12)


@every
def test_a_client_without_a_channel_is_named(row) -> None:
    p = random_problem(5, 1)
    p.gain[3] = 0.0
    found = row.solve(p)
    assert found.status == "infeasible"
    assert "client 3" in found.message
    assert not found.ok
    assert np.isnan(bandwidth(found)).all()


@every
def test_more_clients_than_resource_blocks_is_infeasible(row) -> None:
    found = row.solve(random_problem(5, 1), resource_block=6e6)
    assert found.status == "infeasible"
    assert "client" in found.message


@pytest.mark.parametrize("row", [r for r in TABLE if r.name in ("min-energy", "joint-min-energy")], ids=str)
def test_a_deadline_that_cannot_be_met_names_clients(row) -> None:
    p = random_problem(5, 1)
    tight = Problem(p.compute, p.bits, p.power, p.gain, p.total, p.deadline / 1.5)
    found = row.solve(tight)
    assert found.status == "infeasible"
    assert "client" in found.message


@every
@pytest.mark.parametrize(("field", "value"), [("bits", np.nan), ("gain", -1.0), ("power", np.inf), ("compute", -0.1)])
def test_bad_numbers_are_input_errors_that_name_field_and_client(row, field, value) -> None:
    p = random_problem(5, 1)
    getattr(p, field)[1] = value
    with pytest.raises(InputError, match=rf"{field}.*client 1"):
        row.solve(p)


@every
@pytest.mark.parametrize("total", [0.0, -1.0, np.nan, np.inf])
def test_a_band_that_is_none_is_refused(row, total) -> None:
    p = random_problem(3, 1)
    with pytest.raises(InputError, match="total_bandwidth"):
        row.solve(p.with_total(total))


@every
def test_no_clients_at_all(row) -> None:
    empty = np.zeros(0)
    found = row.solve(Problem(empty, empty, empty, empty, 1e6, 1.0))
    assert found.ok
    assert bandwidth(found).size == 0


@every
def test_a_very_uneven_cohort_is_solved(row) -> None:
    """Gains over 12 decades and payloads over 6: what bisection on a badly chosen variable fails on."""
    rng = np.random.default_rng(5)
    gain, bits = 10 ** rng.uniform(-15, -3, 30), 10 ** rng.uniform(2, 8, 30)
    p = Problem(rng.uniform(0, 1, 30), bits, np.full(30, 0.2), gain, 20e6)
    p = Problem(p.compute, p.bits, p.power, p.gain, 20e6, 1.5 * equal_finish(*p.link, GAP).objective)
    found = row.solve(p)
    w = bandwidth(found)
    assert found.ok
    assert w.sum() == pytest.approx(p.total, rel=1e-9)
    assert row.cost(p, w) == pytest.approx(found.objective, rel=1e-6)


@every
@pytest.mark.parametrize("seed", range(40))
def test_wild_numbers_give_a_feasible_answer_or_a_named_reason(row, seed) -> None:
    """Gains over 15 decades, payloads over 9, computations from microseconds to hours, bounds, tight deadlines."""
    rng = np.random.default_rng(seed)
    n, total = int(rng.integers(1, 12)), 10 ** rng.uniform(3, 9)
    bits = np.where(rng.random(n) < 0.9, 10 ** rng.uniform(0, 9, n), 0.0)
    compute = np.where(rng.random(n) < 0.8, 10 ** rng.uniform(-6, 4, n), 0.0)
    p = Problem(compute, bits, 10 ** rng.uniform(-3, 1, n), 10 ** rng.uniform(-17, -2, n), total)
    low, high = rng.choice([0.0, 0.3 * total / n]), rng.choice([np.inf, 1.5 * total / n])
    earliest = equal_finish(*p.link, GAP, minimum=low, maximum=high)
    assert earliest.status == "optimal"
    slack = rng.choice([1.0 + 1e-9, 1.01, 2.0, 100.0])
    p = Problem(p.compute, bits, p.power, p.gain, total, slack * earliest.objective)
    found = row.solve(p, minimum=low, maximum=high)
    if not found.ok:
        assert slack < 1.01, "a deadline that can be met was refused"
        assert "client" in found.message
        return
    w = bandwidth(found)
    assert np.isfinite(found.objective)
    assert w.sum() <= total * (1 + 1e-9)
    assert ((w >= low * (1 - 1e-9)) & (w <= high * (1 + 1e-9))).all()
