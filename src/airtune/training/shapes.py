"""Which layers of a transformer carry LoRA, and how large they are: known from config.json, without torch.

Planners and cost models need sizes only, and must not load weights. The table below covers the families that we have
checked: a test builds a random model of each and compares. A family that is not in it is refused with the list.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from airtune.devices.latency import module_position
from airtune.errors import InputError, unknown_name
from airtune.lora import AdapterShape, SlotShape, lora_scaling
from airtune.training.families import FAMILY_TABLE, ConfigJson, Family, family_of, number, width
from airtune.training.gates import check_experts, expert_name, gate_sizes, is_gate

Task = Literal["sequence-classification", "causal-lm", "image-classification"]
AdapterKind = Literal["lora", "rslora", "dora", "msp-lora", "beam-lora", "mole", "bottleneck"]
BaseWeights = Literal["full", "int8", "nf4"]
TASKS: tuple[Task, ...] = ("sequence-classification", "causal-lm", "image-classification")
ADAPTER_KINDS: tuple[AdapterKind, ...] = ("lora", "rslora", "dora", "msp-lora", "beam-lora", "mole", "bottleneck")
LINEAR_BYTES: Mapping[BaseWeights, float | None] = {"full": None, "int8": 1.0, "nf4": 0.5 + 4 / 64}  # with scales
LEVELS = 3  # of msp-lora: all layers, a group of layers, one layer


@dataclass(frozen=True)
class ModelConfig:
    """The base model and its LoRA.

    Attributes
    ----------
    name : a name of the catalogue, a local folder, or ``owner/name`` of the Hugging Face hub.
    task : "sequence-classification", "causal-lm" or, for vision transformers, "image-classification".
    target_modules : ends of the names of the linear layers that are adapted (``("query", "value")``), or
        ``("all-linear",)``. Empty: the usual choice for the family, its query and value projections.
    top_layers : only the last so many layers, next to the output, are adapted; None: all.
    adapter : "lora"; "rslora": the scaling is alpha / sqrt(rank) (arXiv 2312.03732); "dora": the norms of the weights'
        rows are trained, too (arXiv 2402.09353, `airtune.training.dora`); "msp-lora": a LoRA that all layers share, one
        for each third of the layers, and one of each layer's own (arXiv 2503.21838); "beam-lora": components compete
        during local training (arXiv 2502.13604, `airtune.training.beam`); "mole": several LoRAs in every module with
        learned gates (arXiv 2404.13628, `airtune.training.mole`); "bottleneck": ReLU units behind each layer, which
        must be square (arXiv 1902.00751, `airtune.training.bottleneck`).
    rank : number of components of each slot, unless a method wants another profile. With msp-lora that of what all
        layers share; half of it, and a quarter of it, for the other two.
    alpha : the scaling is alpha / rank.
    rank_stabilized : alpha / sqrt(rank) instead, for any kind of adapter.
    experts : number of LoRAs in every module with mole, each of rank `rank`; other kinds do not look at it.
    train_pooler : whether BERT's pooler is trained, sent and counted with the head; by default it stays frozen.
    base_weights : how the linear layers inside the transformer's layers are kept: "full", in the run's precision;
        "int8" or "nf4", in 8 or 4 bits (`airtune.training.quantized`).
    """

    name: str = "minilm"
    task: Task = "sequence-classification"
    target_modules: tuple[str, ...] = ()
    adapter: AdapterKind = "lora"
    rank: int = 8
    alpha: float = 16.0
    rank_stabilized: bool = False
    experts: int = 2
    train_pooler: bool = False
    top_layers: int | None = None
    base_weights: BaseWeights = "full"

    def __post_init__(self) -> None:
        """Check the fields.

        Raises
        ------
        InputError : a field has no valid value.
        """
        if self.task not in TASKS:
            raise unknown_name("model.task", self.task, TASKS)
        if self.adapter not in ADAPTER_KINDS:
            raise unknown_name("model.adapter", self.adapter, ADAPTER_KINDS)
        if self.base_weights not in LINEAR_BYTES:
            raise unknown_name("model.base_weights", self.base_weights, LINEAR_BYTES)
        if self.base_weights != "full" and self.adapter == "dora":
            raise InputError(
                "model.base_weights: dora needs the norms of whole weights; valid: full, or another adapter"
            )
        if self.top_layers is not None and self.top_layers < 1:
            raise InputError(f"model.top_layers: {self.top_layers} adapts nothing; valid: 1 or more, or none")
        if self.rank < 1:
            raise InputError(f"model.rank: {self.rank} is no rank; valid: 1 or more")
        if not self.alpha > 0:
            raise InputError(f"model.alpha: {self.alpha} must be positive")
        if self.adapter == "msp-lora" and self.rank < 2 ** (LEVELS - 1):
            raise InputError(f"model.rank: msp-lora divides rank {self.rank} by 2 and by 4; valid: 4 or more")
        if self.adapter == "mole":
            check_experts(self.experts, self.task)

    @property
    def scaling(self) -> float:
        """Return the one scaling of every slot, whatever the slot's own rank."""
        stabilized = self.rank_stabilized or self.adapter == "rslora"
        return lora_scaling(self.alpha, self.rank, rank_stabilized=stabilized)


@dataclass(frozen=True)
class LinearLayer:
    """One linear layer inside the transformer's layers: its full module name, its sizes and its layer's position."""

    name: str
    in_features: int
    out_features: int
    layer: int


FAMILIES: tuple[str, ...] = tuple(sorted(FAMILY_TABLE))


def linear_layers(config_json: ConfigJson) -> tuple[LinearLayer, ...]:
    """Return every linear layer inside the transformer's layers, from input to output (embeddings and head excluded).

    Parameters
    ----------
    config_json : the model's config.json.

    Raises
    ------
    InputError : the family is not known, or a size is missing.
    """
    family = family_of(config_json)
    sizes = family.sizes(config_json)
    return tuple(
        LinearLayer(f"{family.layers.format(layer)}.{name}", *size, layer=layer)
        for layer in range(number(config_json, family.depth))
        for name, size in sizes.items()
    )


def adapter_shape(
    config_json: ConfigJson, model: ModelConfig, num_labels: int | None = None, ranks: Mapping[str, int] | None = None
) -> AdapterShape:
    """Return the sizes of the adapter of a model, without torch.

    Parameters
    ----------
    config_json : the model's config.json.
    model : which layers are adapted, at which rank.
    num_labels : number of classes; causal language modelling has none.
    ranks : slot -> its own rank, 0 or more; slots that are not named have `model.rank`. The scaling is always that of
        `model`.

    Raises
    ------
    InputError : unknown family, no layer matches a target, a rank exceeds its layer, or the task does not fit.
    """
    family = family_of(config_json)
    _check_task(config_json, family, model.task)
    depth = number(config_json, family.depth)
    if model.top_layers is not None and model.top_layers > depth:
        raise InputError(f"model.top_layers: {model.top_layers} is more than the model has; valid: 1 to {depth}")
    lowest = 0 if model.top_layers is None else depth - model.top_layers
    layers = tuple(layer for layer in linear_layers(config_json) if layer.layer >= lowest)
    targets = _targets(layers, model.target_modules or _usual_targets(family, layers, model))
    slots = {layer.name: _slot((layer,), model.rank, model) for layer in targets}
    if model.adapter == "bottleneck":
        _check_square(targets)
    if model.adapter == "msp-lora":
        slots = _shared_slots(targets, family.layers, depth, model)
    if model.adapter == "mole":
        slots = {expert_name(n, e): slot for n, slot in slots.items() for e in range(model.experts)}
    if unknown := set(ranks or {}) - set(slots):
        raise unknown_name("ranks", min(unknown), slots)
    slots = {name: _with_rank(name, slot, (ranks or {}).get(name, slot.rank), model) for name, slot in slots.items()}
    extras = _head(config_json, model, num_labels)
    if model.adapter == "dora":
        extras |= {gain_name(name): (slot.out_features,) for name, slot in slots.items()}
    if model.adapter == "mole":
        extras |= gate_sizes(slots, model.experts)
    return AdapterShape(slots, extras, depth)


def stack_name(config_json: ConfigJson) -> str:
    """Return the name of the list that holds the transformer's layers, in the model with its head."""
    return family_of(config_json).layers.removesuffix(".{}")


_GAIN = ".gain"


def gain_name(module: str) -> str:
    """Return the name of the extra tensor that holds the gains of a module's rows (DoRA)."""
    return module + _GAIN


def is_gain(name: str) -> bool:
    """Return whether an extra tensor holds gains."""
    return name.endswith(_GAIN)


def in_head(name: str) -> bool:
    """Return whether an extra tensor is a parameter of the network's head."""
    return not (is_gain(name) or is_gate(name))


def saved_modules(config_json: ConfigJson, extras: Collection[str]) -> tuple[str, ...]:
    """Return the modules of the head that hold these extras, as PEFT's `modules_to_save` names them."""
    pooler = family_of(config_json).pooler
    inside = {name.rpartition(".")[0] for name in extras if in_head(name)}
    return tuple(sorted({name if name == pooler else name.partition(".")[0] for name in inside}))


def _check_task(config_json: ConfigJson, family: Family, task: Task) -> None:
    kind = repr(config_json.get("model_type"))
    if family.images != (task == "image-classification"):
        reads, valid = ("images", "image-classification") if family.images else ("text", "sequence-classification")
        raise InputError(f"model.task: {kind} reads {reads}, which {task} does not give it; valid: {valid}")
    if task == "causal-lm" and not family.causal:
        raise InputError(
            f"model.task: {kind} is an encoder and has no causal language modelling head; "
            "valid: sequence-classification"
        )


def _usual_targets(family: Family, layers: Sequence[LinearLayer], model: ModelConfig) -> tuple[str, ...]:
    """Return the family's query and value, or what a bottleneck stands behind: the attention's output projection."""
    if model.adapter != "bottleneck":
        return family.targets
    inner = family.layers.format(layers[0].layer) + "."
    return tuple(
        layer.name.removeprefix(inner)
        for layer in layers
        if layer.layer == layers[0].layer and module_position(layer.name)[1] == "output"
    )


def _check_square(layers: Sequence[LinearLayer]) -> None:
    for layer in layers:
        if layer.in_features != layer.out_features:
            raise InputError(
                f"model.target_modules: a bottleneck stands behind a square layer, and {layer.name!r} is "
                f"{layer.in_features} x {layer.out_features}; valid: layers with as many inputs as outputs"
            )


def _targets(layers: tuple[LinearLayer, ...], targets: tuple[str, ...]) -> tuple[LinearLayer, ...]:
    if targets == ("all-linear",):
        return layers
    for target in targets:
        if not any(_matches(layer.name, target) for layer in layers):
            lowest = layers[0].layer
            first = [layer.name for layer in layers if layer.layer == lowest]
            raise InputError(
                f"model.target_modules: no matching target module for {target!r}; linear layers of layer {lowest}: "
                f"{', '.join(first)}; valid: ends of such names, or all-linear"
            )
    return tuple(layer for layer in layers if any(_matches(layer.name, target) for target in targets))


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _slot(layers: Sequence[LinearLayer], rank: int, model: ModelConfig) -> SlotShape:
    """Return the slot that acts in some layers of one size."""
    first = layers[0]
    names = tuple(layer.name for layer in layers)
    return SlotShape(rank, first.in_features, first.out_features, first.layer, names, model.scaling)


def _with_rank(name: str, slot: SlotShape, rank: int, model: ModelConfig) -> SlotShape:
    if model.adapter == "msp-lora" and rank != slot.rank:
        raise InputError(
            "model.adapter: msp-lora has ranks of its own, by level; valid: a method that takes the ranks as they are"
        )
    limit = min(slot.in_features, slot.out_features)
    if not 0 <= rank <= limit:
        raise InputError(f"model.rank: rank {rank} does not fit {name!r}; valid: at most {limit}")
    return replace(slot, rank=rank)


def _shared_slots(targets: Sequence[LinearLayer], layers: str, depth: int, model: ModelConfig) -> dict[str, SlotShape]:
    """Return MSPLoRA's slots: those that all layers share, those of each third of the layers, and each layer's own.

    Only modules of the same name inside a layer and of the same size share. Layer l belongs to third floor(3 l / L).
    """
    found: tuple[dict[str, list[LinearLayer]], ...] = ({}, {}, {})
    for layer in targets:
        inner = layer.name.removeprefix(layers.format(layer.layer) + ".")
        kind = f"{inner}.{layer.in_features}x{layer.out_features}"
        third = layer.layer * LEVELS // depth
        for level, name in enumerate((f"all.{kind}", f"third{third}.{kind}", layer.name)):
            found[level].setdefault(name, []).append(layer)
    return {
        name: _slot(members, model.rank // 2**level, model)
        for level, slots in enumerate(found)
        for name, members in slots.items()
    }


def placement_of(shape: AdapterShape) -> dict[str, tuple[str, ...]]:
    """Return module -> the slots that act there, in the order of the slots."""
    found: dict[str, tuple[str, ...]] = {}
    for name, slot in shape.slots.items():
        for module in slot.modules:
            found[module] = (*found.get(module, ()), name)
    return found


def _head(config_json: ConfigJson, model: ModelConfig, num_labels: int | None) -> dict[str, tuple[int, ...]]:
    family = family_of(config_json)
    if model.train_pooler and (family.pooler is None or model.task == "causal-lm"):
        raise InputError(
            f"model.train_pooler: a {config_json.get('model_type')!r} model for {model.task} has no pooler"
        )
    if model.task == "causal-lm":
        return {}
    if num_labels is None or num_labels < 2:
        raise InputError(f"data: classification needs at least 2 classes, found {num_labels}")
    extras = family.head(config_json, num_labels)
    if model.train_pooler:
        h = width(config_json)
        extras = {f"{family.pooler}.weight": (h, h), f"{family.pooler}.bias": (h,), **extras}
    return extras
