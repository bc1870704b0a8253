"""How often each group aggregates inside a round, and how deep it trains: HierFedLoRA's joint choice (ours in detail).

The gain of f aggregations at depth d is ``f Q(d) - b f^2 delta_g``: progress, less the drift of a group whose labels
diverge by delta_g from everybody's. Q(d) is the share of gradient energy in the last d layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from airtune.types import Floats, Ints


@dataclass(frozen=True)
class FrequencyProblem:
    """What the joint choice knows.

    Attributes
    ----------
    seconds : [groups, frequencies, depths], duration of a group's part of the round; infinite where not allowed.
        Entry [g, j, k] belongs to frequency `frequencies[j]` and depth k + 1.
    frequencies : [frequencies], increasing.
    energy_share : [depths], Q(d), increasing to 1.
    divergence : [groups], delta_g.
    share : [groups], of the examples, summing to 1.
    """

    seconds: Floats
    frequencies: Ints
    energy_share: Floats
    divergence: Floats
    share: Floats

    def drift(self) -> float:
        """Return b, such that the best group's gain at full depth rises up to the largest frequency."""
        mean = float(self.share @ self.divergence)
        scale = max(float(self.divergence.min()), mean / 10.0, 1e-6)
        return 1.0 / (2.0 * float(self.frequencies[-1]) * scale)

    def gain(self) -> Floats:
        """Return the gains, [groups, frequencies, depths]."""
        f = self.frequencies.astype(np.float64)[None, :, None]
        drift = self.drift() * f**2 * self.divergence[:, None, None]
        return f * self.energy_share[None, None, :] - drift

    def deadlines(self) -> Floats:
        """Return the durations by which every group can be done at its least, increasing: the candidates."""
        finite = self.seconds[np.isfinite(self.seconds)]
        floor = self.seconds.min(axis=(1, 2)).max()
        return np.unique(finite[finite >= floor])

    def within(self, deadline: float) -> tuple[Ints, Ints]:
        """Return each group's frequency index and depth index of most gain by a deadline; ties go to more depth."""
        gain = np.where(self.seconds <= deadline, self.gain(), -np.inf)
        reversed_depths = gain[:, :, ::-1].transpose(0, 2, 1).reshape(len(gain), -1)  # deeper first, then fewer cycles
        best = np.argmax(reversed_depths, axis=1)
        frequencies = gain.shape[1]
        return best % frequencies, gain.shape[2] - 1 - best // frequencies

    def rates(self, deadlines: Floats) -> Floats:
        """Return ``sum_g share_g max(gain_g, 0) / T`` for every deadline T, increasing ones."""
        gain = np.maximum(self.gain(), 0.0)
        total = np.zeros(len(deadlines))
        for g in range(len(gain)):
            times, gains = self.seconds[g].ravel(), gain[g].ravel()
            order = np.argsort(times, kind="stable")
            best = np.maximum.accumulate(gains[order])
            last = np.searchsorted(times[order], deadlines, side="right") - 1
            total += self.share[g] * best[last]
        return total / np.maximum(deadlines, 1e-300)


@dataclass(frozen=True)
class FrequencyChoice:
    """Each group's aggregations and depth, both [groups], its seconds, and the deadline that they meet."""

    frequency: Ints
    depth: Ints
    seconds: Floats
    deadline: float

    @property
    def mean_wait(self) -> float:
        """Return the mean over groups of the wait for the slowest group, s."""
        return float((self.seconds.max() - self.seconds).mean())


def choose_frequencies(problem: FrequencyProblem, wait_seconds: float | None = None) -> FrequencyChoice:
    """Return the choice of most gain per second.

    With a wait limit the deadline is lowered until it holds; if none meets it, the choice of least waiting is returned.
    """
    deadlines = problem.deadlines()
    first = int(np.argmax(problem.rates(deadlines)))
    best = _choice(problem, float(deadlines[first]))
    if wait_seconds is None:
        return best
    for deadline in deadlines[: first + 1][::-1]:
        choice = _choice(problem, float(deadline))
        if choice.mean_wait <= wait_seconds:
            return choice
        best = min(best, choice, key=lambda c: c.mean_wait)
    return best


def deepest_once(problem: FrequencyProblem) -> FrequencyChoice:
    """Return the choice in which every group aggregates as seldom as allowed, at the greatest depth it can hold."""
    groups = np.arange(len(problem.seconds))
    depth = np.where(np.isfinite(problem.seconds[:, 0, :]), np.arange(problem.seconds.shape[2]), -1).max(axis=1)
    seconds = problem.seconds[groups, 0, depth]
    return FrequencyChoice(np.full(len(groups), problem.frequencies[0]), depth + 1, seconds, float(seconds.max()))


def _choice(problem: FrequencyProblem, deadline: float) -> FrequencyChoice:
    frequency, depth = problem.within(deadline)
    groups = np.arange(len(frequency))
    return FrequencyChoice(
        problem.frequencies[frequency], depth + 1, problem.seconds[groups, frequency, depth], deadline
    )
