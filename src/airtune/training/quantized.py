"""A base whose linear layers are stored in 8 or 4 bits and multiplied in the network's own precision.

``W x + b`` with a frozen W of which only codes and scales are kept: "int8" has one scale for each output row, the
largest absolute value over 127 (LLM.int8()'s row-wise absmax, arXiv 2208.07339, without its outlier columns); "nf4" has
a 4-bit code for each weight, one of the 16 quantiles of a normal distribution, times the largest absolute value of its
block of 64 (QLoRA, arXiv 2305.14314, table in appendix E; scales in 32 bits, not quantised again).

Each product restores the weight for a moment, in the forward pass and once more in the backward pass, so that no
restored weight is kept for gradients: memory falls, time does not. No weight can be merged into such a base: what a
federation merges stays beside it, in single precision, as for every base here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from airtune.training.families import ConfigJson
from airtune.training.shapes import BaseWeights, linear_layers

BLOCK = 64
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class CodedLinear(nn.Module, ABC):
    """A frozen linear layer without a stored weight; `weight` restores it.

    Attributes
    ----------
    in_features, out_features : its sizes. transposed : whether `weight` is [in, out], as the layer's was (GPT-2).
    bias : [out] or None.
    """

    def __init__(self, matrix: Tensor, bias: Tensor | None, *, transposed: bool) -> None:
        """Take the sizes of a weight [out, in]."""
        super().__init__()
        self.out_features, self.in_features = (int(size) for size in matrix.shape)
        self.transposed = transposed
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @abstractmethod
    def matrix(self) -> Tensor:
        """Return the restored weight, [out, in]."""

    @property
    def weight(self) -> Tensor:
        """Return the restored weight in the layout of the layer that was there before."""
        return self.matrix().T if self.transposed else self.matrix()

    def forward(self, x: Tensor) -> Tensor:
        """Return ``W x + b`` for x of shape [..., in]."""
        return _Product.apply(x, self)  # type: ignore[no-any-return]


class Int8Linear(CodedLinear):
    """Integers of 8 bits, with one scale for each row."""

    codes: Tensor
    scales: Tensor

    def __init__(self, matrix: Tensor, bias: Tensor | None, *, transposed: bool) -> None:
        """Round a weight [out, in]; a row of zeros stays one."""
        super().__init__(matrix, bias, transposed=transposed)
        scales = matrix.abs().amax(dim=1, keepdim=True) / 127
        steps = matrix / scales.where(scales > 0, torch.ones_like(scales))
        self.register_buffer("codes", steps.round().to(torch.int8))
        self.register_buffer("scales", scales)

    def matrix(self) -> Tensor:
        """Return the restored weight, [out, in]."""
        return self.codes.to(self.scales.dtype) * self.scales


class NF4Linear(CodedLinear):
    """Codes of 4 bits, two in a byte, with one scale for each block of 64 weights along the rows."""

    codes: Tensor
    scales: Tensor
    levels: Tensor

    def __init__(self, matrix: Tensor, bias: Tensor | None, *, transposed: bool) -> None:
        """Take the nearest level for each weight of [out, in]; the last block is filled up with zeros."""
        super().__init__(matrix, bias, transposed=transposed)
        levels = torch.tensor(NF4, dtype=matrix.dtype, device=matrix.device)
        flat = functional.pad(matrix.reshape(-1), (0, -matrix.numel() % BLOCK)).reshape(-1, BLOCK)
        scales = flat.abs().amax(dim=1, keepdim=True)
        shares = flat / scales.where(scales > 0, torch.ones_like(scales))
        middles = (levels[1:] + levels[:-1]) / 2
        nearest = torch.bucketize(shares, middles).to(torch.uint8)
        self.register_buffer("codes", nearest[:, ::2] * 16 + nearest[:, 1::2])
        self.register_buffer("scales", scales)
        self.register_buffer("levels", levels)

    def matrix(self) -> Tensor:
        """Return the restored weight, [out, in]."""
        pairs = torch.stack([self.codes >> 4, self.codes & 15], dim=-1).reshape(len(self.codes), BLOCK)
        values = self.levels[pairs.to(torch.int64)] * self.scales
        return values.reshape(-1)[: self.out_features * self.in_features].reshape(self.out_features, self.in_features)


class _Product(torch.autograd.Function):
    """``W x + b`` of a frozen layer: keeps the layer for the backward pass, not the restored weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: CodedLinear) -> Tensor:  # type: ignore[override]
        """Return the product."""
        ctx.layer = layer
        return functional.linear(x, layer.matrix().to(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Return the gradient of x."""
        return gradient @ ctx.layer.matrix().to(gradient.dtype), None


_KINDS: dict[str, type[CodedLinear]] = {"int8": Int8Linear, "nf4": NF4Linear}


def quantize_layers(network: nn.Module, config_json: ConfigJson, base_weights: BaseWeights) -> None:
    """Replace every linear layer inside the transformer's layers; embeddings, norms and head stay as they are."""
    quantize(network, (layer.name for layer in linear_layers(config_json)), base_weights)


def quantize(network: nn.Module, modules: Iterable[str], base_weights: BaseWeights) -> None:
    """Replace linear layers, those inside PEFT's layers included, by coded ones; "full" replaces none.

    modules : names of the layers in the plain network.
    """
    if base_weights == "full":
        return
    for name in modules:
        found = network.get_submodule(name)
        inner = getattr(found, "base_layer", None)
        owner, leaf = (found, "base_layer") if isinstance(inner, nn.Module) else _parent(network, name)
        plain: Any = getattr(owner, leaf)
        transposed = isinstance(plain, Conv1D)
        weight: Tensor = plain.weight.detach()
        matrix = (weight.T if transposed else weight).to(torch.promote_types(weight.dtype, torch.float32))
        setattr(owner, leaf, _KINDS[base_weights](matrix, plain.bias, transposed=transposed))


def _parent(network: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return network.get_submodule(owner), leaf


def stored_bytes(network: nn.Module) -> int:
    """Return the bytes of all parameters and buffers of a network."""
    tensors = (*network.parameters(), *network.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
