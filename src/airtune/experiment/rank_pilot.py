"""TSFA's offline stage by itself: pilot rounds, the bound over ranks, and a plan at the rank that it chooses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from airtune.errors import InputError, NoResultError
from airtune.experiment import checkpoint
from airtune.experiment.build import build
from airtune.experiment.config import Experiment
from airtune.experiment.planning import plan_round
from airtune.experiment.run import Session, digest, start
from airtune.experiment.store import Plain, RunStore, make_output_folder, plain
from airtune.methods.tsfa import TSFA
from airtune.scheduling.latency_control import LatencyControl

PILOT_FOLDER = "pilot"


def run_rank_pilot(experiment: Experiment, folder: Path, session: Session, *, rounds: int | None = None) -> Plain:
    """Run the pilot rounds into a subfolder and return the plan of a round at the rank that they give.

    Parameters
    ----------
    experiment : of the method "tsfa" with `pilot_rounds` of at least 1. folder : new or empty.
    rounds : of the pilot; None: `pilot_rounds`.

    Returns
    -------
    The plan; "curves" holds what decided, "rank_pilot" {"structural_rank", "latency_limit_s", "run", "offline": what
    each candidate rank could send within the limit, "bounds": of each, None where that is not one component}.

    Raises
    ------
    InputError : there is no rank to choose, or the folder is not empty.
    NoResultError : no update of the pilot arrived.
    """
    method = experiment.method
    if not isinstance(method, TSFA):
        raise InputError(f"method: {experiment.method_name} chooses no rank; valid: tsfa")
    rounds = method.pilot_rounds if rounds is None else rounds
    if rounds < 1:
        raise InputError("method.pilot_rounds: 0 leaves no rank to choose; valid: 1 or more")
    make_output_folder(folder)
    method = replace(method, pilot_rounds=rounds)
    stop = replace(experiment.stop, rounds=rounds, fleet_seconds=None, target=None)
    evaluation = replace(experiment.evaluation, every=rounds)
    pilot = replace(experiment, method=method, stop=stop, evaluation=evaluation)
    where = folder / PILOT_FOLDER
    start(pilot, where, session)
    store = RunStore(where)
    head = store.read_head()
    state: object = checkpoint.load(store.checkpoint, digest(head["config"])).state
    assert isinstance(state, LatencyControl), "the pilot is a run of TSFA"
    if not state.bounds:
        raise NoResultError(f"pilot: the bound over ranks was not measured; {where} holds the run")
    found = _planned(pilot, method, state, session)
    decided = {"structural_rank": state.rank, "latency_limit_s": state.limit, "run": PILOT_FOLDER}
    decided |= {"offline": store.rounds()[-1]["notes"]["offline"], "bounds": state.bounds}
    curves = [*head.get("curves", []), method.bound_curve(state, experiment.model.rank)]
    return {**found, "curves": plain(curves), "rank_pilot": plain(decided)}


def _planned(pilot: Experiment, method: TSFA, state: LatencyControl, session: Session) -> Plain:
    """Return the plan of a first round at the chosen rank, within the limit that the pilot had."""
    examples = build(pilot, session.workshop).cell.fleet.num_examples.astype(np.float64)
    fixed = replace(method, pilot_rounds=0, latency_limit=state.limit)
    return plan_round(replace(pilot, method=fixed, model=replace(pilot.model, rank=state.rank)), examples)
