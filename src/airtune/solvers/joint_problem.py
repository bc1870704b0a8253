"""The joint problem of who joins and what each trains: its data, its decisions, and how decisions are compared."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from airtune.errors import InputError
from airtune.solvers.round_bound import RoundModel
from airtune.solvers.sampling_probabilities import Choices
from airtune.solvers.sampling_time import RoundTimes, Scenarios, Split, expected_seconds, slowest_bound
from airtune.solvers.solution import finite_array, name_clients

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

EXACT_CLIENTS = 1000
_SCENARIO_ENTRIES = 100_000


@dataclass(frozen=True)
class JointProblem:
    """The fleet, what a round costs, and the round model.

    Parameters
    ----------
    weight : [clients], a_n; a client without weight is never drawn.
    noise_weight : [clients], w_n, 1 where nothing is known.
    compute : [clients, choices], tau_n(k), s.
    upload : [clients, choices], t_n(k), Hz s.
    ratio : [choices], k / gamma, increasing.
    bandwidth : f, Hz.
    model : rounds to the target.
    fixed : s of every round on top. idle : s of a round that nobody joins.
    allowed : [clients, choices], which sizes a device can hold; every client with weight needs one.
    split : how the band of a cohort is shared.
    """

    weight: Array
    noise_weight: Array
    compute: Array
    upload: Array
    ratio: Array
    bandwidth: float
    model: RoundModel
    fixed: float
    idle: float
    allowed: Bools
    split: Split = "equal-finish"

    @classmethod
    def of(
        cls,
        weight: ArrayLike,
        compute: ArrayLike,
        upload: ArrayLike,
        ratio: ArrayLike,
        bandwidth: float,
        model: RoundModel,
        *,
        noise_weight: ArrayLike = 1.0,
        fixed: float = 0.0,
        idle: float = 0.0,
        allowed: ArrayLike = True,
        split: Split = "equal-finish",
    ) -> JointProblem:
        """Return a checked problem. Raises InputError with the field and the clients that are wrong."""
        a = np.asarray(weight, dtype=np.float64)
        size, ratio = len(a), np.asarray(ratio, dtype=np.float64)
        if len(ratio) == 0 or ratio[0] <= 0.0 or ratio[-1] > 1.0 or bool((np.diff(ratio) <= 0.0).any()):
            raise InputError(f"ratio: {ratio.tolist()} is not possible; valid: increasing numbers above 0, to 1")
        shape = (size, len(ratio))
        tau, t = (np.broadcast_to(np.asarray(part, dtype=np.float64), shape) for part in (compute, upload))
        may = np.broadcast_to(np.asarray(allowed, dtype=np.bool_), shape)
        a = finite_array("weight", a, size)
        stuck = (a > 0.0) & ~may.any(axis=1)
        if stuck.any():
            raise InputError(f"allowed: {name_clients(stuck)} can hold no size; leave such clients out")
        for choice in range(len(ratio)):
            RoundTimes.of(tau[:, choice], t[:, choice], bandwidth, fixed, idle, split)
        w = finite_array("noise_weight", noise_weight, size, positive=True)
        return cls(a, w, tau, t, ratio, bandwidth, model, fixed, idle, may, split)

    @property
    def size(self) -> int:
        """Number of clients."""
        return len(self.weight)

    def times(self, choice: Ints) -> RoundTimes:
        """Return every client's times at its chosen size."""
        rows = np.arange(self.size)
        parts = self.compute[rows, choice], self.upload[rows, choice]
        return RoundTimes(*parts, self.bandwidth, self.fixed, self.idle, self.split)

    def rounds(self, probability: Array, choice: Ints) -> float:
        """Return R, infinite where the target is out of reach."""
        return self.model.rounds(self.weight, self.noise_weight, probability, self.ratio[choice])

    def choices(self, cost: Array, constant: float, allowed: Bools | None = None) -> Choices:
        """Return the problem with an additive time: cost [clients, choices] and a constant, s."""
        square = (self.noise_weight * self.weight**2)[:, None]
        factor = self.model.smoothness_factor(self.ratio)
        gain = self.weight[:, None] / self.weight.sum() * factor if "S" in self.model.form else None
        may = self.allowed if allowed is None else self.allowed & allowed
        may = may | (self.weight == 0.0)[:, None]
        cost = np.where(may, cost, np.inf)
        load = square * self.model.variance_factor(self.ratio)
        return Choices(load, cost, self.model.alpha, self.model.beta, constant, gain)

    def with_full_size(self) -> JointProblem:
        """Return the problem in which every client has the largest size that it can hold."""
        largest = self.allowed & (np.cumsum(self.allowed[:, ::-1], axis=1)[:, ::-1] == 1)
        return replace(self, allowed=largest)


@dataclass(frozen=True)
class Decision:
    """Probabilities and sizes with what they are worth.

    Parameters
    ----------
    probability : [clients]. choice : [clients], index into the ratios.
    rounds : R. round_seconds : E[T], s (or its bound U2, see `Judge`). total_seconds : their product.
    """

    probability: Array
    choice: Ints
    rounds: float
    round_seconds: float

    @property
    def total_seconds(self) -> float:
        """Return the expected seconds to the target; infinite where it is out of reach."""
        return self.rounds * self.round_seconds if np.isfinite(self.rounds) else float("inf")


@dataclass(frozen=True)
class Judge:
    """How decisions are compared: by E[T] over common scenarios, or by its bound U2.

    Parameters
    ----------
    problem : what is decided.
    scenarios : the cohorts; None: the bound.
    """

    problem: JointProblem
    scenarios: Scenarios | None

    @property
    def measure(self) -> str:
        """Say what `Decision.round_seconds` is."""
        if self.scenarios is None:
            return "upper bound U2"
        return "mean over every cohort" if self.scenarios.uniforms is None else "mean over drawn cohorts"

    @staticmethod
    def of(problem: JointProblem, scenarios: int | None = None, seed: int = 0) -> Judge:
        """Return a judge: every cohort of a tiny fleet, drawn cohorts, or, above 1,000 clients, the bound.

        scenarios : cohorts drawn; None: up to 1,024, fewer in large fleets. A given number is used at any size.
        """
        if scenarios is None and problem.size > EXACT_CLIENTS and problem.split == "equal-finish":
            return Judge(problem, None)
        count = scenarios or int(np.clip(_SCENARIO_ENTRIES // problem.size, 16, 1024))
        return Judge(problem, Scenarios.all_or(count, problem.size, seed))

    def decision(self, probability: Array, choice: Ints) -> Decision:
        """Return the decision with its worth."""
        times = self.problem.times(choice)
        if self.scenarios is None:
            seconds = slowest_bound(times, probability)
        else:
            seconds = expected_seconds(times, probability, self.scenarios).value
        return Decision(probability, choice, self.problem.rounds(probability, choice), seconds)
