"""The base model, loaded once, and the adapters of one client at a time on top of it, through PEFT's layers.

`FederatedModel` holds one frozen base for the whole federation. `activate` puts the adapter of one client onto it:
everything that can be trained is a fresh tensor each time, so nothing can leak from one client to the next. A module
may carry several parts, whose outputs add up: what the client trains, what it holds but does not train, and what the
server has merged into the base so far. Each part is one PEFT adapter with its own rank and scaling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from airtune.errors import InputError
from airtune.lora import Adapter, AdapterShape, AdapterSlice, DenseUpdate, Indices, LoraFactors, MergedUpdate
from airtune.streams import torch_seed
from airtune.training.beam import ONE_FACTOR, Gate
from airtune.training.bottleneck import put_behind
from airtune.training.dora import RowGain, decomposed
from airtune.training.gates import is_gate
from airtune.training.hardware import BASE_TYPE, Precision, checked_device, checked_precision
from airtune.training.inputs import Arguments, TokenInputs, inputs_of
from airtune.training.layers import head_parameters, hook_gain, inject_layers, install_parts, set_parameter
from airtune.training.mole import Router, gating_of
from airtune.training.prefix import FrozenPrefix
from airtune.training.quantized import quantize_layers
from airtune.training.shapes import ModelConfig, adapter_shape, gain_name, in_head, is_gain, placement_of
from airtune.types import Beam, ServerModel

NOTHING = AdapterSlice({}, outside="frozen", extras=False)


@dataclass(frozen=True)
class ActiveAdapter:
    """What one client trains: fresh tensors inside the network, in the coordinates of its `train` slice.

    Attributes
    ----------
    slice : the `train` slice.
    adapter : the trained sub-adapter; its tensors are leaves of the network, those that are trained require gradients.
        With DoRA its B are those of the decomposed weight, and its extras hold magnitudes in place of gains.
    start : the same values before training, apart from the network.
    gains : name of the extra tensor -> the gains of one layer's rows (DoRA).
    gates : slot -> the gate of its components (BeamLoRA).
    routers : the gates of the experts, one for each layer in which any acts (MoLE).
    """

    slice: AdapterSlice
    adapter: Adapter
    start: Adapter
    gains: Mapping[str, RowGain] = field(default_factory=dict[str, RowGain])
    gates: Mapping[str, Gate] = field(default_factory=dict[str, Gate])
    routers: tuple[Router, ...] = ()

    def trained(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield (owner, kind, tensor) of everything that requires gradients, in a fixed order."""
        for owner, kind, tensor in self.slice.payload(self.adapter):
            if owner not in self.gains:
                yield owner, kind, tensor
            elif self.gains[owner].factors is not None:
                yield owner, "magnitude", tensor
        yield from ((slot, "gate", gate.logits) for slot, gate in self.gates.items())

    def values(self) -> Adapter:
        """Return the present values as the federation knows them, detached and on the CPU."""
        factors, extras = dict(self.adapter.factors), dict(self.adapter.extras)
        with torch.no_grad():
            for name, gain in self.gains.items():
                if name in extras and gain.factors is not None:
                    extras[name] = gain.compute()
                    factors[gain.slot] = replace(gain.factors, B=gain.factors.B * extras[name][:, None])
            for slot, gate in self.gates.items():
                factors[slot] = replace(factors[slot], B=factors[slot].B * gate.importance())
        values = replace(self.adapter, factors=factors, extras=extras)
        return _map_tensors(values, lambda tensor: tensor.detach().cpu().clone())


class FederatedModel:
    """One frozen base with PEFT layers at the target modules.

    Attributes
    ----------
    network : the transformers model; only its LoRA parts and its head ever change.
    config : what is adapted. num_labels : classes, or None (causal language modelling).
    precision : "fp32"; "bf16": the base in bf16 and autocast, adapters in fp32; "fp64": all double, for checks.
    device : where the network is; the server's adapters stay on the CPU.
    shape : sizes of the adapter at the configured rank.
    transposed : whether the adapted weights are stored as [in, out] (GPT-2). inputs : how a batch enters the network.
    pad_token_id : of padding, None where rows are images.
    prefix : stored activations of the layers in which only the frozen base acts; None: all layers are always run.
    """

    def __init__(
        self,
        network: nn.Module,
        config: ModelConfig,
        *,
        num_labels: int | None = None,
        precision: Precision = "fp32",
        device: str = "cpu",
        fresh: frozenset[str] | None = None,
    ) -> None:
        """Freeze the network and put PEFT layers at its target modules.

        Parameters
        ----------
        network : a transformers model with the head of the task, for example with random weights.
        fresh : names of the head's tensors that the weights file did not have: `initial_adapter` draws them. None: all.

        Raises
        ------
        InputError : precision or device are not available, or `adapter_shape` refuses the model.
        """
        self.device = checked_device(device)
        self.precision: Precision = checked_precision(precision, self.device)
        self.dtype = torch.float64 if precision == "fp64" else torch.float32
        self.network: Any = network
        self.config, self.num_labels = config, num_labels
        self.config_json: dict[str, Any] = self.network.config.to_dict()
        self.shape = self.shape_with(None)
        fresh = frozenset(self.shape.extras) if fresh is None else fresh
        self._pretrained_extras = {
            name: network.get_parameter(name).detach().to("cpu", self.dtype, copy=True)
            for name in self.shape.extras
            if name not in fresh and in_head(name)
        }
        self._hooks: list[RemovableHandle] = []
        self._gating = gating_of(self.shape) if config.adapter == "mole" else None
        self.network.requires_grad_(False).eval().to(device=self.device, dtype=BASE_TYPE[precision])
        if precision == "bf16" and self.device.type == "cpu":
            self.network.set_attn_implementation("eager")  # torch's fused attention is slow backwards in bf16 on a CPU
        self.network.config.use_cache = False
        self.inputs = inputs_of(config.task, self.network.config, self.device, BASE_TYPE[precision])
        self.pad_token_id = self.inputs.pad_token_id if isinstance(self.inputs, TokenInputs) else None
        self._layers = inject_layers(self.network, tuple(placement_of(self.shape)))
        quantize_layers(self.network, self.config_json, config.base_weights)
        self.transposed = next(iter(self._layers.values())).fan_in_fan_out
        self._check_sizes()
        self.prefix: FrozenPrefix | None = None
        self.show(ServerModel(self.initial_adapter(0)))

    def cache_prefix(self, limit: float | None) -> None:
        """Keep activations of untouched lowest layers in at most `limit` bytes, or none at all; what was kept is lost.

        Raises InputError if the network has no plain list of layers.
        """
        self.prefix = None if limit is None else FrozenPrefix(self.network, self.config_json, limit)

    def shape_with(self, ranks: Mapping[str, int] | None) -> AdapterShape:
        """Return the sizes of the adapter if some slots have another rank."""
        return adapter_shape(self.config_json, self.config, self.num_labels, ranks)

    def initial_adapter(self, seed: int, ranks: Mapping[str, int] | None = None) -> Adapter:
        """Return the adapter before round 1: A random, B zero, the head from its file or, if it has none, random.

        A is Kaiming-uniform with a = sqrt 5, that is U(-1/sqrt(in), 1/sqrt(in)), as PEFT draws it; a slot of a higher
        rank begins with the same rows. The head is normal with the model's initializer_range, its biases zero.
        """
        shape = self.shape_with(ranks)
        factors: dict[str, LoraFactors] = {}
        for place, (name, slot) in enumerate(shape.slots.items()):
            rows = torch.empty((slot.rank, slot.in_features), dtype=self.dtype)
            bound, columns = slot.in_features**-0.5, torch.zeros((slot.out_features, slot.rank), dtype=self.dtype)
            rows.uniform_(-bound, bound, generator=_generator(seed, "adapter", place))
            factors[name] = LoraFactors(A=rows, B=columns, scaling=slot.scaling)
        return Adapter(
            factors=factors,
            placement=placement_of(shape),
            layer={name: slot.layer for name, slot in shape.slots.items()},
            num_layers=shape.num_layers,
            extras={name: self._initial_extra(seed, place, name) for place, name in enumerate(shape.extras)},
        )

    def _initial_extra(self, seed: int, place: int, name: str) -> Tensor:
        if name in self._pretrained_extras:
            return self._pretrained_extras[name].clone()
        values = torch.zeros(self.shape.extras[name], dtype=self.dtype)
        if is_gain(name):
            return values + 1.0
        if name.endswith(".bias") or is_gate(name):
            return values
        spread = float(self.config_json.get("initializer_range") or 0.02)
        return values.normal_(0.0, spread, generator=_generator(seed, "head", place))

    # -- one client at a time -----------------------------------------------------------------------------------------

    def activate(
        self,
        model: ServerModel,
        train: AdapterSlice,
        receive: AdapterSlice | None = None,
        *,
        dropout: nn.Module | None = None,
        beam: Beam | None = None,
    ) -> ActiveAdapter:
        """Put one client's adapter onto the base, every tensor of it fresh, and return what the client trains.

        Parameters
        ----------
        model : the server's model that the client starts from.
        train : what gets gradients. If ``train.outside`` is "frozen", what is received but not trained is present and
            frozen; if it is "absent", the client computes with the trained components alone.
        receive : what the client holds; None: everything.
        dropout : in front of A of what is trained (not of what is frozen, whose output stays a constant).
        beam : of the gates, for a client that trains; None: no gates.

        Raises
        ------
        ValueError : the adapter does not fit the network, or has tensors that plain LoRA layers cannot carry.
        """
        self._check_adapter(model)
        trained, gains = self._decomposed(_map_tensors(train.take(model.adapter), self._leaf), model.adapter, train)
        start = _map_tensors(trained, lambda tensor: tensor.detach().cpu().clone())
        for owner, kind, tensor in trained.tensors():
            wanted = train.extras if kind == "extra" else kind == "core" or kind in train.tensors
            fixed = owner in gains and gains[owner].factors is None
            tensor.requires_grad_(wanted and not fixed and (kind == "extra" or train.kept(owner) > 0))
        gates = self._gates(trained, beam)
        frozen = _map_tensors(held_only(model.adapter, train, receive), self._leaf)
        merged = {module: _map_factors(as_factors(update), self._leaf) for module, update in model.base_update.items()}
        if self.prefix is not None:
            self.prefix.look(set(trained.placement) | {gain.slot for gain in gains.values()}, frozen, merged)
        for module, layer in self._layers.items():
            parts = [(trained.factors[slot], dropout) for slot in trained.placement.get(module, ())]
            parts += [(frozen.factors[slot], None) for slot in frozen.placement.get(module, ())]
            parts += [(merged[module], None)] if module in merged else []
            if self.config.adapter == "bottleneck":
                put_behind(layer, parts, merged.get(module))
                parts = []
            install_parts(layer, parts, gains.get(gain_name(module)), gates.get(module))
        extras = trained.extras if train.extras else {n: self._leaf(v) for n, v in model.adapter.extras.items()}
        routers = self._hook(gains, (trained, frozen), extras)
        for name in filter(in_head, extras):
            set_parameter(self.network, name, extras[name])
        return ActiveAdapter(train, trained, start, gains, gates, routers)

    def _gates(self, trained: Adapter, beam: Beam | None) -> dict[str, Gate]:
        """Return equal gates for the slots that are trained, if components compete."""
        if beam is None or self.config.adapter != "beam-lora":
            return {}
        found: dict[str, Gate] = {}
        for slot, f in trained.factors.items():
            if not (f.A.requires_grad and f.B.requires_grad):
                raise InputError(ONE_FACTOR)
            found[slot] = Gate(nn.Parameter(f.A.new_zeros(f.rank)), beam.temperature)
        return found

    def _decomposed(self, trained: Adapter, whole: Adapter, train: AdapterSlice) -> tuple[Adapter, dict[str, RowGain]]:
        """Return the client's adapter with DoRA's decomposition where it trains B, and the gains of every layer."""
        if self.config.adapter != "dora":
            return trained, {}
        factors, extras, gains = dict(trained.factors), dict(trained.extras), dict[str, RowGain]()
        for module, layer in self._layers.items():
            name = gain_name(module)
            weight, received = _weight(layer), self._leaf(whole.extras[name])
            inner, magnitude = None, received
            if name in extras and module in factors and "B" in train.tensors:
                found, magnitude = decomposed(weight, factors[module], received)
                inner, magnitude = _map_factors(found, self._leaf), self._leaf(magnitude)
                factors[module] = inner
            if name in extras:
                extras[name] = magnitude
            gains[name] = RowGain(module, weight, inner, magnitude, received)
        return replace(trained, factors=factors, extras=extras), gains

    def _hook(
        self, gains: Mapping[str, RowGain], adapters: Sequence[Adapter], extras: Mapping[str, Tensor]
    ) -> tuple[Router, ...]:
        """Replace the last client's hooks by those of this one; return the gates of its experts."""
        while self._hooks:
            self._hooks.pop().remove()
        self._hooks += [hook_gain(self._layers[gain.slot], gain) for gain in gains.values()]
        if self._gating is None:
            return ()
        routers, handles = self._gating.install(self.network, self._layers, adapters, extras)
        self._hooks += handles
        return routers

    def show(self, model: ServerModel) -> None:
        """Put the server's whole model onto the base, frozen, for evaluation."""
        self.activate(model, NOTHING)
        self.network.eval()

    def logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the network's output for texts: [batch, classes], or [batch, tokens, vocabulary].

        Parameters
        ----------
        input_ids, attention_mask : [batch, tokens], integers; padding has mask 0, whatever its token.
        """
        return self.output({"input_ids": input_ids, "attention_mask": attention_mask})

    def output(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the network's output for a batch of rows, as `Examples.batch` gives it: [batch, classes] or `logits`'.

        batch : token numbers and mask, or ``pixel_values`` [batch, channels, height, width]; labels are not looked at.
        """
        arguments = self.inputs.arguments(batch)
        skipping: AbstractContextManager[Any] = nullcontext()
        if self.prefix is not None:
            skipping = self.prefix.skipping(self._forward, self.inputs, arguments)
        with skipping:
            output = self._forward(arguments)
        return cast(Tensor, output.logits).to(self.dtype)

    def _forward(self, arguments: Arguments) -> Any:
        with self._autocast():
            return self.network(**arguments)

    def base_weight(self, module: str) -> Tensor:
        """Return the frozen weight of an adapted module as [out, in], on the CPU, in the adapter's precision."""
        return _weight(self._layers[module]).detach().to("cpu", self.dtype)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def _leaf(self, tensor: Tensor) -> Tensor:
        return nn.Parameter(tensor.detach().to(self.device, self.dtype, copy=True), requires_grad=False)

    # -- checks -------------------------------------------------------------------------------------------------------

    def _check_sizes(self) -> None:
        """Compare what config.json promised with the layers that are there."""
        for slot in self.shape.slots.values():
            for module in slot.modules:
                found = (self._layers[module].in_features, self._layers[module].out_features)
                if found != (slot.in_features, slot.out_features):
                    raise ValueError(f"{module} has sizes {found}, config.json promised {slot}")
        head = {name for name, _ in head_parameters(self.network)} if self.config.task != "causal-lm" else set()
        if missing := head - set(self.shape.extras):
            raise ValueError(f"the head has tensors that the adapter does not carry: {sorted(missing)}")
        for name, size in self.shape.extras.items():
            if in_head(name) and tuple(self.network.get_parameter(name).shape) != size:
                raise ValueError(f"{name} has not the size {size} that config.json promised")

    def _check_adapter(self, model: ServerModel) -> None:
        adapter = model.adapter
        if set(adapter.extras) != set(self.shape.extras):
            raise ValueError(
                f"the adapter's extras {sorted(adapter.extras)} are not the head {sorted(self.shape.extras)}"
            )
        if strangers := (set(adapter.placement) | set(model.base_update)) - set(self._layers):
            raise ValueError(f"no LoRA layer for the modules {sorted(strangers)}")
        if unplaced := set(adapter.factors) - {slot for slots in adapter.placement.values() for slot in slots}:
            raise ValueError(f"the slots {sorted(unplaced)} act in no module")


# ------------------------------------------------------------------------------------------------------------- adapters


def _weight(layer: LoraLinear) -> Tensor:
    """Return the base weight of a layer as [out, in]."""
    weight = cast(Tensor, layer.base_layer.weight)
    return weight.T if layer.fan_in_fan_out else weight


def held_only(adapter: Adapter, train: AdapterSlice, receive: AdapterSlice | None) -> Adapter:
    """Return what is present but frozen: received and not trained; nothing if the rest is absent."""
    held = AdapterSlice.everything(adapter.shape) if receive is None else receive
    kept: dict[str, Indices] = {}
    if train.outside == "frozen":
        rest = train.complement(adapter.shape)
        for slot, indices in rest.components.items():
            kept[slot] = indices[np.isin(indices, held.components.get(slot, np.empty(0, np.int64)))]
    return AdapterSlice(kept, extras=False).take(adapter)


def as_factors(update: MergedUpdate) -> LoraFactors:
    """Return a merged update as factors."""
    return update.factors() if isinstance(update, DenseUpdate) else update


def _map_factors(factors: LoraFactors, change: Callable[[Tensor], Tensor]) -> LoraFactors:
    core = None if factors.core is None else change(factors.core)
    return replace(factors, A=change(factors.A), B=change(factors.B), core=core)


def _map_tensors(adapter: Adapter, change: Callable[[Tensor], Tensor]) -> Adapter:
    """Apply a function to each tensor once: a shared slot stays shared."""
    return replace(
        adapter,
        factors={name: _map_factors(factors, change) for name, factors in adapter.factors.items()},
        extras={name: change(tensor) for name, tensor in adapter.extras.items()},
    )


def _generator(seed: int, purpose: str, *where: int) -> torch.Generator:
    return torch.Generator().manual_seed(torch_seed(seed, purpose, *where))
