"""LoRA-FAIR: averages A and B, and corrects B so that the product comes closer to the average product."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from airtune.aggregation.mean import Weights
from airtune.aggregation.residual import Correction, RidgeCorrection
from airtune.compression.dense import Dense
from airtune.methods.composed import Composed, FromParts
from airtune.scheduling.bandwidth import BandwidthRule, EqualSplit
from airtune.scheduling.planner import Separate
from airtune.scheduling.power import FullPower, PowerRule
from airtune.scheduling.sampling import everyone_or
from airtune.scheduling.slicing import everything_or_ranks
from airtune.types import Compressor, LocalTraining


@dataclass(frozen=True)
class LoRAFair(FromParts):
    """Averages both factors and corrects B towards the average of the products; nothing more is sent.

    Paper: Bian et al., "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement",
    ICCV 2025, arXiv 2411.14961.

    Each round it draws `cohort_size` clients uniformly, gives each the corrected adapter, and equal shares of the
    uplink.

    =====================  ==================================================================
    paper                  here
    =====================  ==================================================================
    Delta B                `airtune.aggregation.residual.RidgeCorrection`
    lambda                 `strength`
    S, the similarity      `correction`: squared distance in closed form, or the cosine of the columns
    =====================  ==================================================================

    Departures. By default S is the squared Frobenius distance, whose minimum is a ridge regression [choice]; the cosine
    cannot correct a norm. The published iteration starts at zero; public code starts from random values that stay in
    B as noise. With A fixed only the part of the error in the row space of A can be corrected: the correction is small.
    Clients with fewer components are padded with zeros.

    Parameters
    ----------
    weights : p_k, "examples" or "uniform".
    strength : weight of the penalty on the correction.
    correction : "closed-form" or "published".
    iterations, correction_rate : steps and step size of the published iteration.
    lowest_rank, highest_rank : ranks of the fleet's smallest and largest device (`RankByMemory`); None: every client
        has the adapter's rank.
    cohort_size : clients drawn each round; None: everyone.
    bandwidth, power, training, compressor : as for every method.
    """

    weights: Weights = "examples"
    strength: float = 0.01
    correction: Correction = "closed-form"
    iterations: int = 1000
    correction_rate: float = 0.01
    lowest_rank: int | None = None
    highest_rank: int | None = None
    cohort_size: int | None = None
    bandwidth: BandwidthRule = field(default_factory=EqualSplit)
    power: PowerRule = field(default_factory=FullPower)
    training: LocalTraining = field(default_factory=LocalTraining)
    compressor: Compressor = field(default_factory=Dense)

    arxiv: ClassVar[str] = "2411.14961"
    citation: ClassVar[str] = """@inproceedings{bian2025lorafair,
  title     = {{LoRA-FAIR}: Federated {LoRA} Fine-Tuning with Aggregation and Initialization Refinement},
  author    = {Bian, Jieming and Wang, Lei and Zhang, Letian and Xu, Jie},
  booktitle = {International Conference on Computer Vision},
  year      = {2025},
  note      = {arXiv:2411.14961}
}"""

    @property
    def composed(self) -> Composed:
        """Return the parts that this method is made of."""
        slicer = everything_or_ranks(self.lowest_rank, self.highest_rank)
        planner = Separate(everyone_or(self.cohort_size), slicer, self.bandwidth, self.power)
        return Composed(
            planner,
            RidgeCorrection(self.weights, self.strength, self.correction, self.iterations, self.correction_rate),
            self.compressor,
            self.training,
        )
