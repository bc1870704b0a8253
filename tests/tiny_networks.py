"""Random transformers, two layers of width 32, and random token data: what the training tests run on."""

from typing import Any

import numpy as np
import torch
import transformers

from airtune.training.data import TokenizedData
from airtune.training.images import ImageData
from airtune.training.model import FederatedModel
from airtune.training.shapes import ModelConfig

VOCABULARY, WIDTH, LAYERS, CLASSES = 61, 32, 2, 3
_COMMON = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "intermediate_size": 48}
_ENCODER = {**_COMMON, "num_attention_heads": 4, "max_position_embeddings": 40, "pad_token_id": 0}
_LLAMA = {**_COMMON, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "xlm-roberta": _ENCODER,
    "camembert": _ENCODER,
    "electra": {**_ENCODER, "embedding_size": WIDTH},
    "mpnet": _ENCODER,
    "distilbert": {"vocab_size": VOCABULARY, "dim": WIDTH, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": 48},
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 40}
    | {"bos_token_id": 1, "eos_token_id": 1},
    "gpt_neox": {**_COMMON, "num_attention_heads": 4, "eos_token_id": 1, "bos_token_id": 1},
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 16},
    "gemma": {**_LLAMA, "head_dim": 16},
    "vit": {key: _COMMON[key] for key in ("hidden_size", "num_hidden_layers", "intermediate_size")}
    | {"num_attention_heads": 4, "image_size": 8, "patch_size": 4, "num_channels": 1},
}
_CLASSES = {
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "causal-lm": transformers.AutoModelForCausalLM,
    "image-classification": transformers.AutoModelForImageClassification,
}


def classification(family: str) -> str:
    """Return the task in which a family classifies."""
    return "image-classification" if family == "vit" else "sequence-classification"


def network(family: str = "bert", task: str | None = None, seed: int = 0, **changes: Any) -> Any:
    """Return a transformers model with random weights; torch's own generator is left as it was.

    task : None: that in which the family classifies.
    """
    settings, task = {**SETTINGS[family], **changes}, task or classification(family)
    if task != "causal-lm":
        settings["num_labels"] = CLASSES
    config = transformers.AutoConfig.for_model(family, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = _CLASSES[task].from_config(config)
        with torch.no_grad():  # wider than the usual 0.02, or logits hardly depend on the attention layers
            for name, value in made.named_parameters():
                if value.ndim == 2 and "embed" not in name:
                    value.mul_(6)
    return made.eval()


def federated(family: str = "bert", task: str | None = None, seed: int = 0, **fields: Any) -> FederatedModel:
    """Return a federated model on a random network; `precision` goes to the model, other fields to `ModelConfig`."""
    precision, task = fields.pop("precision", "fp32"), task or classification(family)
    config = ModelConfig(name=f"random-{family}", task=task, **{"rank": 4, "alpha": 8.0, **fields})  # type: ignore[arg-type]
    labels = None if task == "causal-lm" else CLASSES
    return FederatedModel(network(family, task, seed), config, num_labels=labels, precision=precision)


def tokens(examples: int = 40, task: str = "sequence-classification", seed: int = 0) -> TokenizedData:
    """Return random token data of unequal lengths; the class is what the first token tells, so it can be learnt."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 13, examples)
    ids = rng.integers(2, VOCABULARY, int(lengths.sum())).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    labels = (ids[offsets[:-1]] % CLASSES).astype(np.int64)
    names = tuple(f"class {i}" for i in range(CLASSES)) if task == "sequence-classification" else ()
    return TokenizedData(ids, offsets, labels, max(len(names), 1), names, 0, 12, task)  # type: ignore[arg-type]


def images(examples: int = 40, seed: int = 0) -> ImageData:
    """Return random 8 x 8 images, 4 patches each; the class is which of three patches is the brightest."""
    rng = np.random.default_rng(seed)
    pixels, labels = rng.normal(size=(examples, 1, 8, 8)).astype(np.float32), rng.integers(0, CLASSES, examples)
    for image, label in zip(pixels, labels, strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image[0, row : row + 4, column : column + 4] += 2.0
    return ImageData(pixels, labels.astype(np.int64), CLASSES, tuple(f"class {i}" for i in range(CLASSES)), 5)


def rows(task: str, examples: int = 40, seed: int = 0) -> TokenizedData | ImageData:
    """Return random rows of a task."""
    return images(examples, seed) if task == "image-classification" else tokens(examples, task, seed)


def random_adapter(model: FederatedModel, seed: int = 0, ranks: dict[str, int] | None = None) -> Any:
    """Return an adapter of which no factor is zero."""
    adapter = model.initial_adapter(seed, ranks)
    draw = torch.Generator().manual_seed(seed + 1)
    factors = {}
    for name, f in adapter.factors.items():
        columns = 0.3 * torch.randn(f.B.shape, generator=draw, dtype=f.B.dtype)
        factors[name] = type(f)(A=f.A, B=columns, scaling=f.scaling)
    return adapter.with_factors(factors)
