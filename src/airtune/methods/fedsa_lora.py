"""FedSA-LoRA: everyone trains A and B, only A is shared; B stays with its client."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from airtune.aggregation.mean import Weights
from airtune.aggregation.one_factor import SharedFactor
from airtune.compression.dense import Dense
from airtune.lora import Factor
from airtune.methods.composed import Composed, FromParts
from airtune.scheduling.bandwidth import BandwidthRule, EqualSplit
from airtune.scheduling.planner import Separate
from airtune.scheduling.power import FullPower, PowerRule
from airtune.scheduling.sampling import everyone_or
from airtune.types import Compressor, LocalTraining


@dataclass(frozen=True)
class FedSALoRA(FromParts):
    """Shares and averages A alone; each client keeps its own B, so that there are as many models as clients.

    Paper: Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025, arXiv
    2410.01463.

    Each round it draws `cohort_size` clients uniformly, gives each the averaged A, and equal shares of the uplink. A
    client starts from its own B of its last round (zero before its first).

    =====================  ==================================================================
    paper                  here
    =====================  ==================================================================
    A, shared              `shared` = "A", `airtune.aggregation.one_factor.SharedFactor`
    B_k, local             the client's memory: trained, never sent
    =====================  ==================================================================

    Departures. The classifier head is shared and averaged like everywhere else; the authors usually keep it local
    [choice]. `shared = "B"` is the opposite choice, for which Fed-ALoRA argues (arXiv 2509.25414).

    Parameters
    ----------
    shared : "A" or "B".
    weights : p_k, "examples" or "uniform".
    cohort_size : clients drawn each round; None: everyone.
    bandwidth, power, training, compressor : as for every method.
    """

    shared: Factor = "A"
    weights: Weights = "examples"
    cohort_size: int | None = None
    bandwidth: BandwidthRule = field(default_factory=EqualSplit)
    power: PowerRule = field(default_factory=FullPower)
    training: LocalTraining = field(default_factory=LocalTraining)
    compressor: Compressor = field(default_factory=Dense)

    arxiv: ClassVar[str] = "2410.01463"
    citation: ClassVar[str] = """@inproceedings{guo2025fedsa,
  title     = {Selective Aggregation for Low-Rank Adaptation in Federated Learning},
  author    = {Guo, Pengxin and Zeng, Shuang and Wang, Yanran and Fan, Huijie and Wang, Feifei and Qu, Liangqiong},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
  note      = {arXiv:2410.01463}
}"""

    @property
    def composed(self) -> Composed:
        """Return the parts that this method is made of."""
        planner = Separate(everyone_or(self.cohort_size), bandwidth=self.bandwidth, power=self.power)
        return Composed(planner, SharedFactor(self.shared, self.weights), self.compressor, self.training)
