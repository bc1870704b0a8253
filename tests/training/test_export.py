"""The exported folder opens in PEFT and gives the federation's logits."""

import json

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file

from airtune.lora import Adapter, DenseUpdate, LoraFactors, merge
from airtune.training.export import export_adapter, module_factors
from airtune.types import ServerModel
from tiny_networks import LAYERS, federated, network, random_adapter, rows

# PEFT asks transformers for a property that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
CASES = [
    ("bert", "sequence-classification"),
    ("roberta", "sequence-classification"),
    ("mpnet", "sequence-classification"),
    ("distilbert", "sequence-classification"),
    ("electra", "sequence-classification"),
    ("llama", "sequence-classification"),
    ("gpt2", "sequence-classification"),
    ("llama", "causal-lm"),
    ("gpt2", "causal-lm"),
    ("vit", "image-classification"),
]


def logits_of_both(model, server, folder, family, task):
    """Return the federation's logits and those of PEFT on a base that airtune never touched."""
    batch = {name: torch.from_numpy(values) for name, values in rows(task, 6).batch(range(6)).items()}
    base = network(family, task)
    base.config.pad_token_id = model.pad_token_id
    arguments = model.inputs.arguments(batch)
    opened = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    model.show(server)
    with torch.no_grad():
        return model.output(batch), opened(**arguments).logits


def merged_updates(model, adapter):
    """Return a merged update of low rank on the first module and a dense one on the last."""
    other = random_adapter(model, 11)
    first, *_, last = adapter.placement
    low = merge(None, other.factors[first].truncate(2))
    return {first: low, last: DenseUpdate(0.1 * other.factors[last].product())}


@pytest.mark.parametrize(("family", "task"), CASES)
def test_peft_gives_the_same_logits(family, task, tmp_path):
    model = federated(family, task)
    slots = list(model.shape.slots)
    adapter = random_adapter(model, 4, {slots[0]: 1, slots[-1]: 7})
    for name, server in {
        "plain": ServerModel(adapter),
        "merged": ServerModel(adapter, merged_updates(model, adapter)),
    }.items():
        export_adapter(model, server, tmp_path / name)
        ours, theirs = logits_of_both(model, server, tmp_path / name, family, task)
        assert float((ours - theirs).abs().max()) <= 1e-5
    untrained = ServerModel(model.initial_adapter(4))
    assert float((ours - logits_of_both(model, untrained, tmp_path / "plain", family, task)[0]).abs().max()) > 1e-3


def test_the_trained_pooler_is_exported(tmp_path):
    model = federated("bert", train_pooler=True)
    server = ServerModel(random_adapter(model, 4))
    export_adapter(model, server, tmp_path / "adapter")
    ours, theirs = logits_of_both(model, server, tmp_path / "adapter", "bert", "sequence-classification")
    assert float((ours - theirs).abs().max()) <= 1e-5


def test_ranks_and_scalings_stand_in_the_patterns(tmp_path):
    model = federated("bert")
    slots = list(model.shape.slots)
    adapter = random_adapter(model, 4, {slots[0]: 1, slots[1]: 0})
    export_adapter(model, ServerModel(adapter), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {slots[0]: 1, slots[2]: 4, slots[3]: 4}
    assert config["alpha_pattern"] == {slots[0]: 2.0, slots[2]: 8.0, slots[3]: 8.0}
    assert config["target_modules"] == sorted([slots[0], *slots[2:]])
    assert config["modules_to_save"] == ["classifier"]
    assert config["base_model_name_or_path"] == "random-bert"
    content = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(content[f"base_model.model.{slots[0]}.lora_A.weight"], adapter.factors[slots[0]].A)
    ours, theirs = logits_of_both(model, ServerModel(adapter), tmp_path / "adapter", "bert", "sequence-classification")
    assert float((ours - theirs).abs().max()) <= 1e-5


def test_an_adapter_without_any_component_opens_too(tmp_path):
    model = federated("bert")
    adapter = model.initial_adapter(0, dict.fromkeys(model.shape.slots, 0))
    export_adapter(model, ServerModel(adapter), tmp_path / "adapter")
    ours, theirs = logits_of_both(model, ServerModel(adapter), tmp_path / "adapter", "bert", "sequence-classification")
    assert float((ours - theirs).abs().max()) <= 1e-6


def test_shared_and_several_slots_become_one_lora_per_module(tmp_path):
    model = federated("bert")
    own = random_adapter(model, 4)
    modules = list(own.placement)
    shared = LoraFactors(own.factors[modules[0]].A * 0.3, own.factors[modules[0]].B * 0.3, scaling=0.7)
    adapter = Adapter(
        {**own.factors, "shared": shared},
        {module: (module, "shared") for module in modules},
        {**own.layer, "shared": 0},
        LAYERS,
        own.extras,
    )
    server = ServerModel(adapter)
    export_adapter(model, server, tmp_path / "adapter")
    assert {factors.rank for factors in module_factors(server).values()} == {8}
    ours, theirs = logits_of_both(model, server, tmp_path / "adapter", "bert", "sequence-classification")
    assert float((ours - theirs).abs().max()) <= 1e-5


@pytest.mark.parametrize("kind", ["low", "dense"])
def test_stacking_loses_nothing(kind):
    model = federated("bert", precision="fp64")
    adapter = random_adapter(model, 4)
    updates = merged_updates(model, adapter)
    found = module_factors(ServerModel(adapter, updates))
    for module, factors in found.items():
        wanted = adapter.module_product(module)
        if module in updates:
            wanted = wanted + updates[module].product()
        assert torch.allclose(factors.product(), wanted, rtol=0, atol=1e-13)
    module = list(updates)[kind == "dense"]
    assert found[module].rank == 4 + updates[module].rank


def test_equal_models_give_equal_files(tmp_path):
    model = federated("roberta", target_modules=("all-linear",))
    server = ServerModel(random_adapter(model, 4))
    for name in "ab":
        export_adapter(model, server, tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    ours, theirs = logits_of_both(model, server, tmp_path / "a", "roberta", "sequence-classification")
    assert float((ours - theirs).abs().max()) <= 1e-5


def test_an_older_export_is_replaced_and_nothing_else_stays(tmp_path):
    model = federated("bert")
    folder = tmp_path / "deep" / "adapter"
    export_adapter(model, ServerModel(random_adapter(model, 1)), folder)
    (folder / "stale").write_text("old")
    export_adapter(model, ServerModel(random_adapter(model, 2)), folder)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_a_failed_export_leaves_the_older_one(tmp_path, monkeypatch):
    model = federated("bert")
    folder = tmp_path / "adapter"
    export_adapter(model, ServerModel(random_adapter(model, 1)), folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr("airtune.training.export.json.dumps", fail)
    with pytest.raises(OSError, match="no space"):
        export_adapter(model, ServerModel(random_adapter(model, 2)), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_head_weights_travel_untouched(tmp_path):
    model = federated("bert")
    adapter = random_adapter(model, 4)
    head = {name: torch.full_like(tensor, 0.25) for name, tensor in adapter.extras.items()}
    export_adapter(model, ServerModel(adapter.with_factors(adapter.factors, head)), tmp_path / "adapter")
    content = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert np.all(content["base_model.model.classifier.weight"].numpy() == 0.25)
