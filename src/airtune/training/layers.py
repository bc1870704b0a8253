"""PEFT's LoRA layers inside the base network: put there once, given other parts for each client."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from airtune.errors import InputError
from airtune.lora import LoraFactors
from airtune.training.beam import Gate, GatedRows
from airtune.training.dora import RowGain, ScaledRows, scale_base


class SeededDropout(nn.Module):
    """Inverted dropout that draws from its own generator; always active (it is only installed for training)."""

    def __init__(self, probability: float, generator: torch.Generator) -> None:
        """Keep each entry with probability ``1 - probability``."""
        super().__init__()
        self.keep = 1.0 - probability
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with random entries set to zero and the others divided by the probability of keeping them."""
        kept = torch.empty(x.shape, dtype=x.dtype, device=x.device).bernoulli_(self.keep, generator=self.generator)
        return x * kept / self.keep


def inject_layers(network: nn.Module, modules: Sequence[str]) -> dict[str, LoraLinear]:
    """Put an empty PEFT layer at each module and return them by name."""
    transposed = isinstance(network.get_submodule(modules[0]), Conv1D)
    config = LoraConfig(r=1, lora_alpha=1, target_modules=list(modules), fan_in_fan_out=transposed, bias="none")
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, network)
    layers = {name: network.get_submodule(name) for name in modules}
    if wrong := [name for name, layer in layers.items() if not isinstance(layer, LoraLinear)]:
        raise InputError(f"model.target_modules: PEFT has no plain LoRA layer for {', '.join(wrong)}")
    found = [name for name, layer in network.named_modules() if isinstance(layer, LoraLinear)]
    if set(found) != set(modules):
        raise ValueError(f"PEFT adapted {sorted(set(found) ^ set(modules))} against our list")
    return cast(dict[str, LoraLinear], layers)


def install_parts(
    layer: LoraLinear,
    parts: Sequence[tuple[LoraFactors, nn.Module | None]],
    gain: RowGain | None = None,
    gate: Gate | None = None,
) -> None:
    """Give a PEFT layer exactly these parts, one PEFT adapter each, replacing all that it had.

    gain : of the base weight's rows, and of the part whose factors it was made with (DoRA).
    gate : of the components of the first part (BeamLoRA).
    """
    state: Any = layer
    for kept in (state.lora_A, state.lora_B, state.lora_dropout, state.scaling, state.r, state.lora_alpha):
        kept.clear()
    for kept in (state.use_rslora, state.use_dora, state.lora_bias, state.lora_variant, state.lora_magnitude_vector):
        kept.clear()
    names = [f"part{index}" for index in range(len(parts))]
    for name, (factors, dropout) in zip(names, parts, strict=True):
        state.lora_A[name] = _linear(factors.A) if factors.core is None else _Cored(factors.A, factors.core)
        if gate is not None and name == names[0]:
            state.lora_A[name] = GatedRows(_linear(factors.A), gate)
        scaled = gain is not None and gain.factors is not None and factors.B is gain.factors.B
        state.lora_B[name] = ScaledRows(_linear(factors.B), gain) if gain and scaled else _linear(factors.B)
        state.lora_dropout[name] = nn.Identity() if dropout is None else dropout
        state.scaling[name] = factors.scaling
        state.r[name] = factors.rank
        state.lora_alpha[name] = factors.scaling * factors.rank
        state.use_rslora[name] = state.use_dora[name] = state.lora_bias[name] = False
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    layer.set_adapter(names, inference_mode=True)  # activates the parts, but also switches all gradients off
    for parameter in trained:
        parameter.requires_grad_(True)


def hook_gain(layer: LoraLinear, gain: RowGain) -> RemovableHandle:
    """Let a layer's base compute ``diag(rho) W0 x + bias`` until the handle is removed."""
    base: Any = layer.base_layer
    return base.register_forward_hook(lambda module, _, output: scale_base(gain, module, output))


class _Cored(nn.Module):
    """``core A x`` where PEFT expects A: the inner factors of Fed-SB."""

    def __init__(self, rows: Tensor, core: Tensor) -> None:
        """Put these very tensors into the module."""
        super().__init__()
        self.rows = _linear(rows)
        self.core = _linear(core)

    @property
    def weight(self) -> Tensor:
        """Return A: PEFT reads its type."""
        return self.rows.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return the core applied to A x."""
        return self.core(self.rows(x))


def _linear(weight: Tensor) -> nn.Linear:
    """Return a linear layer around this very tensor; nothing is drawn or copied."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = cast(nn.Parameter, weight)
    return layer


def set_parameter(network: nn.Module, name: str, value: Tensor) -> None:
    """Put this very tensor in the place of a parameter."""
    owner, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(owner), leaf, value)


def head_parameters(network: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of the head: all that the task's model has beside the base transformer."""
    prefix = f"{network.base_model_prefix}."
    return ((name, value) for name, value in network.named_parameters() if not name.startswith(prefix))
