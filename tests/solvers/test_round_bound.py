"""The convergence bound holds on quadratics, its terms add up, and pilots recover its constants."""

import numpy as np
import pytest

from airtune.errors import InputError, NoResultError
from airtune.solvers.pilot_fit import (
    GradientNorms,
    Pilot,
    fit_pilots,
    noise_weights,
)
from airtune.solvers.round_bound import FORMS, RoundModel, Theory, gradient_bound, split_rounds

N, D = 5, 6


class Quadratics:
    """f_n(x) = 0.5 (x - c_n)' H (x - c_n), one H: the dissimilarity of the gradients is then the same at every x."""

    def __init__(self, seed: int, sigma: float) -> None:
        rng = np.random.default_rng(seed)
        self.weight = rng.dirichlet(np.ones(N) * 3)
        basis = np.linalg.qr(rng.normal(size=(D, D)))[0]
        self.curvature = basis @ np.diag(rng.uniform(0.2, 1.0, D)) @ basis.T
        self.centres, self.sigma = rng.normal(size=(N, D)), np.full(N, sigma)
        self.mean = self.weight @ self.centres
        self.start = self.mean + 3 * rng.normal(size=D)

    def gradient(self, x: np.ndarray) -> np.ndarray:
        """Return the gradients of every f_n at points [..., D]: [..., N, D]."""
        return (x[..., None, :] - self.centres) @ self.curvature

    def theory(self, step: float, gain: float = 1.0) -> Theory:
        at_mean = self.gradient(self.mean)
        gap = 0.5 * (self.start - self.mean) @ self.curvature @ (self.start - self.mean)
        smoothness = float(np.linalg.eigvalsh(self.curvature)[-1])
        return Theory(gap, smoothness * gain, step, self.weight, self.sigma, np.linalg.norm(at_mean, axis=1))

    def measured(self, q, keep, step: float, rounds: int, runs: int, seed: int) -> tuple[float, float]:
        """Return the mean over rounds and runs of ||grad f||^2 under independent sampling, and its standard error.

        keep : coordinates that each client's update keeps, rescaled: a sketch of the gradient, unbiased.
        """
        rng = np.random.default_rng(seed)
        x = np.tile(self.start, (runs, 1))
        total = np.zeros(runs)
        for _ in range(rounds):
            g = self.gradient(x)
            total += ((self.weight @ g) ** 2).sum(axis=1) / rounds
            noisy = g + rng.normal(size=g.shape) * (self.sigma / D**0.5)[:, None]
            kept = rng.random(g.shape).argsort(axis=-1) < np.asarray(keep)[:, None]
            noisy = noisy * kept * (D / np.asarray(keep))[:, None]
            drawn = rng.random((runs, N)) < q
            x = x - step * ((self.weight / q * drawn)[:, :, None] * noisy).sum(axis=1)
        return float(total.mean()), float(total.std() / runs**0.5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_the_bound_is_never_violated_on_quadratics(seed: int, sigma: float) -> None:
    """H = 1, form V, with and without a sketch of the gradient; no gradient is bounded here."""
    world = Quadratics(seed, sigma)
    rng = np.random.default_rng(seed)
    for keep in (np.full(N, D), rng.integers(2, D + 1, N)):
        q, step, rounds = rng.uniform(0.3, 1.0, N), 0.15, 60
        bound = gradient_bound(world.theory(step), q, keep / D, rounds, "V")
        assert bound.slack > 0
        value, error = world.measured(q, keep, step, rounds, 400, seed)
        assert value <= bound.value + 3 * error
        assert value > 0.05 * bound.value  # and it says something


def test_the_bound_with_a_larger_smoothness_holds_and_both_forms_together_are_the_weakest() -> None:
    """Form S: client n's objective is (1 / ratio_n) times as curved; the bound then has L Gamma."""
    world = Quadratics(1, 0.5)
    ratio = np.array([0.5, 1.0, 0.25, 0.5, 1.0])
    q = np.full(N, 0.8)
    curved = Quadratics(1, 0.5)
    curved.curvature = world.curvature * float((world.weight / ratio).sum())
    step, rounds = 0.05, 80
    base = curved.theory(step)
    theory = Theory(
        base.initial_gap, world.theory(step).smoothness, step, *(base.weight, base.noise, base.dissimilarity)
    )
    value, error = curved.measured(q, np.full(N, D), step, rounds, 300, 0)
    forms = {form: gradient_bound(theory, q, ratio, rounds, form) for form in FORMS}
    assert value <= forms["S"].value + 3 * error
    assert forms["V+S"].value >= max(forms["V"].value, forms["S"].value)


def test_the_variance_identity_of_independent_sampling() -> None:
    """E||sum a I/q g||^2 = ||grad f||^2 + sum a^2 (sigma^2 / q + (1 - q) / q ||grad f_n||^2), by simulation."""
    rng = np.random.default_rng(0)
    world = Quadratics(2, 1.3)
    q, x = rng.uniform(0.2, 1, N), rng.normal(size=D)
    g, runs = world.gradient(x), 200_000
    drawn = rng.random((runs, N)) < q
    noisy = g + rng.normal(size=(runs, N, D)) * 1.3 / D**0.5
    squares = ((((world.weight / q) * drawn)[:, :, None] * noisy).sum(axis=1) ** 2).sum(axis=1)
    norms = (g**2).sum(axis=1)
    expected = ((world.weight @ g) ** 2).sum() + (world.weight**2 * (1.3**2 / q + (1 - q) / q * norms)).sum()
    assert abs(squares.mean() - expected) < 4 * squares.std() / runs**0.5


@pytest.mark.parametrize("form", FORMS)
def test_at_the_rounds_of_the_model_the_bound_equals_the_target(form: str) -> None:
    world = Quadratics(3, 0.7)
    q, ratio, target, step = np.full(N, 0.7), np.array([0.5, 1, 1, 0.5, 1]), 2.0, 0.02
    theory = world.theory(step)
    model, noise = RoundModel.from_theory(theory, target, form)
    rounds = model.rounds(world.weight, noise, q, ratio)
    gamma = (world.weight / ratio).sum() if "S" in form else 1.0
    shrunk = Theory(
        theory.initial_gap, theory.smoothness, step / gamma, *(theory.weight, theory.noise, theory.dissimilarity)
    )
    assert gradient_bound(shrunk, q, ratio, rounds, form).value == pytest.approx(target)


def test_fewer_or_smaller_participants_need_more_rounds_and_a_target_can_be_out_of_reach() -> None:
    a = np.array([0.5, 0.3, 0.2])
    for form in FORMS:
        model = RoundModel(10.0, 2.0, form)
        base = model.rounds(a, 1.0, np.full(3, 0.9), np.ones(3))
        assert model.rounds(a, 1.0, np.full(3, 0.5), np.ones(3)) > base
        assert model.rounds(a, 1.0, np.full(3, 0.9), np.array([1, 1, 0.5])) > base
        assert model.rounds(a, 1.0, np.full(3, 0.05), np.ones(3)) == np.inf
    assert gradient_bound(Quadratics(0, 1).theory(0.15), np.full(N, 0.01), np.ones(N), 10).value == np.inf


def test_the_split_form_is_an_upper_bound_of_form_v() -> None:
    rng = np.random.default_rng(4)
    for _ in range(50):
        a, q = rng.dirichlet(np.ones(6) * 3), rng.uniform(0.5, 1, 6)
        model = RoundModel(10.0, 6 * (a**2 / q).max() * rng.uniform(1.05, 3))
        assert split_rounds(model, a, 1.0, q, 1.0) >= model.rounds(a, 1.0, q, np.ones(6)) * (1 - 1e-12)


# ------------------------------------------------------------------------------------------------------------- pilots


def pilots_of(model: RoundModel, weight, noise, settings, error=0.0, seed=0) -> list[Pilot]:
    rng = np.random.default_rng(seed)
    made = []
    for q, ratio in settings:
        probability, share = np.full(len(weight), q), np.full(len(weight), ratio)
        rounds = model.rounds(weight, noise, probability, share) * np.exp(error * rng.normal())
        made.append(Pilot(probability, share, float(rounds)))
    return made


SETTINGS = [(1.0, 1.0), (0.4, 1.0), (1.0, 0.125), (0.5, 0.5)]


@pytest.mark.parametrize("form", FORMS)
def test_noiseless_pilots_recover_the_constants_and_the_form(form: str) -> None:
    rng = np.random.default_rng(1)
    a, w = rng.dirichlet(np.ones(20) * 5), rng.uniform(0.5, 2, 20)
    truth = RoundModel(37.0, 2.5, form)
    fit = fit_pilots(pilots_of(truth, a, w, SETTINGS), a, w)
    assert fit.best.model.form == form
    assert fit.model().alpha == pytest.approx(37.0, rel=1e-9)
    assert fit.model().beta == pytest.approx(2.5, rel=1e-9)
    assert fit.best.largest < 1e-9
    assert min(other.largest for name, other in fit.by_form.items() if name != form) > 0.01


def test_noisy_pilots_are_fitted_and_poor_fits_are_refused() -> None:
    a = np.full(20, 0.05)
    truth = RoundModel(37.0, 0.6, "V")
    settings = [*SETTINGS[:2], (0.7, 0.5), (0.3, 1.0), (0.5, 1.0)]
    fit = fit_pilots(pilots_of(truth, a, 1.0, settings, error=0.03), a)
    assert fit.usable
    assert fit.model().beta == pytest.approx(0.6, rel=0.3)
    wild = [Pilot(np.full(20, q), np.ones(20), r) for q, r in ((1.0, 50.0), (0.5, 20.0), (0.3, 200.0), (0.2, 30.0))]
    with pytest.raises(NoResultError, match="pilot"):
        fit_pilots(wild, a).model()


def test_pilots_that_say_nothing_are_refused() -> None:
    a = np.full(4, 0.25)
    same = [Pilot(np.ones(4), np.ones(4), 10.0)] * 3
    with pytest.raises(NoResultError, match="differ"):
        fit_pilots(same, a)
    with pytest.raises(InputError, match="3 or more"):
        fit_pilots(same[:2], a)
    backwards = [Pilot(np.full(4, q), np.ones(4), r) for q, r in ((1.0, 30.0), (0.8, 20.0), (0.6, 10.0))]
    with pytest.raises(NoResultError, match="no form fits"):
        fit_pilots(backwards, a)


def test_noise_weights_keep_the_noise_of_uniform_sampling_and_so_the_constants() -> None:
    a, known = np.array([0.5, 0.25, 0.25]), GradientNorms(np.array([1.0, 2.0, np.nan]), np.array([0.0, 0.0, np.nan]))
    weights = noise_weights(known, a)
    np.testing.assert_allclose(weights, [0.625, 2.5, 1.0])
    assert weights @ a**2 == pytest.approx((a**2).sum())
    assert noise_weights(GradientNorms(np.ones(2), np.array([2.0, 0.0])), [0.5, 0.5])[0] == pytest.approx(1.5)
    pilots = pilots_of(RoundModel(37.0, 5.0, "V"), a, 1.0, SETTINGS)
    equal, weighted = (fit_pilots(pilots, a, w).model() for w in (1.0, weights))
    assert weighted.alpha == pytest.approx(equal.alpha)
    assert weighted.beta == pytest.approx(equal.beta)
    np.testing.assert_array_equal(noise_weights(GradientNorms(np.full(3, np.nan), np.full(3, np.nan)), a), np.ones(3))
