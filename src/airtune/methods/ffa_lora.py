"""FFA-LoRA: A is drawn once and frozen, only B is trained and sent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from airtune.aggregation.mean import Weights
from airtune.aggregation.merging import Rows, first_rows
from airtune.aggregation.one_factor import FrozenA
from airtune.compression.dense import Dense
from airtune.methods.composed import Composed, FromParts
from airtune.scheduling.bandwidth import BandwidthRule, EqualSplit
from airtune.scheduling.planner import Separate
from airtune.scheduling.power import FullPower, PowerRule
from airtune.scheduling.sampling import everyone_or
from airtune.types import Compressor, LocalTraining


@dataclass(frozen=True)
class FFALoRA(FromParts):
    """Freezes A and trains, sends and averages B alone: exact, half the bits, and a linear sum for privacy.

    Paper: Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024, arXiv 2403.12313 (no
    official code).

    Each round it draws `cohort_size` clients uniformly, gives each the averaged B, and equal shares of the uplink.

    =====================  ==================================================================
    paper                  here
    =====================  ==================================================================
    A_0, frozen            `rows`: "model" (Kaiming-uniform, as in the paper), or another law
    B_k, averaged          `airtune.aggregation.one_factor.FrozenA`
    alpha                  with the learning rate of B: only learning_rate * scaling^2 matters for SGD
    =====================  ==================================================================

    Departures. `rows = "orthonormal"` gives the control for FedSVD (FFA-orth). A is known from the seed and never sent.
    The learning rate of LoRA is too small here: the paper tunes 0.1 to 1.0 (SGD) where LoRA has 0.01 to 0.1.

    Parameters
    ----------
    rows : law of A: "model", "kaiming", "gaussian" or "orthonormal".
    weights : p_k, "examples" or "uniform".
    seed : of A where `rows` is not "model".
    cohort_size : clients drawn each round; None: everyone.
    bandwidth, power, training, compressor : as for every method.
    """

    rows: Rows = "model"
    weights: Weights = "examples"
    seed: int = 0
    cohort_size: int | None = None
    bandwidth: BandwidthRule = field(default_factory=EqualSplit)
    power: PowerRule = field(default_factory=FullPower)
    training: LocalTraining = field(default_factory=LocalTraining)
    compressor: Compressor = field(default_factory=Dense)

    arxiv: ClassVar[str] = "2403.12313"
    citation: ClassVar[str] = """@inproceedings{sun2024ffalora,
  title     = {Improving {LoRA} in Privacy-preserving Federated Learning},
  author    = {Sun, Youbang and Li, Zitao and Li, Yaliang and Ding, Bolin},
  booktitle = {International Conference on Learning Representations},
  year      = {2024},
  note      = {arXiv:2403.12313}
}"""

    @property
    def composed(self) -> Composed:
        """Return the parts that this method is made of."""
        planner = Separate(everyone_or(self.cohort_size), bandwidth=self.bandwidth, power=self.power)
        return Composed(
            planner, FrozenA(self.weights, start=first_rows(self.rows, self.seed)), self.compressor, self.training
        )
