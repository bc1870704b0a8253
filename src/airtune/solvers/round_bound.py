"""How many rounds independent sampling needs: the convergence bound, term by term, and the fitted form of it.

Under independent sampling client n takes part with probability q_n and its change is weighted by a_n / q_n. With
f = sum_n a_n f_n L-smooth, E||g_n - grad f_n||^2 <= sigma_n^2 and ||grad f_n - grad f||^2 <= G_n^2 (bounded
dissimilarity; gradients themselves need no bound), one step of size eta a round (H = 1) gives

::

    (1/R) sum_r E||grad f(X_r)||^2 <= ( initial + noise + sampling ) / slack

    initial  = (f(X_0) - f*) / (eta R)
    noise    = (L eta / 2) sum_n a_n^2 sigma_n^2 / p_n
    sampling = L eta sum_n a_n^2 (1/p_n - 1) G_n^2
    slack    = 1 - L eta / 2 - L eta sum_n a_n^2 (1/p_n - 1)

with p_n = q_n. A sketch that keeps the share k/gamma of the components enters in two ways [our choice: the published
abstract of arXiv 2505.23555 does not say]: form "V" (variance): it multiplies the second moment of the gradient by
gamma/k, that is p_n = q_n k_n/gamma; form "S" (smoothness, like arXiv 2501.19389): L becomes
L sum_n a_n gamma/k_n; form "V+S": both. For H > 1 the client drift is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from airtune.errors import InputError, unknown_name
from airtune.solvers.solution import finite_array, name_clients

Array = NDArray[np.float64]
Form = Literal["V", "S", "V+S"]
FORMS: tuple[Form, ...] = ("V", "S", "V+S")


@dataclass(frozen=True)
class Theory:
    """The constants of the bound.

    Parameters
    ----------
    initial_gap : f(X_0) - f*, in units of the loss.
    smoothness : L.
    step : eta, the step of one round.
    weight : [clients], a_n, shares of the data; their sum is 1.
    noise : [clients], sigma_n.
    dissimilarity : [clients], G_n.
    """

    initial_gap: float
    smoothness: float
    step: float
    weight: Array
    noise: Array
    dissimilarity: Array


@dataclass(frozen=True)
class BoundTerms:
    """The named terms of the bound; all in units of ||grad f||^2 but `slack`, which has none."""

    initial: float
    noise: float
    sampling: float
    slack: float

    @property
    def value(self) -> float:
        """Return the bound on the mean of E||grad f||^2 over the rounds; infinite where the slack is used up."""
        total = self.initial + self.noise + self.sampling
        return total / self.slack if self.slack > 0.0 else float("inf")


def gradient_bound(
    theory: Theory, probability: ArrayLike, ratio: ArrayLike, rounds: float, form: Form = "V"
) -> BoundTerms:
    """Return the terms of the bound after `rounds` rounds.

    Parameters
    ----------
    probability : [clients], q_n in (0, 1]. ratio : [clients], k_n / gamma in (0, 1], one without a sketch.
    """
    q, share = checked_shares("probability", probability, theory.weight), checked_shares("ratio", ratio, theory.weight)
    _check_form(form)
    a2 = theory.weight**2
    refreshed = q * share if "V" in form else q
    smoothness = theory.smoothness * (float((theory.weight / share).sum()) if "S" in form else 1.0)
    scale = smoothness * theory.step
    return BoundTerms(
        initial=theory.initial_gap / (theory.step * rounds),
        noise=0.5 * scale * float((a2 * theory.noise**2 / refreshed).sum()),
        sampling=scale * float((a2 * (1.0 / refreshed - 1.0) * theory.dissimilarity**2).sum()),
        slack=1.0 - 0.5 * scale - scale * float((a2 * (1.0 / refreshed - 1.0)).sum()),
    )


@dataclass(frozen=True)
class RoundModel:
    """Rounds to a fixed accuracy: ``R = Gamma alpha / (beta - V)`` with two constants, from theory or from pilots.

    ::

        V     = sum_n w_n psi_n a_n^2 / q_n        psi_n = gamma / k_n  (forms "V", "V+S"), else 1
        Gamma = sum_n a_n gamma / k_n              (forms "S", "V+S": step size in proportion to 1 / L), else 1

    w_n is the client's noise weight, 1 where nothing is known.

    Parameters
    ----------
    alpha : rounds. beta : no unit; V must stay below it.
    form : "V", "S" or "V+S".
    """

    alpha: float
    beta: float
    form: Form = "V"

    def __post_init__(self) -> None:
        """Check the constants."""
        _check_form(self.form)
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if not (np.isfinite(value) and value > 0.0):
                raise InputError(f"{name}: must be positive and finite; got {value:g}")

    @staticmethod
    def from_theory(theory: Theory, target: float, form: Form = "V") -> tuple[RoundModel, Array]:
        """Return the model and the noise weights w_n, [clients], with which the bound equals `target`.

        For forms with "S" the theory's step is that without a sketch; it shrinks by 1 / Gamma.
        """
        scale = theory.smoothness * theory.step
        a2, g2 = theory.weight**2, theory.dissimilarity**2
        alpha = theory.initial_gap / (target * scale * theory.step)
        beta = 1.0 / scale - 0.5 + float((a2 * (1.0 + g2 / target)).sum())
        return RoundModel(alpha, beta, form), 1.0 + (theory.noise**2 + 2.0 * g2) / (2.0 * target)

    def variance_factor(self, ratio: ArrayLike) -> Array:
        """Return psi at sketching ratios k / gamma."""
        share = np.asarray(ratio, dtype=np.float64)
        return 1.0 / share if "V" in self.form else np.ones_like(share)

    def smoothness_factor(self, ratio: ArrayLike) -> Array:
        """Return the client's term of Gamma over a_n at sketching ratios; ones for form "V"."""
        share = np.asarray(ratio, dtype=np.float64)
        return 1.0 / share if "S" in self.form else np.ones_like(share)

    def variance(self, weight: ArrayLike, noise_weight: ArrayLike, probability: ArrayLike, ratio: ArrayLike) -> float:
        """Return V; clients without weight do not count, one with weight and probability 0 makes it infinite."""
        a = np.asarray(weight, dtype=np.float64)
        q = np.broadcast_to(np.asarray(probability, dtype=np.float64), a.shape)
        load = np.asarray(noise_weight, dtype=np.float64) * self.variance_factor(ratio) * a**2
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(np.where(a > 0.0, load / q, 0.0).sum())

    def smoothness(self, weight: ArrayLike, ratio: ArrayLike) -> float:
        """Return Gamma."""
        a = np.asarray(weight, dtype=np.float64)
        return float((a * self.smoothness_factor(ratio)).sum()) / float(a.sum())

    def rounds(self, weight: ArrayLike, noise_weight: ArrayLike, probability: ArrayLike, ratio: ArrayLike) -> float:
        """Return R, infinite where the target is out of reach (V >= beta)."""
        left = self.beta - self.variance(weight, noise_weight, probability, ratio)
        return self.smoothness(weight, ratio) * self.alpha / left if left > 0.0 else float("inf")


def split_rounds(
    model: RoundModel, weight: ArrayLike, noise_weight: ArrayLike, probability: ArrayLike, ratio: ArrayLike
) -> float:
    """Return the predecessor's form ``(1/N) sum_n alpha psi'_n / (beta - N w_n psi_n a_n^2 / q_n)``.

    By Jensen's inequality it is never below `RoundModel.rounds` for form "V"; it was chosen there because it is a sum
    over clients. Infinite where a client's own term is.
    """
    a = np.asarray(weight, dtype=np.float64)
    load = np.asarray(noise_weight, dtype=np.float64) * model.variance_factor(ratio) * a**2
    left = model.beta - len(a) * load / np.asarray(probability, dtype=np.float64)
    if not bool((left > 0.0).all()):
        return float("inf")
    return float((model.alpha * model.smoothness_factor(ratio) / left).mean())


def checked_shares(name: str, value: ArrayLike, weight: Array) -> Array:
    """Return [clients] numbers in (0, 1], or raise InputError."""
    share = finite_array(name, value, len(weight), positive=True)
    if (share > 1.0).any():
        raise InputError(f"{name}: {name_clients(share > 1.0)} must be at most 1")
    return share


def _check_form(form: str) -> None:
    if form not in FORMS:
        raise unknown_name("form", form, FORMS)
