"""FedSVD: trains B against a common A, and refactors their product by its SVD after averaging."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from airtune.aggregation.mean import Weights
from airtune.aggregation.merging import Rows, first_rows
from airtune.aggregation.truncation import Refactoring
from airtune.compression.dense import Dense
from airtune.methods.composed import Composed, FromParts
from airtune.scheduling.bandwidth import BandwidthRule, EqualSplit
from airtune.scheduling.planner import Separate
from airtune.scheduling.power import FullPower, PowerRule
from airtune.scheduling.sampling import everyone_or
from airtune.types import Compressor, LocalTraining


@dataclass(frozen=True)
class FedSVD(FromParts):
    """Trains and averages B alone like FFA-LoRA, then takes the basis A from the SVD of the product.

    Paper: Lee et al., "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA", NeurIPS 2025,
    arXiv 2505.12805.

    Each round it draws `cohort_size` clients uniformly, gives each A and B, and equal shares of the uplink.

    =====================  ==================================================================
    paper                  here
    =====================  ==================================================================
    SVD of B A             `airtune.aggregation.truncation.Refactoring`: QR and a small core
    period of the SVD      `period`, rounds
    =====================  ==================================================================

    Departures. While B is zero nothing is refactored [choice]. The new A spans the row space of the first one, so that
    with SGD this method equals `ffa-lora` with `rows = "orthonormal"`: compare the two before believing a gain.

    Parameters
    ----------
    period : rounds from one SVD to the next.
    rows : law of the first A: "model", "kaiming", "gaussian" or "orthonormal".
    weights : p_k, "examples" or "uniform".
    seed : of A where `rows` is not "model".
    cohort_size : clients drawn each round; None: everyone.
    bandwidth, power, training, compressor : as for every method.
    """

    period: int = 1
    rows: Rows = "model"
    weights: Weights = "examples"
    seed: int = 0
    cohort_size: int | None = None
    bandwidth: BandwidthRule = field(default_factory=EqualSplit)
    power: PowerRule = field(default_factory=FullPower)
    training: LocalTraining = field(default_factory=LocalTraining)
    compressor: Compressor = field(default_factory=Dense)

    arxiv: ClassVar[str] = "2505.12805"
    citation: ClassVar[str] = """@inproceedings{lee2025fedsvd,
  title     = {{FedSVD}: Adaptive Orthogonalization for Private Federated Learning with {LoRA}},
  author    = {Lee, Seanie and Park, Sangwoo and Lee, Dong Bok and Wagner, Dominik and Seong, Haebin and
               Bocklet, Tobias and Lee, Juho and Hwang, Sung Ju},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2025},
  note      = {arXiv:2505.12805}
}"""

    @property
    def composed(self) -> Composed:
        """Return the parts that this method is made of."""
        planner = Separate(everyone_or(self.cohort_size), bandwidth=self.bandwidth, power=self.power)
        return Composed(
            planner,
            Refactoring(self.weights, self.period, first_rows(self.rows, self.seed)),
            self.compressor,
            self.training,
        )
