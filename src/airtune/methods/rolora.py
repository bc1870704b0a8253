"""RoLoRA: rounds that train B alternate with rounds that train A."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from airtune.aggregation.mean import Weights
from airtune.aggregation.one_factor import Alternating, trained_factor
from airtune.compression.dense import Dense
from airtune.lora import Factor
from airtune.methods.composed import Composed
from airtune.scheduling.bandwidth import BandwidthRule, EqualSplit
from airtune.scheduling.planner import Separate
from airtune.scheduling.power import FullPower, PowerRule
from airtune.scheduling.sampling import everyone_or
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
)


@dataclass(frozen=True)
class Received:
    """Round, and the round in which each client last downloaded the adapter (0: it knows the first one), [clients]."""

    round: int
    last: Ints


@dataclass(frozen=True)
class RoLoRA:
    """Trains, sends and averages B in odd rounds and A in even rounds: exact in each, half the bits.

    Paper: Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA", NeurIPS 2025, arXiv
    2502.01755 (the official code is not public).

    Each round it draws `cohort_size` clients uniformly and gives them equal shares of the uplink. A client downloads
    the factors that changed since its last download: one of them if it took part in the round before.

    =====================  ==================================================================
    paper                  here
    =====================  ==================================================================
    odd rounds, even ones  `airtune.aggregation.one_factor.Alternating`: B first, then A
    B_k, A_k               what the round trains; the other factor is the broadcast one
    =====================  ==================================================================

    Departures. The optimizer starts afresh every round, so that no moment of one factor meets the other [choice]. The
    classifier head is trained; the supplement's code freezes it without saying so. A client that missed rounds
    downloads both factors [choice].

    Parameters
    ----------
    weights : p_k, "examples" or "uniform".
    cohort_size : clients drawn each round; None: everyone.
    bandwidth, power, training, compressor : as for every method.
    """

    weights: Weights = "examples"
    cohort_size: int | None = None
    bandwidth: BandwidthRule = field(default_factory=EqualSplit)
    power: PowerRule = field(default_factory=FullPower)
    training: LocalTraining = field(default_factory=LocalTraining)
    compressor: Compressor = field(default_factory=Dense)

    arxiv: ClassVar[str] = "2502.01755"
    citation: ClassVar[str] = """@inproceedings{chen2025rolora,
  title     = {Robust Federated Finetuning of {LLMs} via Alternating Optimization of {LoRA}},
  author    = {Chen, Shuangyi and Guo, Yuanxin and Ju, Yue and Dalal, Harik and Zhu, Zhongwen and Khisti, Ashish},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2025},
  note      = {arXiv:2502.01755}
}"""

    @property
    def composed(self) -> Composed:
        """Return the parts that this method is made of."""
        planner = Separate(everyone_or(self.cohort_size), bandwidth=self.bandwidth, power=self.power)
        return Composed(planner, Alternating(self.weights), self.compressor, self.training)

    def init(self, model: ServerModel, fleet: Fleet) -> Received:
        """Return that every client knows the first adapter: A from the seed, B zero."""
        return Received(0, np.zeros(fleet.size, dtype=np.int64))

    def plan(self, state: Received, seen: Observation, rng: np.random.Generator) -> Plan:
        """Draw the cohort and share the band equally; download what has changed."""
        plan = self.composed.plan(None, seen, rng)
        return replace(plan, groups=tuple(_narrowed(group, state, seen.round) for group in plan.groups))

    def aggregate(self, state: Received, model: ServerModel, outcome: RoundOutcome) -> tuple[ServerModel, Received]:
        """Average the factor that was trained, and remember who has downloaded what."""
        last, current = state.last.copy(), state.round + 1
        last[[task.client for task in outcome.plan.tasks]] = current
        model, _ = self.composed.aggregate(None, model, outcome)
        return model, Received(current, last)


def changed_factors(rounds: Iterable[int]) -> frozenset[Factor]:
    """Return the factors that the given rounds trained."""
    return frozenset(trained_factor(number) for number in rounds)


def _narrowed(group: Group, state: Received, current: int) -> Group:
    """Return a group whose clients download only the factors that changed since they last did."""

    def narrowed(task: ClientTask) -> ClientTask:
        last = int(state.last[task.client])
        changed = changed_factors(range(max(last, 1), current))
        return replace(task, receive=replace(task.receive, tensors=changed))

    return replace(group, tasks=tuple(narrowed(task) for task in group.tasks))
