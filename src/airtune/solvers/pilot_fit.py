"""The constants of the round model from pilots: short runs at known probabilities and sketch sizes.

A pilot at (q_i, k_i) that needed R_i rounds to one fixed loss says ``Gamma_i alpha / (beta - V_i) = R_i``. With
R'_i = R_i / Gamma_i this is linear, ``1 / R'_i = beta / alpha - V_i / alpha``; rows are weighted by R'_i, so that the
residuals are relative errors of R to first order. Fitting by least squares and choosing between the forms by the
residual are ours [choice]; arXiv 2505.23555 names no procedure in its abstract.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from airtune.errors import InputError, NoResultError
from airtune.solvers.round_bound import FORMS, Form, RoundModel
from airtune.solvers.solution import finite_array

Array = NDArray[np.float64]

FEWEST_PILOTS = 3
LARGEST_RESIDUAL = 0.25


@dataclass(frozen=True)
class Pilot:
    """One setting and the rounds that it needed.

    Parameters
    ----------
    probability : [clients], q_n. ratio : [clients], k_n / gamma. rounds : to the common loss; need not be whole.
    """

    probability: Array
    ratio: Array
    rounds: float


@dataclass(frozen=True)
class Fit:
    """A fitted round model.

    Parameters
    ----------
    model : alpha, beta and the form.
    predicted : [pilots], rounds. residuals : [pilots], predicted / observed - 1.
    """

    model: RoundModel
    predicted: Array
    residuals: Array

    @property
    def largest(self) -> float:
        """Return the largest relative residual."""
        return float(np.abs(self.residuals).max())


@dataclass(frozen=True)
class PilotFit:
    """The fits of all forms that could be fitted, and the best of them."""

    best: Fit
    by_form: Mapping[Form, Fit]

    @property
    def usable(self) -> bool:
        """Whether plans may be made from it: no pilot is more than 25 % off."""
        return self.best.largest <= LARGEST_RESIDUAL

    def model(self) -> RoundModel:
        """Return the round model.

        Raises
        ------
        NoResultError : the fit is too poor to plan from.
        """
        if not self.usable:
            raise NoResultError(
                f"pilot: the best fit (form {self.best.model.form}) is {self.best.largest:.0%} off, more than "
                f"{LARGEST_RESIDUAL:.0%}; run longer pilots, or at more settings"
            )
        return self.best.model


def fit_pilots(
    pilots: Sequence[Pilot], weight: ArrayLike, noise_weight: ArrayLike = 1.0, forms: Sequence[Form] = FORMS
) -> PilotFit:
    """Fit alpha and beta for every form; the least sum of squared relative residuals wins, the first among equals.

    Parameters
    ----------
    pilots : at least 3, of different settings, one with small sketches if the form is to be told.
    weight, noise_weight : [clients], a_n and w_n.

    Raises
    ------
    InputError : too few pilots, or numbers that are not possible.
    NoResultError : no form fits: the settings do not differ enough, or more noise did not need more rounds.
    """
    if len(pilots) < FEWEST_PILOTS:
        raise InputError(f"pilot: {len(pilots)} settings are too few; valid: {FEWEST_PILOTS} or more")
    rounds = finite_array("pilot rounds", [pilot.rounds for pilot in pilots], len(pilots), positive=True)
    found: dict[Form, Fit] = {}
    for form in forms:
        fit = _fit(form, pilots, rounds, weight, noise_weight)
        if fit is not None:
            found[form] = fit
    if not found:
        raise NoResultError("pilot: no form fits; the settings must differ, and more noise must need more rounds")
    best = min(
        found.values(), key=lambda fit: (round(float((fit.residuals**2).sum()), 12), forms.index(fit.model.form))
    )
    return PilotFit(best, found)


def _fit(form: Form, pilots: Sequence[Pilot], rounds: Array, weight: ArrayLike, noise_weight: ArrayLike) -> Fit | None:
    shape = RoundModel(1.0, 1.0, form)
    noise = np.array([shape.variance(weight, noise_weight, p.probability, p.ratio) for p in pilots])
    reduced = rounds / np.array([shape.smoothness(weight, p.ratio) for p in pilots])
    if not np.isfinite(noise).all() or float(np.ptp(noise)) <= 1e-9 * float(noise.max()):
        return None
    matrix = reduced[:, None] * np.column_stack([np.ones(len(noise)), -noise])
    answer = np.linalg.lstsq(matrix, np.ones(len(noise)), rcond=None)[0]
    level, slope = float(answer[0]), float(answer[1])
    if not (slope > 0.0 and level / slope > float(noise.max())):
        return None
    model = RoundModel(1.0 / slope, level / slope, form)
    predicted = np.array([model.rounds(weight, noise_weight, p.probability, p.ratio) for p in pilots])
    return Fit(model, predicted, predicted / rounds - 1.0)


@dataclass(frozen=True)
class GradientNorms:
    """What is known of the clients' gradients, [clients], NaN where nothing is.

    Parameters
    ----------
    dissimilarity : G_n estimate: the norm of the mean gradient, the largest over the rounds [as in the predecessors'
        code: it bounds the full gradient, not its distance to the fleet's].
    noise : sigma_n estimate.
    """

    dissimilarity: Array
    noise: Array


def noise_weights(gradients: GradientNorms, weight: ArrayLike) -> Array:
    """Return w_n, [clients], in proportion to sigma_n^2 / 2 + G_n^2, with mean 1 by a_n^2; unknown: the mean.

    The bound has w_n = 1 + (sigma_n^2 + 2 G_n^2) / (2 eps); with eps far below the gradients only the ratio counts, and
    the common factor goes into alpha and beta [choice]. With the mean taken by a_n^2 the noise of uniform sampling is
    that of equal weights: constants from uniform pilots hold for both.
    """
    a = np.asarray(weight, dtype=np.float64)
    raw = 0.5 * np.nan_to_num(gradients.noise) ** 2 + gradients.dissimilarity**2
    known = np.isfinite(raw) & (a > 0.0)
    mean = float((a**2 * raw)[known].sum() / (a**2)[known].sum()) if known.any() else 0.0
    if not mean > 0.0:
        return np.ones_like(a)
    return np.where(known, np.maximum(raw / mean, 1e-3), 1.0)
