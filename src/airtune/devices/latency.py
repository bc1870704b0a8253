"""FLOPs of LoRA training, counted from the shape of the transformer and from what is trained.

Forward goes through all layers. Backward goes down to the lowest trained layer only; frozen weights get an activation
gradient but no weight gradient; in the lowest trained layer nothing is propagated that no trained factor needs. A
multiply and an add count as two FLOPs, and matrix products are counted (what `torch.utils.flop_counter` counts);
normalisations, activations and softmax are not.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from airtune.errors import InputError, unknown_name

Array = NDArray[np.float64]

KINDS = ("query", "key", "value", "query_key_value", "output", "gate", "up", "down")
"""The linear layers of a transformer layer, the last axis of `ranks`; query_key_value is their fusion (GPT-2)."""

FACTORS = ("A", "B")
"""What is trained of a component, unless a method freezes one of them."""

Head = Literal["classification", "causal", "none"]

_SUFFIXES = {
    "query": ("query", "q", "q_proj", "q_lin"),
    "key": ("key", "k", "k_proj", "k_lin"),
    "value": ("value", "v", "v_proj", "v_lin"),
    "query_key_value": ("attn.c_attn", "c_attn", "query_key_value", "qkv_proj"),
    "output": ("attention.output.dense", "attn.c_proj", "o", "o_proj", "out_lin", "attention.dense"),
    "gate": ("gate_proj",),
    "up": ("intermediate.dense", "up_proj", "lin1", "c_fc", "fc1", "dense_h_to_4h"),
    "down": ("output.dense", "down_proj", "lin2", "mlp.c_proj", "fc2", "dense_4h_to_h"),
}
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class TransformerShape:
    """The sizes of a transformer that costs depend on.

    Parameters
    ----------
    layers, hidden, intermediate, heads, key_value_heads, head_size, vocabulary, positions : as in its config.json.
    gated : the MLP has a gate (LLaMA).
    fused : query, key and value are one linear layer (GPT-2).
    dense_head : what a classifier puts before its output layer: "none", "frozen" (BERT's pooler) or "trained".
    score_every_token : the classifier is applied to every token (LLaMA and GPT-2 in transformers).
    tied : output embedding shared with the input's.
    token_types : segment embeddings.
    input_features : numbers in one patch that a linear layer embeds (ViT; 0 for a look-up of tokens).
    biases : linear layers have biases.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    head_size: int
    vocabulary: int
    positions: int
    gated: bool = False
    fused: bool = False
    dense_head: Literal["none", "frozen", "trained"] = "none"
    score_every_token: bool = False
    tied: bool = True
    token_types: int = 0
    input_features: int = 0
    biases: bool = True

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "intermediate", "heads", "key_value_heads", "head_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: must be at least 1; got {getattr(self, name)}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TransformerShape:
        """Return the shape for a Hugging Face config.json, given as a mapping; an unknown model_type is an error."""
        kind = str(config.get("model_type"))
        if kind not in _FAMILIES:
            raise unknown_name("model_type", kind, _FAMILIES)
        return cls(**_sizes(config), **_FAMILIES[kind])

    def features(self, kind: str) -> tuple[int, int]:
        """Return (in, out) features of one of `KINDS`; (0, 0) where this transformer has no such layer."""
        if kind not in KINDS:
            raise unknown_name("kind", kind, KINDS)
        attention, keys = self.heads * self.head_size, self.key_value_heads * self.head_size
        split = {"query": attention, "key": keys, "value": keys}
        if kind in split:
            return (0, 0) if self.fused else (self.hidden, split[kind])
        if kind == "query_key_value":
            return (self.hidden, attention + 2 * keys) if self.fused else (0, 0)
        if kind == "gate" and not self.gated:
            return (0, 0)
        return {
            "output": (attention, self.hidden),
            "gate": (self.hidden, self.intermediate),
            "up": (self.hidden, self.intermediate),
            "down": (self.intermediate, self.hidden),
        }[kind]

    @property
    def inputs(self) -> Array:
        """In-features [kinds]."""
        return np.array([self.features(kind)[0] for kind in KINDS], dtype=np.float64)

    @property
    def outputs(self) -> Array:
        """Out-features [kinds]."""
        return np.array([self.features(kind)[1] for kind in KINDS], dtype=np.float64)

    @property
    def parameters(self) -> int:
        """Number of weights of the base model, embeddings and output embedding included, classifier left out."""
        linear = int((self.inputs * self.outputs).sum()) + (int(self.outputs.sum()) if self.biases else 0)
        norm = self.hidden * (2 if self.biases else 1)
        embeddings = (self.vocabulary * (1 if self.tied else 2) + self.positions + self.token_types) * self.hidden
        pooler = self.hidden * (self.hidden + 1) if self.dense_head == "frozen" else 0
        return embeddings + self.layers * (linear + 2 * norm) + norm + pooler + self.input_features * self.hidden


@lru_cache(maxsize=4096)
def module_position(name: str) -> tuple[int, str]:
    """Return (layer, kind) of a linear layer from its module name.

    For example ``model.layers.3.self_attn.q_proj`` is (3, "query"). Raises InputError for a name that is not a known
    linear layer of a transformer layer.
    """
    match = _LAYER.search(name)
    if match is not None:
        inner = match[2]
        endings = [(suffix, kind) for kind, suffixes in _SUFFIXES.items() for suffix in suffixes]
        fitting = [(len(s), kind) for s, kind in endings if inner == s or inner.endswith("." + s)]
        if fitting:
            return int(match[1]), max(fitting)[1]
    raise InputError(f"module {name!r}: not a linear layer of a transformer layer; valid endings: {_SUFFIXES}")


def rank_table(shape: TransformerShape, ranks: Mapping[str, int]) -> Array:
    """Return ranks [layers, kinds] from ranks by module name; modules that share a place add up."""
    table = np.zeros((shape.layers, len(KINDS)))
    for name, rank in ranks.items():
        layer, kind = module_position(name)
        if layer >= shape.layers or shape.features(kind) == (0, 0):
            raise InputError(f"module {name!r}: this transformer has {shape.layers} layers and no such module")
        table[layer, KINDS.index(kind)] += rank
    return table


def forward_flops(
    shape: TransformerShape,
    ranks: ArrayLike,
    sequence_length: ArrayLike,
    sequences: ArrayLike = 1,
    head: Head = "classification",
    classes: int = 2,
    *,
    core: bool = False,
) -> Array:
    """Return the FLOPs of one forward pass.

    Parameters
    ----------
    shape : of the base model.
    ranks : [..., layers, kinds], LoRA components present, trained or not.
    sequence_length : [...], tokens per sequence, padding included.
    sequences : [...], in the batch.
    head : "classification", "causal" (logits over the vocabulary for every token) or "none".
    classes : of the classifier.
    core : every module has a square core between A and B (Fed-SB).

    Returns
    -------
    [...], FLOPs of the whole batch.
    """
    rank, length, batch = _arguments(shape, ranks, sequence_length, sequences)
    layer = 2.0 * (shape.inputs * shape.outputs).sum() + 4.0 * length * shape.heads * shape.head_size
    lora = 2.0 * (rank * (shape.inputs + shape.outputs + rank * core)).sum(axis=(-2, -1))
    patches = 2.0 * shape.input_features * shape.hidden * (length - 1.0)  # all tokens but the class token
    return batch * (length * (shape.layers * layer + lora) + patches + _head_forward(shape, length, head, classes))


def backward_flops(
    shape: TransformerShape,
    ranks: ArrayLike,
    sequence_length: ArrayLike,
    sequences: ArrayLike = 1,
    head: Head = "classification",
    classes: int = 2,
    *,
    frozen_ranks: ArrayLike = 0,
    factors: Collection[str] = FACTORS,
    train_head: bool = True,
    train_pooler: bool = False,
) -> Array:
    """Return the FLOPs of one backward pass; arguments as in `forward_flops`, and

    Parameters
    ----------
    ranks : [..., layers, kinds], LoRA components that are trained.
    frozen_ranks : [..., layers, kinds], components that are present but frozen.
    factors : which parts of the trained components have a gradient: "A", "B", "core". FFA-LoRA's A has none.
    train_head : the classifier is trained.
    train_pooler : BERT's pooler is trained too.
    """
    rank, length, batch = _arguments(shape, ranks, sequence_length, sequences)
    frozen = np.broadcast_to(np.asarray(frozen_ranks, dtype=np.float64), rank.shape)
    trained = rank > 0.0
    above = np.cumsum(trained.any(axis=-1), axis=-1) - trained.any(axis=-1) > 0  # some lower layer is trained
    lowest = trained.any(axis=-1) & ~above
    full = _layer_backward(shape, rank, frozen, factors, length[..., None], np.ones_like(trained[..., :4]), True)
    entry = _layer_backward(shape, rank, frozen, factors, length[..., None], _reached(trained), False)
    layers = np.where(above, full, np.where(lowest, entry, 0.0)).sum(axis=-1)
    any_layer = np.asarray(trained.any(axis=(-2, -1)))
    return batch * (length * layers + _head_backward(shape, length, head, classes, any_layer, train_head, train_pooler))


def training_flops(
    shape: TransformerShape,
    ranks: ArrayLike,
    sequence_length: ArrayLike,
    sequences: ArrayLike = 1,
    head: Head = "classification",
    classes: int = 2,
    *,
    frozen_ranks: ArrayLike = 0,
    factors: Collection[str] = FACTORS,
    train_head: bool = True,
    train_pooler: bool = False,
) -> Array:
    """Return the FLOPs of one training step: forward and backward; arguments as in `backward_flops`."""
    present = np.asarray(ranks, dtype=np.float64) + np.asarray(frozen_ranks, dtype=np.float64)
    forward = forward_flops(shape, present, sequence_length, sequences, head, classes, core="core" in factors)
    return forward + backward_flops(
        shape,
        ranks,
        sequence_length,
        sequences,
        head,
        classes,
        frozen_ranks=frozen_ranks,
        factors=factors,
        train_head=train_head,
        train_pooler=train_pooler,
    )


def _reached(trained: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return [..., layers, stages]: whether a stage's *input* needs a gradient in a layer whose own input needs none.

    Stages: attention projections, attention output, MLP in, MLP down. A stage's input needs a gradient if something
    trained stands before it.
    """
    stage = np.stack([trained[..., :4].any(-1), trained[..., 4], trained[..., 5:7].any(-1), trained[..., 7]], axis=-1)
    return np.cumsum(stage, axis=-1) - stage > 0


def _layer_backward(
    shape: TransformerShape,
    rank: Array,
    frozen: Array,
    factors: Collection[str],
    length: Array,
    reached: NDArray[np.bool_],
    below: bool,
) -> Array:
    """Return backward FLOPs per token [..., layers].

    reached : [..., layers, stages], whether the input of a stage needs a gradient; `below`: whether the layer's own
    input does.
    """
    stages = np.array([0, 0, 0, 0, 1, 2, 2, 3])
    needs = np.broadcast_to(np.asarray(below), rank.shape) if below else reached[..., stages]
    passed = (2.0 * shape.inputs * shape.outputs) * needs
    inputs, outputs = shape.inputs, shape.outputs
    lora = rank * _component_backward(rank, inputs, outputs, factors, needs)
    still = frozen * (2.0 * outputs + 2.0 * inputs) * needs
    product = 2.0 * length * shape.heads * shape.head_size
    if below:
        attention = 4.0 * product * np.ones(rank.shape[:-1])
    else:
        fused = rank[..., 3] > 0.0
        query, key, value = (((rank[..., i] > 0.0) | fused).astype(np.float64) for i in range(3))
        attention = product * (np.maximum(query, key) + query + key + value)
    return (passed + lora + still).sum(axis=-1) + attention


def _component_backward(
    rank: Array, inputs: Array, outputs: Array, factors: Collection[str], needs: Array | NDArray[np.bool_]
) -> Array:
    """Return backward FLOPs per token of one trained component: gradients of A, B and core, and what leads to them."""
    a, b, core = (part in factors for part in ("A", "B", "core"))
    behind_core = np.maximum(needs, float(a))  # A, or something before it, needs one
    before_b = np.maximum(behind_core, float(core))
    own = 2.0 * inputs * a + 2.0 * outputs * b + 2.0 * rank * core
    return own + 2.0 * outputs * before_b + 2.0 * rank * core * behind_core + 2.0 * inputs * needs


def _head_forward(shape: TransformerShape, length: Array, head: Head, classes: int) -> Array:
    """Return FLOPs per sequence [...] of the head."""
    if head == "none":
        return np.zeros_like(length)
    if head == "causal":
        return 2.0 * shape.hidden * shape.vocabulary * length
    if head != "classification":
        raise unknown_name("head", head, ("classification", "causal", "none"))
    dense = 0.0 if shape.dense_head == "none" else 2.0 * shape.hidden**2
    return dense + 2.0 * shape.hidden * classes * (length if shape.score_every_token else np.ones_like(length))


def _head_backward(
    shape: TransformerShape,
    length: Array,
    head: Head,
    classes: int,
    any_layer: NDArray[np.bool_],
    train_head: bool,
    train_pooler: bool,
) -> Array:
    if head == "none":
        return np.zeros_like(length)
    if head == "causal":
        return 2.0 * shape.hidden * shape.vocabulary * length * any_layer
    dense_trained = (shape.dense_head == "trained" and train_head) or (shape.dense_head == "frozen" and train_pooler)
    dense = 0.0 if shape.dense_head == "none" else 2.0 * shape.hidden**2
    tokens = length if shape.score_every_token else np.ones_like(length)
    output = 2.0 * shape.hidden * classes * tokens
    into_output = any_layer | (dense_trained and dense > 0.0)
    return output * train_head + output * into_output + dense * dense_trained + dense * any_layer


def _arguments(
    shape: TransformerShape, ranks: ArrayLike, sequence_length: ArrayLike, sequences: ArrayLike
) -> tuple[Array, Array, Array]:
    rank = np.asarray(ranks, dtype=np.float64)
    if rank.shape[-2:] != (shape.layers, len(KINDS)):
        raise InputError(f"ranks: must be [..., {shape.layers}, {len(KINDS)}]; got {rank.shape}")
    leading = np.broadcast_shapes(rank.shape[:-2], np.shape(sequence_length), np.shape(sequences))
    length = np.broadcast_to(np.asarray(sequence_length, dtype=np.float64), leading)
    batch = np.broadcast_to(np.asarray(sequences, dtype=np.float64), leading)
    return np.broadcast_to(rank, (*leading, *rank.shape[-2:])), length, batch


_ENCODER: dict[str, Any] = {"token_types": 1}
_FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {"dense_head": "frozen", "token_types": 2},
    "roberta": {"dense_head": "trained", **_ENCODER},
    "xlm-roberta": {"dense_head": "trained", **_ENCODER},
    "camembert": {"dense_head": "trained", **_ENCODER},
    "electra": {"dense_head": "trained", "token_types": 2},
    "mpnet": {"dense_head": "trained"},
    "distilbert": {"dense_head": "trained"},
    "vit": {"dense_head": "none"},
    "gpt2": {"fused": True, "score_every_token": True},
    "gpt_neox": {"fused": True, "score_every_token": True},
    **{
        name: {"gated": True, "score_every_token": True, "biases": False}
        for name in ("llama", "mistral", "qwen2", "qwen3", "gemma")
    },
}


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes that every family names in its own way."""
    hidden = _integer(config, "hidden_size", "n_embd", "dim")
    heads = _integer(config, "num_attention_heads", "n_head", "n_heads")
    vision = config.get("model_type") == "vit"
    patch = int(config.get("patch_size", 16))
    patches = (int(config.get("image_size", 224)) // patch) ** 2 if vision else 0
    rotary = config.get("model_type") in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gpt_neox")
    return {
        "layers": _integer(config, "num_hidden_layers", "n_layer", "n_layers"),
        "hidden": hidden,
        "intermediate": _integer(config, "intermediate_size", "n_inner", "hidden_dim", default=4 * hidden),
        "heads": heads,
        "key_value_heads": _integer(config, "num_key_value_heads", default=heads),
        "head_size": _integer(config, "head_dim", default=hidden // heads),
        "vocabulary": 0 if vision else _integer(config, "vocab_size"),
        "positions": patches + 1
        if vision
        else (0 if rotary else _integer(config, "max_position_embeddings", "n_positions", "n_ctx")),
        "tied": bool(config.get("tie_word_embeddings", True)),
        "input_features": int(config.get("num_channels", 3)) * patch**2 if vision else 0,
    }


def _integer(config: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        if value is not None:
            raise InputError(f"config.json: {name}: must be a positive integer; got {value!r}")
    if default is None:
        raise InputError(f"config.json: none of {', '.join(names)} is given")
    return default
