"""Bottleneck adapters: ``y + s B relu(A y)`` behind a linear layer, instead of ``s B A x`` beside it.

Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019 (arXiv 1902.00751), as FedAdapter (arXiv
2205.10162) uses them. A is the projection down, [rank, width], B the one up, [width, rank]; y is the layer's output, so
the layer must be square: by default the attention's output projection, the first of the two places of the paper.

Each component is a unit of the bottleneck, ``b_i relu(a_i y)``, and units add up. So slices, bits, FLOPs and averages
are those of LoRA at that layer, and what is trained, what is held frozen and what is left out go together as with LoRA.
The product B A means nothing here: methods that multiply, merge or factorise it are refused
(`airtune.experiment.combinations`). Without biases, and B starts at zero as LoRA's does [our choice].

A run's result is a folder of our own, because PEFT knows no such adapter: `load_bottleneck` puts it behind the layers
of a transformers model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from airtune.errors import InputError
from airtune.lora import LoraFactors

CONFIG, WEIGHTS = "bottleneck.json", "bottleneck.safetensors"
FORMAT = 1

Part = tuple[LoraFactors, nn.Module | None]


def added(parts: Sequence[Part], output: Tensor) -> Tensor:
    """Return the layer's output plus what the parts make of it.

    Parameters
    ----------
    parts : factors, and the dropout in front of their A (None: none).
    output : [..., width], of the layer alone.
    """
    total = output
    for factors, dropout in parts:
        seen = output if dropout is None else dropout(output)
        units = nn.functional.relu(nn.functional.linear(seen, factors.A))
        total = total + factors.scaling * nn.functional.linear(units, factors.B)
    return total


def hook_bottleneck(layer: nn.Module, parts: Sequence[Part]) -> RemovableHandle:
    """Put the parts behind a layer until the handle is removed."""

    def behind(module: nn.Module, args: Any, output: Any) -> Tensor:
        return added(parts, output)

    return layer.register_forward_hook(behind)


def put_behind(layer: nn.Module, parts: Sequence[Part], merged: LoraFactors | None) -> None:
    """Put exactly these parts behind a layer, replacing those that an earlier call put there.

    Raises
    ------
    ValueError : something was merged into the layer, whose product means nothing here.
    """
    if merged is not None:
        raise ValueError("a bottleneck adapter cannot be merged into the base")
    earlier = layer.__dict__.pop(_HANDLE, None)
    if earlier is not None:
        earlier.remove()
    if parts:
        layer.__dict__[_HANDLE] = hook_bottleneck(layer, parts)


_HANDLE = "_airtune_bottleneck"


def save_bottleneck(
    folder: Path, modules: Mapping[str, Sequence[LoraFactors]], extras: Mapping[str, Tensor], base_model: str
) -> None:
    """Write the adapters of each module and the head into an existing folder; several parts become one."""
    tensors = {name: tensor for name, tensor in extras.items()}
    for name, parts in modules.items():
        tensors[f"{name}.A"] = torch.cat([f.A for f in parts])
        tensors[f"{name}.B"] = torch.cat([f.scaling * f.B for f in parts], dim=1)
    content = {name: tensor.detach().cpu().float().contiguous().clone() for name, tensor in tensors.items()}
    save_file(content, str(folder / WEIGHTS), metadata={"format": "pt"})
    description = {
        "format": FORMAT,
        "kind": "bottleneck",
        "computes": "y + B relu(A y), y the output of the module; no biases",
        "activation": "relu",
        "base_model": base_model,
        "modules": sorted(modules),
        "head": sorted(extras),
    }
    (folder / CONFIG).write_text(json.dumps(description, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_bottleneck(network: nn.Module, folder: Path | str) -> list[RemovableHandle]:
    """Put the adapters of a run's folder behind the layers of a transformers model, and its head into the model.

    Returns
    -------
    one handle a module; removing them takes the adapters away again.

    Raises
    ------
    InputError : the folder is not one of this format, or the model has not its modules.
    """
    description, tensors = _read(Path(folder))
    handles: list[RemovableHandle] = []
    try:
        with torch.no_grad():
            for name in description["head"]:
                network.get_parameter(name).copy_(tensors[name])
        for name in description["modules"]:
            factors = LoraFactors(A=tensors[f"{name}.A"], B=tensors[f"{name}.B"], scaling=1.0)
            handles.append(hook_bottleneck(network.get_submodule(name), [(factors, None)]))
    except (AttributeError, KeyError, RuntimeError) as error:
        for handle in handles:
            handle.remove()
        raise InputError(f"{folder}: does not fit this model: {' '.join(str(error).split())[:200]}") from error
    return handles


def _read(folder: Path) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    try:
        description = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(str(folder / WEIGHTS))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no bottleneck adapter: {error}") from error
    if description.get("format") != FORMAT:
        raise InputError(f"{folder}: format {description.get('format')!r} is not known; valid: {FORMAT}")
    return description, tensors
