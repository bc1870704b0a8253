"""FedIT: federated averaging of both LoRA factors, the baseline."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from airtune.aggregation.mean import Mean, Weights
from airtune.compression.dense import Dense
from airtune.methods.composed import Composed
from airtune.scheduling.bandwidth import BandwidthRule, EqualSplit
from airtune.scheduling.planner import Separate
from airtune.scheduling.power import FullPower, PowerRule
from airtune.scheduling.sampling import everyone_or
from airtune.types import Compressor, Fleet, LocalTraining, Observation, Plan, RoundOutcome, ServerModel


@dataclass(frozen=True)
class FedIT:
    """FedAvg of A and B: everyone trains the whole adapter, the server averages A and B separately.

    Paper: Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", arXiv 2305.05644 (also
    called FedLoRA where it is a baseline).

    Each round it draws `cohort_size` clients uniformly, gives them the whole adapter and equal shares of the uplink.

    ==================  =====================================================
    paper               here
    ==================  =====================================================
    K, participation    `cohort_size`
    p_k = n_k / sum n   `weights` = "examples", over the updates that arrived
    A_k, B_k            the update's factors
    ==================  =====================================================

    Departures: the paper has no radio; the equal split of the band is ours [choice]. Its 10 local epochs and
    participation 0.1 are settings of `training` and `cohort_size`, not defaults.

    Not exact: the mean of A times the mean of B is not the mean of the products (see `airtune.aggregation.mean`).

    Parameters
    ----------
    cohort_size : clients drawn each round, 1 to the size of the fleet; None: everyone.
    weights : "examples" or "uniform".
    bandwidth : how the uplink is shared. power : how strongly clients send.
    training, compressor : of every client.
    """

    cohort_size: int | None = None
    weights: Weights = "examples"
    bandwidth: BandwidthRule = field(default_factory=EqualSplit)
    power: PowerRule = field(default_factory=FullPower)
    training: LocalTraining = field(default_factory=LocalTraining)
    compressor: Compressor = field(default_factory=Dense)

    arxiv: ClassVar[str] = "2305.05644"
    citation: ClassVar[str] = """@article{zhang2023fedit,
  title   = {Towards Building the Federated {GPT}: Federated Instruction Tuning},
  author  = {Zhang, Jianyi and Vahidian, Saeed and Kuo, Martin and Li, Chunyuan and Zhang, Ruiyi and Yu, Tong and
             Wang, Guoyin and Chen, Yiran},
  journal = {arXiv preprint arXiv:2305.05644},
  year    = {2023}
}"""

    @property
    def composed(self) -> Composed:
        """Return the parts that this method is made of."""
        planner = Separate(everyone_or(self.cohort_size), bandwidth=self.bandwidth, power=self.power)
        return Composed(planner, Mean(self.weights), self.compressor, self.training)

    def init(self, model: ServerModel, fleet: Fleet) -> None:
        """Return no state."""
        return None

    def plan(self, state: None, seen: Observation, rng: np.random.Generator) -> Plan:
        """Draw the cohort and share the band equally."""
        return self.composed.plan(state, seen, rng)

    def aggregate(self, state: None, model: ServerModel, outcome: RoundOutcome) -> tuple[ServerModel, None]:
        """Average A and B."""
        return self.composed.aggregator(model, outcome), None
