"""How strongly clients send: each rule a frozen dataclass whose fields are its configuration.

All rules answer `choose(...)` with a `Solution` whose value is {"bandwidth": [clients] Hz, "power": [clients] W} and
whose objective is the round's latest finish in seconds; the transmit energy stands in the message.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from airtune.errors import unknown_name
from airtune.scheduling.bandwidth import BandwidthRule, check_deadline
from airtune.solvers.equal_finish import Uploads, equal_finish
from airtune.solvers.joint_energy import joint_min_energy
from airtune.solvers.solution import Solution
from airtune.wireless.rate import power_for_rate

Array = NDArray[np.float64]


class PowerRule(Protocol):
    """What chooses transmit powers, given a rule for the bandwidth."""

    def choose(
        self,
        bandwidth_rule: BandwidthRule,
        compute_seconds: ArrayLike,
        bits: ArrayLike,
        maximum_power: ArrayLike,
        gain: ArrayLike,
        noise_density: ArrayLike,
        total_bandwidth: float,
        snr_gap: float = 1.0,
    ) -> Solution:
        """Return bandwidths and powers; arguments as in `airtune.scheduling.bandwidth.BandwidthRule.allocate`."""
        ...


@dataclass(frozen=True)
class FullPower:
    """Everybody sends at the most its device allows."""

    def choose(
        self,
        bandwidth_rule: BandwidthRule,
        compute_seconds: ArrayLike,
        bits: ArrayLike,
        maximum_power: ArrayLike,
        gain: ArrayLike,
        noise_density: ArrayLike,
        total_bandwidth: float,
        snr_gap: float = 1.0,
    ) -> Solution:
        """Return the bandwidth rule's split and the maximum powers; see `PowerRule`."""
        uploads = Uploads.of(compute_seconds, bits, maximum_power, gain, noise_density, snr_gap)
        split = bandwidth_rule.allocate(
            compute_seconds, bits, maximum_power, gain, noise_density, total_bandwidth, snr_gap
        )
        most = np.broadcast_to(np.asarray(maximum_power, dtype=np.float64), (uploads.size,))
        return _answer(split, uploads, most, most)


@dataclass(frozen=True)
class LeastPower:
    """The bandwidth rule splits the band at full power; then each client sends as weakly as the deadline allows.

    Parameters
    ----------
    deadline : s for compute and upload; None: `slack` times the latest finish at full power. A client that misses the
        deadline at full power sends at full power.
    slack : at least 1, used without a deadline.
    """

    deadline: float | None = None
    slack: float = 1.0

    def __post_init__(self) -> None:
        check_deadline(self.deadline, self.slack, "power")

    def choose(
        self,
        bandwidth_rule: BandwidthRule,
        compute_seconds: ArrayLike,
        bits: ArrayLike,
        maximum_power: ArrayLike,
        gain: ArrayLike,
        noise_density: ArrayLike,
        total_bandwidth: float,
        snr_gap: float = 1.0,
    ) -> Solution:
        """Return the split and the least powers; see `PowerRule`."""
        uploads = Uploads.of(compute_seconds, bits, maximum_power, gain, noise_density, snr_gap)
        most = np.broadcast_to(np.asarray(maximum_power, dtype=np.float64), (uploads.size,))
        split = bandwidth_rule.allocate(
            compute_seconds, bits, maximum_power, gain, noise_density, total_bandwidth, snr_gap
        )
        if not split.ok:
            return _answer(split, uploads, most, most)
        by = self.deadline if self.deadline is not None else self.slack * split.objective
        left = by - uploads.compute_seconds
        with np.errstate(divide="ignore"):
            rate = np.where(left > 0.0, uploads.bits / np.maximum(left, 0.0), np.where(uploads.bits > 0.0, np.inf, 0.0))
        least = power_for_rate(rate, split.value, gain, noise_density, snr_gap)
        return _answer(split, uploads, np.minimum(least, most), most)


@dataclass(frozen=True)
class JointMinEnergy:
    """Bandwidths and powers of least transmit energy by a deadline, chosen together; the bandwidth rule plays no part.

    `airtune.solvers.joint_energy.joint_min_energy`.

    Parameters
    ----------
    deadline : s for compute and upload; None: `slack` times the earliest finish that band and powers allow.
    slack : at least 1, used without a deadline.
    resource_block : Hz, or None for continuous bandwidth.
    """

    deadline: float | None = None
    slack: float = 1.2
    resource_block: float | None = None

    def __post_init__(self) -> None:
        check_deadline(self.deadline, self.slack, "power")

    def choose(
        self,
        bandwidth_rule: BandwidthRule,
        compute_seconds: ArrayLike,
        bits: ArrayLike,
        maximum_power: ArrayLike,
        gain: ArrayLike,
        noise_density: ArrayLike,
        total_bandwidth: float,
        snr_gap: float = 1.0,
    ) -> Solution:
        """Return bandwidths and powers; see `PowerRule`."""
        link = (compute_seconds, bits, maximum_power, gain, noise_density, total_bandwidth)
        uploads = Uploads.of(*link[:5], snr_gap)
        most = np.broadcast_to(np.asarray(maximum_power, dtype=np.float64), (uploads.size,))
        by = self.deadline
        if by is None:
            earliest = equal_finish(*link, snr_gap, resource_block=self.resource_block)
            if not earliest.ok:
                return _answer(earliest, uploads, most, most)
            by = self.slack * earliest.objective
        found = joint_min_energy(*link, by, snr_gap, resource_block=self.resource_block)
        split = Solution(found.value["bandwidth"], found.status, found.objective, found.iterations, found.message)
        return _answer(split, uploads, found.value["power"], most)


POWER_RULES: dict[str, type[PowerRule]] = {
    "full": FullPower,
    "least": LeastPower,
    "joint-min-energy": JointMinEnergy,
}


def power_rule(name: str) -> PowerRule:
    """Return the rule of that name with its default fields; an unknown name raises InputError."""
    if name.replace("_", "-") not in POWER_RULES:
        raise unknown_name("power", name, POWER_RULES)
    return POWER_RULES[name.replace("_", "-")]()


def _answer(split: Solution, uploads: Uploads, power: Array, maximum: Array) -> Solution:
    """Return bandwidth and power with the finish that they lead to."""
    value = {"bandwidth": split.value, "power": np.where(uploads.bits > 0.0, power, 0.0)}
    if not split.ok:
        return Solution(value, split.status, split.objective, split.iterations, split.message)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(maximum > 0.0, power / maximum, 0.0)
    sent = Uploads(
        uploads.compute_seconds, uploads.bits, uploads.signal * share, uploads.noise, uploads.minimum, uploads.maximum
    )
    finish = sent.finish(split.value)
    with np.errstate(invalid="ignore"):
        energy = np.where(uploads.bits > 0.0, power * (finish - uploads.compute_seconds), 0.0).sum()
    return Solution(value, split.status, float(finish.max(initial=0.0)), split.iterations, f"{energy:.6g} J to send")
