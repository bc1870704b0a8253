"""From an observation to the joint sampling problem: seconds and Hz s of every client at every sketch size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from airtune.errors import InputError
from airtune.scheduling.bandwidth import BandwidthRule, EqualSplit
from airtune.scheduling.capacity import CapacityEstimator, Estimate
from airtune.scheduling.sketching import Sketching
from airtune.scheduling.work import LocalWork
from airtune.solvers.joint_problem import JointProblem
from airtune.solvers.round_bound import Form, RoundModel
from airtune.types import ClientUpdate, Floats, Ints, Observation, RoundOutcome


@dataclass(frozen=True)
class RoundConstants:
    """Constants of the round model; from pilots where there are any.

    Parameters
    ----------
    alpha, beta : of `airtune.solvers.round_bound.RoundModel`. None [our choice, not from any paper]: beta is 1/4 above
        the noise of full participation at the largest sizes, and alpha is such that this would need 50 rounds. A
        balanced fleet without caps then has about 8 expected participants. Only ratios of predicted times mean
        something without a pilot.
    form : "V" (a sketch adds variance), "S" (it makes the objective less smooth), or "V+S".
    gradient_norms : G_n of every client of the fleet, or none known.
    gradient_noise : sigma_n of every client, or none known.
    """

    alpha: float | None = None
    beta: float | None = None
    form: Form = "V"
    gradient_norms: tuple[float, ...] = ()
    gradient_noise: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check what needs no fleet."""
        RoundModel(1.0 if self.alpha is None else self.alpha, 1.0 if self.beta is None else self.beta, self.form)
        if (self.alpha is None) != (self.beta is None):
            raise InputError("constants: alpha and beta belong together; valid: both or neither")

    @property
    def from_pilot(self) -> bool:
        """Whether alpha and beta were given."""
        return self.alpha is not None

    def model(self, least_load: float) -> RoundModel:
        """Return the round model.

        least_load : the noise of full participation at the largest sizes, sum of w_n psi_n a_n^2.
        """
        if self.alpha is not None and self.beta is not None:
            return RoundModel(self.alpha, self.beta, self.form)
        return RoundModel(DEFAULT_ROUNDS * DEFAULT_SLACK, least_load + DEFAULT_SLACK, self.form)

    def per_client(self, values: tuple[float, ...], name: str, size: int) -> Floats | None:
        """Return values as [clients], None for none; raise InputError if their number is not the fleet's."""
        if not values:
            return None
        if len(values) != size:
            raise InputError(f"method.constants.{name}: has {len(values)} values; valid: none, or {size}, one a client")
        return np.array(values, dtype=np.float64)


DEFAULT_SLACK = 0.25
DEFAULT_ROUNDS = 50.0


@dataclass(frozen=True)
class Measured:
    """What reports said of every client.

    Attributes
    ----------
    slowdown : seconds of computation over the cost functions' prediction.
    efficiency : bits per second and Hz of the uploads.
    gradient : norm of the mean gradient of a round, of plain SGD.
    loss : [clients], the latest local loss, NaN where there is none.
    """

    slowdown: Estimate
    efficiency: Estimate
    gradient: Estimate
    loss: Floats

    @staticmethod
    def unknown(size: int) -> Measured:
        """Return that nothing is known."""
        unknown = Estimate.unknown(size)
        return Measured(unknown, unknown, unknown, np.full(size, np.nan))

    def after(
        self, outcome: RoundOutcome, predicted: dict[int, float], norms: dict[int, float], estimator: CapacityEstimator
    ) -> Measured:
        """Return what is known after a round.

        Parameters
        ----------
        predicted : client -> s of computation that the cost functions predicted.
        norms : client -> norm of the mean gradient, where the training is plain SGD.
        """
        updates = outcome.updates
        clients = np.array([update.task.client for update in updates], dtype=np.int64)
        slowdown = np.array([_slowdown(u, predicted.get(u.task.client)) for u in updates], dtype=np.float64)
        spectral = np.array([_efficiency(u) for u in updates], dtype=np.float64)
        gradient = np.array([norms.get(u.task.client, np.nan) for u in updates], dtype=np.float64)
        loss = self.loss.copy()
        for update in updates:
            loss[update.task.client] = update.reports.get("loss", np.nan)
        return Measured(
            slowdown=estimator.update(self.slowdown, clients, slowdown),
            efficiency=estimator.update(self.efficiency, clients, spectral),
            gradient=estimator.update(self.gradient, clients, gradient),
            loss=loss,
        )


def _known_or(estimate: Estimate, otherwise: Floats) -> Floats:
    return np.where(np.isnan(estimate.value), otherwise, estimate.value)


def _slowdown(update: ClientUpdate, predicted: float | None) -> float:
    reports = update.reports
    if predicted is None or "forward_seconds" not in reports or "backward_seconds" not in reports:
        return float("nan")
    return (reports["forward_seconds"] + reports["backward_seconds"]) / max(predicted, 1e-300)


def _efficiency(update: ClientUpdate) -> float:
    seconds, width = update.reports.get("upload_seconds", float("nan")), update.task.bandwidth
    return update.cost.uplink_bits / (seconds * width) if seconds > 0.0 and width > 0.0 else float("nan")


@dataclass(frozen=True)
class CohortProblem:
    """What turns observations into problems.

    Parameters
    ----------
    kept : [choices], components of a slot, increasing. sketching : how sketches are drawn and sent.
    constants : of the round model. fixed, idle : s, see `JointProblem`.
    count_download : whether the time to receive the slice, alone with the downlink band, comes to the computation.
    """

    kept: Ints
    sketching: Sketching
    constants: RoundConstants
    fixed: float
    idle: float
    count_download: bool

    def problem(
        self,
        seen: Observation,
        work: LocalWork,
        measured: Measured,
        noise_weight: Floats,
        bandwidth: BandwidthRule,
        expected_cohort: float,
    ) -> JointProblem:
        """Return the problem of the whole fleet, whoever is idle now.

        Clients without examples, link or the memory for the smallest sketch have no weight and are never drawn. The
        spectral efficiency is the estimated channel's at an equal share of the band among `expected_cohort` clients,
        or what was measured; the clock of a run uses the channel's own rate.
        """
        compute, bits, received = self._work(seen, work)
        compute = compute * _known_or(measured.slowdown, np.ones(seen.fleet.size))[:, None]
        upload, sent = self._uploads(seen, measured, bits, expected_cohort)
        if self.count_download:
            rate = seen.links.downlink_rate(np.arange(seen.fleet.size))
            with np.errstate(divide="ignore"):
                compute = compute + received / rate[:, None]
        needed = np.array([work.memory_bytes(self.sketching.sized(seen.shape, int(k)), seen) for k in self.kept])
        allowed = needed[None, :] <= seen.fleet.memory_bytes[:, None]
        reachable = np.isfinite(compute + upload + sent).all(axis=1)
        usable = allowed.any(axis=1) & reachable & (seen.fleet.num_examples > 0)
        weight = np.where(usable, seen.fleet.data_weight, 0.0)
        ratio = self.kept / seen.shape.max_rank
        model = self.constants.model(_least_load(weight, noise_weight, ratio, allowed, self.constants.form))
        return JointProblem.of(
            weight,
            np.where(usable[:, None], compute + sent, 0.0),
            np.where(usable[:, None], upload, 0.0),
            ratio,
            seen.free_bandwidth,
            model,
            noise_weight=noise_weight,
            fixed=self.fixed,
            idle=self.idle,
            allowed=allowed,
            split="equal" if isinstance(bandwidth, EqualSplit) else "equal-finish",
        )

    def _work(self, seen: Observation, work: LocalWork) -> tuple[Floats, Floats, Floats]:
        """Return seconds of computation, bits up and bits down, [clients, choices]."""
        table = np.zeros((3, seen.fleet.size, len(self.kept)))
        for place, kept in enumerate(self.kept.tolist()):
            slices = self.sketching.sized(seen.shape, kept)
            for client in range(seen.fleet.size):
                task = work.task(client, slices, seen)
                table[:, client, place] = (
                    seen.costs.compute_seconds(task),
                    seen.costs.uplink_bits(task),
                    seen.costs.downlink_bits(task),
                )
        return table[0], table[1], table[2]

    def _uploads(
        self, seen: Observation, measured: Measured, bits: Floats, expected_cohort: float
    ) -> tuple[Floats, Floats]:
        """Return Hz s of the shared band, and s that no band changes (measured networks), [clients, choices]."""
        clients = np.arange(seen.fleet.size)
        share = np.full(seen.fleet.size, seen.free_bandwidth / max(expected_cohort, 1.0))
        rate = seen.links.uplink_rate(clients, share, seen.fleet.transmit_power)
        with np.errstate(divide="ignore"):
            if seen.links.fixed_uplink_rate is not None:
                return np.zeros_like(bits), bits / rate[:, None]
            efficiency = _known_or(measured.efficiency, rate / share)
            return bits / efficiency[:, None], np.zeros_like(bits)


def _least_load(weight: Floats, noise_weight: Floats, ratio: Floats, allowed: np.ndarray, form: Form) -> float:
    """Return the noise of full participation when every client has the largest size that it can hold."""
    largest = np.where(allowed, ratio, 0.0).max(axis=1)
    factor = 1.0 / np.maximum(largest, 1e-300) if "V" in form else np.ones_like(largest)
    return float((noise_weight * weight**2 * np.where(weight > 0.0, factor, 0.0)).sum())
