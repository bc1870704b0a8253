"""Random fleets for tests of the joint sampling problem, and its exact objective written once more."""

from __future__ import annotations

import itertools

import numpy as np
from scipy.optimize import minimize

from airtune.solvers.joint_problem import Decision, JointProblem, Judge
from airtune.solvers.round_bound import FORMS, RoundModel
from airtune.solvers.sampling_time import Scenarios, every_cohort, expected_seconds

RATIOS = (0.125, 0.25, 0.5, 1.0)


def random_fleet(seed: int, size: int | None = None, form: str = "V", ratios=RATIOS, **changes) -> JointProblem:
    """Return a fleet of 2 to 40 clients: balanced or not, computing or sending longer, target near or far."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(2, 41)) if size is None else size
    share = np.array(ratios)
    weight = rng.dirichlet(np.full(size, rng.choice([0.5, 2.0, 20.0])))
    compute = rng.lognormal(0.0, rng.uniform(0.2, 1.5), size)[:, None] * (1.0 + rng.uniform(0.0, 3.0) * share)
    upload = rng.lognormal(0.0, rng.uniform(0.2, 1.5), size)[:, None] * (share + rng.uniform(0.0, 0.1))
    band = upload[:, -1].mean() * rng.lognormal(0.0, 1.5) * min(size, 8) / compute.mean()
    noise = rng.uniform(0.5, 2.0, size)
    beta = (noise * weight**2).sum() * (1.0 + rng.lognormal(0.0, 1.5)) + rng.choice([0.0, 0.25])
    fields = {"noise_weight": noise, "fixed": float(rng.choice([0, 1])), "idle": float(rng.choice([0, 1])), **changes}
    return JointProblem.of(weight, compute, upload, share, band, RoundModel(10.0, float(beta), form), **fields)


def varied_fleet(seed: int, size: int | None = None, ratios=RATIOS) -> JointProblem:
    """Return a fleet whose form goes round V, S, V+S with the seed and of which every second one has memory caps.

    A capped client holds the sizes up to one of its own; the target is put within reach of what fits.
    """
    form = FORMS[seed % 3]
    open_fleet = random_fleet(seed, size, form, ratios)
    if seed % 2 == 0:
        return open_fleet
    most = np.random.default_rng(10_000 + seed).integers(0, len(ratios), open_fleet.size)
    allowed = np.arange(len(ratios)) <= most[:, None]
    factor = open_fleet.model.variance_factor(open_fleet.ratio)[most]
    load = open_fleet.noise_weight * open_fleet.weight**2
    beta = open_fleet.model.beta + float((load * (factor - 1.0)).sum())
    return JointProblem.of(
        open_fleet.weight,
        open_fleet.compute,
        open_fleet.upload,
        open_fleet.ratio,
        open_fleet.bandwidth,
        RoundModel(10.0, beta, form),
        noise_weight=open_fleet.noise_weight,
        fixed=open_fleet.fixed,
        idle=open_fleet.idle,
        allowed=allowed,
    )


def exact_total(problem: JointProblem, q: np.ndarray, choice: np.ndarray) -> float:
    """Return R E[T] with every cohort enumerated, written once more."""
    rounds = problem.rounds(q, choice)
    return rounds * expected_seconds(problem.times(choice), q, Scenarios()).value if np.isfinite(rounds) else np.inf


# --------------------------------------------------------------------------------------------------- the true optimum


def chances(q: np.ndarray) -> np.ndarray:
    """Return the probability of every cohort in the order of `every_cohort`; q is [clients] or [clients, points]."""
    weight = np.ones((1, *q.shape[1:]))
    for one in q:
        weight = np.concatenate([weight * (1.0 - one), weight * one])
    return weight


class GivenSizes:
    """R E[T] of one choice of sizes as a function of q alone: the seconds of all cohorts are computed once."""

    def __init__(self, problem: JointProblem, choice: np.ndarray) -> None:
        share, model = problem.ratio[choice], problem.model
        self.seconds = problem.times(choice).of_cohorts(every_cohort(problem.size))
        self.load = problem.noise_weight * model.variance_factor(share) * problem.weight**2
        self.rounds = model.alpha * model.smoothness(problem.weight, share)
        self.beta = model.beta

    def total(self, q: np.ndarray) -> np.ndarray:
        """Return R E[T] at points q, [clients, points]; infinite where the target is out of reach."""
        slack = self.beta - (self.load[:, None] / q).sum(axis=0)
        mean = self.seconds @ chances(q)
        return np.where(slack > 0.0, self.rounds * mean / np.maximum(slack, 1e-300), np.inf)

    def logarithm(self, z: np.ndarray) -> tuple[float, np.ndarray]:
        """Return log(R E[T] / rounds) and its gradient at q = exp(z)."""
        q = np.exp(z)
        slack = self.beta - float((self.load / q).sum())
        if slack <= 0.0:
            return 50.0, np.zeros_like(z)
        mean, added = float(self.seconds @ chances(q)), np.empty_like(q)
        for client in range(len(q)):
            there, away = q.copy(), q.copy()
            there[client], away[client] = 1.0, 0.0
            added[client] = self.seconds @ (chances(there) - chances(away))
        return np.log(mean) - np.log(slack), q * (added / mean - (self.load / q**2) / slack)

    def least(self, starts: tuple[float, ...]) -> float:
        """Return the least over q by SLSQP in log q from several common probabilities exp(start)."""
        if self.load.sum() >= self.beta:
            return float("inf")
        bounds = [(max(float(low), -14.0), 0.0) for low in np.log(self.load / self.beta)]
        best = np.inf
        for start in starts:
            z = np.full(len(self.load), start)
            while self.beta <= (self.load / np.exp(z)).sum():
                z = 0.5 * z
            options = {"maxiter": 300, "ftol": 1e-12}
            found = minimize(self.logarithm, z, jac=True, method="SLSQP", bounds=bounds, options=options)
            best = min(best, self.logarithm(found.x)[0])
        return self.rounds * float(np.exp(best))


def all_sizes(problem: JointProblem) -> list[np.ndarray]:
    """Return every choice of sizes that the memories allow, [clients] each."""
    return [np.array(c) for c in itertools.product(*(np.flatnonzero(row) for row in problem.allowed))]


def true_optimum(problem: JointProblem, starts: tuple[float, ...] = (-1e-3, -0.7, -2.0)) -> float:
    """Return the least R E[T] over all sizes, q by SLSQP from several starts, every cohort enumerated."""
    return min(GivenSizes(problem, choice).least(starts) for choice in all_sizes(problem))


# --------------------------------------------------------------------------------------------------------- sizes alone


def best_common_probability(problem: JointProblem, judge: Judge, points: int = 12) -> Decision:
    """Return the least time with one q for everyone: threshold sizes first, then one client's size at a time."""
    used = problem.weight > 0.0
    tried: list[Decision] = []
    for threshold in np.quantile(problem.compute[problem.allowed], np.linspace(0.0, 1.0, 6)):
        may = problem.allowed & (problem.compute <= threshold)
        largest = may.shape[1] - 1 - may[:, ::-1].argmax(axis=1)
        choice = np.where(may.any(axis=1), largest, problem.allowed.argmax(axis=1)).astype(np.int64)
        for q in np.geomspace(0.5 / problem.size, 1.0, points).tolist():
            tried.append(judge.decision(used * q, choice))
    best = min(tried, key=lambda found: found.total_seconds)
    for client in np.flatnonzero(used).tolist():
        for size in np.flatnonzero(problem.allowed[client]).tolist():
            sizes = best.choice.copy()
            sizes[client] = size
            found = judge.decision(best.probability, sizes)
            best = found if found.total_seconds < best.total_seconds else best
    return best
