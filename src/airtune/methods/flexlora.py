"""FlexLoRA: a rank per device; the server averages products and truncates their SVD."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from airtune.aggregation.mean import Weights
from airtune.aggregation.truncation import Truncation
from airtune.compression.dense import Dense
from airtune.methods.composed import Composed, FromParts
from airtune.scheduling.bandwidth import BandwidthRule, EqualSplit
from airtune.scheduling.planner import Separate
from airtune.scheduling.power import FullPower, PowerRule
from airtune.scheduling.sampling import everyone_or
from airtune.scheduling.slicing import everything_or_ranks
from airtune.types import Compressor, LocalTraining


@dataclass(frozen=True)
class FlexLoRA(FromParts):
    """Averages the clients' products and gives each client the best approximation of its rank.

    Paper: Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources",
    NeurIPS 2024, arXiv 2402.11505.

    Each round it draws `cohort_size` clients uniformly, gives each the first r_k singular directions of the global
    update, and equal shares of the uplink.

    =====================  ==============================================================================
    paper                  here
    =====================  ==============================================================================
    r_k                    by the device's memory between `lowest_rank` and `highest_rank`
    sum_k p_k B_k A_k      stacked factors with p_k s_k on A
    SVD, truncated         `airtune.aggregation.truncation.Truncation`: QR and a small core, no dense update
    alpha_k / r_k          one scaling for all ranks, [model].alpha / [model].rank
    =====================  ==============================================================================

    Departures. The server keeps the leading [model].rank directions, the most that any client may hold [choice]; the
    paper keeps the dense update. How r_k follows from the device is ours [choice]. Directions that the sum does not
    have get random rows and zero columns, so that they can be trained [choice]. The basis changes every round, so the
    optimizer starts afresh. Truncation is lossy: with unequal ranks the model is no fixed point.

    Parameters
    ----------
    weights : p_k, "examples" or "uniform".
    balanced : singular values as square roots in A and B; else all in B.
    seed : of rows for directions that the sum does not have.
    lowest_rank, highest_rank : ranks of the fleet's smallest and largest device (`RankByMemory`); None: every client
        has the adapter's rank.
    cohort_size : clients drawn each round; None: everyone.
    bandwidth, power, training, compressor : as for every method.
    """

    weights: Weights = "examples"
    balanced: bool = False
    seed: int = 0
    lowest_rank: int | None = None
    highest_rank: int | None = None
    cohort_size: int | None = None
    bandwidth: BandwidthRule = field(default_factory=EqualSplit)
    power: PowerRule = field(default_factory=FullPower)
    training: LocalTraining = field(default_factory=LocalTraining)
    compressor: Compressor = field(default_factory=Dense)

    arxiv: ClassVar[str] = "2402.11505"
    citation: ClassVar[str] = """@inproceedings{bai2024flexlora,
  title     = {Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources},
  author    = {Bai, Jiamu and Chen, Daoyuan and Qian, Bingchen and Yao, Liuyi and Li, Yaliang},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024},
  note      = {arXiv:2402.11505}
}"""

    @property
    def composed(self) -> Composed:
        """Return the parts that this method is made of."""
        slicer = everything_or_ranks(self.lowest_rank, self.highest_rank)
        planner = Separate(everyone_or(self.cohort_size), slicer, self.bandwidth, self.power)
        return Composed(
            planner, Truncation(self.weights, balanced=self.balanced, seed=self.seed), self.compressor, self.training
        )
