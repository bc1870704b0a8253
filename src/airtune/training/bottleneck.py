"""Bottleneck adapters: ``y + s B relu(A y)`` behind a linear layer, instead of ``s B A x`` beside it.

Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019 (arXiv 1902.00751), as FedAdapter (arXiv
2205.10162) uses them. A is the projection down, [rank, width], B the one up, [width, rank]; y is the layer's output, so
the layer must be square: by default the attention's output projection, the first of the two places of the paper.

Each component is a unit of the bottleneck, ``b_i relu(a_i y)``, and units add up. So slices, bits, FLOPs and averages
are those of LoRA at that layer, and what is trained, what is held frozen and what is left out go together as with LoRA.
The product B A means nothing here: methods that multiply, merge or factorise it are refused
(`airtune.experiment.combinations`). Without biases, and B starts at zero as LoRA's does [our choice].

PEFT knows no such adapter: a run's result is a folder that `airtune.training.saved.open_adapter` opens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from airtune.lora import LoraFactors

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
