"""What a controller of the long-term latency remembers: its queues, what dropping costs each client, and the channel.

The virtual queue grows by what a round takes beyond the limit and never falls below zero,
Q <- max(Q + latency - limit, 0), so that a bounded queue means a mean latency within the limit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.special import chndtrix

from airtune.types import Floats, Ints, RoundOutcome


@dataclass(frozen=True)
class LatencyControl:
    """The state of `airtune.methods.tsfa.TSFA`: plain numbers and arrays, so that a checkpoint holds it.

    Attributes
    ----------
    queue : s; [1], or [clients] where every client has a queue of its own (`per_client`).
    tails : [clients, rank + 1], energy of the components beyond the i largest in each client's last upload; NaN before.
    mean_gain : [clients], mean of the channel estimates so far; NaN before the first.
    rounds : number of rounds so far, of each of which `latency_sum` (s) is the sum of the latencies.
    limit : s; NaN until the first round decides it.
    rank : the structural rank; 0 until it is fixed.
    latency : s, planned in the last round: where the next search starts; NaN before.
    bounds : of the ranks that the offline stage compared; empty before.
    """

    queue: Floats
    tails: Floats
    mean_gain: Floats
    per_client: bool = False
    rounds: int = 0
    latency_sum: float = 0.0
    limit: float = float("nan")
    rank: int = 0
    latency: float = float("nan")
    bounds: tuple[float, ...] = ()

    @staticmethod
    def new(clients: int, rank: int, *, per_client: bool) -> LatencyControl:
        """Return that nothing is known: empty queues."""
        return LatencyControl(
            queue=np.zeros(clients if per_client else 1),
            tails=np.full((clients, rank + 1), np.nan),
            mean_gain=np.full(clients, np.nan),
            per_client=per_client,
        )

    def having_seen(self, gain: Floats) -> LatencyControl:
        """Return the state with one more channel estimate of every client, [clients]."""
        known = np.where(np.isnan(self.mean_gain), gain, self.mean_gain)
        return replace(self, mean_gain=known + (gain - known) / (self.rounds + 1))

    def after(self, outcome: RoundOutcome) -> LatencyControl:
        """Return the state with the queues after a round, whatever arrived."""
        latency = outcome.end_time - outcome.start_time
        queue = self.queue.copy()
        seconds = _latencies(outcome) if self.per_client else {0: latency}
        for place, value in seconds.items():
            queue[place] = max(float(queue[place]) + value - self.limit, 0.0)
        return replace(self, queue=queue, rounds=self.rounds + 1, latency_sum=self.latency_sum + latency)

    @property
    def mean_latency(self) -> float:
        """Return the mean latency of the rounds so far, s; NaN before the first."""
        return self.latency_sum / self.rounds if self.rounds else float("nan")


def relative_errors(tails: Floats, weights: Floats, rank: int, model: str) -> Floats:
    """Return what sending i = 1 ... rank components costs each client, [n, rank], relative to the cohort's energy.

    Parameters
    ----------
    tails : [n, rank + 1], NaN where nothing was measured. weights : [n], p_k of the cohort, summing to 1.
    rank : number of components that could be sent.
    model : "profile": the measured tails, and (1 - i / rank)^2 of the mean energy where there is none; "quadratic":
        (1 - i / rank)^2 of each client's energy; "linear": 1 - i / rank, the worst case.

    Dividing by the cohort's mean energy makes the price of latency independent of how far training is [choice].
    """
    known = ~np.isnan(tails[:, 0])
    energy = np.where(known, tails[:, 0], 0.0)
    mean = float((weights * energy).sum() / weights[known].sum()) if known.any() else 0.0
    energy = np.where(known, energy, mean) if mean > 0.0 else np.ones(len(tails))
    dropped = 1.0 - np.arange(1, rank + 1) / rank
    errors = energy[:, None] * (dropped if model == "linear" else dropped**2)[None, :]
    if model == "profile" and mean > 0.0:
        errors = np.where(known[:, None], tails[:, 1:], errors)
    return errors / float((weights * energy).sum())


def quantile_gain(estimate: Floats, mean: Floats, error_variance: float, quantile: float) -> Floats:
    """Return the gain below which the true channel falls with probability `quantile`, given its estimate.

    Under Rayleigh fading with the estimate sqrt(1 - s2) h + sqrt(s2) e of a coefficient h of unit power (the model of
    `airtune.wireless.knowledge`), h given the estimate is complex normal with mean sqrt(1 - s2) times it and variance
    s2, so that 2 |h|^2 / s2 is noncentral chi-square with 2 degrees of freedom. The rate rises with the
    gain: a quantile of the gain is the same quantile of the rate.

    Parameters
    ----------
    estimate, mean : [n], estimated gain, and mean gain of the link. error_variance : s2, 0 to 1.
    """
    if error_variance <= 0.0:
        return estimate
    power = estimate / np.where(mean > 0.0, mean, 1.0)
    place = chndtrix(quantile, 2.0, 2.0 * (1.0 - error_variance) * power / error_variance)
    return mean * 0.5 * error_variance * np.asarray(place, dtype=np.float64)


def _latencies(outcome: RoundOutcome) -> dict[int, float]:
    """Return client -> its seconds in this round; a lost task counts as the whole round."""
    found = {update.task.client: update.arrival_time - outcome.start_time for update in outcome.updates}
    found |= {lost.task.client: outcome.end_time - outcome.start_time for lost in outcome.lost}
    return found


def planned_clients(cohort: Ints, weights: Floats) -> Floats:
    """Return the weights [n] of a cohort, summing to 1; weights : [clients] of the fleet."""
    share = weights[cohort]
    return share / share.sum() if share.sum() > 0.0 else np.full(len(cohort), 1.0 / max(len(cohort), 1))
