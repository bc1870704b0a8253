"""FedRA: each device trains randomly drawn layers, as many as it can afford."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from airtune.aggregation.mean import Mean, Weights
from airtune.compression.dense import Dense
from airtune.methods.composed import Composed
from airtune.scheduling.bandwidth import BandwidthRule, EqualSplit
from airtune.scheduling.planner import Separate
from airtune.scheduling.power import FullPower, PowerRule
from airtune.scheduling.sampling import everyone_or
from airtune.scheduling.slicing import RandomLayers
from airtune.types import Compressor, Fleet, LocalTraining, Observation, Plan, RoundOutcome, ServerModel


@dataclass(frozen=True)
class FedRA:
    """Small devices train a few random layers, other ones each round; every layer is averaged over its owners.

    Paper: Su et al., "FedRA: A Random Allocation Strategy for Federated Tuning to Unleash the Power of Heterogeneous
    Clients", arXiv 2311.11227 (ECCV 2024). A baseline here, in our simplified form.

    Each round it draws `cohort_size` clients uniformly, a set of layers for each, and equal shares of the uplink.

    =======================  ==========================================================
    paper                    here
    =======================  ==========================================================
    allocation matrix        `RandomLayers`, one row per client and round
    number of layers         between `least_layers` and all, by the device's memory
    aggregation by matrix    `Mean` over the owners of each layer
    =======================  ==========================================================

    Departures: in the paper a client builds a *smaller model* from the drawn layers; here the whole frozen base stays,
    and only the adapter is partial, since the base is on every device anyway. So the forward pass is not shortened
    and the backward pass reaches down to the lowest drawn layer. The number of layers by memory is ours [choice].

    Parameters
    ----------
    least_layers : layers of the smallest device.
    outside : "frozen": the global adapter acts, fixed, in the layers that are not drawn; "absent": nothing there.
    weights : "examples" or "uniform", over the owners of a layer.
    cohort_size : clients drawn each round; None: everyone.
    bandwidth, power, training, compressor : as for every method.
    """

    least_layers: int = 1
    outside: Literal["frozen", "absent"] = "frozen"
    weights: Weights = "examples"
    cohort_size: int | None = None
    bandwidth: BandwidthRule = field(default_factory=EqualSplit)
    power: PowerRule = field(default_factory=FullPower)
    training: LocalTraining = field(default_factory=LocalTraining)
    compressor: Compressor = field(default_factory=Dense)

    arxiv: ClassVar[str] = "2311.11227"
    citation: ClassVar[str] = """@inproceedings{su2024fedra,
  title     = {{FedRA}: A Random Allocation Strategy for Federated Tuning to Unleash the Power of Heterogeneous
               Clients},
  author    = {Su, Shangchao and Li, Bin and Xue, Xiangyang},
  booktitle = {European Conference on Computer Vision},
  year      = {2024},
  note      = {arXiv:2311.11227}
}"""

    @property
    def composed(self) -> Composed:
        """Return the parts that this method is made of."""
        slicer = RandomLayers(self.least_layers, self.outside)
        planner = Separate(everyone_or(self.cohort_size), slicer, self.bandwidth, self.power)
        return Composed(planner, Mean(self.weights, extras_weights="examples"), self.compressor, self.training)

    def init(self, model: ServerModel, fleet: Fleet) -> None:
        """Return no state."""
        return None

    def plan(self, state: None, seen: Observation, rng: np.random.Generator) -> Plan:
        """Draw cohort and layers, share the band."""
        return self.composed.plan(state, seen, rng)

    def aggregate(self, state: None, model: ServerModel, outcome: RoundOutcome) -> tuple[ServerModel, None]:
        """Average every layer over its owners."""
        return self.composed.aggregator(model, outcome), None
