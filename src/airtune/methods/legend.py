"""LEGEND: a LoRA depth per device, and ranks that rise towards the output, so that nobody waits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from airtune.aggregation.mean import Mean, Weights
from airtune.aggregation.resize import Shrink, emptied_beyond, sorted_by_energy
from airtune.capabilities import Trait
from airtune.compression.dense import Dense
from airtune.errors import InputError, unknown_name
from airtune.lora import AdapterShape
from airtune.scheduling.bandwidth import BandwidthRule, EqualSplit
from airtune.scheduling.capacity import Capacity, CapacityEstimator, Speeds, assumed_speeds
from airtune.scheduling.depth import (
    DepthChoice,
    DepthRule,
    ProfileForm,
    choose_depths,
    choose_most_progress,
    cover_layers,
    rank_profile,
)
from airtune.scheduling.planner import able_clients, make_tasks, share_band
from airtune.scheduling.power import FullPower, PowerRule
from airtune.scheduling.sampling import everyone_or
from airtune.scheduling.slicing import depth_slices
from airtune.scheduling.work import LocalWork, Slices
from airtune.types import (
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

Variant = Literal["A", "B", "C"]
GRID = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of the steepest slope that variant C tries


@dataclass(frozen=True)
class _Option:
    """One rank profile with what it needs at every depth; arrays [depths + 1], entry 0 without meaning."""

    ranks: Mapping[str, int]
    slices: tuple[Slices, ...]
    layers: Ints  # that the backward pass crosses
    bits: Floats
    progress: Floats  # components trained


@dataclass(frozen=True)
class Legend:
    """Each device trains as many of the last layers as its speed, link and memory allow in the common time.

    Paper: Liu et al., "Adaptive Parameter-Efficient Federated Fine-Tuning on Heterogeneous Devices", arXiv 2412.20004
    (IEEE Trans. Mobile Computing 24(11), 2025). Only its abstract is public to us: the two decisions (LoRA depth and
    rank distribution), their coupling and "higher ranks close to the output" are the paper's. *Everything else here
    is our reading [choice]*: cost model, greedy algorithm, coverage guard, aggregation. No result is a reproduction.

    Each round: update the capacity estimates from the reports; give every client the deepest choice that ends by the
    reference time; lower that time while the mean wait is too long; raise clients until every layer has owners;
    average every layer over those that trained it.

    ===========================  ==================================================================================
    specification                here
    ===========================  ==================================================================================
    L, l                         adapted layers, 0 next to the input
    k_i (LoRA depth)             number of last adapted layers that client i trains, >= `least_depth`
    r_l, Phi                     rank of layer l (`ranks`), sum = L * `reference_rank`
    lambda                       `slope` * 2 (reference_rank - 1) / (L - 1)
    that_i, mu_i, beta_i         `Capacity.forward`, `.backward_layer` (both per local step), `.upload_bit` (per *bit*)
    t_i(k)                       steps (forward + layers crossed * backward_layer) + upload_bit * bits(k)
    rho                          `smoothing`
    eps_w                        `wait_tolerance` (share of the first reference time) or `wait_seconds`
    n_min, k_min                 `min_owners`, `least_depth`
    D1, D2                       `outside` = "frozen" or "absent"
    variants A, B, C             `variant`
    ===========================  ==================================================================================

    Departures from the specification: upload time counts bits (the head included), not ranks, which is the same
    where all layers are of one size and there is no head. Variant C does not run the greedy steps for each slope but
    finds the most progress per second exactly (`choose_most_progress`); the greedy version came within 5 % of the
    optimum in 59 % of 200 random instances only. The global adapter then has the largest rank that any slope gives each
    layer, of which a round uses the first; components beyond them act no more (B set to zero) once a round has used
    fewer. With D1 the client downloads all layers every round, also those that did not change.

    Parameters
    ----------
    reference_rank : mean rank of the layers; None: ``[model].rank``.
    profile : "increasing" towards the output, "uniform", "decreasing" or "middle" (ablations; same rank budget).
    slope : 0 to 1, share of the steepest slope; 1 starts at rank 1.
    variant : "A": reference time = fastest client at full depth, but never below what the slowest needs; "B": without
        that floor; "C": slope and depths of most progress per second, each round anew.
    fixed_depth : a depth for everyone instead of the algorithm (ablation); None: the algorithm.
    least_depth : least depth of a client that takes part.
    wait_tolerance, wait_seconds : allowed mean wait, share of the reference time, or s (None: by the share).
    min_owners : clients that should train each layer.
    drop_straggler : whether the slowest client is left out where depth cannot remove more waiting.
    full_depth_reference : whether the reference is looked for among clients whose memory holds full depth only.
    memory_limit : whether depth respects memory when it is chosen; without it a plan that does not fit is an error.
    outside : "frozen" (D1): clients keep the global adapter below their depth; "absent" (D2): nothing there.
    weights : "uniform" over the owners of a layer, or "examples". The head is always averaged by examples.
    shrink : variant C: how components are dropped: "svd" (least energy first) or "truncate" (last first).
    smoothing, outlier_factor : of the capacity estimates, see `CapacityEstimator`.
    upload_estimate : "measured": smoothed uploads; "channel": rate of this round's estimated link, equal shares.
    cohort_size : clients drawn each round; None: everyone.
    bandwidth, power, training, compressor : as for every method.
    """

    reference_rank: int | None = None
    profile: ProfileForm = "increasing"
    slope: float = 1.0
    variant: Variant = "A"
    fixed_depth: int | None = None
    least_depth: int = 1
    wait_tolerance: float = 0.1
    wait_seconds: float | None = None
    min_owners: int = 2
    drop_straggler: bool = False
    full_depth_reference: bool = False
    memory_limit: bool = True
    outside: Literal["frozen", "absent"] = "frozen"
    weights: Weights = "uniform"
    shrink: Shrink = "svd"
    smoothing: float = 0.8
    outlier_factor: float = 2.0
    upload_estimate: Literal["measured", "channel"] = "measured"
    cohort_size: int | None = None
    bandwidth: BandwidthRule = field(default_factory=EqualSplit)
    power: PowerRule = field(default_factory=FullPower)
    training: LocalTraining = field(default_factory=LocalTraining)
    compressor: Compressor = field(default_factory=Dense)

    arxiv: ClassVar[str] = "2412.20004"
    citation: ClassVar[str] = """@article{liu2025legend,
  title   = {Adaptive Parameter-Efficient Federated Fine-Tuning on Heterogeneous Devices},
  author  = {Liu, Jun and Liao, Yunming and Xu, Hongli and Xu, Yang and Liu, Jianchun and Qian, Chen},
  journal = {IEEE Transactions on Mobile Computing},
  volume  = {24},
  number  = {11},
  pages   = {12533--12549},
  year    = {2025},
  doi     = {10.1109/TMC.2025.3586644},
  note    = {arXiv:2412.20004}
}"""

    def __post_init__(self) -> None:
        """Check names and ranges that need no fleet."""
        _one_of("variant", self.variant, ("A", "B", "C"))
        _one_of("outside", self.outside, ("frozen", "absent"))
        _one_of("shrink", self.shrink, ("svd", "truncate"))
        _one_of("upload_estimate", self.upload_estimate, ("measured", "channel"))
        rank_profile(2, 1 if self.reference_rank is None else self.reference_rank, self.profile, self.slope)
        CapacityEstimator(self.smoothing, self.outlier_factor)
        for name, value, least in (
            ("wait_tolerance", self.wait_tolerance, 0),
            ("wait_seconds", self.wait_seconds, 0),
            ("least_depth", self.least_depth, 1),
            ("fixed_depth", self.fixed_depth, 1),
            ("min_owners", self.min_owners, 0),
        ):
            if value is not None and not value >= least:
                raise InputError(f"method.{name}: {value} is not possible; valid: at least {least}")

    @property
    def traits(self) -> frozenset[Trait]:
        """Return that depths differ, ranks too in variant C, and that clients can be chosen by their speed."""
        chosen = frozenset({Trait.UNKNOWN_PROBABILITY}) if self.drop_straggler else frozenset[Trait]()
        changing = frozenset({Trait.UNEQUAL_RANKS}) if self.variant == "C" else frozenset[Trait]()
        return frozenset({Trait.PARTIAL_DEPTH}) | chosen | changing

    # -- ranks --------------------------------------------------------------------------------------------------------

    def ranks(self, shape: AdapterShape) -> dict[str, int]:
        """Return the rank of every slot of the global adapter, from its shape at ``[model].rank``."""
        reference = shape.max_rank if self.reference_rank is None else self.reference_rank
        profiles = [self._profile(shape, reference, slope) for slope in self._slopes]
        ranks = {name: max(profile[name] for profile in profiles) for name in shape.slots}
        for name, rank in ranks.items():
            largest = min(shape.slots[name].in_features, shape.slots[name].out_features)
            if rank > largest:
                raise InputError(f"method.reference_rank: {reference} needs rank {rank} in {name}; valid: to {largest}")
        return ranks

    @property
    def _slopes(self) -> tuple[float, ...]:
        return GRID if self.variant == "C" else (self.slope,)

    def _profile(self, shape: AdapterShape, reference: int, slope: float) -> dict[str, int]:
        by_layer = dict(zip(shape.layers, rank_profile(len(shape.layers), reference, self.profile, slope), strict=True))
        return {name: by_layer[slot.layer] for name, slot in shape.slots.items()}

    def _profiles(self, shape: AdapterShape) -> list[dict[str, int]]:
        """Return the profiles to choose from in a round: the adapter's own ranks, or the grid of variant C."""
        own = {name: slot.rank for name, slot in shape.slots.items()}
        if self.variant != "C":
            return [own]
        reference = min(own.values()) if self.reference_rank is None else self.reference_rank
        grid = [self._profile(shape, reference, slope) for slope in GRID]
        return [{name: min(profile[name], own[name]) for name in own} for profile in grid]

    # -- a round ------------------------------------------------------------------------------------------------------

    def init(self, model: ServerModel, fleet: Fleet) -> Capacity:
        """Return that nothing is known of any client."""
        return Capacity.unknown(fleet.size)

    def plan(self, state: Capacity, seen: Observation, rng: np.random.Generator) -> Plan:
        """Decide a round with this method's own training and compressor."""
        return self.decide(state, seen, rng, LocalWork(self.training, self.compressor))

    def decide(self, state: Capacity, seen: Observation, rng: np.random.Generator, work: LocalWork) -> Plan:
        """Choose profile and depths, and share the band."""
        options = [self._option(profile, seen, work) for profile in self._profiles(seen.shape)]
        least = self.least_depth if self.fixed_depth is None else self.fixed_depth
        deepest = len(options[0].slices) - 1
        if least > deepest:
            raise InputError(f"method.least_depth, method.fixed_depth: {least} is not possible; valid: 1 to {deepest}")
        able, notes = able_clients(seen, work, options[0].slices[least])
        cohort = everyone_or(self.cohort_size).sample(able, seen, rng)
        if not len(cohort.clients):
            return Plan((Group(()),), notes)
        known = state if self.upload_estimate == "measured" else _without_uploads(state)
        speeds = assumed_speeds(known, seen, work, cohort.clients, options[-1].slices[-1])
        choices = [self._choose(option, speeds, self._caps(option, seen, work, cohort.clients)) for option in options]
        option, choice = max(zip(options, choices, strict=True), key=lambda pair: self._merit(*pair))
        part = choice.depth > 0
        slices = [option.slices[k] for k in choice.depth[part]]
        tasks = make_tasks(cohort.clients[part], slices, seen, work, cohort.probability[part].tolist())
        notes |= self._notes(option, choice, seen.shape)
        return Plan((Group(share_band(tasks, seen, self.bandwidth, self.power)),), notes)

    def learn(self, state: Capacity, outcome: RoundOutcome) -> Capacity:
        """Update the capacities from the reports."""
        return CapacityEstimator(self.smoothing, self.outlier_factor).learn(state, outcome)

    @property
    def aggregator(self) -> Mean:
        """Return the mean over the owners of each layer."""
        return Mean(self.weights, absent="excluded", extras_weights="examples")

    def aggregate(self, state: Capacity, model: ServerModel, outcome: RoundOutcome) -> tuple[ServerModel, Capacity]:
        """Average every layer over its owners, update the capacities, and drop components that the round left out."""
        averaged, state = self.aggregator(model, outcome), self.learn(state, outcome)
        if self.variant != "C" or averaged is model:
            return averaged, state
        adapter = emptied_beyond(averaged.adapter, _ranks_in_use(outcome.plan))
        adapter = sorted_by_energy(adapter) if self.shrink == "svd" else adapter
        return ServerModel(adapter, averaged.base_update, averaged.version, averaged.merged_bits), state

    # -- parts of a decision ------------------------------------------------------------------------------------------

    def _option(self, ranks: Mapping[str, int], seen: Observation, work: LocalWork) -> _Option:
        depths = range(1, len(seen.shape.layers) + 1)
        slices = [depth_slices(seen.shape, depth, self.outside, ranks) for depth in depths]
        tasks = [work.task(0, part, seen) for part in slices]
        return _Option(
            ranks=ranks,
            slices=(slices[0], *slices),
            layers=np.array([0, *(part.train.depth(seen.shape) for part in slices)], dtype=np.int64),
            bits=np.array([0, *(seen.costs.uplink_bits(task) for task in tasks)], dtype=np.float64),
            progress=np.array([0, *(part.train.total_components() for part in slices)], dtype=np.float64),
        )

    def _caps(self, option: _Option, seen: Observation, work: LocalWork, clients: Ints) -> Ints:
        """Return the deepest choice that fits each client's memory, [clients]."""
        if not self.memory_limit:
            return np.full(len(clients), len(option.slices) - 1, dtype=np.int64)
        return work.that_fit(option.slices[1:], seen, clients)

    def _choose(self, option: _Option, speeds: Speeds, cap: Ints) -> DepthChoice:
        seconds, deepest = speeds.seconds(option.layers, option.bits), len(option.slices) - 1
        rule = self._rule
        if self.fixed_depth is not None:
            fixed = np.minimum(cap, self.fixed_depth)
            return choose_depths(seconds, np.where(fixed < self.fixed_depth, 0, fixed), rule)
        if self.variant == "C":
            choice = choose_most_progress(seconds, cap, option.progress, rule)
        else:
            reference = np.flatnonzero(cap == deepest) if self.full_depth_reference else None
            choice = choose_depths(seconds, cap, rule, reference)
        return cover_layers(choice, seconds, cap, rule)

    def _merit(self, option: _Option, choice: DepthChoice) -> tuple[bool, float]:
        """Return what variant C compares: whether the wait limit holds, then progress per second."""
        tolerated = self.wait_tolerance * choice.reference_seconds if self.wait_seconds is None else self.wait_seconds
        return choice.mean_wait <= tolerated, _progress_per_second(option, choice)

    @property
    def _rule(self) -> DepthRule:
        return DepthRule(
            reference="fastest" if self.variant == "B" else "reachable",
            wait_tolerance=self.wait_tolerance,
            wait_seconds=self.wait_seconds,
            least=self.least_depth if self.fixed_depth is None else self.fixed_depth,
            min_owners=self.min_owners,
            drop_straggler=self.drop_straggler,
        )

    def _notes(self, option: _Option, choice: DepthChoice, shape: AdapterShape) -> dict[str, Any]:
        """Return what goes on record; layers counted from 0 next to the input."""
        layers = shape.layers
        return {
            "predicted_round_s": choice.round_seconds,
            "predicted_mean_wait_s": choice.mean_wait,
            "reference_s": choice.reference_seconds,
            "components_per_second": _progress_per_second(option, choice),
            "passes": choice.passes,
            "layers_with_too_few_owners": [layers[len(layers) - depth] for depth in choice.uncovered],
            "layer_ranks": [max(option.ranks[name] for name in shape.in_layer(layer)) for layer in layers],
        }


def _progress_per_second(option: _Option, choice: DepthChoice) -> float:
    return float(option.progress[choice.depth].sum()) / max(choice.round_seconds, 1e-300)


def _ranks_in_use(plan: Plan) -> dict[str, int]:
    """Return the largest number of components that any task of the plan holds of each slot."""
    ranks: dict[str, int] = {}
    for task in plan.tasks:
        for name, components in task.receive.components.items():
            ranks[name] = max(ranks.get(name, 0), len(components))
    return ranks


def _without_uploads(state: Capacity) -> Capacity:
    unknown = Capacity.unknown(len(state.forward.value))
    return Capacity(state.forward, state.backward_layer, unknown.upload_bit)


def _one_of(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise unknown_name(f"method.{name}", value, valid)
