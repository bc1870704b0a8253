"""GaLore with weight averaging: gradients projected on a common random subspace, the average merged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from airtune.aggregation.mean import Weights
from airtune.aggregation.merging import Redraw
from airtune.aggregation.one_factor import MergeAndRedraw
from airtune.compression.dense import Dense
from airtune.methods.composed import Composed, FromParts
from airtune.scheduling.bandwidth import BandwidthRule, EqualSplit
from airtune.scheduling.planner import Separate
from airtune.scheduling.power import FullPower, PowerRule
from airtune.scheduling.sampling import everyone_or
from airtune.scheduling.slicing import everything_or_ranks
from airtune.types import Compressor, LocalTraining


@dataclass(frozen=True)
class GaLoreAverage(FromParts):
    """Averages weights that were trained by projected gradients, with one common projector per round.

    Papers: Zhao et al., "GaLore", ICML 2024, arXiv 2403.03507; averaging of its weights: Mahla et al., "Why Gradient
    Subspace? Identifying and Mitigating LoRA's Bottlenecks in Federated Fine-Tuning of Large Language Models", arXiv
    2410.23111 (no public code).

    Each round it draws `cohort_size` clients uniformly and gives them equal shares of the uplink. The projector P is B,
    drawn from a seed; A starts at zero and is trained, so that the change ``scaling P A`` of a client is what GaLore
    does with that projector. Averaging the weights is averaging A: only A travels, and the merge is exact.

    =========================  ==================================================================
    papers                     here
    =========================  ==================================================================
    P, [out, rank]             B, orthonormal columns from `seed` and the model's version
    projected moments          the optimizer's moments of A
    scale                      the adapter's scaling, [model].alpha / [model].rank
    update_proj_gap            one round
    W <- sum_k p_k W_k         `airtune.aggregation.one_factor.MergeAndRedraw`, mirrored
    =========================  ==================================================================

    Departures. GaLore takes P from the SVD of a gradient and averages dense weights. A gradient of a client's data in
    the projector would be sent to everyone, and the server has none of its own: P is random [choice]. It always
    projects the output side; GaLore the shorter one. No weight decay on the whole weight.

    Parameters
    ----------
    weights : p_k, "examples" or "uniform".
    seed : of the projectors.
    lowest_rank, highest_rank : ranks of the fleet's smallest and largest device (`RankByMemory`); None: every client
        has the adapter's rank.
    cohort_size : clients drawn each round; None: everyone.
    bandwidth, power, training, compressor : as for every method.
    """

    weights: Weights = "examples"
    seed: int = 0
    lowest_rank: int | None = None
    highest_rank: int | None = None
    cohort_size: int | None = None
    bandwidth: BandwidthRule = field(default_factory=EqualSplit)
    power: PowerRule = field(default_factory=FullPower)
    training: LocalTraining = field(default_factory=LocalTraining)
    compressor: Compressor = field(default_factory=Dense)

    arxiv: ClassVar[str] = "2410.23111"
    citation: ClassVar[str] = """@article{mahla2024whygradientsubspace,
  title   = {Why Gradient Subspace? Identifying and Mitigating {LoRA}'s Bottlenecks in Federated Fine-Tuning of Large
             Language Models},
  author  = {Mahla, Navyansh and Jadhav, Kshitij Sharad and Ramakrishnan, Ganesh},
  journal = {arXiv preprint arXiv:2410.23111},
  year    = {2024}
}"""

    @property
    def composed(self) -> Composed:
        """Return the parts that this method is made of."""
        slicer = everything_or_ranks(self.lowest_rank, self.highest_rank)
        planner = Separate(everyone_or(self.cohort_size), slicer, self.bandwidth, self.power)
        return Composed(
            planner, MergeAndRedraw("B", self.weights, Redraw("orthonormal", self.seed)), self.compressor, self.training
        )
