"""HierFedLoRA: near-IID groups, each with its own number of aggregations per round and its own depth."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np

from airtune.aggregation.groups import GroupMean, GroupWeights, layer_energies
from airtune.aggregation.mean import Mean
from airtune.compression.dense import Dense
from airtune.errors import InputError, unknown_name
from airtune.lora import AdapterShape
from airtune.scheduling.bandwidth import BandwidthRule, EqualSplit
from airtune.scheduling.capacity import Capacity, CapacityEstimator, Speeds, assumed_speeds
from airtune.scheduling.frequency import FrequencyChoice, FrequencyProblem, choose_frequencies, deepest_once
from airtune.scheduling.grouping import GroupingProblem, divergence, near_iid_groups
from airtune.scheduling.planner import able_clients, make_tasks, share_band
from airtune.scheduling.power import FullPower, PowerRule
from airtune.scheduling.sampling import everyone_or
from airtune.scheduling.slicing import depth_slices
from airtune.scheduling.work import LocalWork, Slices
from airtune.types import (
    ClientTask,
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


@dataclass(frozen=True)
class GroupingState:
    """What HierFedLoRA remembers.

    Attributes
    ----------
    capacity : estimates of every client.
    group : [clients], -1 where a client has no group yet. grouped_at : number of rounds done when groups were made.
    grouped_seconds : [clients], backward seconds per layer at that time.
    energy : [adapted layers], share of update energy of each layer, lowest first; NaN before the first measurement.
    tuned_at : [adapted layers], number of rounds done when each layer was trained last.
    rounds : rounds done.
    """

    capacity: Capacity
    group: Ints
    grouped_at: int
    grouped_seconds: Floats
    energy: Floats
    tuned_at: Ints
    rounds: int


@dataclass(frozen=True)
class _Cohort:
    """The clients of one round and what each depth costs them; depths as positions 0 .. deepest - 1."""

    clients: Ints
    group: Ints
    speeds: Speeds
    cap: Ints
    slices: tuple[Slices, ...]
    layers: Ints
    bits: Floats


@dataclass(frozen=True)
class HierFedLoRA:
    """Groups whose labels look like everybody's aggregate among themselves several times before they meet.

    Paper: Liu et al., "Resource-Efficient Federated Fine-Tuning Large Language Models for Heterogeneous Data", arXiv
    2503.21213. Only its abstract is public to us: near-IID groups, an aggregation frequency per group, a depth per
    group counted from the output, chosen jointly. *Everything else here is our reading [choice]*: grouping, gain,
    time model, guard. No result is a reproduction.

    Each round: (re)group the clients by label divergence and speed if due; choose frequency f_g and depth d_g of
    every group, most gain per second, within one common deadline; each group runs f_g cycles of local training and
    averaging; the server averages every layer over the clients of the groups that trained it.

    =======================  =======================================================================================
    specification            here
    =======================  =======================================================================================
    K, G_g                   `groups`; a `Group` of the plan
    f_g                      `Group.cycles`, between `least_frequency` and `most_frequency`
    d_g                      depth in adapted layers, at most what every member's memory holds
    s                        `training.local_steps` (or epochs) of each cycle
    v_i, delta_g             label counts of the fleet; their KL divergence to everybody's
    that_i, mu_i, beta_i     `Capacity`; uploads per bit, with the head
    Q(d)                     share of *update* energy in the last d layers, see below
    b, gain                  `airtune.scheduling.frequency`
    w, P_regroup             `label_weight`, `regroup_rounds`
    R1, R2                   `step_budget` None, or the steps of one round divided by f_g
    =======================  =======================================================================================

    Departures. Q(d) is measured from how far each layer moved in updates that trained all layers (with an adaptive
    optimizer this is nearly the share of the layer's parameters); the first round trains at full depth for it, later
    ones refresh it whenever a group trains at full depth, which the layer guard makes happen. The server is the inner
    aggregator and all traffic counts, so the global exchange takes no time of its own. Groups also change when an
    able client has none. Without label counts (causal language modelling without `data.topics`, which is not on by
    default) groups are made by speed alone, and the plan says so.

    Parameters
    ----------
    groups : K, at least 1; fewer if there are fewer clients.
    grouping : "near-iid", or "random" (ablation).
    label_weight : w, 0 to 1; 1 ignores speed.
    least_frequency, most_frequency : limits of f_g; equal ones fix it (ablation).
    fixed_depth : a depth for every group (ablation); None: chosen.
    step_budget : None: `training.local_steps` in each cycle; else local steps per round, shared by the cycles.
    regroup_rounds : rounds between regroupings.
    cover_rounds : every layer is trained at least once in this many rounds.
    wait_tolerance : allowed mean wait over groups as a share of the deadline; None: no limit.
    weights : "examples": every client by its examples; "normalised": changes divided by f_g before averaging, against
        bias towards groups that aggregate often.
    smoothing, outlier_factor : of the capacity estimates.
    cohort_size : clients drawn each round; None: everyone.
    bandwidth, power, training, compressor : as for every method.
    """

    groups: int = 8
    grouping: Literal["near-iid", "random"] = "near-iid"
    label_weight: float = 0.7
    least_frequency: int = 1
    most_frequency: int = 10
    fixed_depth: int | None = None
    step_budget: int | None = None
    regroup_rounds: int = 20
    cover_rounds: int = 5
    wait_tolerance: float | None = None
    weights: GroupWeights = "examples"
    smoothing: float = 0.8
    outlier_factor: float = 2.0
    cohort_size: int | None = None
    bandwidth: BandwidthRule = field(default_factory=EqualSplit)
    power: PowerRule = field(default_factory=FullPower)
    training: LocalTraining = field(default_factory=LocalTraining)
    compressor: Compressor = field(default_factory=Dense)

    arxiv: ClassVar[str] = "2503.21213"
    citation: ClassVar[str] = """@article{liu2025hierfedlora,
  title   = {Resource-Efficient Federated Fine-Tuning Large Language Models for Heterogeneous Data},
  author  = {Liu, Jun and Liao, Yunming and Xu, Hongli and Xu, Yang},
  journal = {arXiv preprint arXiv:2503.21213},
  year    = {2025}
}"""

    def __post_init__(self) -> None:
        """Check names and ranges that need no fleet."""
        if self.grouping not in ("near-iid", "random"):
            raise unknown_name("method.grouping", self.grouping, ("near-iid", "random"))
        GroupMean(self.weights)
        for name, number in (
            ("groups", self.groups),
            ("least_frequency", self.least_frequency),
            ("most_frequency", self.most_frequency),
            ("fixed_depth", self.fixed_depth),
            ("step_budget", self.step_budget),
            ("regroup_rounds", self.regroup_rounds),
            ("cover_rounds", self.cover_rounds),
        ):
            if number is not None and number < 1:
                raise InputError(f"method.{name}: {number} is not possible; valid: at least 1")
        if self.most_frequency < self.least_frequency:
            raise InputError(
                f"method.most_frequency: {self.most_frequency} is below least_frequency; valid: at least it"
            )
        if not 0.0 <= self.label_weight <= 1.0:
            raise InputError(f"method.label_weight: {self.label_weight} is not possible; valid: 0 to 1")
        if self.wait_tolerance is not None and not self.wait_tolerance >= 0.0:
            raise InputError(f"method.wait_tolerance: {self.wait_tolerance} is not possible; valid: at least 0")
        CapacityEstimator(self.smoothing, self.outlier_factor)

    # -- state --------------------------------------------------------------------------------------------------------

    def init(self, model: ServerModel, fleet: Fleet) -> GroupingState:
        """Return that nobody has a group and nothing is known."""
        layers = len(model.adapter.shape.layers)
        return GroupingState(
            capacity=Capacity.unknown(fleet.size),
            group=np.full(fleet.size, -1, dtype=np.int64),
            grouped_at=0,
            grouped_seconds=np.full(fleet.size, np.nan),
            energy=np.full(layers, np.nan),
            tuned_at=np.zeros(layers, dtype=np.int64),
            rounds=0,
        )

    def aggregate(
        self, state: GroupingState, model: ServerModel, outcome: RoundOutcome
    ) -> tuple[ServerModel, GroupingState]:
        """Average every layer over the clients that trained it; remember groups, speeds, energies, trained layers."""
        return self.aggregator(model, outcome), self._learn(state, model, outcome)

    @property
    def aggregator(self) -> GroupMean:
        """Return the mean over the clients of the groups that trained a layer."""
        return GroupMean(self.weights)

    def _learn(self, state: GroupingState, model: ServerModel, outcome: RoundOutcome) -> GroupingState:
        group, fresh = state.group.copy(), bool(outcome.plan.notes.get("regrouped", False))
        if fresh:
            group[:] = -1
        for note, members in zip(outcome.plan.notes.get("groups", []), outcome.plan.groups, strict=True):
            group[[task.client for task in members.tasks]] = note["group"]
        capacity = CapacityEstimator(self.smoothing, self.outlier_factor).learn(state.capacity, outcome)
        shape, rounds, tuned_at = model.adapter.shape, state.rounds + 1, state.tuned_at.copy()
        deepest = max((_depth(update.task, shape) for update in outcome.updates), default=0)
        tuned_at[len(tuned_at) - deepest :] = rounds
        moved = layer_energies(model.adapter, outcome.updates)
        return GroupingState(
            capacity=capacity,
            group=group,
            grouped_at=state.rounds if fresh else state.grouped_at,
            grouped_seconds=capacity.backward_layer.value.copy() if fresh else state.grouped_seconds,
            energy=state.energy if moved is None else moved,
            tuned_at=tuned_at,
            rounds=rounds,
        )

    # -- plan ---------------------------------------------------------------------------------------------------------

    def plan(self, state: GroupingState, seen: Observation, rng: np.random.Generator) -> Plan:
        """Group if due, choose frequency and depth of each group, share the band among all clients."""
        work = LocalWork(self.training, self.compressor)
        if self.fixed_depth is not None and self.fixed_depth > len(seen.shape.layers):
            raise InputError(
                f"method.fixed_depth: {self.fixed_depth} is too deep; valid: 1 to {len(seen.shape.layers)}"
            )
        able, notes = able_clients(seen, work, depth_slices(seen.shape, 1, "frozen"))
        drawn = everyone_or(self.cohort_size).sample(able, seen, rng)
        if not len(drawn.clients):
            return Plan((), {**notes, "groups": []})
        cohort, regrouped = self._cohort(state, seen, work, drawn.clients, rng)
        present = np.unique(cohort.group)
        labels, share = _labels(seen, cohort.clients), seen.fleet.num_examples[cohort.clients].astype(np.float64)
        apart = np.array([divergence(labels[cohort.group == g].sum(axis=0), labels.sum(axis=0)) for g in present])
        problem = FrequencyProblem(
            seconds=self._seconds(cohort, present),
            frequencies=np.arange(self.least_frequency, self.most_frequency + 1),
            energy_share=_energy_share(state.energy),
            divergence=np.maximum(apart, 0.0),
            share=np.array([share[cohort.group == g].sum() for g in present]) / share.sum(),
        )
        choice = self._covered(self._choose(state, problem), problem, state)
        tasks = self._tasks(cohort, present, choice, seen, work, drawn.probability)
        notes |= {
            "regrouped": regrouped,
            "grouped_by": self._grouped_by(seen),
            "deadline_s": choice.deadline,
            "predicted_round_s": float(choice.seconds.max()),
            "predicted_mean_wait_s": choice.mean_wait,
            "groups": [
                {
                    "group": int(g),
                    "frequency": int(f),
                    "depth": int(d),
                    "divergence": float(kl),
                    "predicted_s": float(t),
                }
                for g, f, d, kl, t in zip(present, choice.frequency, choice.depth, apart, choice.seconds, strict=True)
            ],
        }
        return Plan(self._groups(tasks, cohort, present, choice), notes)

    def _cohort(
        self, state: GroupingState, seen: Observation, work: LocalWork, clients: Ints, rng: np.random.Generator
    ) -> tuple[_Cohort, bool]:
        """Return the cohort with its groups, and whether these are new."""
        depths = range(1, len(seen.shape.layers) + 1)
        slices = tuple(depth_slices(seen.shape, depth, "frozen") for depth in depths)
        tasks = [work.task(0, part, seen) for part in slices]
        cohort = _Cohort(
            clients=clients,
            group=state.group[clients],
            speeds=assumed_speeds(state.capacity, seen, work, clients, slices[-1]),
            cap=work.that_fit(slices, seen, clients),
            slices=slices,
            layers=np.array([part.train.depth(seen.shape) for part in slices], dtype=np.int64),
            bits=np.array([float(seen.costs.uplink_bits(task)) for task in tasks]),
        )
        if not self._due(state, cohort):
            return cohort, False
        groups = min(self.groups, len(clients))
        if self.grouping == "random":
            return replace(cohort, group=rng.permutation(len(clients)) % groups), True
        half = max(len(slices) // 2, 1) - 1
        seconds = cohort.speeds.seconds(cohort.layers[half : half + 1], cohort.bits[half : half + 1])[:, 0]
        weight = self.label_weight if self._grouped_by(seen) == "labels and speed" else 0.0
        problem = GroupingProblem(_labels(seen, clients), seconds, groups, weight)
        return replace(cohort, group=near_iid_groups(problem)), True

    def _grouped_by(self, seen: Observation) -> str:
        """Return what groups are made by, for the record."""
        if self.grouping == "random":
            return "random"
        return "speed" if seen.fleet.label_counts is None else "labels and speed"

    def _due(self, state: GroupingState, cohort: _Cohort) -> bool:
        """Return whether groups are made anew: on schedule, for newcomers, or when a client's speed has changed."""
        if np.any(cohort.group < 0) or state.rounds - state.grouped_at >= self.regroup_rounds:
            return True
        then, now = state.grouped_seconds[cohort.clients], state.capacity.backward_layer.value[cohort.clients]
        return bool(np.any(np.abs(now - then) > 0.3 * then))

    def _seconds(self, cohort: _Cohort, present: Ints) -> Floats:
        """Return the duration of every choice, [groups, frequencies, depths]; infinite beyond a member's memory."""
        frequencies = range(self.least_frequency, self.most_frequency + 1)
        seconds = np.full((len(present), len(frequencies), len(cohort.slices)), np.inf)
        for j, frequency in enumerate(frequencies):
            speeds = cohort.speeds
            if self.step_budget is not None:
                speeds = replace(speeds, steps=np.full(len(speeds.steps), float(self._budgeted(frequency))))
            cycle = speeds.seconds(cohort.layers, cohort.bits)
            for g, name in enumerate(present):
                members = cohort.group == name
                allowed = min(int(cohort.cap[members].min()), self.fixed_depth or len(cohort.slices))
                first = allowed - 1 if self.fixed_depth is not None else 0
                seconds[g, j, first:allowed] = frequency * cycle[members, first:allowed].max(axis=0)
        return seconds

    def _budgeted(self, frequency: int) -> int:
        return max((self.step_budget or 0) // frequency, 1)

    def _choose(self, state: GroupingState, problem: FrequencyProblem) -> FrequencyChoice:
        """Return the joint choice; before Q is known, the least frequency at full depth."""
        if np.isnan(state.energy).any():
            return deepest_once(problem)
        free = choose_frequencies(problem)
        return free if self.wait_tolerance is None else choose_frequencies(problem, self.wait_tolerance * free.deadline)

    def _covered(self, choice: FrequencyChoice, problem: FrequencyProblem, state: GroupingState) -> FrequencyChoice:
        """Return the choice with one group at its deepest if a layer would stay untrained for too long."""
        overdue = np.flatnonzero(state.rounds + 1 - state.tuned_at >= self.cover_rounds)
        if not len(overdue) or self.fixed_depth is not None:
            return choice
        deepest = np.isfinite(problem.seconds[:, 0, :]).sum(axis=1)
        wanted = min(len(state.tuned_at) - int(overdue[0]), int(deepest.max()))
        if choice.depth.max() >= wanted:
            return choice
        times = problem.seconds[np.arange(len(deepest)), 0, deepest - 1]
        fastest = int(np.argmin(np.where(deepest >= wanted, times, np.inf)))
        frequency, depth, seconds = choice.frequency.copy(), choice.depth.copy(), choice.seconds.copy()
        frequency[fastest], depth[fastest], seconds[fastest] = problem.frequencies[0], deepest[fastest], times[fastest]
        return FrequencyChoice(frequency, depth, seconds, choice.deadline)

    def _tasks(
        self,
        cohort: _Cohort,
        present: Ints,
        choice: FrequencyChoice,
        seen: Observation,
        work: LocalWork,
        probability: Floats,
    ) -> tuple[ClientTask, ...]:
        place = np.searchsorted(present, cohort.group)
        slices = [cohort.slices[depth - 1] for depth in choice.depth[place]]
        tasks = make_tasks(cohort.clients, slices, seen, work, probability.tolist())
        if self.step_budget is not None:
            steps = [self._budgeted(int(f)) for f in choice.frequency[place]]
            tasks = [
                replace(task, training=replace(task.training, local_steps=count))
                for task, count in zip(tasks, steps, strict=True)
            ]
        return share_band(tasks, seen, self.bandwidth, self.power)

    def _groups(
        self, tasks: tuple[ClientTask, ...], cohort: _Cohort, present: Ints, choice: FrequencyChoice
    ) -> tuple[Group, ...]:
        inner = Mean("examples", absent="excluded")
        return tuple(
            Group(
                tasks=tuple(task for task, own in zip(tasks, cohort.group, strict=True) if own == g),
                cycles=int(frequency),
                combine=inner,
            )
            for g, frequency in zip(present, choice.frequency, strict=True)
        )


def _labels(seen: Observation, clients: Ints) -> Floats:
    """Return label counts, [clients, classes]; one class for all without labels."""
    if seen.fleet.label_counts is None:
        return seen.fleet.num_examples[clients].astype(np.float64)[:, None]
    return seen.fleet.label_counts[clients].astype(np.float64)


def _energy_share(energy: Floats) -> Floats:
    """Return Q(d) for d = 1 .. layers; proportional to d while nothing has been measured."""
    known = np.ones(len(energy)) if np.isnan(energy).any() else energy
    return np.cumsum(known[::-1]) / max(float(known.sum()), 1e-300)


def _depth(task: ClientTask, shape: AdapterShape) -> int:
    """Return the depth in adapted layers."""
    return sum(layer >= task.train.lowest_layer(shape) for layer in shape.layers)
