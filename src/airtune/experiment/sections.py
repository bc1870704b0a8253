"""The sections of an experiment file that no other part of airtune defines: fleet, radio options, engine, stop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from airtune.devices.availability import Always, Availability
from airtune.devices.battery import Battery
from airtune.devices.profiles import DeviceProfile, load_profile
from airtune.errors import InputError, unknown_name
from airtune.experiment import kinds
from airtune.experiment.hints import EMPTY, Context, Plain, field_names, name_of
from airtune.experiment.schema import check_keys, read_dataclass, write_dataclass
from airtune.types import LocalTraining
from airtune.wireless.channel import Channel, RadioChannel
from airtune.wireless.knowledge import ChannelKnowledge
from airtune.wireless.trace import TraceChannel
from airtune.wireless.units import quantity


@dataclass(frozen=True)
class FleetConfig:
    """Who takes part.

    Attributes
    ----------
    devices : profile -> number of clients, in this order; or a list with one profile per client. A profile is a name
        (see docs/experiment-file.md) or the path of a TOML file.
    memory_share : part of a device's memory that training may use, in (0, 1] [our choice: half].
    mode_period : s, how often a device changes its power mode; "inf": it stays in its first one.
    idle_seconds : fleet seconds of a round in which nobody can take part.
    availability : when clients are there.
    battery : of every device; a device below its reserve takes no task; "none": all on mains.
    charging : when devices are plugged in (asked at the start of a round).
    """

    devices: Mapping[str, int] | tuple[str, ...]
    memory_share: float = 0.5
    mode_period: float = quantity("inf", "s")
    idle_seconds: float = quantity("1 s", "s")
    availability: Availability = field(default_factory=Always)
    battery: Battery | None = None
    charging: Availability = field(default_factory=Always)

    def __post_init__(self) -> None:
        """Check counts, names and ranges."""
        counts = self.devices.values() if isinstance(self.devices, Mapping) else [1] * len(self.devices)
        if any(count < 0 for count in counts) or sum(counts) < 1:
            raise InputError(f"devices: {self.devices!r} makes no fleet; valid: at least one client, no negative count")
        if not 0.0 < self.memory_share <= 1.0:
            raise InputError(f"memory_share: {self.memory_share} is not in (0, 1]")
        for name in ("mode_period", "idle_seconds"):
            if not getattr(self, name) > 0.0:
                raise InputError(f"{name}: {getattr(self, name)} is not positive, in s")
        self.profiles()

    @property
    def clients(self) -> int:
        """Return the number of clients."""
        return sum(self.devices.values()) if isinstance(self.devices, Mapping) else len(self.devices)

    def profiles(self) -> list[DeviceProfile]:
        """Return one profile per client; an unknown name raises InputError."""
        names = dict.fromkeys(self.devices)
        try:
            known = {name: load_profile(name) for name in names}
        except InputError as error:
            raise InputError(f"devices: {str(error).removeprefix('device: ')}") from error
        if isinstance(self.devices, Mapping):
            return [known[name] for name, count in self.devices.items() for _ in range(count)]
        return [known[name] for name in self.devices]


@dataclass(frozen=True)
class RadioOptions:
    """What [wireless] says besides the channel's own fields.

    knowledge : how well planners know the channel.
    downlink : "broadcast": sent once at the worst member's rate; "unicast": each client gets its own copy.
    """

    knowledge: ChannelKnowledge = field(default_factory=ChannelKnowledge)
    downlink: Literal["broadcast", "unicast"] = "broadcast"


@dataclass(frozen=True)
class Wireless:
    """The radio: the true channel, what planners know of it, and how the downlink is used."""

    channel: RadioChannel
    options: RadioOptions


@dataclass(frozen=True)
class Engine:
    """How this machine computes the training. Automatic choices are made once and written to run.json.

    Attributes
    ----------
    precision : "fp32" (reproducible), "bf16" (where the hardware has it) or "fp64" (checks).
    device : "cpu", "cuda" or "cuda:N".
    engine : "twin": one client after the other, the readable way. "cohort": all clients of a round together, the same
        numbers up to rounding (`airtune.training.cohort`); what it cannot serve it refuses.
    memory_budget : bytes for activations and adapters of the cohort engine; None: half of what is free at the start.
    micro_batch_tokens : most token places, padding included, that the cohort engine sends through the network at once;
        None: what the budget allows, on a CPU at most 2048 [our choice].
    checkpointing : whether the cohort engine's layers keep their input alone for the backward pass and run a second
        time: a third more arithmetic for a part of the memory.
    threads : of torch; None: as many as this process may use, with `workers` one each.
    workers : Ray workers that train the clients, one CPU and one base model each; None: this process trains them.
    group_size : most clients that are trained together; None: the whole cohort, with `workers` 8 [our choice].
    prefix_cache : bytes for activations of the lowest layers, kept from round to round where only the frozen base acts
        in them; None: none are kept. See `airtune.training.prefix`.
    """

    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    device: str = "cpu"
    engine: Literal["twin", "cohort"] = "twin"
    threads: int | None = None
    workers: int | None = None
    group_size: int | None = None
    prefix_cache: float | None = field(default=None, metadata={"unit": "B"})
    memory_budget: float | None = field(default=None, metadata={"unit": "B"})
    micro_batch_tokens: int | None = None
    checkpointing: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("threads", "workers", "group_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} is below 1")
        if self.prefix_cache is not None and not 0.0 < self.prefix_cache < math.inf:
            raise InputError(f"prefix_cache: {self.prefix_cache:g} B is not possible; valid: a positive size, or none")
        if self.memory_budget is not None and not 1.0 <= self.memory_budget < math.inf:
            raise InputError(f"memory_budget: {self.memory_budget:g} B is no size; valid: a positive one, or none")
        for name in ("memory_budget", "micro_batch_tokens", "checkpointing"):
            if getattr(self, name) and self.engine == "twin":
                raise InputError(f'{name}: the twin has none; valid: leave it out, or engine = "cohort"')
        if self.micro_batch_tokens is not None and self.micro_batch_tokens < 1:
            raise InputError(f"micro_batch_tokens: {self.micro_batch_tokens} is below 1")


@dataclass(frozen=True)
class StopLimits:
    """When a run ends: whichever of the given limits comes first.

    rounds : number of rounds, None for no limit. fleet_seconds : virtual time, s. target : of the metric.
    """

    rounds: int | None = 10
    fleet_seconds: float | None = field(default=None, metadata={"unit": "s"})
    target: float | None = None

    def __post_init__(self) -> None:
        """Refuse runs that cannot end, or that cannot begin."""
        if self.rounds is None and self.fleet_seconds is None:
            raise InputError("rounds: none, and fleet_seconds none: the run might never end; valid: give one of them")
        if self.rounds is not None and self.rounds < 0:
            raise InputError(f"rounds: {self.rounds} is negative")
        if self.fleet_seconds is not None and not (math.isfinite(self.fleet_seconds) and self.fleet_seconds > 0.0):
            raise InputError(f"fleet_seconds: {self.fleet_seconds:g} is not positive and finite, in s")


@dataclass(frozen=True)
class Evaluation:
    """How the model is measured.

    every : rounds between evaluations; the last round is always evaluated.
    batch_size : rows at a time. split : "test", or "validation" for the choice of settings.
    aggregation_error : whether rounds record how far the server's model is from the mean of the clients' models
        (`airtune.aggregation.error`); costs a dense product per client and module.
    """

    every: int = 1
    batch_size: int = 64
    split: Literal["test", "validation"] = "test"
    aggregation_error: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("every", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} is below 1")


def check_training(training: LocalTraining, where: str = "training") -> None:
    """Raise InputError for numbers with which no training is possible."""
    rules: tuple[tuple[str, bool, str], ...] = (
        ("local_steps", training.local_steps is None or training.local_steps >= 1, "1 or more, or none"),
        ("epochs", 0.0 < training.epochs < math.inf, "a positive number"),
        ("batch_size", training.batch_size >= 1, "1 or more"),
        ("learning_rate", 0.0 < training.learning_rate < math.inf, "a positive number"),
        (
            "head_learning_rate",
            training.head_learning_rate is None or 0.0 <= training.head_learning_rate < math.inf,
            "0 or more, or none",
        ),
        ("weight_decay", 0.0 <= training.weight_decay < math.inf, "0 or more"),
        ("momentum", 0.0 <= training.momentum < 1.0, "from 0 to below 1"),
        ("max_grad_norm", training.max_grad_norm is None or training.max_grad_norm > 0.0, "a positive number, or none"),
        ("lora_dropout", 0.0 <= training.lora_dropout < 1.0, "from 0 to below 1"),
    )
    for name, good, valid in rules:
        if not good:
            raise InputError(f"{where}.{name}: {getattr(training, name)} is not possible; valid: {valid}")


# --------------------------------------------------------------------------------------- one table, several dataclasses


def read_merged(parts: tuple[type, ...], value: Any, where: str, context: Context = EMPTY) -> tuple[Any, ...]:
    """Return several dataclasses from one table: each takes the keys that are its fields."""
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: must be a table, not {value!r}")
    table = cast("Plain", value)
    names = [field_names(part) for part in parts]
    check_keys(table, [name for each in names for name in each], where)
    return tuple(
        read_dataclass(part, {key: table[key] for key in table if key in own}, where, context)
        for part, own in zip(parts, names, strict=True)
    )


CHANNELS: Mapping[str, type] = {"cell": Channel, "trace": TraceChannel}


def read_wireless(value: Any) -> Wireless:
    """Return the radio of [wireless]: the fields of the channel (``type``, default "cell") and the options."""
    if not isinstance(value, Mapping):
        raise InputError(f"wireless: must be a table, not {value!r}")
    table = dict(cast("Plain", value))
    kind = str(table.pop("type", "cell"))
    if kind not in CHANNELS:
        raise unknown_name("wireless.type", kind, CHANNELS)
    channel, options = read_merged((CHANNELS[kind], RadioOptions), table, "wireless", Context(kinds.choices()))
    return Wireless(channel, options)


def write_wireless(wireless: Wireless) -> Plain:
    """Return the table from which `read_wireless` makes an equal radio."""
    kind = next((name for name, kind in CHANNELS.items() if kind is type(wireless.channel)), None)
    return {
        "type": kind or name_of(type(wireless.channel)),
        **write_dataclass(wireless.channel, Context(kinds.choices())),
        **write_dataclass(wireless.options),
    }
