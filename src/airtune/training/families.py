"""Where each transformer family keeps its layers, its linear layers and its classifier: from config.json, no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from airtune.errors import InputError, unknown_name

ConfigJson = Mapping[str, Any]
Sizes = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Family:
    """Where one transformer family keeps its linear layers and its classifier.

    layers : name of layer {i} in the model with its head. sizes : name inside a layer -> (in, out).
    head : (width, classes) -> name -> shape. pooler : its module, if it has one. depth : key of the number of layers.
    causal : has a language modelling head. images : reads pixels, not tokens.
    """

    layers: str
    sizes: Callable[[ConfigJson], Sizes]
    targets: tuple[str, ...]
    head: Callable[[ConfigJson, int], dict[str, tuple[int, ...]]]
    depth: str = "num_hidden_layers"
    pooler: str | None = None
    causal: bool = False
    images: bool = False


def number(config: ConfigJson, key: str) -> int:
    """Return a positive whole number of config.json; InputError if there is none."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"model.name: config.json has no usable {key!r} (found {value!r})")
    return value


def width(config: ConfigJson) -> int:
    """Return the hidden size, whatever the family calls it."""
    return number(config, next((key for key in ("hidden_size", "n_embd", "dim") if key in config), "hidden_size"))


def _encoder_sizes(query: str, key: str, value: str, output: str) -> Callable[[ConfigJson], Sizes]:
    def sizes(config: ConfigJson) -> Sizes:
        h, m = width(config), number(config, "intermediate_size")
        attention: Sizes = {name: (h, h) for name in (query, key, value, output)}
        return {**attention, "intermediate.dense": (h, m), "output.dense": (m, h)}

    return sizes


_bert_sizes = _encoder_sizes(
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"
)
_mpnet_sizes = _encoder_sizes("attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o")


def _distilbert_sizes(config: ConfigJson) -> Sizes:
    h, m = width(config), number(config, "hidden_dim")
    attention: Sizes = {f"attention.{name}_lin": (h, h) for name in ("q", "k", "v", "out")}
    return {**attention, "ffn.lin1": (h, m), "ffn.lin2": (m, h)}


def _llama_sizes(config: ConfigJson) -> Sizes:
    h, m, heads = width(config), number(config, "intermediate_size"), number(config, "num_attention_heads")
    key_heads = number(config, "num_key_value_heads") if config.get("num_key_value_heads") else heads
    head = number(config, "head_dim") if config.get("head_dim") else h // heads
    return {
        "self_attn.q_proj": (h, heads * head),
        "self_attn.k_proj": (h, key_heads * head),
        "self_attn.v_proj": (h, key_heads * head),
        "self_attn.o_proj": (heads * head, h),
        "mlp.gate_proj": (h, m),
        "mlp.up_proj": (h, m),
        "mlp.down_proj": (m, h),
    }


def _vit_sizes(config: ConfigJson) -> Sizes:
    h, m = width(config), number(config, "intermediate_size")
    attention: Sizes = {f"attention.{name}_proj": (h, h) for name in ("q", "k", "v", "o")}
    return {**attention, "mlp.fc1": (h, m), "mlp.fc2": (m, h)}


def _gpt2_sizes(config: ConfigJson) -> Sizes:
    h = width(config)
    m = number(config, "n_inner") if config.get("n_inner") else 4 * h
    return {"attn.c_attn": (h, 3 * h), "attn.c_proj": (h, h), "mlp.c_fc": (h, m), "mlp.c_proj": (m, h)}


def _neox_sizes(config: ConfigJson) -> Sizes:
    h, m = width(config), number(config, "intermediate_size")
    return {
        "attention.query_key_value": (h, 3 * h),
        "attention.dense": (h, h),
        "mlp.dense_h_to_4h": (h, m),
        "mlp.dense_4h_to_h": (m, h),
    }


def _dense_head(config: ConfigJson, classes: int) -> dict[str, tuple[int, ...]]:
    return {"classifier.weight": (classes, width(config)), "classifier.bias": (classes,)}


def _two_layer_head(config: ConfigJson, classes: int) -> dict[str, tuple[int, ...]]:
    h = width(config)
    return {
        "classifier.dense.weight": (h, h),
        "classifier.dense.bias": (h,),
        "classifier.out_proj.weight": (classes, h),
        "classifier.out_proj.bias": (classes,),
    }


def _distilbert_head(config: ConfigJson, classes: int) -> dict[str, tuple[int, ...]]:
    h = width(config)
    return {
        "pre_classifier.weight": (h, h),
        "pre_classifier.bias": (h,),
        "classifier.weight": (classes, h),
        "classifier.bias": (classes,),
    }


def _score_head(config: ConfigJson, classes: int) -> dict[str, tuple[int, ...]]:
    return {"score.weight": (classes, width(config))}


_BERT = ("query", "value")
_LLAMA = Family("model.layers.{}", _llama_sizes, ("q_proj", "v_proj"), _score_head, causal=True)
FAMILY_TABLE: Mapping[str, Family] = {
    "bert": Family("bert.encoder.layer.{}", _bert_sizes, _BERT, _dense_head, pooler="bert.pooler.dense"),
    "roberta": Family("roberta.encoder.layer.{}", _bert_sizes, _BERT, _two_layer_head),
    "xlm-roberta": Family("roberta.encoder.layer.{}", _bert_sizes, _BERT, _two_layer_head),
    "camembert": Family("roberta.encoder.layer.{}", _bert_sizes, _BERT, _two_layer_head),
    "electra": Family("electra.encoder.layer.{}", _bert_sizes, _BERT, _two_layer_head),
    "mpnet": Family("mpnet.encoder.layer.{}", _mpnet_sizes, ("attn.q", "attn.v"), _two_layer_head),
    "distilbert": Family(
        "distilbert.transformer.layer.{}", _distilbert_sizes, ("q_lin", "v_lin"), _distilbert_head, depth="n_layers"
    ),
    "gpt2": Family("transformer.h.{}", _gpt2_sizes, ("c_attn",), _score_head, depth="n_layer", causal=True),
    "gpt_neox": Family("gpt_neox.layers.{}", _neox_sizes, ("query_key_value",), _score_head, causal=True),
    "vit": Family("vit.layers.{}", _vit_sizes, ("q_proj", "v_proj"), _dense_head, images=True),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), _LLAMA),
}


def family_of(config_json: ConfigJson) -> Family:
    """Return the family of a config.json; InputError with the list if it is not known."""
    name = str(config_json.get("model_type"))
    if name not in FAMILY_TABLE:
        raise unknown_name("model.name: model_type of config.json", name, FAMILY_TABLE)
    return FAMILY_TABLE[name]
