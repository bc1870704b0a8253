"""What a planner knows of the channel: an estimate, old and noisy. The simulator applies the truth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from airtune.errors import InputError, unknown_name
from airtune.wireless.fading import complex_normal
from airtune.wireless.radio import Direction, RadioChannel
from airtune.wireless.units import quantity

Array = NDArray[np.float64]

MODES = ("instant", "mean", "ergodic")


@dataclass(frozen=True)
class ChannelKnowledge:
    """How good the planner's channel estimates are.

    Parameters
    ----------
    mode : "instant": the fading coefficient is measured; "mean": only path loss and shadowing are known; "ergodic":
        as "mean", times exp(E[ln |h|^2]), so that the rate at that gain is the long-run rate at high SNR.
    error_variance : s2 in [0, 1] of the estimate sqrt(1 - s2) h + sqrt(s2) e, e complex normal, drawn anew each round:
        0 is perfect, 1 useless; the mean power stays that of h [our choice among the usual models]. "instant" only.
    delay_rounds : the estimate is that of the round so many rounds ago (of the first round while there were fewer).
    delay : s by which the estimate is old, on top.
    """

    mode: Literal["instant", "mean", "ergodic"] = "instant"
    error_variance: float = 0.0
    delay_rounds: int = 0
    delay: float = quantity("0 s", "s")

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise unknown_name("knowledge.mode", self.mode, MODES)
        if not 0.0 <= self.error_variance <= 1.0:
            raise InputError(f"knowledge.error_variance: must be from 0 to 1; got {self.error_variance:g}")
        if self.delay_rounds < 0 or not (math.isfinite(self.delay) and self.delay >= 0.0):
            raise InputError("knowledge.delay_rounds, knowledge.delay: must be at least 0")

    def estimate(
        self,
        channel: RadioChannel,
        seed: int,
        clients: ArrayLike,
        time: float,
        round_index: int,
        direction: Direction = "uplink",
        round_starts: Sequence[float] = (),
    ) -> Array:
        """Return the gains [n] that the planner sees.

        Parameters
        ----------
        channel : the true channel.
        seed : of the world.
        clients : [n].
        time : s, when the plan is made.
        round_index : of the round being planned; the estimation error is a function of it.
        direction : of the link.
        round_starts : start times (s) of the earlier rounds, oldest first; needed when `delay_rounds` > 0.
        """
        index = np.atleast_1d(np.asarray(clients)).astype(np.int64)
        seen_at = self._seen_at(time, round_index, round_starts)
        mean = channel.mean_gain(seed, index, seen_at, direction)
        if self.mode != "instant":
            return mean * (math.exp(channel.mean_log_fading) if self.mode == "ergodic" else 1.0)
        true = channel.coefficient(seed, index, seen_at, direction)
        if self.error_variance > 0.0:
            error = complex_normal(seed, f"channel-estimate.{direction}", index, round_index)
            true = math.sqrt(1.0 - self.error_variance) * true + math.sqrt(self.error_variance) * error
        return mean * (true.real**2 + true.imag**2)

    def _seen_at(self, time: float, round_index: int, round_starts: Sequence[float]) -> float:
        when = time
        if self.delay_rounds > 0 and round_starts:
            when = round_starts[max(0, len(round_starts) - self.delay_rounds)]
        elif self.delay_rounds > 0 and round_index > 1:
            raise InputError("knowledge.delay_rounds: the start times of the earlier rounds are needed")
        return max(0.0, when - self.delay)
