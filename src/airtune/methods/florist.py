"""FLoRIST: stacks all adapters and merges the leading singular directions of the stack."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from airtune.aggregation.mean import Weights
from airtune.aggregation.merging import Redraw
from airtune.aggregation.stacking import EnergyThreshold
from airtune.compression.dense import Dense
from airtune.methods.composed import Composed, FromParts
from airtune.scheduling.bandwidth import BandwidthRule, EqualSplit
from airtune.scheduling.planner import Separate
from airtune.scheduling.power import FullPower, PowerRule
from airtune.scheduling.sampling import everyone_or
from airtune.scheduling.slicing import everything_or_ranks
from airtune.types import Compressor, LocalTraining


@dataclass(frozen=True)
class FLoRIST(FromParts):
    """Merges as many singular directions of the stacked adapters as hold a share of their energy, then starts new ones.

    Paper: Ramesh and Dass, "FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated Fine-Tuning of
    Large Language Models", arXiv 2506.09199.

    Each round it draws `cohort_size` clients uniformly and gives them equal shares of the uplink; each trains a new
    adapter of its rank. A client downloads the thresholded updates that it has not merged yet.

    =====================  =======================================================================
    paper                  here
    =====================  =======================================================================
    tau                    `energy`, per slot
    two SVDs and a core    `airtune.aggregation.stacking.EnergyThreshold`: QR and a small core
    r_k                    by the device's memory between `lowest_rank` and `highest_rank`
    =====================  =======================================================================

    Departures. New adapters are drawn from a seed that all share [choice; the authors' code has several ways to start].
    How r_k follows from the device is ours [choice]. Energy 1 is FLoRA with a smaller download.

    Parameters
    ----------
    energy : share of each slot's squared singular values that is kept, above 0, at most 1.
    weights : p_k, "examples" or "uniform".
    seed : of the new adapters.
    lowest_rank, highest_rank : ranks of the fleet's smallest and largest device (`RankByMemory`); None: every client
        has the adapter's rank.
    cohort_size : clients drawn each round; None: everyone.
    bandwidth, power, training, compressor : as for every method.
    """

    energy: float = 0.9
    weights: Weights = "examples"
    seed: int = 0
    lowest_rank: int | None = None
    highest_rank: int | None = None
    cohort_size: int | None = None
    bandwidth: BandwidthRule = field(default_factory=EqualSplit)
    power: PowerRule = field(default_factory=FullPower)
    training: LocalTraining = field(default_factory=LocalTraining)
    compressor: Compressor = field(default_factory=Dense)

    arxiv: ClassVar[str] = "2506.09199"
    citation: ClassVar[str] = """@article{ramesh2025florist,
  title   = {{FLoRIST}: Singular Value Thresholding for Efficient and Accurate Federated Fine-Tuning of Large Language
             Models},
  author  = {Ramesh, Hariharan and Dass, Jyotikrishna},
  journal = {arXiv preprint arXiv:2506.09199},
  year    = {2025}
}"""

    @property
    def composed(self) -> Composed:
        """Return the parts that this method is made of."""
        slicer = everything_or_ranks(self.lowest_rank, self.highest_rank)
        planner = Separate(everyone_or(self.cohort_size), slicer, self.bandwidth, self.power)
        return Composed(
            planner,
            EnergyThreshold(self.energy, self.weights, redraw=Redraw(seed=self.seed)),
            self.compressor,
            self.training,
        )
