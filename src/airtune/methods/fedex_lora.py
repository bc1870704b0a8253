"""FedEx-LoRA: averages A and B, and merges what the averages leave out into the base."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from airtune.aggregation.mean import Weights
from airtune.aggregation.residual import ResidualMerge
from airtune.compression.dense import Dense
from airtune.methods.composed import Composed, FromParts
from airtune.scheduling.bandwidth import BandwidthRule, EqualSplit
from airtune.scheduling.planner import Separate
from airtune.scheduling.power import FullPower, PowerRule
from airtune.scheduling.sampling import everyone_or
from airtune.scheduling.slicing import everything_or_ranks
from airtune.types import Compressor, LocalTraining


@dataclass(frozen=True)
class FedExLoRA(FromParts):
    """Averages both factors and merges the error of the averages into the base: exact, and training goes on.

    Paper: Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models",
    ACL 2025, arXiv 2410.09432.

    Each round it draws `cohort_size` clients uniformly, gives each the mean adapter and the residuals that it has not
    merged yet, and equal shares of the uplink.

    =====================  ==================================================================
    paper                  here
    =====================  ==================================================================
    Delta W_res            `airtune.aggregation.residual.ResidualMerge`, times the scaling
    r' of inexact SVD      `residual_rank`
    W_0 + Delta W_res      `ServerModel.base_update`, an accumulator in single precision
    =====================  ==================================================================

    Departures. The residual is sent as factors of rank (K - 1) r, its exact rank, or dense where that is less; the
    authors send it dense. They add it transposed for linear layers, a bug. The paper has equal ranks and uniform
    weights; with unequal ranks the residual is of rank sum r_k + r, and exact [choice].

    Parameters
    ----------
    weights : p_k, "examples" or "uniform".
    residual_rank : best approximation of this rank instead of the whole residual; None: exact.
    lowest_rank, highest_rank : ranks of the fleet's smallest and largest device (`RankByMemory`); None: every client
        has the adapter's rank.
    cohort_size : clients drawn each round; None: everyone.
    bandwidth, power, training, compressor : as for every method.
    """

    weights: Weights = "examples"
    residual_rank: int | None = None
    lowest_rank: int | None = None
    highest_rank: int | None = None
    cohort_size: int | None = None
    bandwidth: BandwidthRule = field(default_factory=EqualSplit)
    power: PowerRule = field(default_factory=FullPower)
    training: LocalTraining = field(default_factory=LocalTraining)
    compressor: Compressor = field(default_factory=Dense)

    arxiv: ClassVar[str] = "2410.09432"
    citation: ClassVar[str] = """@inproceedings{singhal2025fedex,
  title     = {{FedEx-LoRA}: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models},
  author    = {Singhal, Raghav and Ponkshe, Kaustubh and Vepakomma, Praneeth},
  booktitle = {Annual Meeting of the Association for Computational Linguistics},
  year      = {2025},
  note      = {arXiv:2410.09432}
}"""

    @property
    def composed(self) -> Composed:
        """Return the parts that this method is made of."""
        slicer = everything_or_ranks(self.lowest_rank, self.highest_rank)
        planner = Separate(everyone_or(self.cohort_size), slicer, self.bandwidth, self.power)
        return Composed(planner, ResidualMerge(self.weights, rank=self.residual_rank), self.compressor, self.training)
