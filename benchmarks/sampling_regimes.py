"""Where joint sampling and sketching gain over simpler decisions, and where they bring nothing: planned seconds.

    OMP_NUM_THREADS=1 python benchmarks/sampling_regimes.py [--seeds 0,1,2]

Random fleets of 40 clients with unbalanced data; a round is judged by its expected time over common cohorts, the rounds
by the round model. No training. q alone and both together are solved with all branches; uniform, weighted and k-only
get their best expected number of participants. Rows are regimes: how long computing takes against sending, whether
computing grows with the sketch, how unequal data are, how many participants the constants ask for, and the form of the
round model. Numbers are the seconds of each decision over those of the joint one: 1.10 is 10 % more.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np

from airtune.solvers.joint_problem import JointProblem
from airtune.solvers.joint_sampling import solve
from airtune.solvers.round_bound import Form, RoundModel

CLIENTS = 40
RATIO = np.array([0.125, 0.25, 0.5, 1.0])
BASELINES = ("full", "uniform", "weighted", "q-only", "k-only")


@dataclass(frozen=True)
class Regime:
    """One row.

    Parameters
    ----------
    computing : mean seconds of computing over those of sending alone in the band.
    grows : part of the computing that is in proportion to the sketch. spread : deviation of log speed and log link.
    data : Dirichlet parameter of the data shares. slack : beta above the noise of full participation.
    """

    name: str
    computing: float = 1.0
    grows: float = 0.2
    spread: float = 0.8
    data: float = 1.0
    slack: float = 0.25
    form: Form = "V"


REGIMES = (
    Regime("sending dominates", computing=0.1),
    Regime("as long as each other"),
    Regime("computing dominates, hardly grows with the sketch", computing=10.0, grows=0.05),
    Regime("computing dominates, grows with the sketch", computing=10.0, grows=0.8),
    Regime("the same, stragglers (spread 1.5)", computing=10.0, grows=0.8, spread=1.5),
    Regime("equal devices, unbalanced data", spread=0.0, data=0.3),
    Regime("equal data, unequal devices", data=1e4),
    Regime("few participants (beta 2 above)", slack=2.0),
    Regime("form S", form="S"),
    Regime("form S, computing dominates and grows", computing=10.0, grows=0.8, form="S"),
)


def fleet(regime: Regime, seed: int) -> JointProblem:
    """Return a random fleet; sending a whole adapter alone takes 1/8 s on average, eight at once 1 s."""
    rng = np.random.default_rng(seed)
    weight = rng.dirichlet(np.full(CLIENTS, regime.data))
    weight = np.maximum(weight, 1e-4)
    weight /= weight.sum()
    speed, link = np.exp(regime.spread * rng.standard_normal((2, CLIENTS, 1)))
    compute = regime.computing * speed * ((1.0 - regime.grows) + regime.grows * RATIO)
    beta = float((weight**2).sum()) + regime.slack
    return JointProblem.of(weight, compute, link * RATIO, RATIO, 8.0, RoundModel(12.5, beta, regime.form), idle=0.1)


def row(regime: Regime, seed: int) -> dict[str, float]:
    """Return the seconds of every decision over the joint one's, expected participants, the part that is sketched."""
    problem = fleet(regime, seed)
    found = solve(problem, baselines=True, seed=seed)
    assert found.decision is not None, "beta is above the noise of full participation"
    best = found.decision.total_seconds
    alone = solve(problem.with_full_size(), baselines=False, seed=seed)
    seconds = {**found.candidates, "q-only": alone.solution.objective}
    ratios = {name: seconds.get(name, float("nan")) / best for name in BASELINES}
    sketched = float((found.decision.choice < len(RATIO) - 1).mean())
    return {**ratios, "participants": float(found.decision.probability.sum()), "sketched": sketched, "gap": found.gap}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", default="0,1,2")
    seeds = [int(text) for text in parser.parse_args().seeds.split(",")]
    names = (*BASELINES, "participants", "sketched", "gap")
    print(f"| regime | {' | '.join(names)} |\n| --- |{' --- |' * len(names)}")
    for regime in REGIMES:
        rows = [row(regime, seed) for seed in seeds]
        cells: list[str] = []
        for name in names:
            values = np.array([one[name] for one in rows])
            shown = (f"{values.mean():.0%}", "") if name in ("sketched", "gap") else (f"{values.mean():.2f}", "")
            cells.append(shown[0] + (f" ± {values.std(ddof=1):.2f}" if name in BASELINES and len(rows) > 1 else ""))
        print(f"| {regime.name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
