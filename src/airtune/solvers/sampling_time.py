"""How long a round of an independently sampled cohort takes, when the band is shared so that all finish together.

Client n is in the cohort K with probability q_n, on its own. It computes tau_n seconds and needs t_n Hz s to upload
(seconds at 1 Hz: the spectral efficiency is taken as fixed). The round ends at the root T of

    sum_{n in K} t_n / (T - tau_n) = f        (f: the band in Hz; unique above max tau_n)

The expectation over K has no closed form. Here: exactly by enumeration for small fleets, by Monte Carlo with common
random numbers (the same uniforms for every q, so two q are compared without their noise), and bounds in closed form,
L <= E[T] <= U2 <= U1. To all of them come `fixed` seconds every round and `idle` seconds for a round without anybody.
Mathematics: our reading of arXiv 2505.23555, whose abstract names only "adaptive bandwidth allocation" [choice].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from airtune.errors import InputError, unknown_name
from airtune.solvers.solution import finite_array
from airtune.streams import stream

Array = NDArray[np.float64]
Bools = NDArray[np.bool_]
Split = Literal["equal-finish", "equal"]
LARGEST_ENUMERATION = 12
_ITERATIONS = 100


@dataclass(frozen=True)
class RoundTimes:
    """What every client's round consists of.

    Parameters
    ----------
    compute : [clients], tau_n, s before the upload starts.
    upload : [clients], t_n, Hz s: bits over spectral efficiency.
    bandwidth : f, Hz.
    fixed : s that every round takes on top. idle : s of a round that nobody joins (on top of `fixed`).
    split : "equal-finish", or "equal": every client of the cohort has f / |K| (the ablation).
    """

    compute: Array
    upload: Array
    bandwidth: float
    fixed: float = 0.0
    idle: float = 0.0
    split: Split = "equal-finish"

    @classmethod
    def of(
        cls,
        compute: ArrayLike,
        upload: ArrayLike,
        bandwidth: float,
        fixed: float = 0.0,
        idle: float = 0.0,
        split: Split = "equal-finish",
    ) -> RoundTimes:
        """Return checked times. Raises InputError for numbers that are not finite or negative."""
        size = np.broadcast(np.atleast_1d(compute), upload).size
        if not (np.isfinite(bandwidth) and bandwidth > 0.0):
            raise InputError(f"bandwidth: must be positive and finite, in Hz; got {bandwidth:g}")
        if not (0.0 <= fixed < np.inf and 0.0 <= idle < np.inf):
            raise InputError(f"fixed, idle: must be finite and not negative, in s; got {fixed:g}, {idle:g}")
        if split not in ("equal-finish", "equal"):
            raise unknown_name("split", split, ("equal-finish", "equal"))
        tau, t = finite_array("compute", compute, size), finite_array("upload", upload, size)
        return cls(tau, t, bandwidth, fixed, idle, split)

    @property
    def size(self) -> int:
        """Number of clients."""
        return self.compute.size

    def of_cohorts(self, cohorts: Bools) -> Array:
        """Return the seconds of some cohorts, [cohorts], from membership [cohorts, clients]."""
        seconds = np.full(len(cohorts), self.fixed + self.idle)
        rows, clients = np.nonzero(cohorts)
        if len(rows) == 0:
            return seconds
        some, starts = np.unique(rows, return_index=True)
        compute, upload = self.compute[clients], self.upload[clients]
        if self.split == "equal":
            count = np.diff(np.append(starts, len(rows)))
            finish = compute + upload * np.repeat(count, count) / self.bandwidth
            seconds[some] = self.fixed + np.maximum.reduceat(finish, starts)
        else:
            seconds[some] = self.fixed + _finish_times(compute, upload, starts, self.bandwidth)
        return seconds


def _finish_times(compute: Array, upload: Array, starts: NDArray[np.intp], bandwidth: float) -> Array:
    """Return the root T of every cohort; the members of cohort i are those from starts[i] to starts[i + 1].

    1 / sum(t / (T - tau)) is concave and increasing, so Newton's method on it from the left never passes the root.
    It starts at the larger of two lower bounds: each client alone with the band, and Jensen's inequality.
    """
    lengths = np.diff(np.append(starts, len(compute)))
    alone = np.maximum.reduceat(compute + upload / bandwidth, starts)
    sent = np.add.reduceat(upload, starts)
    mean = np.divide(np.add.reduceat(upload * compute, starts), sent, out=np.zeros_like(sent), where=sent > 0.0)
    time = np.maximum(alone, (mean + sent / bandwidth) * (1.0 - 1e-12))
    sends = upload > 0.0
    for _ in range(_ITERATIONS):
        left = np.repeat(time, lengths) - compute
        share = np.divide(upload, left, out=np.zeros_like(upload), where=sends)
        need = np.add.reduceat(share, starts)
        slope = np.add.reduceat(np.divide(share, left, out=np.zeros_like(upload), where=sends), starts)
        excess = np.maximum(need - bandwidth, 0.0)
        step = np.divide(excess * need, bandwidth * slope, out=np.zeros_like(time), where=slope > 0.0)
        time = time + step
        if bool((step <= 1e-14 * time).all()):
            break
    return time


# ----------------------------------------------------------------------------------------------------------- scenarios


@dataclass(frozen=True)
class Scenarios:
    """The cohorts over which a mean is taken: the same uniforms for every q, or all cohorts.

    Parameters
    ----------
    uniforms : [scenarios, clients] in [0, 1), client n takes part where its uniform is below q_n; None: every one of
        the 2^N cohorts, weighted by its probability.
    """

    uniforms: Array | None = None

    @staticmethod
    def draw(count: int, clients: int, seed: int = 0) -> Scenarios:
        """Return `count` scenarios, a pure function of the arguments."""
        return Scenarios(np.stack([stream(seed, "round time", s).random(clients) for s in range(count)]))

    @staticmethod
    def all_or(count: int, clients: int, seed: int = 0) -> Scenarios:
        """Return every cohort where there are no more of them than `count` (and 2^12), else drawn scenarios."""
        if clients <= LARGEST_ENUMERATION and 2**clients <= count:
            return Scenarios()
        return Scenarios.draw(count, clients, seed)

    def cohorts(self, probability: Array) -> tuple[Bools, Array]:
        """Return membership, [scenarios, clients], and the weight of each scenario, summing to 1."""
        if self.uniforms is not None:
            count = len(self.uniforms)
            return self.uniforms < probability, np.full(count, 1.0 / count)
        members = every_cohort(len(probability))
        return members, np.where(members, probability, 1.0 - probability).prod(axis=1)


def every_cohort(clients: int) -> Bools:
    """Return all cohorts of a small fleet, [2^clients, clients]. Raises ValueError above 12 clients."""
    if clients > LARGEST_ENUMERATION:
        raise ValueError(f"{clients} clients have too many cohorts to list; the limit is {LARGEST_ENUMERATION}")
    return (np.arange(2**clients)[:, None] >> np.arange(clients)) % 2 == 1


@dataclass(frozen=True)
class Mean:
    """An estimate, s, and its standard error, s (0 where it is exact)."""

    value: float
    error: float


def expected_seconds(times: RoundTimes, probability: ArrayLike, scenarios: Scenarios) -> Mean:
    """Return E[T] over the scenarios, [clients] probabilities.

    With drawn scenarios, two quantities whose expectations are known serve as control variates with coefficient 1:
    the slowest computation of the cohort, and the time to send its uploads one after the other.
    """
    q = np.asarray(probability, dtype=np.float64)
    cohorts, weight = scenarios.cohorts(q)
    seconds = times.of_cohorts(cohorts)
    if scenarios.uniforms is None:
        return Mean(float(weight @ seconds), 0.0)
    slowest = np.where(cohorts, times.compute, 0.0).max(axis=1, initial=0.0)
    sent = cohorts @ (times.upload / times.bandwidth)
    known = expected_slowest(times.compute, q) + float(q @ times.upload) / times.bandwidth
    empty = ~cohorts.any(axis=1) * times.idle
    rest = seconds - slowest - sent - empty
    error = float(rest.std(ddof=1)) / len(rest) ** 0.5 if len(rest) > 1 else float("inf")
    return Mean(float(rest.mean()) + known + empty_seconds(times, q), error)


# -------------------------------------------------------------------------------------------------------------- bounds


def empty_seconds(times: RoundTimes, probability: Array) -> float:
    """Return what rounds without anybody add to the expectation, s: `idle` times their probability."""
    return times.idle * float(np.prod(1.0 - probability))


def expected_slowest(compute: Array, probability: Array) -> float:
    """Return E[max of tau over the cohort], s, 0 for an empty one: a sum over the clients sorted by tau."""
    order = np.argsort(compute, kind="stable")
    q, tau = probability[order], compute[order]
    none_slower = np.append(np.cumprod((1.0 - q)[::-1])[::-1][1:], 1.0)
    return float((tau * q * none_slower).sum())


def additive_bound(times: RoundTimes, probability: ArrayLike) -> float:
    """Return U1 >= E[T], s: ``sum q_n (tau_n + t_n / f)``, as if clients worked one after the other."""
    q = np.asarray(probability, dtype=np.float64)
    return times.fixed + empty_seconds(times, q) + float(q @ (times.compute + times.upload / times.bandwidth))


def slowest_bound(times: RoundTimes, probability: ArrayLike) -> float:
    """Return U2 >= E[T], s: ``E[max tau] + sum q_n t_n / f``, as if uploads began when all have computed."""
    q = np.asarray(probability, dtype=np.float64)
    sending = float(q @ times.upload) / times.bandwidth
    return times.fixed + empty_seconds(times, q) + expected_slowest(times.compute, q) + sending


def lower_bound(times: RoundTimes, probability: ArrayLike) -> float:
    """Return L <= E[T], s: the larger of the slowest computation and the sum of uploads, each in expectation.

    For the equal-finish split; the equal split takes at least as long.
    """
    q = np.asarray(probability, dtype=np.float64)
    sending = float(q @ times.upload) / times.bandwidth
    return times.fixed + empty_seconds(times, q) + max(expected_slowest(times.compute, q), sending)


def with_split(times: RoundTimes, split: Split) -> RoundTimes:
    """Return the same times under another way to share the band."""
    return replace(times, split=split)
