"""FedAdapter: a few small adapters at the top first, then deeper and wider ones as learning slows down."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from airtune.aggregation.mean import Mean, Weights
from airtune.capabilities import Trait
from airtune.compression.dense import Dense
from airtune.errors import InputError
from airtune.lora import AdapterShape
from airtune.scheduling.bandwidth import BandwidthRule, EqualSplit
from airtune.scheduling.planner import Separate
from airtune.scheduling.power import FullPower, PowerRule
from airtune.scheduling.sampling import everyone_or
from airtune.scheduling.slicing import depth_slices
from airtune.scheduling.work import LocalWork, Slices
from airtune.types import Compressor, Fleet, Ints, LocalTraining, Observation, Plan, RoundOutcome, ServerModel


@dataclass(frozen=True)
class Growth:
    """The present configuration and how it has fared.

    depth : adapted layers in use, from the output. width : components in use of each slot.
    layers, rank : what there is at most.
    best : least mean training loss of a round so far. stale : rounds since it fell noticeably.
    deeper : whether the next step is one in depth.
    """

    depth: int
    width: int
    layers: int
    rank: int
    best: float = math.inf
    stale: int = 0
    deeper: bool = True

    def grown(self, depth_step: int) -> Growth:
        """Return the next configuration: deeper and wider in turns, and the other one where one has reached its end."""
        deeper = self.depth < self.layers and (self.deeper or self.width >= self.rank)
        if deeper:
            return replace(self, depth=min(self.depth + depth_step, self.layers), stale=0, deeper=False)
        return replace(self, width=min(2 * self.width, self.rank), stale=0, deeper=True)


@dataclass(frozen=True)
class _Top:
    """The first `width` components of the last `depth` layers, for everybody; nothing acts below."""

    depth: int
    width: int

    @property
    def traits(self) -> frozenset[Trait]:
        """Return that nobody holds the lower layers."""
        return frozenset({Trait.PARTIAL_DEPTH})

    def least(self, shape: AdapterShape) -> Slices:
        """Return the one slice."""
        ranks = {name: min(self.width, slot.rank) for name, slot in shape.slots.items()}
        return depth_slices(shape, self.depth, "absent", ranks)

    def slices(self, clients: Ints, seen: Observation, work: LocalWork, rng: np.random.Generator) -> list[Slices]:
        """Return it for every client."""
        return [self.least(seen.shape)] * len(clients)


@dataclass(frozen=True)
class FedAdapter:
    """All devices train the same small adapters of the top layers; depth and width grow in turns when the loss stalls.

    Paper: Cai et al., "Efficient Federated Learning for Modern NLP" (FedAdapter, first called AutoFedNLP), arXiv
    2205.10162 (MobiCom 2023). A baseline here, in a simplified form.

    Each round it draws `cohort_size` clients uniformly, gives all the same slice, and equal shares of the uplink.

    ==========================  =====================================================================================
    paper                       here
    ==========================  =====================================================================================
    adapter (bottleneck)        ``[model] adapter = "bottleneck"``; with "lora" it is the growth of LoRA alone
    depth, width                `Growth.depth` layers from the output, `Growth.width` components of each slot
    start small, upgrade        from `first_depth`, `first_width`; by `depth_step`, by the factor 2 in width
    ==========================  =====================================================================================

    Departures. In the paper three groups of devices try the present, a deeper and a wider configuration side by side,
    and the one that gains most accuracy per second is taken; here everybody trains one configuration, and depth and
    width grow in turns whenever the mean training loss has not fallen by `least_gain` of its value for `patience`
    rounds [choice]. In the paper devices keep the activations of the frozen lower layers; here the virtual clock
    charges every device the whole forward pass (``[training] prefix_cache`` keeps them on the simulating machine).

    Parameters
    ----------
    first_depth : layers at the start. first_width : components at the start; None: a quarter of ``[model].rank``.
    depth_step : layers added at once.
    patience : rounds without a noticeable gain before the next step. least_gain : share of the loss.
    weights : "examples" or "uniform".
    cohort_size : clients drawn each round; None: everyone.
    bandwidth, power, training, compressor : as for every method.
    """

    first_depth: int = 1
    first_width: int | None = None
    depth_step: int = 1
    patience: int = 2
    least_gain: float = 0.05
    weights: Weights = "examples"
    cohort_size: int | None = None
    bandwidth: BandwidthRule = field(default_factory=EqualSplit)
    power: PowerRule = field(default_factory=FullPower)
    training: LocalTraining = field(default_factory=LocalTraining)
    compressor: Compressor = field(default_factory=Dense)

    arxiv: ClassVar[str] = "2205.10162"
    citation: ClassVar[str] = """@inproceedings{cai2023fedadapter,
  title     = {Efficient Federated Learning for Modern {NLP}},
  author    = {Cai, Dongqi and Wu, Yaozong and Wang, Shangguang and Lin, Felix Xiaozhu and Xu, Mengwei},
  booktitle = {Proceedings of the 29th Annual International Conference on Mobile Computing and Networking},
  year      = {2023},
  note      = {arXiv:2205.10162}
}"""

    def __post_init__(self) -> None:
        """Check the numbers that need no model."""
        for name in ("first_depth", "depth_step", "patience", "first_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"method.{name}: {value} is not possible; valid: 1 or more")
        if not 0.0 <= self.least_gain < 1.0:
            raise InputError(f"method.least_gain: {self.least_gain} is not possible; valid: from 0 to below 1")

    @property
    def traits(self) -> frozenset[Trait]:
        """Return that nobody holds the lower layers at first."""
        return frozenset({Trait.PARTIAL_DEPTH})

    @property
    def aggregator(self) -> Mean:
        """Return the mean over those that trained; the rest stays zero."""
        return Mean(self.weights, extras_weights="examples")

    def init(self, model: ServerModel, fleet: Fleet) -> Growth:
        """Return the smallest configuration.

        Raises InputError if it is larger than the adapter.
        """
        shape = model.adapter.shape
        width = max(1, shape.max_rank // 4) if self.first_width is None else self.first_width
        for name, value, most in (
            ("first_depth", self.first_depth, len(shape.layers)),
            ("first_width", width, shape.max_rank),
        ):
            if value > most:
                raise InputError(f"method.{name}: {value} is more than the adapter has; valid: 1 to {most}")
        return Growth(self.first_depth, width, len(shape.layers), shape.max_rank)

    def plan(self, state: Growth, seen: Observation, rng: np.random.Generator) -> Plan:
        """Draw the cohort and share the band equally."""
        return self.decide(state, seen, rng, LocalWork(self.training, self.compressor))

    def decide(self, state: Growth, seen: Observation, rng: np.random.Generator, work: LocalWork) -> Plan:
        """Return the plan; the notes hold depth and width."""
        top = _Top(state.depth, state.width)
        planner = Separate(everyone_or(self.cohort_size), top, self.bandwidth, self.power)
        plan = planner.decide(None, seen, rng, work)
        return replace(plan, notes={**plan.notes, "depth": state.depth, "width": state.width})

    def learn(self, state: Growth, outcome: RoundOutcome) -> Growth:
        """Grow if the loss has stalled."""
        losses = [u.reports["loss"] for u in outcome.updates if math.isfinite(u.reports.get("loss", math.nan))]
        if not losses:
            return state
        loss = math.fsum(losses) / len(losses)
        if loss < state.best * (1.0 - self.least_gain) or math.isinf(state.best):
            return replace(state, best=loss, stale=0)
        if state.stale + 1 < self.patience:
            return replace(state, stale=state.stale + 1)
        return state.grown(self.depth_step)

    def aggregate(self, state: Growth, model: ServerModel, outcome: RoundOutcome) -> tuple[ServerModel, Growth]:
        """Average what was trained, and grow if the loss has stalled."""
        return self.aggregator(model, outcome), self.learn(state, outcome)
