"""Pilots: short runs at known probabilities and sketch sizes, from which adaptive sampling's constants are fitted.

Each pilot is an ordinary run of `AdaptiveSampling` with uniform sampling and one size for everyone. The rounds that
each needs to one common loss on the validation rows go to `airtune.solvers.pilot_fit`. Settings, smoothing and the
common loss are ours [choice]; the specification's sources fix other pilots for other formulas.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from airtune.errors import InputError, NoResultError
from airtune.experiment import checkpoint
from airtune.experiment.build import build
from airtune.experiment.config import Experiment
from airtune.experiment.run import Session, digest, start
from airtune.experiment.store import Plain, RunStore, make_output_folder, plain
from airtune.files import write_atomically
from airtune.methods.adaptive_sampling import AdaptiveSampling, SamplingState
from airtune.scheduling.joint_cohort import RoundConstants
from airtune.scheduling.sketching import kept_components
from airtune.solvers.pilot_fit import Pilot, PilotFit, fit_pilots
from airtune.types import Floats

PILOT_FILE = "pilot.json"


@dataclass(frozen=True)
class PilotSetting:
    """One pilot: everyone joins with `probability` and keeps the share `ratio` of the components."""

    probability: float
    ratio: float


SETTINGS = (PilotSetting(1.0, 1.0), PilotSetting(0.3, 1.0), PilotSetting(1.0, 0.125), PilotSetting(0.5, 0.5))


@dataclass(frozen=True)
class PilotResult:
    """What the pilots gave.

    Parameters
    ----------
    constants : for `AdaptiveSampling.constants`. fit : with residuals. loss : that all pilots reached.
    """

    constants: RoundConstants
    fit: PilotFit
    loss: float


def run_pilots(
    experiment: Experiment,
    folder: Path,
    session: Session,
    *,
    rounds: int = 20,
    settings: Sequence[PilotSetting] = SETTINGS,
) -> PilotResult:
    """Run the pilots into subfolders, fit, and write pilot.json.

    Parameters
    ----------
    experiment : of the method "adaptive-sampling"; its world, data, training and other fields are used.
    folder : new or empty. rounds : of each pilot.

    Raises
    ------
    InputError : another method, or the folder is not empty.
    NoResultError : no form fits, or the best is more than 25 % off; pilot.json then says by how much.
    """
    method = experiment.method
    if not isinstance(method, AdaptiveSampling):
        raise InputError(f"method: {experiment.method_name} has no pilots; valid: adaptive-sampling")
    make_output_folder(folder)
    bench = build(experiment, session.workshop)
    examples, shape = bench.cell.fleet.num_examples, bench.start.adapter.shape
    usable = examples > 0
    losses: list[Floats] = []
    gradients: list[Floats] = []
    for index, setting in enumerate(settings):
        run = _pilot(experiment, method, setting, rounds, int(usable.sum()))
        where = folder / f"pilot-{index}"
        start(run, where, session)
        losses.append(np.array([line["loss"] for line in RunStore(where).rounds() if "loss" in line]))
        gradients.append(_gradients(where))
    level, needed = rounds_to_common_loss(losses)
    kept = [int(kept_components(shape, (setting.ratio,))[0]) / shape.max_rank for setting in settings]
    pilots = [
        Pilot(np.where(usable, setting.probability, 1.0), np.full(len(examples), ratio), float(count))
        for setting, ratio, count in zip(settings, kept, needed, strict=True)
    ]
    fit = fit_pilots(pilots, bench.cell.fleet.data_weight)
    norms = _largest(gradients)
    model = fit.best.model
    constants = RoundConstants(model.alpha, model.beta, model.form, gradient_norms=norms)
    _write(folder / PILOT_FILE, constants, fit, level, settings, needed)
    fit.model()
    return PilotResult(constants, fit, level)


def rounds_to_common_loss(losses: Sequence[Floats], window: int = 3) -> tuple[float, Floats]:
    """Return the loss that all pilots reach, and the rounds that each needs, interpolated.

    The losses, [rounds + 1] each and round 0 first, are smoothed by a centred mean over `window` rounds; the common
    loss is the largest of the pilots' least ones.

    Raises
    ------
    NoResultError : a pilot learnt nothing, or all reach the loss before round 1.
    """
    smooth = [_smoothed(curve, window) for curve in losses]
    level = max(float(curve.min()) for curve in smooth)
    needed = np.array([_crossing(curve, level) for curve in smooth])
    if not (needed > 0.0).all():
        raise NoResultError("pilot: a pilot never fell below its first loss; run longer pilots or train faster")
    return level, needed


def _smoothed(curve: Floats, window: int) -> Floats:
    half = window // 2
    return np.array([curve[max(i - half, 0) : i + half + 1].mean() for i in range(len(curve))])


def _crossing(curve: Floats, level: float) -> float:
    """Return the first round, interpolated, at which a curve is at or below the level."""
    place = int(np.argmax(curve <= level))
    if place == 0:
        return 0.0
    above, below = float(curve[place - 1]), float(curve[place])
    return place - 1 + (above - level) / (above - below)


def _pilot(
    experiment: Experiment, method: AdaptiveSampling, setting: PilotSetting, rounds: int, clients: int
) -> Experiment:
    probe = replace(
        method,
        sampling="uniform",
        sizes="largest",
        expected_cohort_size=setting.probability * clients,
        ratios=(setting.ratio,),
        noise="gradients",
        replan_every=None,
        weight_cap=None,
        constants=RoundConstants(),
    )
    evaluation = replace(experiment.evaluation, every=1, split="validation")
    stop = replace(experiment.stop, rounds=rounds, fleet_seconds=None, target=None)
    return replace(experiment, method=probe, evaluation=evaluation, stop=stop)


def _gradients(folder: Path) -> Floats:
    """Return the gradient norms that the pilot's last state holds, [clients], NaN where unknown."""
    store = RunStore(folder)
    state: object = checkpoint.load(store.checkpoint, digest(store.read_head()["config"])).state
    assert isinstance(state, SamplingState), "a pilot is a run of adaptive sampling"
    return state.measured.gradient.value


def _largest(gradients: Sequence[Floats]) -> tuple[float, ...]:
    """Return the largest norm of every client; none at all where some client has no estimate."""
    table = np.array(gradients)
    if np.isnan(table).all(axis=0).any():
        return ()
    return tuple(float(norm) for norm in np.nanmax(table, axis=0))


def _write(
    path: Path,
    constants: RoundConstants,
    fit: PilotFit,
    level: float,
    settings: Sequence[PilotSetting],
    needed: Floats,
) -> None:
    """Write constants, residuals and what they come from."""
    best = fit.best
    content: Plain = {
        "schema": 1,
        "usable": fit.usable,
        "constants": {
            "alpha": constants.alpha,
            "beta": constants.beta,
            "form": constants.form,
            "gradient_norms": list(constants.gradient_norms),
        },
        "loss": level,
        "largest_residual": best.largest,
        "residual_by_form": {form: found.largest for form, found in fit.by_form.items()},
        "pilots": [
            {"probability": s.probability, "ratio": s.ratio, "rounds": r, "fitted": p}
            for s, r, p in zip(settings, needed.tolist(), best.predicted.tolist(), strict=True)
        ],
    }
    write_atomically(path, (json.dumps(plain(content), indent=1) + "\n").encode())
