"""Layer shapes from config.json alone, against the real transformers and PEFT models."""

import json
import subprocess
import sys

import peft
import pytest

from airtune.errors import InputError
from airtune.training.shapes import FAMILIES, ModelConfig, adapter_shape, linear_layers
from tiny_networks import CLASSES, LAYERS, SETTINGS, classification, network

# PEFT asks transformers for a property that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
DECODERS = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma")


def config_of(family):
    return network(family).config.to_dict()


def test_every_known_family_is_tested():
    assert set(SETTINGS) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_layers_are_those_of_the_network(family):
    made = network(family)
    inside = {
        name: tuple(module.weight.shape)
        for name, module in made.named_modules()
        if hasattr(module, "weight") and module.weight.ndim == 2 and "layer" in name.replace(".h.", ".layer.")
        if not name.startswith(("pooler", "classifier"))
    }
    transposed = family == "gpt2"
    found = {
        layer.name: (layer.in_features, layer.out_features) if transposed else (layer.out_features, layer.in_features)
        for layer in linear_layers(made.config.to_dict())
    }
    assert found == inside
    assert {layer.layer for layer in linear_layers(made.config.to_dict())} == set(range(LAYERS))


@pytest.mark.parametrize("targets", [(), ("all-linear",)])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_shape_is_that_of_peft(family, targets):
    made = network(family)
    config = made.config.to_dict()
    model = ModelConfig(task=classification(family), target_modules=targets, rank=3, alpha=6.0)
    shape = adapter_shape(config, model, CLASSES)
    settings = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=list(shape.slots),
        fan_in_fan_out=family == "gpt2",
        task_type="SEQ_CLS" if family != "vit" else None,
        modules_to_save=["classifier"] if family == "vit" else None,
    )
    with_peft = peft.get_peft_model(made, settings)
    prefix = "base_model.model."
    sizes = {
        name.removeprefix(prefix).removesuffix(".default.weight"): tuple(value.shape)
        for name, value in with_peft.named_parameters()
        if ".lora_" in name
    }
    ours = {f"{name}.lora_A": (slot.rank, slot.in_features) for name, slot in shape.slots.items()}
    ours |= {f"{name}.lora_B": (slot.out_features, slot.rank) for name, slot in shape.slots.items()}
    assert ours == sizes
    assert {slot.scaling for slot in shape.slots.values()} == {2.0}
    head = {
        name.removeprefix(prefix).replace("modules_to_save.default.", ""): tuple(value.shape)
        for name, value in with_peft.named_parameters()
        if value.requires_grad and ".lora_" not in name
    }
    if (
        family != "distilbert"
    ):  # PEFT's own list leaves DistilBERT's first head layer frozen; ours trains the head whole
        assert dict(shape.extras) == head
    assert all(shape.extras[name] == size for name, size in head.items())


def test_default_targets_are_the_usual_ones():
    names = {
        family: set(adapter_shape(config_of(family), ModelConfig(task=classification(family)), CLASSES).slots)
        for family in SETTINGS
    }
    assert names["bert"] == {
        f"bert.encoder.layer.{i}.attention.self.{kind}" for i in range(LAYERS) for kind in ("query", "value")
    }
    assert names["mpnet"] == {f"mpnet.encoder.layer.{i}.attention.attn.{k}" for i in range(LAYERS) for k in "qv"}
    assert names["llama"] == {f"model.layers.{i}.self_attn.{k}_proj" for i in range(LAYERS) for k in "qv"}
    assert names["vit"] == {f"vit.layers.{i}.attention.{k}_proj" for i in range(LAYERS) for k in "qv"}
    assert names["gpt2"] == {f"transformer.h.{i}.attn.c_attn" for i in range(LAYERS)}


def test_causal_models_have_no_head_to_train():
    for family in DECODERS:
        assert adapter_shape(config_of(family), ModelConfig(task="causal-lm")).extras == {}


def test_pooler_is_an_extra_on_request():
    shape = adapter_shape(config_of("bert"), ModelConfig(train_pooler=True), CLASSES)
    assert list(shape.extras) == [
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    ]
    with pytest.raises(InputError, match=r"model\.train_pooler.*no pooler"):
        adapter_shape(config_of("llama"), ModelConfig(train_pooler=True), CLASSES)


def test_each_slot_may_have_its_own_rank_and_keeps_the_scaling():
    config = config_of("bert")
    first, *others = adapter_shape(config, ModelConfig(rank=4, alpha=8.0), CLASSES).slots
    shape = adapter_shape(config, ModelConfig(rank=4, alpha=8.0), CLASSES, {first: 7, others[-1]: 0})
    assert [slot.rank for slot in shape.slots.values()] == [7, 4, 4, 0]
    assert {slot.scaling for slot in shape.slots.values()} == {2.0}
    assert ModelConfig(rank=4, alpha=8.0, rank_stabilized=True).scaling == 4.0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda c: adapter_shape(c, ModelConfig(target_modules=("q_proj",)), 2),
            "no matching target module.*self.query",
        ),
        (lambda c: adapter_shape(c, ModelConfig(target_modules=("query", "nope")), 2), "'nope'"),
        (lambda c: adapter_shape(c, ModelConfig(rank=33), 2), r"model\.rank: rank 33.*at most 32"),
        (lambda c: adapter_shape(c, ModelConfig(), 1), "at least 2 classes"),
        (lambda c: adapter_shape(c, ModelConfig(), 2, {"nowhere": 2}), "ranks: unknown name 'nowhere'"),
        (lambda c: adapter_shape(c, ModelConfig(task="causal-lm")), "encoder"),
        (lambda c: adapter_shape(c, ModelConfig(task="image-classification"), 2), "model.task: 'bert' reads text"),
        (
            lambda _: adapter_shape(config_of("vit"), ModelConfig(), 2),
            "model.task: 'vit' reads images.*valid: image-cl",
        ),
        (lambda _: adapter_shape(config_of("vit"), ModelConfig(task="causal-lm"), 2), "valid: image-classification"),
        (lambda c: adapter_shape({**c, "model_type": "brt"}, ModelConfig(), 2), "did you mean 'bert'"),
        (lambda c: adapter_shape({**c, "intermediate_size": None}, ModelConfig(), 2), "intermediate_size"),
        (lambda c: ModelConfig(task="translation"), "model.task"),
        (lambda c: ModelConfig(rank=0), "model.rank"),
        (lambda c: ModelConfig(alpha=0.0), "model.alpha"),
    ],
)
def test_bad_input_is_told_in_one_line(build, message):
    with pytest.raises(InputError, match=message) as error:
        build(config_of("bert"))
    assert "\n" not in str(error.value)


def test_shapes_need_no_torch():
    config = json.dumps(config_of("bert"), default=str)
    code = (
        "import json, sys\n"
        "from airtune.training.shapes import ModelConfig, adapter_shape\n"
        "shape = adapter_shape(json.loads(sys.argv[1]), ModelConfig(), 2)\n"
        "assert len(shape.slots) == 4\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, config], check=True, timeout=60)


@pytest.mark.parametrize("kind", ["lora", "dora", "msp-lora", "bottleneck"])
def test_top_layers_alone_are_adapted_and_depth_still_counts_all(kind):
    shape = adapter_shape(config_of("bert"), ModelConfig(adapter=kind, rank=4, top_layers=1), CLASSES)
    assert shape.layers == (LAYERS - 1,) and shape.num_layers == LAYERS
    assert all(name.startswith("bert.encoder.layer.1.") for slot in shape.slots.values() for name in slot.modules)
    with pytest.raises(InputError, match=r"model\.top_layers"):
        ModelConfig(top_layers=0)
