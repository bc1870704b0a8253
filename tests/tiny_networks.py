"""Random transformers, two layers of width 32, and random token data: what the training tests run on."""

from typing import Any

import numpy as np
import torch
import transformers

from airtune.training.data import TokenizedData
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
}


def network(family: str = "bert", task: str = "sequence-classification", seed: int = 0, **changes: Any) -> Any:
    """Return a transformers model with random weights; torch's own generator is left as it was."""
    settings = {**SETTINGS[family], **changes}
    if task == "sequence-classification":
        settings["num_labels"] = CLASSES
    config = transformers.AutoConfig.for_model(family, **settings)
    classify = task == "sequence-classification"
    kind = transformers.AutoModelForSequenceClassification if classify else transformers.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = kind.from_config(config)
        with torch.no_grad():  # wider than the usual 0.02, or logits hardly depend on the attention layers
            for name, value in made.named_parameters():
                if value.ndim == 2 and "embed" not in name:
                    value.mul_(6)
    return made.eval()


def federated(
    family: str = "bert", task: str = "sequence-classification", seed: int = 0, **fields: Any
) -> FederatedModel:
    """Return a federated model on a random network; `precision` goes to the model, other fields to `ModelConfig`."""
    precision = fields.pop("precision", "fp32")
    config = ModelConfig(name=f"random-{family}", task=task, **{"rank": 4, "alpha": 8.0, **fields})  # type: ignore[arg-type]
    labels = CLASSES if task == "sequence-classification" else None
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


def random_adapter(model: FederatedModel, seed: int = 0, ranks: dict[str, int] | None = None) -> Any:
    """Return an adapter of which no factor is zero."""
    adapter = model.initial_adapter(seed, ranks)
    draw = torch.Generator().manual_seed(seed + 1)
    factors = {}
    for name, f in adapter.factors.items():
        columns = 0.3 * torch.randn(f.B.shape, generator=draw, dtype=f.B.dtype)
        factors[name] = type(f)(A=f.A, B=columns, scaling=f.scaling)
    return adapter.with_factors(factors)
