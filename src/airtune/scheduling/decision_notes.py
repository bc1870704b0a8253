"""What goes on record of a joint sampling decision: what is expected of it, what it gains, and what it rests on."""

from __future__ import annotations

from typing import Any

import numpy as np

from airtune.scheduling.joint_cohort import RoundConstants
from airtune.solvers.joint_problem import Decision, JointProblem
from airtune.solvers.joint_sampling import JointAnswer

UNUSED = "the noise weights are equal; those of the pilot's gradients are used with --method.noise gradients"


def decision_notes(
    problem: JointProblem,
    answer: JointAnswer,
    decision: Decision,
    constants: RoundConstants,
    noise: str,
    round_index: int,
) -> dict[str, Any]:
    """Return the notes of a decision; noise: where its weights w_n come from.

    ``expected_rounds``, ``expected_round_s`` and ``expected_total_s`` are means over cohorts by the round model;
    ``time_measure`` says which expected time of a round that is, for every candidate alike. ``gain_over_uniform`` is
    the time of uniform sampling (largest sizes, its best cohort size) over the decision's; it is left out where
    uniform sampling never reaches the target.
    """
    notes: dict[str, Any] = {
        "sampling_round": round_index,
        "solver": {
            "status": answer.solution.status,
            "objective": finite(answer.solution.objective),
            "iterations": answer.solution.iterations,
            "branch": answer.branch,
            "gap": finite(answer.gap),
        },
        "expected_rounds": finite(decision.rounds),  # None: by the bound the target is out of reach
        "expected_round_s": decision.round_seconds,
        "expected_total_s": finite(decision.total_seconds),
        "expected_cohort": float(decision.probability.sum()),
        "time_measure": answer.measure,
        "candidates_s": {name: finite(seconds) for name, seconds in answer.candidates.items()},
        "round_model": {
            "alpha": problem.model.alpha,
            "beta": problem.model.beta,
            "form": problem.model.form,
            "from_pilot": constants.from_pilot,
        },
    }
    if constants.gradient_norms and noise == "equal":
        notes["unused"] = UNUSED
    gain = answer.gain_over_uniform
    return notes if gain is None else {**notes, "gain_over_uniform": gain}


def finite(value: float) -> float | None:
    """Return a number that JSON knows, None for an infinite one."""
    return float(value) if np.isfinite(value) else None
