"""FLoRA: stacks all clients' adapters, merges the stack into the base, and starts new adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from airtune.aggregation.mean import Weights
from airtune.aggregation.merging import Redraw
from airtune.aggregation.stacking import Stacking
from airtune.compression.dense import Dense
from airtune.methods.composed import Composed, FromParts
from airtune.scheduling.bandwidth import BandwidthRule, EqualSplit
from airtune.scheduling.planner import Separate
from airtune.scheduling.power import FullPower, PowerRule
from airtune.scheduling.sampling import everyone_or
from airtune.scheduling.slicing import everything_or_ranks
from airtune.types import Compressor, LocalTraining


@dataclass(frozen=True)
class FLoRA(FromParts):
    """Merges the stack of all clients' adapters into the base each round, then starts new ones: exact for any ranks.

    Paper: Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations",
    NeurIPS 2024, arXiv 2409.05976.

    Each round it draws `cohort_size` clients uniformly and gives them equal shares of the uplink; each trains a new
    adapter of its rank. A client downloads the stacks that it has not merged yet (the dense update where that is less).

    ======================  ==========================================================================
    paper                   here
    ======================  ==========================================================================
    stacking, p_k on A      `airtune.aggregation.stacking.Stacking`, p_k s_k on A
    r_k                     by the device's memory between `lowest_rank` and `highest_rank`
    merge into W            `ServerModel.base_update`, an accumulator in single precision
    ======================  ==========================================================================

    Departures. New adapters are drawn from a seed that all share, so A is not sent [choice]. How r_k follows from the
    device is ours [choice]. A and B are known by their names, not by their shapes. The broadcast stack hands every
    client all other clients' adapters, up to their weights: see docs/privacy.md. Starting over each round loses the
    optimizer's momentum: take few rounds with long local training.

    Parameters
    ----------
    weights : p_k, "examples" or "uniform".
    seed : of the new adapters.
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

    arxiv: ClassVar[str] = "2409.05976"
    citation: ClassVar[str] = """@inproceedings{wang2024flora,
  title     = {{FLoRA}: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations},
  author    = {Wang, Ziyao and Shen, Zheyu and He, Yexiao and Sun, Guoheng and Wang, Hongyi and Lyu, Lingjuan and
               Li, Ang},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024},
  note      = {arXiv:2409.05976}
}"""

    @property
    def composed(self) -> Composed:
        """Return the parts that this method is made of."""
        slicer = everything_or_ranks(self.lowest_rank, self.highest_rank)
        planner = Separate(everyone_or(self.cohort_size), slicer, self.bandwidth, self.power)
        return Composed(planner, Stacking(self.weights, redraw=Redraw(seed=self.seed)), self.compressor, self.training)
