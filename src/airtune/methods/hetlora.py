"""HetLoRA: a rank per device, pruned while training, and averages weighted by the size of the updates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import ClassVar

import numpy as np

from airtune.aggregation.mean import FrobeniusWeighted, Scope
from airtune.capabilities import Trait
from airtune.compression.dense import Dense
from airtune.errors import InputError
from airtune.lora import AdapterShape, AdapterSlice
from airtune.scheduling.bandwidth import BandwidthRule, EqualSplit
from airtune.scheduling.planner import able_clients, make_tasks, share_band
from airtune.scheduling.power import FullPower, PowerRule
from airtune.scheduling.sampling import everyone_or
from airtune.scheduling.slicing import RankByMemory, truncations
from airtune.scheduling.work import LocalWork
from airtune.types import (
    ClientTask,
    Compressor,
    Fleet,
    Group,
    Ints,
    LocalTraining,
    Observation,
    Plan,
    RoundOutcome,
    ServerModel,
    TailPenalty,
)


@dataclass(frozen=True)
class RankLimits:
    """What pruning has left: the largest rank of every client, [clients]."""

    ranks: Ints


@dataclass(frozen=True)
class HetLoRA:
    """Each device trains the first r_k components, and loses its tail when training makes the tail small.

    Paper: Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", EMNLP 2024,
    arXiv 2401.06432 (no official code).

    Each round it draws `cohort_size` clients uniformly, gives each the server's adapter truncated to its rank, and
    equal shares of the uplink. Clients minimise the loss plus ``lambda ||B[:, t:]||_F ||A[t:]||_F`` per slot; if the
    sum of these products has fallen during training, the client's rank becomes max(r_min, t).

    =====================  ============================================================================
    paper                  here
    =====================  ============================================================================
    r_min, r_max           `lowest_rank`, `highest_rank`
    r_k                    by the device's memory between the two (`RankByMemory`), then pruned
    gamma, lambda          `decay`, `penalty`
    sparsity weights       `FrobeniusWeighted`: ||B_k A_k||_F over their sum, zero padding
    =====================  ============================================================================

    Departures. How r_k follows from the device is ours: linear in the logarithm of the memory [choice]. The tail
    starts at t = min(r - 1, floor(gamma r)): rounding gamma r can give t = r, an empty tail whose penalty is zero
    [choice]. A rank pruned during a round takes effect with the next download, since upload times are fixed before
    training [choice]. Clients that cannot be pruned any more have no penalty [choice]. A component that no client of
    the cohort holds is unchanged instead of zero, since zero rows and columns would never train again [choice]. Norms
    are per slot by default; public code has both [choice]. The classifier head is averaged by examples.

    Parameters
    ----------
    lowest_rank, highest_rank : ranks of the fleet's smallest and largest device; `highest_rank` None: [model].rank.
    decay : gamma, 0 < gamma < 1. penalty : lambda, at least 0 (0: no pruning).
    scope : "slot" or "model": over what the norm of an update is taken.
    cohort_size : clients drawn each round; None: everyone.
    bandwidth, power, training, compressor : as for every method.
    """

    lowest_rank: int = 2
    highest_rank: int | None = None
    decay: float = 0.99
    penalty: float = 0.001
    scope: Scope = "slot"
    cohort_size: int | None = None
    bandwidth: BandwidthRule = field(default_factory=EqualSplit)
    power: PowerRule = field(default_factory=FullPower)
    training: LocalTraining = field(default_factory=LocalTraining)
    compressor: Compressor = field(default_factory=Dense)

    arxiv: ClassVar[str] = "2401.06432"
    citation: ClassVar[str] = """@inproceedings{cho2024hetlora,
  title     = {Heterogeneous {LoRA} for Federated Fine-tuning of On-Device Foundation Models},
  author    = {Cho, Yae Jee and Liu, Luyang and Xu, Zheng and Fahrezi, Aldi and Joshi, Gauri},
  booktitle = {Conference on Empirical Methods in Natural Language Processing},
  year      = {2024},
  note      = {arXiv:2401.06432}
}"""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0.0 < self.decay < 1.0:
            raise InputError(f"method.decay: {self.decay} is not possible; valid: above 0, below 1")
        if not 0.0 <= self.penalty < math.inf:
            raise InputError(f"method.penalty: {self.penalty} is not possible; valid: at least 0")
        if self.lowest_rank < 1 or (self.highest_rank is not None and self.highest_rank < self.lowest_rank):
            given = f"{self.lowest_rank} and {self.highest_rank}"
            raise InputError(
                f"method.lowest_rank, method.highest_rank: {given} are not possible; valid: 1 <= lowest <= highest"
            )

    @property
    def traits(self) -> frozenset[Trait]:
        """Return that ranks differ."""
        return frozenset({Trait.UNEQUAL_RANKS})

    @property
    def aggregator(self) -> FrobeniusWeighted:
        """Return the sparsity-weighted mean."""
        return FrobeniusWeighted(self.scope)

    def ranks(self, shape: AdapterShape) -> Mapping[str, int]:
        """Return the highest rank for every slot of the global adapter."""
        return {
            name: slot.rank if self.highest_rank is None else self.highest_rank for name, slot in shape.slots.items()
        }

    def init(self, model: ServerModel, fleet: Fleet) -> RankLimits:
        """Return that nothing has been pruned."""
        return RankLimits(np.full(fleet.size, model.adapter.shape.max_rank, dtype=np.int64))

    def plan(self, state: RankLimits, seen: Observation, rng: np.random.Generator) -> Plan:
        """Decide a round with this method's own training and compressor."""
        return self.decide(state, seen, rng, LocalWork(self.training, self.compressor))

    def decide(self, state: RankLimits, seen: Observation, rng: np.random.Generator, work: LocalWork) -> Plan:
        """Draw the cohort, truncate to each client's rank, share the band."""
        rule = RankByMemory(min(self.lowest_rank, seen.shape.max_rank), self.highest_rank)
        able, notes = able_clients(seen, work, rule.least(seen.shape))
        cohort = everyone_or(self.cohort_size).sample(able, seen, rng)
        ranks = np.minimum(rule.ranks(cohort.clients, seen, work), state.ranks[cohort.clients])
        slices = truncations(ranks, seen.shape)
        tasks = make_tasks(cohort.clients, slices, seen, work, cohort.probability.tolist())
        training = {int(r): self._penalised(work.training, int(r), seen.shape) for r in np.unique(ranks)}
        tasks = [replace(task, training=training[int(r)]) for task, r in zip(tasks, ranks, strict=True)]
        return Plan((Group(share_band(tasks, seen, self.bandwidth, self.power)),), notes)

    def learn(self, state: RankLimits, outcome: RoundOutcome) -> RankLimits:
        """Lower the rank of the clients whose tail became smaller."""
        ranks = state.ranks.copy()
        for update in outcome.updates:
            task, reports = update.task, update.reports
            if not _has_tail(task) or not reports["tail_norm_after"] < reports["tail_norm_before"]:
                continue
            rank = max(len(components) for components in task.train.components.values())
            ranks[task.client] = min(int(ranks[task.client]), max(self.lowest_rank, tail_start(rank, self.decay)))
        return RankLimits(ranks)

    def aggregate(self, state: RankLimits, model: ServerModel, outcome: RoundOutcome) -> tuple[ServerModel, RankLimits]:
        """Average by Frobenius norms; prune."""
        return self.aggregator(model, outcome), self.learn(state, outcome)

    def _penalised(self, training: LocalTraining, rank: int, shape: AdapterShape) -> LocalTraining:
        """Return the training of a client of this rank: with the penalty, unless nothing could be pruned."""
        if self.penalty == 0.0 or max(self.lowest_rank, tail_start(rank, self.decay)) >= rank:
            return training
        kept = AdapterSlice.truncation(shape, rank)
        start = {name: tail_start(kept.kept(name), self.decay) for name in shape.slots if kept.kept(name) > 1}
        return replace(training, penalties=(*training.penalties, TailPenalty(self.penalty, start)))


def tail_start(rank: int, decay: float) -> int:
    """Return the first component of the tail, ``min(rank - 1, floor(decay * rank))``, so that it is never empty."""
    return min(rank - 1, math.floor(Fraction(decay).limit_denominator(10**6) * rank))


def _has_tail(task: ClientTask) -> bool:
    return any(isinstance(penalty, TailPenalty) for penalty in task.training.penalties)
