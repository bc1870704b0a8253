"""MoLE in a federation: clusters of clients train one expert each, then everybody trains the gates between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np

from airtune.aggregation.mean import Mean, Weights
from airtune.compression.dense import Dense
from airtune.errors import InputError, unknown_name
from airtune.lora import NEITHER, AdapterShape, AdapterSlice
from airtune.scheduling.bandwidth import BandwidthRule, EqualSplit
from airtune.scheduling.planner import able_clients, make_tasks, share_band
from airtune.scheduling.power import FullPower, PowerRule
from airtune.scheduling.sampling import everyone_or
from airtune.scheduling.work import LocalWork, Slices
from airtune.training.gates import experts_of
from airtune.training.shapes import placement_of
from airtune.types import (
    BalancePenalty,
    Compressor,
    Fleet,
    Floats,
    Group,
    Ints,
    LocalTraining,
    Observation,
    Plan,
    RoundOutcome,
    ServerModel,
)

Clusters = Literal["labels", "index"]


@dataclass(frozen=True)
class MoLEState:
    """The expert of each client, [clients]; and the clients that have downloaded all experts since these are fixed."""

    expert: Ints
    holders: tuple[int, ...] = ()


@dataclass(frozen=True)
class MoLE:
    """First each cluster of clients trains an expert of its own, then all clients train the gates between the experts.

    Paper: Wu et al., "Mixture of LoRA Experts", ICLR 2024, arXiv 2404.13628, which is not about federations. It goes
    with ``model.adapter = "mole"`` alone (`airtune.training.mole`), whose ``model.experts`` is the number of clusters.

    Each round it draws `cohort_size` clients uniformly and gives them equal shares of the uplink. In the first
    `expert_rounds` rounds a client downloads, trains and uploads the expert of its cluster as plain LoRA, with head and
    gates; an expert is the average of its cluster. After that the experts are fixed: a client downloads all of them
    once, trains gates and head, and uploads these alone. With `personal` they stay on the client, which sends nothing.

    =====================  ==================================================================
    paper                  here
    =====================  ==================================================================
    N trained LoRAs        one for each cluster, trained in the federation
    e, tau                 the extras ``layer0.gate``, ``layer0.gate_log_temperature`` ...
    alpha                  `balance`
    task loss, L_balance   the client's loss, `airtune.types.BalancePenalty`
    =====================  ==================================================================

    Departures. Clusters, the two phases and averaged gates are ours [choice]: the paper begins with given LoRAs. The
    classifier head is trained in both phases and averaged over all clients [choice]; the paper has none. Gates
    travel with the head in the first phase, in which they have no effect and do not change.

    Parameters
    ----------
    expert_rounds : rounds of the first phase, at least 1.
    clusters : "labels": clients with similar shares of labels, which they tell the server; "index": client modulo
        experts.
    personal : whether gates and head of the second phase are each client's own.
    balance : alpha of the paper, which takes 0.5; it keeps one expert from taking all. 0: none.
    weights : p_k, "examples" or "uniform".
    cohort_size : clients drawn each round; None: everyone.
    bandwidth, power, training, compressor : as for every method.
    """

    expert_rounds: int = 4
    clusters: Clusters = "labels"
    personal: bool = False
    balance: float = 0.5
    weights: Weights = "examples"
    cohort_size: int | None = None
    bandwidth: BandwidthRule = field(default_factory=EqualSplit)
    power: PowerRule = field(default_factory=FullPower)
    training: LocalTraining = field(default_factory=LocalTraining)
    compressor: Compressor = field(default_factory=Dense)

    only_adapter: ClassVar[str] = "mole"
    arxiv: ClassVar[str] = "2404.13628"
    citation: ClassVar[str] = """@inproceedings{wu2024mole,
  title     = {Mixture of {LoRA} Experts},
  author    = {Wu, Xun and Huang, Shaohan and Wei, Furu},
  booktitle = {International Conference on Learning Representations},
  year      = {2024},
  note      = {arXiv:2404.13628}
}"""

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.expert_rounds < 1:
            raise InputError(
                f"method.expert_rounds: {self.expert_rounds} leaves the experts untrained; valid: 1 or more"
            )
        if self.clusters not in ("labels", "index"):
            raise unknown_name("method.clusters", self.clusters, ("labels", "index"))
        if not 0.0 <= self.balance < float("inf"):
            raise InputError(f"method.balance: {self.balance} is not possible; valid: at least 0")
        _ = Mean(self.weights), everyone_or(self.cohort_size)

    def init(self, model: ServerModel, fleet: Fleet) -> MoLEState:
        """Return the clusters.

        Raises
        ------
        InputError : clusters by labels, and the data have none.
        """
        experts = 1 + max(experts_of(model.adapter.placement).values())
        if self.clusters == "index":
            return MoLEState(np.arange(fleet.size, dtype=np.int64) % experts)
        if fleet.label_counts is None:
            raise InputError('method.clusters: the data have no labels to go by; valid: "index"')
        return MoLEState(label_clusters(fleet.label_counts.astype(np.float64), experts))

    def plan(self, state: MoLEState, seen: Observation, rng: np.random.Generator) -> Plan:
        """Return the plan: experts alone at first, then gates."""
        training = self.training
        whole = AdapterSlice.everything(seen.shape)
        least = max(_expert_slices(seen.shape).values(), key=lambda part: part.num_values(seen.shape))
        if seen.round > self.expert_rounds:
            least = whole
            terms = (BalancePenalty(self.balance),) if self.balance else ()
            training = replace(training, penalties=(*training.penalties, *terms))
        work = LocalWork(training, self.compressor)
        able, notes = able_clients(seen, work, Slices.same(least))
        clients = everyone_or(self.cohort_size).sample(able, seen, rng)
        slices = [self._slices(int(client), state, seen, whole) for client in clients.clients]
        tasks = make_tasks(clients.clients, slices, seen, work, clients.probability.tolist())
        phase = "experts" if seen.round <= self.expert_rounds else "gates"
        return Plan((Group(share_band(tasks, seen, self.bandwidth, self.power)),), {**notes, "phase": phase})

    def _slices(self, client: int, state: MoLEState, seen: Observation, whole: AdapterSlice) -> Slices:
        if seen.round <= self.expert_rounds:
            return Slices.same(_expert_slices(seen.shape)[int(state.expert[client])])
        gates = replace(whole, tensors=NEITHER)
        mine = replace(gates, extras=not self.personal)
        if client not in state.holders:
            return Slices(whole, gates, mine)
        return Slices(mine, gates, mine)

    def aggregate(self, state: MoLEState, model: ServerModel, outcome: RoundOutcome) -> tuple[ServerModel, MoLEState]:
        """Return the averages of what was sent, and who holds all experts now."""
        sent = tuple(u for u in outcome.updates if u.task.send.extras or u.task.send.tensors)
        if outcome.plan.notes.get("phase") == "gates":
            arrived = {update.task.client for update in outcome.updates}
            state = replace(state, holders=tuple(sorted({*state.holders, *arrived})))
        return Mean(self.weights)(model, replace(outcome, updates=sent)), state


def _expert_slices(shape: AdapterShape) -> Mapping[int, AdapterSlice]:
    """Return expert -> the slice that holds it alone, in every module."""
    everything = AdapterSlice.everything(shape).components
    experts = experts_of(placement_of(shape))
    return {
        expert: AdapterSlice({slot: everything[slot] for slot, owner in experts.items() if owner == expert})
        for expert in sorted(set(experts.values()))
    }


def label_clusters(counts: Floats, clusters: int, passes: int = 50) -> Ints:
    """Return the cluster of each client, [clients], by its shares of labels: k-means without any random draw.

    counts : [clients, classes]; clients without examples go to cluster 0. The first centre is that of all clients,
    further ones are the clients farthest from all centres before them, then the first is moved like the others. A
    cluster may stay empty where clients are fewer or alike.
    """
    total = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, total, out=np.zeros_like(counts), where=total > 0)
    known = np.flatnonzero(total[:, 0] > 0)
    cluster = np.zeros(len(counts), dtype=np.int64)
    if not len(known):
        return cluster
    points = shares[known]
    centres = [points.mean(axis=0)]
    for _ in range(clusters - 1):
        centres.append(points[np.argmax(_distances(points, np.array(centres)).min(axis=1))])
    places = np.array(centres)
    nearest = np.argmin(_distances(points, places), axis=1)
    for _ in range(passes):
        for index in np.unique(nearest):
            places[index] = points[nearest == index].mean(axis=0)
        moved = np.argmin(_distances(points, places), axis=1)
        if np.array_equal(moved, nearest):
            break
        nearest = moved
    cluster[known] = nearest
    return cluster


def _distances(points: Floats, centres: Floats) -> Floats:
    """Return the squared distances, [points, centres]."""
    return np.square(points[:, None, :] - centres[None, :, :]).sum(axis=2)
