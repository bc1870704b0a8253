"""RAC-LoRA: a chain of merged adapters, one factor drawn anew each round and the other trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from airtune.aggregation.algebra import RowLaw
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
class RACLoRA(FromParts):
    """Draws A anew each round, trains and averages B alone, and merges the product into the base.

    Paper: Malinovsky et al., "Randomized Asymmetric Chain of LoRA: The First Meaningful Theoretical Framework for
    Low-Rank Adaptation", arXiv 2410.08305 (no public code).

    Each round it draws `cohort_size` clients uniformly and gives them equal shares of the uplink. A comes from a seed
    and B starts at zero: a client downloads the averages of B that it has not merged yet.

    =======================  ==================================================================
    paper                    here
    =======================  ==================================================================
    A_t (S in the analysis)  `rows`, drawn from `seed` and the model's version
    B_t, averaged, merged    `airtune.aggregation.one_factor.MergeAndRedraw`
    one block of the chain   one round
    alpha / r                the adapter's scaling
    =======================  ==================================================================

    Departures. The rows are orthonormal by default, so that a step of gradient descent is the projected step of the
    analysis [choice; the paper draws Gaussian ones]. Weights and sampling of clients are ours [choice]. Clients of
    lower rank use the first rows of A and their B is padded with zeros, which is exact [choice].

    Parameters
    ----------
    rows : law of A: "orthonormal", "gaussian" or "kaiming".
    weights : p_k, "examples" or "uniform".
    seed : of A.
    lowest_rank, highest_rank : ranks of the fleet's smallest and largest device (`RankByMemory`); None: every client
        has the adapter's rank.
    cohort_size : clients drawn each round; None: everyone.
    bandwidth, power, training, compressor : as for every method.
    """

    rows: RowLaw = "orthonormal"
    weights: Weights = "examples"
    seed: int = 0
    lowest_rank: int | None = None
    highest_rank: int | None = None
    cohort_size: int | None = None
    bandwidth: BandwidthRule = field(default_factory=EqualSplit)
    power: PowerRule = field(default_factory=FullPower)
    training: LocalTraining = field(default_factory=LocalTraining)
    compressor: Compressor = field(default_factory=Dense)

    arxiv: ClassVar[str] = "2410.08305"
    citation: ClassVar[str] = """@article{malinovsky2024raclora,
  title   = {Randomized Asymmetric Chain of {LoRA}: The First Meaningful Theoretical Framework for Low-Rank Adaptation},
  author  = {Malinovsky, Grigory and Michieli, Umberto and Hammoud, Hasan Abed Al Kader and Ceritli, Taha and
             Elesedy, Hayder and Ozay, Mete and Richt{\'a}rik, Peter},
  journal = {arXiv preprint arXiv:2410.08305},
  year    = {2024}
}"""

    @property
    def composed(self) -> Composed:
        """Return the parts that this method is made of."""
        slicer = everything_or_ranks(self.lowest_rank, self.highest_rank)
        planner = Separate(everyone_or(self.cohort_size), slicer, self.bandwidth, self.power)
        return Composed(
            planner, MergeAndRedraw("A", self.weights, Redraw(self.rows, self.seed)), self.compressor, self.training
        )
