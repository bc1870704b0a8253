"""How one band is split among the uploads of a round: each rule a frozen dataclass whose fields are its configuration.

All rules answer `allocate(compute_seconds, bits, power, gain, noise_density, total_bandwidth, snr_gap)` with a
`Solution` whose value is [clients] in Hz and whose objective is the round's latest finish in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from airtune.errors import InputError, unknown_name
from airtune.solvers.airtime import min_energy, min_latency_sum
from airtune.solvers.equal_finish import Uploads, equal_finish, why_infeasible
from airtune.solvers.solution import Solution, infeasible, name_clients

Array = NDArray[np.float64]


class BandwidthRule(Protocol):
    """What splits a band."""

    def allocate(
        self,
        compute_seconds: ArrayLike,
        bits: ArrayLike,
        power: ArrayLike,
        gain: ArrayLike,
        noise_density: ArrayLike,
        total_bandwidth: float,
        snr_gap: float = 1.0,
    ) -> Solution:
        """Return the split; arguments as in `airtune.solvers.equal_finish.equal_finish`."""
        ...


@dataclass(frozen=True)
class EqualSplit:
    """Every client with bits to send gets the same bandwidth (whole resource blocks, rounded down, if given, Hz)."""

    resource_block: float | None = None

    def allocate(
        self,
        compute_seconds: ArrayLike,
        bits: ArrayLike,
        power: ArrayLike,
        gain: ArrayLike,
        noise_density: ArrayLike,
        total_bandwidth: float,
        snr_gap: float = 1.0,
    ) -> Solution:
        """Return W / n for each of the n clients that send; see `BandwidthRule`."""
        uploads = Uploads.of(compute_seconds, bits, power, gain, noise_density, snr_gap)
        return _by_weight(uploads, np.ones(uploads.size), total_bandwidth, self.resource_block)


@dataclass(frozen=True)
class Proportional:
    """Bandwidth in proportion to a weight.

    Parameters
    ----------
    to : "bits": the payload; "airtime": bits over the spectral efficiency at an equal split, so that a weak channel
        gets more.
    resource_block : Hz; shares are rounded to whole blocks (largest remainder, at least one each).
    """

    to: Literal["bits", "airtime"] = "bits"
    resource_block: float | None = None

    def allocate(
        self,
        compute_seconds: ArrayLike,
        bits: ArrayLike,
        power: ArrayLike,
        gain: ArrayLike,
        noise_density: ArrayLike,
        total_bandwidth: float,
        snr_gap: float = 1.0,
    ) -> Solution:
        """Return W weight_n / sum weight; see `BandwidthRule`."""
        uploads = Uploads.of(compute_seconds, bits, power, gain, noise_density, snr_gap)
        weight = uploads.bits
        if self.to == "airtime":
            share = total_bandwidth / max(int((uploads.bits > 0.0).sum()), 1)
            with np.errstate(divide="ignore", invalid="ignore"):
                weight = np.where(uploads.signal > 0.0, uploads.bits / uploads.rate(share), 0.0)
        elif self.to != "bits":
            raise unknown_name("bandwidth.to", self.to, ("bits", "airtime"))
        return _by_weight(uploads, weight, total_bandwidth, self.resource_block)


@dataclass(frozen=True)
class EqualFinish:
    """The split that ends the last upload earliest: `airtune.solvers.equal_finish.equal_finish`.

    Parameters
    ----------
    minimum, maximum : bandwidth of one client that sends, Hz.
    resource_block : Hz, or None for continuous bandwidth.
    """

    minimum: float = 0.0
    maximum: float = float("inf")
    resource_block: float | None = None

    def allocate(
        self,
        compute_seconds: ArrayLike,
        bits: ArrayLike,
        power: ArrayLike,
        gain: ArrayLike,
        noise_density: ArrayLike,
        total_bandwidth: float,
        snr_gap: float = 1.0,
    ) -> Solution:
        """Return the min-max split; see `BandwidthRule`."""
        sends = np.asarray(bits, dtype=np.float64) > 0.0
        return equal_finish(
            compute_seconds,
            bits,
            power,
            gain,
            noise_density,
            total_bandwidth,
            snr_gap,
            minimum=np.where(sends, self.minimum, 0.0),
            maximum=self.maximum,
            resource_block=self.resource_block,
        )


@dataclass(frozen=True)
class MinEnergy:
    """The split that costs least transmit energy among those that meet a deadline, at full power.

    `airtune.solvers.airtime.min_energy`. The round's objective is still reported in seconds; energy is in the message.

    Parameters
    ----------
    deadline : s for compute and upload; None: `slack` times the earliest finish that the band allows.
    slack : at least 1, used without a deadline.
    minimum, maximum : bandwidth of one client that sends, Hz.
    resource_block : Hz, or None for continuous bandwidth.
    """

    deadline: float | None = None
    slack: float = 1.2
    minimum: float = 0.0
    maximum: float = float("inf")
    resource_block: float | None = None

    def __post_init__(self) -> None:
        check_deadline(self.deadline, self.slack, "bandwidth")

    def allocate(
        self,
        compute_seconds: ArrayLike,
        bits: ArrayLike,
        power: ArrayLike,
        gain: ArrayLike,
        noise_density: ArrayLike,
        total_bandwidth: float,
        snr_gap: float = 1.0,
    ) -> Solution:
        """Return the least-energy split; see `BandwidthRule`."""
        link = (compute_seconds, bits, power, gain, noise_density, total_bandwidth)
        minimum = np.where(np.asarray(bits, dtype=np.float64) > 0.0, self.minimum, 0.0)
        block = self.resource_block
        deadline = self.deadline
        if deadline is None:
            earliest = equal_finish(*link, snr_gap, minimum=minimum, maximum=self.maximum, resource_block=block)
            if not earliest.ok:
                return earliest
            deadline = self.slack * earliest.objective
        found = min_energy(*link, deadline, snr_gap, minimum=minimum, maximum=self.maximum, resource_block=block)
        return _in_seconds(found, Uploads.of(*link[:5], snr_gap), f"{found.objective:.6g} J by {deadline:.6g} s")


@dataclass(frozen=True)
class MinLatencySum:
    """The split with the least sum of latencies: good for the average client, not for the last one.

    `airtune.solvers.airtime.min_latency_sum` with equal weights.

    Parameters
    ----------
    minimum, maximum : bandwidth of one client that sends, Hz.
    resource_block : Hz, or None for continuous bandwidth.
    """

    minimum: float = 0.0
    maximum: float = float("inf")
    resource_block: float | None = None

    def allocate(
        self,
        compute_seconds: ArrayLike,
        bits: ArrayLike,
        power: ArrayLike,
        gain: ArrayLike,
        noise_density: ArrayLike,
        total_bandwidth: float,
        snr_gap: float = 1.0,
    ) -> Solution:
        """Return the split of the least sum; see `BandwidthRule`."""
        link = (compute_seconds, bits, power, gain, noise_density, total_bandwidth)
        minimum = np.where(np.asarray(bits, dtype=np.float64) > 0.0, self.minimum, 0.0)
        found = min_latency_sum(
            *link, 1.0, snr_gap, minimum=minimum, maximum=self.maximum, resource_block=self.resource_block
        )
        return _in_seconds(found, Uploads.of(*link[:5], snr_gap), f"sum of latencies {found.objective:.6g} s")


def check_deadline(deadline: float | None, slack: float, field: str) -> None:
    """Raise InputError unless the deadline is None or positive and the slack at least 1."""
    if deadline is not None and not (np.isfinite(deadline) and deadline > 0.0):
        raise InputError(f"{field}.deadline: must be positive and finite, in s; got {deadline:g}")
    if not (np.isfinite(slack) and slack >= 1.0):
        raise InputError(f"{field}.slack: must be at least 1; got {slack:g}")


def _in_seconds(found: Solution, uploads: Uploads, message: str) -> Solution:
    """Return the solution with the latest finish as its objective."""
    if not found.ok:
        return found
    finish = float(uploads.finish(found.value).max(initial=0.0))
    return Solution(found.value, found.status, finish, found.iterations, message)


def _by_weight(uploads: Uploads, weight: Array, total: float, resource_block: float | None) -> Solution:
    """Split `total` by weight among those that send."""
    if not (np.isfinite(total) and total > 0.0):
        raise InputError(f"total_bandwidth: must be positive and finite, in Hz; got {total:g}")
    problem = why_infeasible(uploads, total)
    if problem is not None:
        return infeasible(uploads.size, problem)
    weight = np.where(uploads.bits > 0.0, weight, 0.0)
    bandwidth = total * weight / weight.sum() if weight.sum() > 0.0 else np.zeros(uploads.size)
    if resource_block is not None:
        counted = _round_to_blocks(bandwidth, weight > 0.0, total, resource_block)
        if counted is None:
            message = f"more clients than resource blocks of {resource_block:g} Hz: {name_clients(weight > 0.0)}"
            return infeasible(uploads.size, message)
        bandwidth = counted
    finish = float(uploads.finish(bandwidth).max(initial=0.0))
    return Solution(bandwidth, "feasible", finish, 0)


def _round_to_blocks(bandwidth: Array, sends: NDArray[np.bool_], total: float, block: float) -> Array | None:
    """Return whole blocks by largest remainder, at least one for each that sends; None if they do not suffice."""
    available = int(np.floor(total / block * (1.0 + 1e-12)))
    if int(sends.sum()) > available:
        return None
    exact = bandwidth / block * (available * block / total)
    count = np.maximum(np.floor(exact + 1e-9), sends)
    spare = available - int(count.sum())
    order = np.argsort(-(exact - count), kind="stable")
    if spare > 0:
        receivers = order[sends[order]][: min(spare, int(sends.sum()))]
        count[receivers] += 1
    while count.sum() > available:
        count[int(np.argmax(count - exact - 1e9 * (count <= 1)))] -= 1
    return count * block


BANDWIDTH_RULES: dict[str, type[BandwidthRule]] = {
    "equal": EqualSplit,
    "proportional": Proportional,
    "equal-finish": EqualFinish,
    "min-energy": MinEnergy,
    "min-latency-sum": MinLatencySum,
}


def bandwidth_rule(name: str) -> BandwidthRule:
    """Return the rule of that name with its default fields; an unknown name raises InputError."""
    if name.replace("_", "-") not in BANDWIDTH_RULES:
        raise unknown_name("bandwidth", name, BANDWIDTH_RULES)
    return BANDWIDTH_RULES[name.replace("_", "-")]()
