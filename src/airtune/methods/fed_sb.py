"""Fed-SB: two frozen bases and a small trained core between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from airtune.aggregation.mean import Weights
from airtune.aggregation.one_factor import SharedCore
from airtune.compression.dense import Dense
from airtune.methods.composed import Composed, FromParts
from airtune.scheduling.bandwidth import BandwidthRule, EqualSplit
from airtune.scheduling.planner import Separate
from airtune.scheduling.power import FullPower, PowerRule
from airtune.scheduling.sampling import everyone_or
from airtune.types import Compressor, LocalTraining


@dataclass(frozen=True)
class FedSB(FromParts):
    """Trains, sends and averages only a small core R between frozen A and B: exact, and rank^2 values per slot.

    Paper: Singhal et al., "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private)
    Federated LoRA Fine-Tuning", arXiv 2502.15436.

    Each round it draws `cohort_size` clients uniformly, gives each the averaged cores, and equal shares of the uplink.

    =====================  ==================================================================
    paper                  here
    =====================  ==================================================================
    Delta W = s B R A      `LoraFactors.core` is R
    A, B                   orthonormal, from `seed`
    R, averaged            `airtune.aggregation.one_factor.SharedCore`
    =====================  ==================================================================

    Departures. The paper takes A, B and R_0 from the SVD of a first gradient, which is computed on clients' data; here
    A and B are random and R starts at zero, so the model starts at the base [choice]. Take a rank several times that of
    LoRA: the core has rank^2 values.

    Parameters
    ----------
    weights : p_k, "examples" or "uniform".
    seed : of A and B.
    cohort_size : clients drawn each round; None: everyone.
    bandwidth, power, training, compressor : as for every method.
    """

    weights: Weights = "examples"
    seed: int = 0
    cohort_size: int | None = None
    bandwidth: BandwidthRule = field(default_factory=EqualSplit)
    power: PowerRule = field(default_factory=FullPower)
    training: LocalTraining = field(default_factory=LocalTraining)
    compressor: Compressor = field(default_factory=Dense)

    arxiv: ClassVar[str] = "2502.15436"
    citation: ClassVar[str] = """@article{singhal2025fedsb,
  title   = {{Fed-SB}: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private) Federated
             {LoRA} Fine-Tuning},
  author  = {Singhal, Raghav and Ponkshe, Kaustubh and Vartak, Rohit and Varshney, Lav R. and Vepakomma, Praneeth},
  journal = {arXiv preprint arXiv:2502.15436},
  year    = {2025}
}"""

    @property
    def composed(self) -> Composed:
        """Return the parts that this method is made of."""
        planner = Separate(everyone_or(self.cohort_size), bandwidth=self.bandwidth, power=self.power)
        return Composed(planner, SharedCore(self.weights, self.seed), self.compressor, self.training)
