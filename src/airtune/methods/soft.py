"""SOFT: components kept near orthogonal, so that norms tell which of them to send."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from airtune.aggregation.covariance import factor_diagnostics
from airtune.aggregation.mean import Mean, Weights
from airtune.aggregation.senders import AverageOver, SendersMean, check_average_over
from airtune.compression.soft import OrthogonalityForm, Soft, check_orthogonality, orthogonalized
from airtune.methods.composed import Composed
from airtune.scheduling.bandwidth import BandwidthRule, EqualSplit
from airtune.scheduling.planner import Separate
from airtune.scheduling.sampling import everyone_or
from airtune.types import Compressor, Fleet, LocalTraining, Observation, Plan, RoundOutcome, ServerModel


@dataclass(frozen=True)
class SoftLoRA:
    """SOFT alone: near-orthogonal factors, the most important components sent, at a fixed keep ratio and equal band.

    Paper: Kim and Choi, "Two-Stage Wireless Federated LoRA Fine-Tuning with Sparsified Orthogonal Updates", arXiv
    2505.00333. Only the abstract is public to us: near-orthogonal factors, a per-rank norm metric, no SVD on the
    client, factors averaged separately are the paper's. *The forms here are our reading [choice]*; no result is a
    reproduction. `TSFA` adds the paper's two-stage controller.

    Each round: `cohort_size` clients train the loss plus ``weight * sum over slots of Pen(B) + Pen(A')``, send the
    components with the largest ``||b_i|| ||a_i||`` (`Soft`), and the server averages A and B over all of them.

    =========================  ==============================================
    specification              here
    =========================  ==============================================
    lambda, Pen                `orthogonality_weight`, `orthogonality`
    s (keep ratio)             `compressor.keep_ratio`
    v_i, (D) or (P)            `compressor.importance`, `compressor.fill`
    p_k                        `weights` = "examples", over what arrived
    =========================  ==============================================

    Departures: none from what the abstract says; the penalty's form and weight, the fill, the equal split of the band
    and the division by all p_k (a client that did not send a component counts as the server's value) are ours [choice].

    Parameters
    ----------
    orthogonality_weight : lambda, at least 0.
    orthogonality : "cosine" (scale-free, default), "mixed" (off-diagonal on B, identity on A), "off-diagonal" or
        "identity" (drives all norms to 1, so that they say nothing about importance, unless the weight is small).
    weights : "examples" or "uniform".
    average_over : "everyone": who did not send a component counts as the server's value; "senders": does not count.
    cohort_size : clients drawn each round; None: everyone.
    bandwidth, training, compressor : as for every method.
    """

    orthogonality_weight: float = 1e-2
    orthogonality: OrthogonalityForm = "cosine"
    weights: Weights = "examples"
    average_over: AverageOver = "everyone"
    cohort_size: int | None = None
    bandwidth: BandwidthRule = field(default_factory=EqualSplit)
    training: LocalTraining = field(default_factory=LocalTraining)
    compressor: Compressor = field(default_factory=Soft)

    arxiv: ClassVar[str] = "2505.00333"
    citation: ClassVar[str] = """@article{kim2025soft,
  title   = {Two-Stage Wireless Federated {LoRA} Fine-Tuning with Sparsified Orthogonal Updates},
  author  = {Kim, Bumjun and Choi, Wan},
  journal = {arXiv preprint arXiv:2505.00333},
  year    = {2025}
}"""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_orthogonality(self.orthogonality_weight, self.orthogonality)
        check_average_over(self.average_over, self.compressor)

    @property
    def aggregator(self) -> Mean | SendersMean:
        """Return the separate mean of A and B."""
        return SendersMean(self.weights) if self.average_over == "senders" else Mean(self.weights)

    @property
    def composed(self) -> Composed:
        """Return the parts that this method is made of."""
        planner = Separate(everyone_or(self.cohort_size), bandwidth=self.bandwidth)
        training = orthogonalized(self.training, self.orthogonality_weight, self.orthogonality)
        return Composed(planner, self.aggregator, self.compressor, training)

    def init(self, model: ServerModel, fleet: Fleet) -> None:
        """Return no state."""
        return None

    def plan(self, state: None, seen: Observation, rng: np.random.Generator) -> Plan:
        """Draw the cohort and share the band."""
        return self.composed.plan(state, seen, rng)

    def aggregate(self, state: None, model: ServerModel, outcome: RoundOutcome) -> tuple[ServerModel, None]:
        """Average A and B separately."""
        return self.composed.aggregator(model, outcome), None

    def diagnose(self, state: None, outcome: RoundOutcome) -> Mapping[str, float]:
        """Return the covariance of the factors, their coherence and the spread of importance."""
        return factor_diagnostics(outcome, self.weights)
