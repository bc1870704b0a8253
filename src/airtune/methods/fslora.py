"""FSLoRA: every client trains a random sketch of the global LoRA components, as large as it can carry."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from airtune.aggregation.mean import IndependentSampling, Weights
from airtune.compression.dense import Dense
from airtune.methods.composed import Composed, FromParts
from airtune.scheduling.bandwidth import BandwidthRule, EqualSplit
from airtune.scheduling.planner import Separate
from airtune.scheduling.sampling import everyone_or
from airtune.scheduling.sketching import Assign, Download, Scope, SketchByRatio, Sketching
from airtune.types import Compressor, LocalTraining


@dataclass(frozen=True)
class FSLoRA(FromParts):
    """Federated sketching: the server keeps one pair (B, A) of high rank, clients update random sub-matrices of it.

    Paper: Fang et al., "Federated Sketching LoRA: On-Device Collaborative Fine-Tuning of Large Language Models",
    arXiv 2501.19389.

    Each round it draws `cohort_size` clients uniformly; each draws k of the rank's components, computes with
    ``W0 + scaling * (rank / k) * B[:, I] A[I, :]`` and sends the changes of B[:, I] and A[I, :]; the server adds the
    changes, weighted. With SGD this equals training the whole B and A through the sketch ``S = (rank / k) diag(1_I)``,
    E[S] = I.

    ==============================  ==========================================================================
    paper                           here
    ==============================  ==========================================================================
    r, the global rank              ``[model].rank``
    k_i / r, sketching ratio        `ratios`, one for each client by `assign`
    S_i                             `AdapterSlice.sketch`, one draw per client and round
    H, N                            `training.local_steps`; clients of the fleet
    1 / (number of sampled) sum     `IndependentSampling` with `weights` = "uniform" and probability K / N
    ==============================  ==========================================================================

    Departures: the paper leaves open how ratios follow from devices; equal parts of the fleet by speed are ours
    [choice]. The client downloads its sketch only (the server draws it); `download` = "all" is the published code's
    convention. The server adds the changes as they are; the published code feeds them to AdamW at the server. In that
    code the sketch is never applied (its mask compares full names with "lora_B"), so its figures are those of full
    rank; here it is. A and B of a slot share the subset (there: one draw per tensor). With AdamW at the clients the
    factor rank / k no longer scales the step as it does for SGD: allowed, and heuristic.

    Parameters
    ----------
    ratios : sketching ratios k / rank, in (0, 1].
    assign : "speed" or "memory": equal parts of the fleet, the weakest have the smallest ratio; "random": each client
        draws a ratio every round, all equally likely.
    scope : "slot": a subset for each slot; "client": one for all slots.
    download : "slice" or "all".
    cohort_size : clients drawn each round; None: everyone.
    weights : "uniform" (the paper's objective) or "examples".
    bandwidth, training, compressor : as for every method.
    """

    ratios: tuple[float, ...] = (0.125, 0.25, 0.5)
    assign: Assign = "speed"
    scope: Scope = "slot"
    download: Download = "slice"
    cohort_size: int | None = None
    weights: Weights = "uniform"
    bandwidth: BandwidthRule = field(default_factory=EqualSplit)
    training: LocalTraining = field(
        default_factory=lambda: LocalTraining(optimizer="sgd", learning_rate=5e-4, momentum=0.9)
    )
    compressor: Compressor = field(default_factory=Dense)

    arxiv: ClassVar[str] = "2501.19389"
    citation: ClassVar[str] = """@article{fang2025fslora,
  title   = {Federated Sketching {LoRA}: On-Device Collaborative Fine-Tuning of Large Language Models},
  author  = {Fang, Wenzhi and Han, Dong-Jun and Yuan, Liangqi and Hosseinalipour, Seyyedali and
             Brinton, Christopher G.},
  journal = {arXiv preprint arXiv:2501.19389},
  year    = {2025}
}"""

    @property
    def composed(self) -> Composed:
        """Return the parts that this method is made of."""
        slicer = SketchByRatio(self.ratios, self.assign, Sketching(self.scope, self.download))
        planner = Separate(everyone_or(self.cohort_size), slicer, self.bandwidth)
        return Composed(planner, IndependentSampling(self.weights), self.compressor, self.training)
