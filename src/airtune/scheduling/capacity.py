"""What each client can do, estimated from what it reports: seconds forward, backward and per uploaded bit.

Estimates are smoothed over rounds and bounded against wild measurements. A client that has not reported yet is judged
by the cost functions of the observation (the probe before round 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from airtune.errors import InputError
from airtune.scheduling.work import LocalWork, Slices
from airtune.types import ClientUpdate, Floats, Ints, Observation, RoundOutcome


@dataclass(frozen=True)
class Estimate:
    """One quantity of every client.

    Attributes
    ----------
    value : [clients], NaN where nothing is known.
    suspect : [clients], the last measurement that was out of range and is not confirmed yet, NaN if there is none.
    """

    value: Floats
    suspect: Floats

    @staticmethod
    def unknown(size: int) -> Estimate:
        """Return the estimate of `size` clients of which nothing is known."""
        return Estimate(np.full(size, np.nan), np.full(size, np.nan))


@dataclass(frozen=True)
class Capacity:
    """What is known of every client; LEGEND's status (mu, beta) and the forward time.

    Attributes
    ----------
    forward : seconds of the forward pass through all layers, one local step.
    backward_layer : seconds of the backward pass through one layer, one local step.
    upload_bit : seconds to upload one bit.
    """

    forward: Estimate
    backward_layer: Estimate
    upload_bit: Estimate

    @staticmethod
    def unknown(size: int) -> Capacity:
        """Return the capacity of `size` clients of which nothing is known."""
        return Capacity(Estimate.unknown(size), Estimate.unknown(size), Estimate.unknown(size))


@dataclass(frozen=True)
class CapacityEstimator:
    """Exponential smoothing ``x <- rho x + (1 - rho) measured`` with bounded influence.

    A measurement outside [x / f, f x] counts as the nearer end of that range, so that one wild measurement moves an
    estimate by at most (1 - rho)(f - 1) of itself. If the next one is out of range too and within the factor f of
    the first, the change is real (a power mode, say) and the estimate becomes their geometric mean [choice].

    Parameters
    ----------
    smoothing : rho, 0 <= rho < 1; 0 takes each measurement as it is within the range.
    outlier_factor : f > 1.
    """

    smoothing: float = 0.8
    outlier_factor: float = 2.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0.0 <= self.smoothing < 1.0:
            raise InputError(f"method.smoothing: {self.smoothing} is not possible; valid: at least 0, below 1")
        if not self.outlier_factor > 1.0:
            raise InputError(f"method.outlier_factor: {self.outlier_factor} is not possible; valid: above 1")

    def update(self, estimate: Estimate, clients: Ints, measured: Floats) -> Estimate:
        """Return the estimate after one measurement of some clients, both [n]; what is not positive is ignored."""
        usable = np.isfinite(measured) & (measured > 0.0)
        clients, measured = clients[usable], measured[usable]
        old, suspect = estimate.value[clients], estimate.suspect[clients]
        f, rho = self.outlier_factor, self.smoothing
        wild = (measured < old / f) | (measured > old * f)  # False where nothing is known
        confirmed = wild & (measured >= suspect / f) & (measured <= suspect * f) & ((measured > old) == (suspect > old))
        smooth = rho * old + (1.0 - rho) * np.clip(measured, old / f, old * f)
        new = np.where(np.isnan(old), measured, smooth)
        new = np.where(confirmed, np.sqrt(measured * np.where(confirmed, suspect, 1.0)), new)
        value, doubt = estimate.value.copy(), estimate.suspect.copy()
        value[clients] = new
        doubt[clients] = np.where(wild & ~confirmed, measured, np.nan)
        return Estimate(value, doubt)

    def learn(self, capacity: Capacity, outcome: RoundOutcome) -> Capacity:
        """Return the capacity after a round; clients that report no seconds are left as they were."""
        reporting = [u for u in outcome.updates if "forward_seconds" in u.reports and "backward_seconds" in u.reports]
        clients = np.array([u.task.client for u in reporting], dtype=np.int64)
        cycles = {task.client: group.cycles for group in outcome.plan.groups for task in group.tasks}
        measured = np.array([_measure(u, outcome, cycles) for u in reporting]).reshape(-1, 3)
        return Capacity(
            forward=self.update(capacity.forward, clients, measured[:, 0]),
            backward_layer=self.update(capacity.backward_layer, clients, measured[:, 1]),
            upload_bit=self.update(capacity.upload_bit, clients, measured[:, 2]),
        )


def _measure(update: ClientUpdate, outcome: RoundOutcome, cycles: Mapping[int, int]) -> tuple[float, float, float]:
    """Return forward s per step, backward s per step and layer, upload s per bit; NaN where nothing was done."""
    client, values, bits = update.task.client, update.values, update.cost.uplink_bits
    steps = update.task.training.steps(int(outcome.fleet.num_examples[client]))
    depth = values.num_layers - min(values.layer.values(), default=values.num_layers)
    upload = update.reports.get("upload_seconds", np.nan) * cycles.get(client, 1)
    return (
        update.reports["forward_seconds"] / steps,
        update.reports["backward_seconds"] / (steps * depth) if depth else np.nan,
        upload / bits if bits else np.nan,
    )


@dataclass(frozen=True)
class Speeds:
    """What is assumed of some clients in one round, each [n]: the columns of `Capacity` without gaps.

    Attributes
    ----------
    forward : seconds per local step. backward_layer : seconds per local step and layer. upload_bit : seconds.
    steps : local steps in one round (or cycle).
    """

    forward: Floats
    backward_layer: Floats
    upload_bit: Floats
    steps: Floats

    def seconds(self, layers: Ints, bits: Floats) -> Floats:
        """Return completion times, [n, options]: `layers` crossed backward and `bits` sent by option, [options]."""
        compute = self.forward[:, None] + self.backward_layer[:, None] * layers[None, :]
        return self.steps[:, None] * compute + self.upload_bit[:, None] * bits[None, :]


def assumed_speeds(capacity: Capacity, seen: Observation, work: LocalWork, clients: Ints, full: Slices) -> Speeds:
    """Return what is known of some clients, completed by the observation's cost functions where nothing is.

    full : the slices of the deepest choice; the probe asks for its cost and an equal share of the free band.
    """
    steps = np.array([work.training.steps(int(n)) for n in seen.fleet.num_examples[clients]], dtype=np.float64)
    forward, backward = capacity.forward.value[clients], capacity.backward_layer.value[clients]
    for place in np.flatnonzero(np.isnan(forward) | np.isnan(backward)):
        task = work.task(int(clients[place]), full, seen)
        flops = np.array(seen.costs.compute_flops(task))
        part = seen.costs.compute_seconds(task) * flops / (max(float(flops.sum()), 1e-300) * steps[place])
        forward[place], backward[place] = part[0], part[1] / max(full.train.depth(seen.shape), 1)
    share = np.full(len(clients), seen.free_bandwidth / max(len(clients), 1))
    rate = seen.links.uplink_rate(clients, share, seen.fleet.transmit_power[clients])
    upload = capacity.upload_bit.value[clients]
    return Speeds(forward, backward, np.where(np.isnan(upload), 1.0 / rate, upload), steps)
