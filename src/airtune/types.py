"""What passes between deciding, doing and learning: fleet, observation, plan, update, outcome, model, record.

A method sees an `Observation` and returns a `Plan`; a runner turns the plan into a `RoundOutcome`; the method turns
the outcome into a new `ServerModel`. Everything here is a frozen dataclass or a protocol, needs numpy only, and speaks
SI units: seconds, Hz, W, J, bits, bytes. Arrays written ``[clients]`` have one entry per client of the whole fleet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from airtune.errors import InputError
from airtune.lora import Adapter, AdapterShape, AdapterSlice, MergedUpdate
from airtune.optimizers import GaLore, LoraRite, Optimizer, as_optimizer
from airtune.wireless.rate import achievable_rate

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# ---------------------------------------------------------------------------------------------------- fleet and links


@dataclass(frozen=True)
class Fleet:
    """All clients and their hardware, one entry per client.

    Attributes
    ----------
    device : names of the device profiles.
    flops_per_second : [clients], effective training FLOP/s at the current power mode.
    memory_bytes : [clients], memory that training may use.
    transmit_power : [clients], W, the most a client may radiate.
    energy_per_flop : [clients], J per FLOP while training.
    receive_power : [clients], W, while receiving.
    num_examples : [clients], training examples; a client with none is never scheduled.
    label_counts : [clients, classes], training examples per class or topic, or None (texts without either).
    """

    device: tuple[str, ...]
    flops_per_second: Floats
    memory_bytes: Floats
    transmit_power: Floats
    energy_per_flop: Floats
    receive_power: Floats
    num_examples: Ints
    label_counts: Ints | None = None

    @property
    def size(self) -> int:
        """Return the number of clients."""
        return len(self.device)

    @property
    def data_weight(self) -> Floats:
        """Return each client's share of all examples, [clients], summing to 1."""
        return self.num_examples / max(int(self.num_examples.sum()), 1)


@dataclass(frozen=True)
class LinkState:
    """The radio at one instant as a planner sees it: estimates, [clients] unless said otherwise.

    Attributes
    ----------
    uplink_gain, downlink_gain : linear power gain of each client's channel.
    noise_density : W/Hz at the receiver, noise figure and interference margin included (one number).
    uplink_bandwidth, downlink_bandwidth : Hz, shared by all (one number each).
    downlink_power : W, of the base station (one number).
    downlink_noise_density : W/Hz at the devices; None: the same as `noise_density`.
    snr_gap : linear gap to Shannon's limit, at least 1 (one number).
    fixed_uplink_rate, fixed_downlink_rate : bit/s or None: measured networks; no bandwidth enters.
    """

    uplink_gain: Floats
    downlink_gain: Floats
    noise_density: float
    uplink_bandwidth: float
    downlink_bandwidth: float
    downlink_power: float
    snr_gap: float = 1.0
    downlink_noise_density: float | None = None
    fixed_uplink_rate: Floats | None = None
    fixed_downlink_rate: Floats | None = None

    def uplink_rate(self, clients: Ints, bandwidth: Floats, power: Floats) -> Floats:
        """Return the achievable uplink rate of some clients in bit/s, ``w log2(1 + P g / (gap w N0))``."""
        if self.fixed_uplink_rate is not None:
            return self.fixed_uplink_rate[clients]
        return np.asarray(
            achievable_rate(bandwidth, power, self.uplink_gain[clients], self.noise_density, self.snr_gap)
        )

    def downlink_rate(self, clients: Ints) -> Floats:
        """Return the downlink rate of some clients in bit/s if each had the whole downlink band."""
        if self.fixed_downlink_rate is not None:
            return self.fixed_downlink_rate[clients]
        gain = self.downlink_gain[clients]
        noise = self.noise_density if self.downlink_noise_density is None else self.downlink_noise_density
        return np.asarray(achievable_rate(self.downlink_bandwidth, self.downlink_power, gain, noise, self.snr_gap))


# ------------------------------------------------------------------------------------------------------ local training


@dataclass(frozen=True)
class TailPenalty:
    """HetLoRA's self-pruning term ``weight * ||B[:, t:]||_F ||A[t:, :]||_F`` per slot (arXiv 2401.06432).

    start : slot -> first component t of the tail; a slot without an entry has no tail.
    """

    weight: float
    start: Mapping[str, int]


@dataclass(frozen=True)
class ProximalPenalty:
    """FedProx's term ``weight / 2 * ||x - x_received||^2`` over everything trained (arXiv 1812.06127)."""

    weight: float


@dataclass(frozen=True)
class OrthogonalityPenalty:
    """SOFT's term ``weight * sum_slots Pen(B) + Pen(A')`` that keeps components orthogonal (arXiv 2505.00333).

    form : "cosine", "off-diagonal", "identity" or "mixed" (off-diagonal on B, identity on A).
    """

    weight: float
    form: Literal["cosine", "off-diagonal", "identity", "mixed"] = "cosine"


@dataclass(frozen=True)
class BalancePenalty:
    """MoLE's term ``-weight * sum_i log q_i``, q_i the mean gate of expert i (arXiv 2404.13628); 0 without gates."""

    weight: float = 0.5


Penalty = TailPenalty | ProximalPenalty | OrthogonalityPenalty | BalancePenalty


@dataclass(frozen=True)
class Beam:
    """How components compete under ``model.adapter = "beam-lora"`` (arXiv 2502.13604, `airtune.training.beam`).

    every : steps from one replacement to the next, at least 2; none in the last `every` steps of a round.
    first_share : of the importance that is kept at the beginning of a round, in (0, 1]; it rises to 1.
    temperature : of the gates, positive.
    """

    every: int = 4
    first_share: float = 0.95
    temperature: float = 0.05

    def __post_init__(self) -> None:
        """Refuse numbers with which there is no search."""
        if self.every < 2:
            raise InputError(f"every: {self.every} leaves no time for a snapshot; valid: 2 or more")
        if not 0.0 < self.first_share <= 1.0:
            raise InputError(f"first_share: {self.first_share} is not possible; valid: above 0, at most 1")
        if not 0.0 < self.temperature < float("inf"):
            raise InputError(f"temperature: {self.temperature} is not possible; valid: a positive number")


@dataclass(frozen=True)
class SamplePrivacy:
    """DP-SGD within a client (Abadi et al., arXiv 1607.00133), by opacus: `airtune.training.private_steps`.

    Each step draws its batch by independent coins, every example with probability batch_size / examples, clips each
    example's gradient to `largest_norm` and adds Gaussian noise of standard deviation noise_multiplier * largest_norm
    to their sum, which is divided by the expected batch size.

    largest_norm : C, of one example's gradient over all that is trained. noise_multiplier : z.
    """

    largest_norm: float = 1.0
    noise_multiplier: float = 1.0

    def __post_init__(self) -> None:
        """Refuse numbers with which nothing is hidden or nothing is learnt."""
        for name in ("largest_norm", "noise_multiplier"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name}: {getattr(self, name)} is not possible; valid: a positive number")


@dataclass(frozen=True)
class LocalTraining:
    """How a client trains between two exchanges.

    Attributes
    ----------
    local_steps : optimizer steps per round; None: `epochs` passes over the client's own data.
    epochs : passes over the client's data when `local_steps` is None, each of ceil(examples / batch_size) steps.
    batch_size : examples per step.
    learning_rate : of the LoRA factors; `head_learning_rate` of the extras (None: the same).
    optimizer : a name of `airtune.optimizers` ("adamw", "sgd", "lora-plus", "lora-rite", "lora-pro", "galore"), or one
        of its objects; a name becomes the object with its defaults. Its state is fresh in every round.
    weight_decay, momentum, max_grad_norm : of the optimizer; `max_grad_norm` None: no clipping.
    base_dropout : whether the base model's own dropout is active (False keeps a frozen prefix exact).
    lora_dropout : dropout in front of A.
    penalties : terms added to the loss.
    beam : of ``model.adapter = "beam-lora"``; other adapters do not look at it.
    privacy : of the client's examples: clipped and noisy gradients; None: plain ones.
    """

    local_steps: int | None = 10
    epochs: float = 1.0
    batch_size: int = 16
    learning_rate: float = 1e-3
    head_learning_rate: float | None = None
    optimizer: Optimizer | str = "adamw"
    weight_decay: float = 0.0
    momentum: float = 0.0
    max_grad_norm: float | None = None
    base_dropout: bool = False
    lora_dropout: float = 0.0
    penalties: tuple[Penalty, ...] = ()
    beam: Beam = Beam()
    privacy: SamplePrivacy | None = None

    def __post_init__(self) -> None:
        """Turn a name into its optimizer, and refuse what it cannot do.

        Raises
        ------
        InputError : the optimizer is not known, or does not go with another field.
        """
        optimizer = as_optimizer(self.optimizer)
        object.__setattr__(self, "optimizer", optimizer)
        self._check_privacy()
        if isinstance(optimizer, LoraRite) and self.max_grad_norm is not None:
            raise InputError(
                "max_grad_norm: the norm of the factors' gradients depends on how the product is factored, and "
                "lora-rite must not; valid: none, with optimizer.clip in its place"
            )
        if isinstance(optimizer, GaLore) and self.weight_decay:
            raise InputError("weight_decay: galore would decay the full weight, beyond the adapter's rank; valid: 0")

    def _check_privacy(self) -> None:
        """Refuse what would look at the examples beside the noisy gradients."""
        if self.privacy is None:
            return
        if self.penalties:
            raise InputError("privacy: penalties have no gradient of one example; valid: privacy = none, or no penalty")
        if self.max_grad_norm is not None:
            raise InputError("privacy: the norm of every example is clipped already; valid: max_grad_norm = none")

    def steps(self, num_examples: int) -> int:
        """Return the optimizer steps of a client with that many examples (at least one)."""
        if self.local_steps is not None:
            return self.local_steps
        return max(1, math.ceil(self.epochs * -(-num_examples // self.batch_size)))


@dataclass(frozen=True)
class Payload:
    """What travels: named flat arrays and the bits that they take on the link, header excluded."""

    arrays: Mapping[str, NDArray[Any]]
    bits: int


class Compressor(Protocol):
    """Turns a trained slice into bits and back. `memory` is the client's own state (error feedback), never sent."""

    def bits(self, send: AdapterSlice, shape: AdapterShape) -> int:
        """Return an upper bound of the payload, known before training: arrival times use it."""
        ...

    def encode(
        self,
        send: AdapterSlice,
        trained: Adapter,
        start: Adapter,
        memory: Mapping[str, Tensor],
        rng: np.random.Generator,
    ) -> tuple[Payload, Mapping[str, Tensor]]:
        """Return the payload and the new memory. `trained` and `start` are in the coordinates of `send`."""
        ...

    def decode(self, send: AdapterSlice, payload: Payload, start: Adapter) -> Adapter:
        """Return what the server understands, in the coordinates of `send`."""
        ...


# ---------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class ClientTask:
    """What one client does in one round.

    Attributes
    ----------
    client : index in the fleet.
    receive : what is downloaded; train : what gets gradients; send : what is uploaded.
    training : how it trains.
    compressor : how the upload is coded.
    bandwidth : Hz of the shared uplink. transmit_power : W.
    probability : with which the client was drawn (independent sampling), 1 if it was simply chosen.
    """

    client: int
    receive: AdapterSlice
    train: AdapterSlice
    send: AdapterSlice
    training: LocalTraining
    compressor: Compressor
    bandwidth: float
    transmit_power: float
    probability: float = 1.0


@dataclass(frozen=True)
class Cutoff:
    """When a round ends.

    Attributes
    ----------
    min_updates : end with this many arrivals; None: wait for all.
    deadline : end after this many seconds at the latest; None: no limit.
    late : what happens to updates that are not there: "drop" them, or "keep" them in flight for a later round.
    """

    min_updates: int | None = None
    deadline: float | None = None
    late: Literal["drop", "keep"] = "drop"


@dataclass(frozen=True)
class Group:
    """Clients that share a cut-off; an ordinary round is one group with one cycle.

    A group with several cycles is a federation of its own inside the round (HierFedLoRA): after each cycle but the
    last, `combine` turns its updates into the group's model, from which the next cycle starts. All uploads count.
    """

    tasks: tuple[ClientTask, ...]
    cutoff: Cutoff = Cutoff()
    cycles: int = 1
    combine: Aggregator | None = None


@dataclass(frozen=True)
class Plan:
    """One round, decided. `notes` holds what the planner wants on record: objective, bound, predicted seconds ..."""

    groups: tuple[Group, ...]
    notes: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def tasks(self) -> tuple[ClientTask, ...]:
        """Return the tasks of all groups."""
        return tuple(task for group in self.groups for task in group.tasks)

    def check(self, seen: Observation) -> None:
        """Raise `PlanError` with *all* violations: bandwidth, power, memory, idle clients, slices, cut-offs."""
        found = [*_check_cohort(self, seen), *_check_radio(self, seen), *_check_slices(self, seen)]
        if found:
            raise PlanError(found)


class PlanError(InputError):
    """A plan that breaks a constraint; the message lists every violation on one line."""

    def __init__(self, violations: Sequence[str]) -> None:
        """Keep the list; the message joins it."""
        super().__init__("plan: " + "; ".join(violations))
        self.violations = tuple(violations)


def _check_cohort(plan: Plan, seen: Observation) -> Iterator[str]:
    clients = [task.client for task in plan.tasks]
    if len(set(clients)) < len(clients):
        yield f"clients {sorted({c for c in clients if clients.count(c) > 1})} have more than one task"
    idle = set(seen.idle.tolist())
    if busy := [c for c in clients if c not in idle]:
        yield f"clients {busy} are not idle"
    for group in plan.groups:
        if group.cycles < 1 or (group.cycles > 1 and group.combine is None):
            yield f"a group with {group.cycles} cycles needs at least one cycle and a way to combine them"
        if group.cutoff.deadline is not None and not group.cutoff.deadline > 0:
            yield f"the deadline must be positive, not {group.cutoff.deadline} s"


def _check_radio(plan: Plan, seen: Observation) -> Iterator[str]:
    widths = np.array([task.bandwidth for task in plan.tasks])
    if not np.all(np.isfinite(widths)) or np.any(widths < 0):
        yield "bandwidths must be finite and not negative"
    elif widths.sum() > seen.free_bandwidth * (1 + 1e-9):
        yield f"bandwidths sum to {widths.sum():.6g} Hz, {seen.free_bandwidth:.6g} Hz are free"
    for task in plan.tasks:
        limit = float(seen.fleet.transmit_power[task.client])
        if not 0 <= task.transmit_power <= limit * (1 + 1e-9):
            yield f"client {task.client}: transmit power {task.transmit_power:.4g} W exceeds {limit:.4g} W"


def _check_slices(plan: Plan, seen: Observation) -> Iterator[str]:
    known: dict[int, list[str]] = {}  # clients share slices
    for task in plan.tasks:
        for name, part in (("receive", task.receive), ("train", task.train), ("send", task.send)):
            if id(part) not in known:
                known[id(part)] = part.violations(seen.shape)
            for line in known[id(part)]:
                yield f"client {task.client}: {name}: {line}"
        needed, available = seen.costs.memory_bytes(task), float(seen.fleet.memory_bytes[task.client])
        if needed > available:
            yield f"client {task.client}: training needs {needed / 1e9:.2f} GB, the device has {available / 1e9:.2f} GB"


# --------------------------------------------------------------------------------------------------------- observation


class GainStatistics(Protocol):
    """What a planner may know of the channel beyond one round: its law, not what it will be."""

    def draw(self, count: int, rng: np.random.Generator) -> Floats:
        """Return uplink gains [count, clients], drawn independently of each other and of the world's own."""
        ...


class Costs(Protocol):
    """The one physics: planner, simulator and report ask the same functions."""

    def compute_flops(self, task: ClientTask) -> tuple[float, float]:
        """Return the forward and the backward FLOPs of the task's local training."""
        ...

    def compute_seconds(self, task: ClientTask) -> float:
        """Return the seconds of local training at the client's current speed."""
        ...

    def uplink_bits(self, task: ClientTask) -> int:
        """Return the upper bound of the upload, bits."""
        ...

    def downlink_bits(self, task: ClientTask) -> int:
        """Return the bits of the `receive` slice (missed merges not included)."""
        ...

    def memory_bytes(self, task: ClientTask) -> float:
        """Return the bytes that training needs at its peak."""
        ...

    def compute_joules(self, task: ClientTask) -> float:
        """Return the energy of local training, J."""
        ...


@dataclass(frozen=True)
class Observation:
    """What a planner may know at the start of a round: estimates only, never the true channel.

    Attributes
    ----------
    round : from 1. time : fleet seconds.
    fleet, links, shape, costs : hardware, estimated radio, sizes of the adapter, cost functions.
    idle : clients that are available, have data and are not in flight, increasing.
    in_flight : clients whose update of an earlier round is still under way.
    free_bandwidth : Hz of the uplink that no update in flight occupies.
    reports : client -> its latest report (loss, measured seconds, norms ...).
    statistics : the law of the uplink gains; None: not known.
    """

    round: int
    time: float
    fleet: Fleet
    links: LinkState
    shape: AdapterShape
    costs: Costs
    idle: Ints
    in_flight: Ints
    free_bandwidth: float
    reports: Mapping[int, Mapping[str, float]] = field(default_factory=dict[int, Mapping[str, float]])
    statistics: GainStatistics | None = None


# --------------------------------------------------------------------------------------------------- model and outcome


@dataclass(frozen=True)
class ServerModel:
    """The federation's model: base + `base_update` + `adapter`.

    Attributes
    ----------
    adapter : the global adapter.
    base_update : module -> what was merged into the base so far (FLoRA, FedEx, RAC, GaLore), fp32: factors, or a dense
        matrix once their rank reaches the layer's size (`airtune.lora.merge`). Empty for most methods.
    version : number of aggregations that changed the model.
    merged_bits : version -> bits a client must download to make the merge of that version.
    """

    adapter: Adapter
    base_update: Mapping[str, MergedUpdate] = field(default_factory=dict[str, MergedUpdate])
    version: int = 0
    merged_bits: Mapping[int, int] = field(default_factory=dict[int, int])

    def catch_up_bits(self, since: int) -> int:
        """Return the bits of the merges that a client with version `since` has missed, capped at the dense size."""
        missed = sum(bits for version, bits in self.merged_bits.items() if version > since)
        dense = sum(32 * f.in_features * f.out_features for f in self.base_update.values())
        return min(missed, dense)

    def updated(self, adapter: Adapter) -> ServerModel:
        """Return the next version with another adapter."""
        return replace(self, adapter=adapter, version=self.version + 1)


@dataclass(frozen=True)
class TaskCost:
    """Seconds, bits and joules of one task as the clock charged them (for a lost task: what was spent)."""

    download_seconds: float
    compute_seconds: float
    upload_seconds: float
    uplink_bits: int
    downlink_bits: int
    joules: float


@dataclass(frozen=True)
class ClientUpdate:
    """What arrived from one client.

    Attributes
    ----------
    task : what was asked.
    values : the decoded upload in the coordinates of `task.send`.
    model_version : of the model it started from; with an older one the update is stale.
    started_at, arrival_time : fleet seconds.
    cost : seconds, bits and joules.
    reports : scalars the client measured ("loss", "forward_seconds", "backward_seconds", "upload_seconds" ...).
    """

    task: ClientTask
    values: Adapter
    model_version: int
    started_at: float
    arrival_time: float
    cost: TaskCost
    reports: Mapping[str, float]


@dataclass(frozen=True)
class LostTask:
    """A task without a usable update: late, vanished, diverged ..."""

    task: ClientTask
    reason: str
    cost: TaskCost


@dataclass(frozen=True)
class RoundOutcome:
    """What a round brought; `aggregate` sees it even if nothing arrived.

    `past_models` holds version -> model for stale updates: those that started from an earlier version.
    `stale_exponent` is set where the rule itself weakens stale changes, as products
    (`airtune.aggregation.staleness`); None: nobody asked it to.
    """

    plan: Plan
    fleet: Fleet
    updates: tuple[ClientUpdate, ...]
    lost: tuple[LostTask, ...]
    start_time: float
    end_time: float
    broadcast_bits: int = 0
    past_models: Mapping[int, ServerModel] = field(default_factory=dict[int, ServerModel])
    stale_exponent: float | None = None

    def start_of(self, update: ClientUpdate, current: ServerModel) -> Adapter:
        """Return the values an update started from, in the coordinates of its `send` slice."""
        model = current if update.model_version == current.version else self.past_models[update.model_version]
        return update.task.send.take(model.adapter)

    @property
    def uplink_bits(self) -> int:
        """Return the uplink bits of arrived and lost tasks."""
        return sum(part.cost.uplink_bits for part in (*self.updates, *self.lost))

    @property
    def downlink_bits(self) -> int:
        """Return the downlink bits: a broadcast counted once, unicast per client."""
        return self.broadcast_bits + sum(part.cost.downlink_bits for part in (*self.updates, *self.lost))

    @property
    def joules(self) -> float:
        """Return the energy of all devices, lost work included."""
        return sum(part.cost.joules for part in (*self.updates, *self.lost))


@dataclass(frozen=True)
class InFlight:
    """A task under way: when it started, when it will arrive, and from which model."""

    task: ClientTask
    model_version: int
    started_at: float
    arrival_time: float
    round: int
    cost: TaskCost


@dataclass(frozen=True)
class Pending:
    """What outlives a round besides the model: work in flight, the models it started from, the clients' own memories.

    Attributes
    ----------
    in_flight : tasks that have not arrived.
    models : version -> model, for the versions that `in_flight` still needs.
    held_version : client -> version of the merges that it holds.
    memory : client -> its private tensors (error feedback, personal factors); never sent.
    reports : client -> latest report.
    round_starts : fleet seconds at which the rounds so far began (a planner with delayed channel knowledge needs them).
    charge : [clients], J left in the devices' batteries; None on mains or before the first round.
    """

    in_flight: tuple[InFlight, ...] = ()
    models: Mapping[int, ServerModel] = field(default_factory=dict[int, ServerModel])
    held_version: Mapping[int, int] = field(default_factory=dict[int, int])
    memory: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict[int, "Mapping[str, Tensor]"])
    reports: Mapping[int, Mapping[str, float]] = field(default_factory=dict[int, Mapping[str, float]])
    round_starts: tuple[float, ...] = ()
    charge: Floats | None = None


# ----------------------------------------------------------------------------------------------------------- protocols

State = TypeVar("State")


@runtime_checkable
class Method(Protocol[State]):
    """A federated method: a frozen dataclass whose fields are its configuration."""

    def init(self, model: ServerModel, fleet: Fleet) -> State:
        """Return the state before round 1."""
        ...

    def plan(self, state: State, seen: Observation, rng: np.random.Generator) -> Plan:
        """Decide one round."""
        ...

    def aggregate(self, state: State, model: ServerModel, outcome: RoundOutcome) -> tuple[ServerModel, State]:
        """Turn what arrived into the next model and state."""
        ...


class Aggregator(Protocol):
    """Turns the updates of a round into the next model."""

    def __call__(self, model: ServerModel, outcome: RoundOutcome) -> ServerModel:
        """Return the next model; without updates, the model as it is."""
        ...


class Environment(Protocol):
    """The world as planners see it."""

    @property
    def fleet(self) -> Fleet:
        """Return the fleet at time 0."""
        ...

    def observe(self, round_index: int, time: float, pending: Pending, model: ServerModel) -> Observation:
        """Return what is known at the start of a round."""
        ...


class Runner(Protocol):
    """Does what a plan says, in simulation or on real devices."""

    def run(
        self, plan: Plan, model: ServerModel, pending: Pending, *, round_index: int, time: float
    ) -> tuple[RoundOutcome, Pending]:
        """Run one round that starts at `time` fleet seconds."""
        ...


@dataclass(frozen=True)
class Trained:
    """The result of one client's local training, in the coordinates of its `train` slice."""

    values: Adapter
    reports: Mapping[str, float]


@dataclass(frozen=True)
class TrainingJob:
    """One client's local training, addressed so that its random draws do not depend on the order of execution."""

    task: ClientTask
    model: ServerModel
    round: int
    cycle: int = 0
    memory: Mapping[str, Tensor] = field(default_factory=dict[str, "Tensor"])


class Trainer(Protocol):
    """Trains clients: the readable twin one by one, the cohort engine together."""

    def train(self, jobs: Sequence[TrainingJob]) -> Sequence[Trained]:
        """Return one result per job, in order. A diverged client reports a loss that is not finite."""
        ...


# -------------------------------------------------------------------------------------------------------------- record


@dataclass(frozen=True)
class ClientRecord:
    """One client's line in a round record."""

    client: int
    components: int
    depth: int
    bandwidth_hz: float
    bits_up: int
    bits_down: int
    download_s: float
    compute_s: float
    upload_s: float
    wait_s: float
    energy_j: float


@dataclass(frozen=True)
class RoundRecord:
    """One line of rounds.jsonl: round 0 is the evaluation before training."""

    round: int
    time_s: float
    duration_s: float
    cohort: tuple[int, ...]
    arrived: tuple[int, ...]
    dropped: tuple[tuple[int, str], ...]
    uplink_bits: int
    downlink_bits: int
    energy_j: float
    train_loss: float | None
    metrics: Mapping[str, float]
    clients: tuple[ClientRecord, ...]
    notes: Mapping[str, Any]
    diagnostics: Mapping[str, float]
