"""Pilots: short runs at known probabilities and sketch sizes, from which adaptive sampling's constants are fitted.

Each pilot is an ordinary run of `AdaptiveSampling` with uniform sampling and one size for everyone. The rounds that
each needs to common losses on the validation rows go to `airtune.solvers.pilot_fit`; gradient norms and mini-batch
noise are measured at the models before and after the first pilot (`airtune.experiment.gradients`). Settings, smoothing
and levels are ours [choice]; the specification's sources fix other pilots for other formulas.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from airtune.errors import InputError, NoResultError
from airtune.experiment import checkpoint
from airtune.experiment.build import Bench, Workshop, build
from airtune.experiment.config import Experiment
from airtune.experiment.gradients import measure_gradients
from airtune.experiment.pilot_file import PILOT_FILE, SCHEMA
from airtune.experiment.run import Session, digest, start
from airtune.experiment.store import Plain, RunStore, make_output_folder, plain
from airtune.files import write_atomically
from airtune.methods.adaptive_sampling import AdaptiveSampling
from airtune.scheduling.joint_cohort import RoundConstants
from airtune.scheduling.sketching import kept_components
from airtune.solvers.pilot_fit import GradientNorms, Pilot, PilotFit, fit_pilots, noise_weights
from airtune.types import Floats, ServerModel

ROUNDS = 12
LEVELS = (0.6, 0.7, 0.8, 0.9, 1.0)  # of the way from the first loss to the common one
LARGEST_VALIDATION = 500  # rows taken where the file sets none: a tenth of the training rows, at most so many


@dataclass(frozen=True)
class PilotSetting:
    """One pilot: everyone joins with `probability` and keeps the share `ratio` of the components."""

    probability: float
    ratio: float


@dataclass(frozen=True)
class PilotResult:
    """What the pilots gave.

    Parameters
    ----------
    constants : for `AdaptiveSampling.constants`. fit : with residuals. loss : that all pilots reached.
    settings, rounds : of the pilots; the rounds to that loss. gradients : as measured.
    examples : [clients], training examples of the drawn partition.
    """

    constants: RoundConstants
    fit: PilotFit
    loss: float
    settings: tuple[PilotSetting, ...]
    rounds: Floats
    gradients: GradientNorms
    examples: Floats


def default_settings(clients: int) -> tuple[PilotSetting, ...]:
    """Return four pilots with 16, 4, 16 and 8 expected participants: two sizes of cohort, three of sketch."""
    cohorts = ((16, 1.0), (4, 1.0), (16, 0.125), (8, 0.5))
    return tuple(PilotSetting(min(1.0, cohort / clients), ratio) for cohort, ratio in cohorts)


def run_pilots(
    experiment: Experiment,
    folder: Path,
    session: Session,
    *,
    rounds: int = ROUNDS,
    settings: Sequence[PilotSetting] | None = None,
) -> PilotResult:
    """Run the pilots into subfolders, fit, and write pilot.json.

    Parameters
    ----------
    experiment : of the method "adaptive-sampling"; its world, data, training and other fields are used. Without
        validation rows a tenth of the training rows is taken, at most 500.
    folder : new or empty. rounds : of each pilot. settings : None: `default_settings`.

    Raises
    ------
    InputError : another method, or the folder is not empty.
    NoResultError : no form fits, or the best is more than 25 % off; pilot.json then says by how much.
    """
    method = experiment.method
    if not isinstance(method, AdaptiveSampling):
        raise InputError(f"method: {experiment.method_name} has no pilots; valid: adaptive-sampling")
    if rounds < 2:
        raise InputError(f"--pilot-rounds: {rounds} are too few; valid: 2 or more")
    make_output_folder(folder)
    experiment = _with_validation(experiment, session.workshop)
    bench = build(experiment, session.workshop)
    examples = bench.cell.fleet.num_examples
    usable = examples > 0
    chosen = default_settings(int(usable.sum())) if settings is None else tuple(settings)
    losses: list[Floats] = []
    for index, setting in enumerate(chosen):
        run = _pilot(experiment, method, setting, rounds, int(usable.sum()))
        where = folder / f"pilot-{index}"
        start(run, where, session)
        losses.append(np.array([line["loss"] for line in RunStore(where).rounds() if "loss" in line]))
    gradients = measure_gradients(bench, (bench.start, _last_model(folder / "pilot-0")), experiment.training)
    level, needed = rounds_to_common_loss(losses)
    fit = _fit(bench, method, chosen, needed, gradients)
    model = fit.best.model
    norms, noise = _known(gradients.dissimilarity), _known(gradients.noise)
    constants = RoundConstants(model.alpha, model.beta, model.form, gradient_norms=norms, gradient_noise=noise)
    result = PilotResult(constants, fit, level, chosen, needed, gradients, examples.astype(np.float64))
    content = json.dumps(plain(pilot_summary(result, experiment.seed)), indent=1) + "\n"
    write_atomically(folder / PILOT_FILE, content.encode())
    fit.model()
    return result


def pilot_summary(result: PilotResult, seed: int) -> Plain:
    """Return the content of pilot.json: constants, residuals and what they come from."""
    constants, fit = result.constants, result.fit
    pairs = zip(result.settings, result.rounds.tolist(), fit.best.predicted.tolist(), strict=True)
    return {
        "schema": SCHEMA,
        "seed": seed,
        "usable": fit.usable,
        "constants": {
            "alpha": constants.alpha,
            "beta": constants.beta,
            "form": constants.form,
            "gradient_norms": list(constants.gradient_norms),
            "gradient_noise": list(constants.gradient_noise),
        },
        "loss": result.loss,
        "largest_residual": fit.best.largest,
        "residual_by_form": {form: found.largest for form, found in fit.by_form.items()},
        "pilots": [
            {"probability": s.probability, "ratio": s.ratio, "rounds": observed, "fitted": fitted}
            for s, observed, fitted in pairs
        ],
    }


def planned_with(experiment: Experiment, constants: RoundConstants) -> Experiment:
    """Return the experiment with the pilots' constants in its method."""
    method = experiment.method
    assert isinstance(method, AdaptiveSampling), "only that method has pilots"
    return replace(experiment, method=replace(method, constants=constants))


# ------------------------------------------------------------------------------------------------------------- rounds


def rounds_to_common_loss(
    losses: Sequence[Floats], window: int = 3, levels: Sequence[float] = LEVELS
) -> tuple[float, Floats]:
    """Return the loss that all pilots reach, and the rounds that each needs, interpolated.

    The losses, [rounds + 1] each and round 0 first, are smoothed by a centred mean over `window` rounds (fewer at the
    ends); the common loss is the largest of the pilots' least ones. A single crossing is noisy, so the *ratios* of the
    pilots' rounds are geometric means over `levels`, parts of the way from the first loss down to the common one; their
    scale is that of the common loss. [Choice; the predecessors' code averages over five levels, too.]

    Raises
    ------
    NoResultError : a pilot learnt nothing, or all reach the loss before round 1.
    """
    smooth = [_smoothed(curve, window) for curve in losses]
    first, level = max(float(curve[0]) for curve in smooth), max(float(curve.min()) for curve in smooth)
    needed = np.array(
        [[_crossing(curve, (1.0 - part) * first + part * level) for curve in smooth] for part in sorted(levels)]
    )
    if not (needed > 0.0).all():
        raise NoResultError("pilot: a pilot never fell below its first loss; run longer pilots or train faster")
    logs = np.log(needed)
    relative = logs - logs.mean(axis=1, keepdims=True)
    return level, np.exp(relative.mean(axis=0) + logs[-1].mean())


def _smoothed(curve: Floats, window: int) -> Floats:
    last, half = len(curve) - 1, window // 2
    reach = [min(half, i, last - i) for i in range(len(curve))]
    return np.array([curve[i - r : i + r + 1].mean() for i, r in enumerate(reach)])


def _crossing(curve: Floats, level: float) -> float:
    """Return the first round, interpolated, at which a curve is at or below the level."""
    place = int(np.argmax(curve <= level))
    if place == 0:
        return 0.0
    above, below = float(curve[place - 1]), float(curve[place])
    return place - 1 + (above - level) / (above - below)


# ---------------------------------------------------------------------------------------------------------------- runs


def _fit(
    bench: Bench, method: AdaptiveSampling, settings: Sequence[PilotSetting], needed: Floats, gradients: GradientNorms
) -> PilotFit:
    fleet, shape = bench.cell.fleet, bench.start.adapter.shape
    usable = fleet.num_examples > 0
    kept = [int(kept_components(shape, (setting.ratio,))[0]) / shape.max_rank for setting in settings]
    pilots = [
        Pilot(np.where(usable, setting.probability, 1.0), np.full(fleet.size, ratio), float(count))
        for setting, ratio, count in zip(settings, kept, needed, strict=True)
    ]
    weight = fleet.data_weight
    noise = noise_weights(gradients, weight) if method.noise == "gradients" else np.ones(fleet.size)
    return fit_pilots(pilots, weight, noise)


def _pilot(
    experiment: Experiment, method: AdaptiveSampling, setting: PilotSetting, rounds: int, clients: int
) -> Experiment:
    probe = replace(
        method,
        sampling="uniform",
        sizes="largest",
        expected_cohort_size=setting.probability * clients,
        ratios=(setting.ratio,),
        noise="equal",
        replan_every=None,
        weight_cap=None,
        constants=RoundConstants(),
    )
    evaluation = replace(experiment.evaluation, every=1, split="validation")
    stop = replace(experiment.stop, rounds=rounds, fleet_seconds=None, target=None)
    return replace(experiment, method=probe, evaluation=evaluation, stop=stop)


def _with_validation(experiment: Experiment, workshop: Workshop) -> Experiment:
    if experiment.data.validation_rows > 0:
        return experiment
    rows = len(workshop.tokens(experiment.data, experiment.model).train)
    count = max(1, min(LARGEST_VALIDATION, rows // 10))
    return replace(experiment, data=replace(experiment.data, validation_rows=count))


def _last_model(folder: Path) -> ServerModel:
    store = RunStore(folder)
    return checkpoint.load(store.checkpoint, digest(store.read_head()["config"])).model


def _known(values: Floats) -> tuple[float, ...]:
    """Return one number a client, the mean for those without examples; none at all where nothing is known."""
    known = np.isfinite(values)
    return tuple(np.where(known, values, values[known].mean()).tolist()) if known.any() else ()
