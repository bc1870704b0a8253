"""Bytes that LoRA training needs on a device."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import ArrayLike, NDArray

from airtune.devices.latency import FACTORS, KINDS, Head, TransformerShape
from airtune.errors import InputError

Array = NDArray[np.float64]


def lora_parameters(shape: TransformerShape, ranks: ArrayLike, factors: Collection[str] = FACTORS) -> Array:
    """Return the number of LoRA parameters [...] for ranks [..., layers, kinds], of the named factors.

    rank * in for "A", rank * out for "B" and rank^2 for "core" per module.
    """
    rank = np.asarray(ranks, dtype=np.float64)
    a, b, core = (float(part in factors) for part in ("A", "B", "core"))
    return (rank * (a * shape.inputs + b * shape.outputs + core * rank)).sum(axis=(-2, -1))


def activation_bytes(
    shape: TransformerShape, sequence_length: ArrayLike, sequences: ArrayLike, value_bytes: int
) -> Array:
    """Return the bytes [...] of activations that one layer keeps for its backward pass.

    Korthikanti et al., "Reducing activation recomputation in large transformer models", 2022, equation 1, for 16-bit
    values: s b (18 h + 4 f) + 5 a s^2 b, written for an intermediate size f (f = 4 h gives their 34 s b h), with 4 f
    more for a gate, and scaled by `value_bytes` / 2. LoRA keeps less, as frozen layers need not keep their inputs, so
    this is an upper estimate [our choice].
    """
    length, batch = np.asarray(sequence_length, dtype=np.float64), np.asarray(sequences, dtype=np.float64)
    width = 18.0 * shape.hidden + (8.0 if shape.gated else 4.0) * shape.intermediate
    return (length * batch * width + 5.0 * shape.heads * length**2 * batch) * (value_bytes / 2.0)


def training_bytes(
    shape: TransformerShape,
    ranks: ArrayLike,
    sequence_length: ArrayLike,
    sequences: ArrayLike,
    head: Head = "classification",
    classes: int = 2,
    *,
    frozen_ranks: ArrayLike = 0,
    factors: Collection[str] = FACTORS,
    value_bytes: int = 4,
    linear_bytes: float | None = None,
    trained_other: ArrayLike = 0,
    constant: float = 0.0,
) -> Array:
    """Return the bytes [...] of one client's training.

    Base weights, adapter weights, the activations of every layer from the lowest trained one up, one more layer in
    passing, logits with their gradient, and for each trained parameter a gradient and two Adam moments in 32 bits.

    Parameters
    ----------
    shape, ranks, sequence_length, sequences, head, classes : as in `airtune.devices.latency.training_flops`.
    frozen_ranks : [..., layers, kinds], components present but not trained.
    factors : what has a gradient in the trained components: "A", "B", "core".
    value_bytes : of weights and activations: 4 (fp32) or 2 (bf16).
    linear_bytes : of a weight of the frozen linear layers, if they are stored in fewer bits; None: `value_bytes`. While
        a layer computes, its weight is there in `value_bytes`, too: one more of the largest kind.
    trained_other : [...], other trained parameters (classifier).
    constant : bytes of everything else (framework, operating system).
    """
    if value_bytes not in (2, 4):
        raise InputError(f"value_bytes: must be 2 or 4; got {value_bytes}")
    rank = np.asarray(ranks, dtype=np.float64)
    if rank.shape[-2:] != (shape.layers, len(KINDS)):
        raise InputError(f"ranks: must be [..., {shape.layers}, {len(KINDS)}]; got {rank.shape}")
    trained = lora_parameters(shape, rank, factors) + np.asarray(trained_other, dtype=np.float64)
    fixed = [part for part in FACTORS if part not in factors]
    held = np.broadcast_to(np.asarray(frozen_ranks, dtype=np.float64), rank.shape)
    frozen = lora_parameters(shape, held) + lora_parameters(shape, rank, fixed)
    depth = (np.cumsum((rank > 0.0).any(axis=-1), axis=-1) > 0).sum(axis=-1)
    kept = (depth + 1.0) * activation_bytes(shape, sequence_length, sequences, value_bytes)
    tokens = np.asarray(sequences, dtype=np.float64) * np.asarray(sequence_length, dtype=np.float64)
    logits = {"causal": shape.vocabulary * tokens, "classification": classes * np.asarray(sequences), "none": 0.0}[head]
    weights = value_bytes * (shape.parameters + frozen) + 4.0 * trained
    if linear_bytes is not None:
        matrices = shape.inputs * shape.outputs
        weights = weights - shape.layers * (value_bytes - linear_bytes) * matrices.sum() + value_bytes * matrices.max()
    return weights + 12.0 * trained + kept + 8.0 * logits + constant
