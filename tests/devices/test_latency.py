"""FLOPs against torch's own counter on small random models."""

from __future__ import annotations

import numpy as np
import pytest

from airtune.devices.latency import (
    KINDS,
    TransformerShape,
    backward_flops,
    forward_flops,
    module_position,
    rank_table,
    training_flops,
)
from airtune.errors import InputError

BERT = {
    "model_type": "bert",
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 80,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
MPNET = {**BERT, "model_type": "mpnet"}
ROBERTA = {**BERT, "model_type": "roberta"}
GPT2 = {"model_type": "gpt2", "n_embd": 48, "n_layer": 3, "n_head": 4, "n_inner": None, "vocab_size": 100}
GPT2 |= {"n_positions": 64}
DISTILBERT = {"model_type": "distilbert", "dim": 48, "n_layers": 3, "n_heads": 4, "hidden_dim": 96, "vocab_size": 100}
DISTILBERT |= {"max_position_embeddings": 64}
VIT = {"model_type": "vit", "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
VIT |= {"intermediate_size": 96, "image_size": 32, "patch_size": 8, "num_channels": 3}

TOKENS, SEQUENCES, CLASSES = 10, 3, 5

CASES = [
    (BERT, ("query", "value"), (0, 1, 2), "classification"),
    (BERT, ("query", "value"), (1, 2), "classification"),
    (BERT, ("value",), (2,), "classification"),
    (BERT, ("key",), (1,), "classification"),
    (BERT, ("attention.output.dense",), (1, 2), "classification"),
    (BERT, ("intermediate.dense", "layer.1.output.dense"), (1, 2), "classification"),
    (BERT, ("query",), (), "classification"),
    (ROBERTA, ("query", "value"), (1, 2), "classification"),
    (MPNET, ("attn.q", "attn.v"), (1, 2), "classification"),
    (DISTILBERT, ("q_lin", "v_lin"), (1, 2), "classification"),
    (GPT2, ("c_attn",), (1, 2), "causal"),
    (GPT2, ("c_attn", "mlp.c_proj"), (0, 1, 2), "classification"),
    (LLAMA, ("q_proj", "v_proj"), (0, 1, 2), "causal"),
    (LLAMA, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), (1, 2), "causal"),
    (LLAMA, ("gate_proj", "down_proj"), (2,), "causal"),
    (LLAMA, ("down_proj",), (0,), "causal"),
    (LLAMA, ("q_proj", "v_proj"), (1, 2), "classification"),
    (VIT, ("q_proj", "v_proj", "fc1"), (1, 2), "classification"),
]


def _model(config, head):
    transformers = pytest.importorskip("transformers")
    sizes = {k: v for k, v in config.items() if k != "model_type"}
    built = transformers.AutoConfig.for_model(
        config["model_type"], **sizes, num_labels=CLASSES, pad_token_id=0, attn_implementation="eager"
    )
    if config["model_type"] == "vit":
        return transformers.AutoModelForImageClassification.from_config(built, attn_implementation="eager")
    auto = transformers.AutoModelForCausalLM if head == "causal" else transformers.AutoModelForSequenceClassification
    return auto.from_config(built, attn_implementation="eager")


def _adapted(config, targets, layers, head):
    """Return a PEFT model and its trained ranks by module name; different ranks per layer."""
    peft = pytest.importorskip("peft")
    model = _model(config, head)
    names = [
        name
        for name, module in model.named_modules()
        if any(name.endswith(t) or t in name for t in targets) and hasattr(module, "weight")
        if any(f".{i}." in name for i in (layers or (0, 1, 2)))
    ]
    ranks = {name: 2 + module_position(name)[0] for name in names}
    lora = peft.LoraConfig(target_modules=names, rank_pattern=ranks, r=2)
    adapted = peft.get_peft_model(model, lora)
    if not layers:
        adapted.requires_grad_(False)
        ranks = {}
    for name, parameter in adapted.named_parameters():
        if head == "classification" and any(part in name for part in ("classifier", "score")):
            parameter.requires_grad_(True)
    return adapted, ranks, names


def _inputs(config, head):
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    if config["model_type"] == "vit":
        pixels = torch.randn(SEQUENCES, 3, 32, 32, generator=generator)
        return {"pixel_values": pixels, "labels": torch.zeros(SEQUENCES, dtype=torch.long)}, 17
    tokens = torch.randint(1, 100, (SEQUENCES, TOKENS), generator=generator)
    labels = tokens if head == "causal" else torch.zeros(SEQUENCES, dtype=torch.long)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}, TOKENS


@pytest.mark.parametrize(("config", "targets", "layers", "head"), CASES)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_counted_as_torch_counts(config, targets, layers, head) -> None:
    flop_counter = pytest.importorskip("torch.utils.flop_counter")
    model, ranks, names = _adapted(config, targets, layers, head)
    inputs, tokens = _inputs(config, head)
    with flop_counter.FlopCounterMode(display=False) as counter:
        loss = model(**inputs).loss
    forward = counter.get_total_flops()
    with flop_counter.FlopCounterMode(display=False) as counter:
        loss.backward()
    backward = counter.get_total_flops()
    shape = TransformerShape.from_config(config)
    table = rank_table(shape, ranks)
    present = rank_table(shape, {name: 2 + module_position(name)[0] for name in names})
    assert forward_flops(shape, present, tokens, SEQUENCES, head, CLASSES) == pytest.approx(forward, rel=0.005)
    counted = backward_flops(shape, table, tokens, SEQUENCES, head, CLASSES, frozen_ranks=present - table)
    assert counted == pytest.approx(backward, rel=0.02)


@pytest.mark.parametrize("config", [BERT, ROBERTA, MPNET, DISTILBERT, GPT2, LLAMA, VIT])
def test_parameters_are_those_of_the_model(config) -> None:
    head = "causal" if config in (LLAMA,) else "classification"
    model = _model(config, head)
    others = ("classifier", "score", "pre_classifier", "relative_attention_bias")
    count = sum(p.numel() for name, p in model.named_parameters() if not any(part in name for part in others))
    assert TransformerShape.from_config(config).parameters == pytest.approx(count, rel=0.01)


def test_a_frozen_module_between_trained_ones_only_passes_gradients_on() -> None:
    shape = TransformerShape.from_config(BERT)
    ranks = np.zeros((3, len(KINDS)))
    ranks[:, 0] = 4
    deep = training_flops(shape, ranks, TOKENS)
    shallow = training_flops(shape, ranks * np.array([[0.0], [0.0], [1.0]]), TOKENS)
    forward = forward_flops(shape, ranks, TOKENS)
    assert shallow < deep < 3.0 * forward
    bounds = (1 + 1 / 3) / 2 * 0.7, 1.0
    assert bounds[0] < shallow / deep < bounds[1]


def test_costs_are_vectorised_over_clients_and_grow_with_rank() -> None:
    shape = TransformerShape.from_config(BERT)
    ranks = np.zeros((4, 3, len(KINDS)))
    ranks[..., 0] = np.arange(1, 5)[:, None]
    together = training_flops(shape, ranks, [8, 9, 10, 11], [1, 2, 3, 4])
    alone = [training_flops(shape, ranks[i], 8 + i, 1 + i) for i in range(4)]
    np.testing.assert_allclose(together, alone)
    assert (np.diff(training_flops(shape, ranks, TOKENS)) > 0).all()


@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("bert.encoder.layer.11.attention.self.query", (11, "query")),
        ("bert.encoder.layer.0.attention.output.dense", (0, "output")),
        ("bert.encoder.layer.0.output.dense", (0, "down")),
        ("mpnet.encoder.layer.2.attention.attn.o", (2, "output")),
        ("model.layers.3.mlp.gate_proj", (3, "gate")),
        ("transformer.h.4.attn.c_attn", (4, "query_key_value")),
        ("transformer.h.4.attn.c_proj", (4, "output")),
        ("transformer.h.4.mlp.c_proj", (4, "down")),
        ("distilbert.transformer.layer.5.ffn.lin1", (5, "up")),
        ("gpt_neox.layers.1.mlp.dense_4h_to_h", (1, "down")),
    ],
)
def test_module_names_are_placed(name, position) -> None:
    assert module_position(name) == position


@pytest.mark.parametrize("name", ["classifier", "bert.pooler.dense", "model.layers.1.input_layernorm"])
def test_other_modules_are_refused(name) -> None:
    with pytest.raises(InputError, match="not a linear layer"):
        module_position(name)


def test_unknown_family_and_bad_sizes_name_the_field() -> None:
    with pytest.raises(InputError, match=r"model_type: unknown name 'berty'.*did you mean 'bert'"):
        TransformerShape.from_config({**BERT, "model_type": "berty"})
    with pytest.raises(InputError, match="hidden_size"):
        TransformerShape.from_config({**BERT, "hidden_size": 0})
    with pytest.raises(InputError, match="3 layers"):
        rank_table(TransformerShape.from_config(BERT), {"bert.encoder.layer.3.attention.self.query": 4})
