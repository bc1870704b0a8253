"""The base model with PEFT layers: what is active, what is trained, and that nothing else is."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from aggregation_examples import outcome, task, update
from airtune.aggregation.one_factor import MergeAndRedraw
from airtune.errors import InputError
from airtune.lora import ONLY_A, ONLY_B, Adapter, AdapterSlice, DenseUpdate, LoraFactors, merge
from airtune.training.catalogue import catalogue, is_fetched
from airtune.training.hardware import checked_device, checked_precision, on_device
from airtune.training.loading import load_model
from airtune.training.model import NOTHING, FederatedModel
from airtune.training.shapes import ModelConfig
from airtune.types import ServerModel
from tiny_networks import CLASSES, LAYERS, federated, network, random_adapter, tokens

FAMILIES = ("bert", "mpnet", "llama", "gpt2")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return federated(request.param, precision="fp64")


@pytest.fixture(scope="module")
def bert():
    return federated("bert", precision="fp64")


def batch(model, examples=5):
    arrays = tokens(examples).batch(range(examples))
    return torch.from_numpy(arrays["input_ids"]), torch.from_numpy(arrays["attention_mask"])


def logits_of(model, server=None):
    if server is not None:
        model.show(server)
    with torch.no_grad():
        return model.logits(*batch(model))


def dense_logits(model, family_network, delta, extras):
    """Return the logits of an ordinary network whose weights hold the dense updates: no PEFT, no slices."""
    family_network.double()
    with torch.no_grad():
        for module, update in delta.items():
            weight = family_network.get_submodule(module).weight
            weight += update.T if model.transposed else update
        for name, value in extras.items():
            family_network.get_parameter(name).copy_(value)
        ids, mask = batch(model)
        family_network.config.pad_token_id = model.pad_token_id
        return family_network(input_ids=ids.masked_fill(mask == 0, model.pad_token_id), attention_mask=mask).logits


def products(adapter):
    return {module: adapter.module_product(module) for module in adapter.placement}


# --------------------------------------------------------------------------------------------------- initial adapter


def test_initial_adapter_leaves_the_network_as_it_is(model):
    adapter = model.initial_adapter(3)
    plain = dense_logits(model, network(model.config_json["model_type"]), {}, adapter.extras)
    assert torch.allclose(logits_of(model, ServerModel(adapter)), plain, atol=1e-12)


def test_initial_adapter_depends_on_the_seed_and_on_nothing_else(bert):
    before = torch.random.get_rng_state()
    first, again, other = bert.initial_adapter(1), bert.initial_adapter(1), bert.initial_adapter(2)
    assert torch.equal(torch.random.get_rng_state(), before)
    for (owner, kind, a), (_, _, b), (_, _, c) in zip(first.tensors(), again.tensors(), other.tensors(), strict=True):
        assert torch.equal(a, b), (owner, kind)
        zero = kind == "B" or owner.endswith(".bias")
        assert torch.equal(a, c) == zero
        assert bool((a == 0).all()) == zero
    a = [factors.A for factors in first.factors.values()]
    assert not torch.equal(a[0], a[1]), "slots of one size must not share their A"


def test_initial_a_is_kaiming_uniform_as_peft_draws_it():
    large = federated("bert", rank=32, precision="fp64")
    values = torch.cat([factors.A.flatten() for factors in large.initial_adapter(0).factors.values()])
    bound = 1 / np.sqrt(32)
    assert float(values.abs().max()) <= bound
    assert float(values.std()) == pytest.approx(bound / np.sqrt(3), rel=0.05)
    reference = torch.empty(32, 32)
    torch.nn.init.kaiming_uniform_(reference, a=5**0.5, generator=torch.Generator().manual_seed(0))
    assert float(values.std()) == pytest.approx(float(reference.std()), rel=0.08)


def test_a_higher_rank_begins_with_the_same_rows(bert):
    slot = next(iter(bert.shape.slots))
    low, high = bert.initial_adapter(1), bert.initial_adapter(1, {slot: 9})
    assert torch.equal(high.factors[slot].A[:4], low.factors[slot].A)
    assert high.factors[slot].scaling == low.factors[slot].scaling
    assert high.factors[slot].rank == 9


def test_shape_of_the_adapter_is_the_promised_one(model):
    assert model.initial_adapter(0).shape == model.shape


# ------------------------------------------------------------------------------------------------- what is active


def test_shown_model_equals_an_ordinary_network_with_dense_updates(model):
    slots = list(model.shape.slots)
    adapter = random_adapter(model, 4, {slots[0]: 2, slots[-1]: 0})
    shown = logits_of(model, ServerModel(adapter))
    dense = dense_logits(model, network(model.config_json["model_type"]), products(adapter), adapter.extras)
    assert torch.allclose(shown, dense, atol=1e-11)
    assert not torch.allclose(shown, logits_of(model, ServerModel(model.initial_adapter(4))), atol=1e-4)


@pytest.mark.parametrize("kind", ["factors", "dense"])
def test_merged_updates_act_beside_the_adapter(model, kind):
    adapter, merged = random_adapter(model, 4), random_adapter(model, 9)
    module = list(adapter.placement)[-1]
    update = merge(None, merged.factors[module])
    if kind == "dense":
        update = DenseUpdate(update.product())
    dense = products(adapter)
    dense[module] = dense[module] + merged.factors[module].product()
    reference = dense_logits(model, network(model.config_json["model_type"]), dense, adapter.extras)
    assert torch.allclose(logits_of(model, ServerModel(adapter, {module: update})), reference, atol=1e-11)


@pytest.mark.parametrize(("rule", "tensors"), [("A", ONLY_B), ("B", ONLY_A)])
def test_merging_one_clients_update_and_starting_over_changes_no_logit(model, rule, tensors):
    """RAC-LoRA's and GaLore's round: the product goes into the base, one factor is drawn anew, the other is zero."""
    adapter = random_adapter(model, 4)
    before = logits_of(model, ServerModel(adapter))
    sent = update(task(0, AdapterSlice.everything(adapter.shape, tensors)), adapter)
    after = MergeAndRedraw(rule)(ServerModel(adapter), outcome([sent], [5]))
    trained = "B" if rule == "A" else "A"
    assert not any(getattr(f, trained).any() for f in after.adapter.factors.values())
    assert all(
        not torch.equal(getattr(f, rule), getattr(adapter.factors[n], rule)) for n, f in after.adapter.factors.items()
    )
    assert torch.allclose(logits_of(model, after), before, atol=1e-5)


def test_absent_and_frozen_remainder(bert):
    adapter = random_adapter(bert, 4)
    server = ServerModel(adapter)
    first, second, *_ = adapter.factors
    some = {first: np.array([0, 2]), second: np.array([1])}
    absent = AdapterSlice(some, outside="absent")
    bert.activate(server, absent)
    reference = dense_logits(bert, network("bert"), products(absent.take(adapter)), adapter.extras)
    assert torch.allclose(logits_of(bert), reference, atol=1e-11)
    bert.activate(server, AdapterSlice(some, outside="frozen"))
    assert torch.allclose(
        logits_of(bert), dense_logits(bert, network("bert"), products(adapter), adapter.extras), atol=1e-11
    )


def test_what_was_not_received_is_not_active(bert):
    adapter = random_adapter(bert, 4)
    top = AdapterSlice.top_layers(bert.shape, 1)
    receive = AdapterSlice.truncation(bert.shape, 3)
    bert.activate(ServerModel(adapter), top, receive)
    union = {name: np.arange(4 if top.kept(name) else 3) for name in adapter.factors}
    dense = products(AdapterSlice(union).take(adapter))
    assert torch.allclose(logits_of(bert), dense_logits(bert, network("bert"), dense, adapter.extras), atol=1e-11)


def test_sketch_is_scaled_by_rank_over_kept(bert):
    adapter = random_adapter(bert, 4)
    sketch = AdapterSlice.sketch(bert.shape, 2, np.random.default_rng(0))
    bert.activate(ServerModel(adapter), sketch)
    dense = {
        name: adapter.factors[name].scaling * 2.0 * (f.B[:, sketch.components[name]] @ f.A[sketch.components[name]])
        for name, f in adapter.factors.items()
    }
    assert torch.allclose(logits_of(bert), dense_logits(bert, network("bert"), dense, adapter.extras), atol=1e-11)


def test_a_shared_slot_acts_in_every_module_and_collects_all_gradients(bert):
    own = random_adapter(bert, 4)
    modules = list(own.placement)
    shared = Adapter(
        {"shared": own.factors[modules[0]]},
        {module: ("shared",) for module in modules},
        {"shared": 0},
        LAYERS,
        own.extras,
    )
    active = bert.activate(ServerModel(shared), AdapterSlice.everything(shared.shape))
    bert.logits(*batch(bert)).square().sum().backward()
    assert active.adapter.factors["shared"].A.grad is not None
    reference = dense_logits(bert, network("bert"), products(shared), own.extras)
    assert torch.allclose(logits_of(bert), reference, atol=1e-11)


# ---------------------------------------------------------------------------------------------------- what is trained


def gradients(model, server, train, receive=None):
    active = model.activate(server, train, receive)
    model.logits(*batch(model)).square().sum().backward()
    return active, {name for name, value in model.network.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("depth", range(LAYERS + 1))
def test_gradients_exist_exactly_in_the_top_layers(model, depth):
    adapter = random_adapter(model, 4)
    train = AdapterSlice.top_layers(adapter.shape, depth)
    active, touched = gradients(model, ServerModel(adapter), train)
    above = {name for name, layer in adapter.layer.items() if layer >= LAYERS - depth}
    expected = {f"{name}.lora_{kind}.part0.weight" for name in above for kind in "AB"} | set(adapter.extras)
    assert touched == expected
    assert {owner for owner, kind, _ in active.trained() if kind != "extra"} == above
    assert all(tensor.grad is not None for _, _, tensor in active.trained())


def test_backward_has_nothing_to_do_below_the_lowest_trained_layer(bert):
    needs_gradient = {}

    def remember(layer):
        return lambda _, __, output: needs_gradient.update({layer: output.requires_grad})

    layers = enumerate(bert.network.bert.encoder.layer)
    hooks = [layer.register_forward_hook(remember(i)) for i, layer in layers]
    gradients(bert, ServerModel(random_adapter(bert)), AdapterSlice.top_layers(bert.shape, 1))
    for hook in hooks:
        hook.remove()
    assert needs_gradient == {0: False, 1: True}


@pytest.mark.parametrize("kind", ["A", "B"])
def test_a_frozen_factor_gets_no_gradient_but_acts(bert, kind):
    adapter = random_adapter(bert, 4)
    train = AdapterSlice.everything(adapter.shape, frozenset({kind}))
    active, touched = gradients(bert, ServerModel(adapter), train)
    assert touched == {f"{name}.lora_{kind}.part0.weight" for name in adapter.factors} | set(adapter.extras)
    assert {k for _, k, _ in active.trained()} == {kind, "extra"}
    shown = logits_of(bert)
    assert torch.allclose(shown, logits_of(bert, ServerModel(adapter)), atol=1e-12)


def test_a_frozen_head_gets_no_gradient(bert):
    train = AdapterSlice({name: np.arange(4) for name in bert.shape.slots}, extras=False)
    _, touched = gradients(bert, ServerModel(random_adapter(bert)), train)
    assert not touched & set(bert.shape.extras)


def test_nothing_to_train_needs_no_gradient(bert):
    active = bert.activate(ServerModel(random_adapter(bert)), NOTHING)
    assert list(active.trained()) == []
    assert not bert.logits(*batch(bert)).requires_grad


def test_the_server_keeps_its_own_tensors(bert):
    adapter = random_adapter(bert, 4)
    copies = [tensor.clone() for _, _, tensor in adapter.tensors()]
    active = bert.activate(ServerModel(adapter), AdapterSlice.everything(adapter.shape))
    with torch.no_grad():
        for _, _, tensor in active.trained():
            tensor.add_(1.0)
    assert all(torch.equal(tensor, copy) for (_, _, tensor), copy in zip(adapter.tensors(), copies, strict=True))
    for (_, _, now), (_, _, start) in zip(active.values().tensors(), active.start.tensors(), strict=True):
        assert torch.equal(now, start + 1)


def test_activation_forgets_the_client_before(bert):
    server = ServerModel(random_adapter(bert, 4))
    reference = logits_of(bert, server)
    active = bert.activate(server, AdapterSlice.sketch(bert.shape, 1, np.random.default_rng(0)))
    bert.logits(*batch(bert)).square().sum().backward()
    with torch.no_grad():
        for _, _, tensor in active.trained():
            tensor.fill_(float("nan"))
    assert torch.equal(logits_of(bert, server), reference)
    assert all(value.grad is None for value in bert.network.parameters())


# ------------------------------------------------------------------------------------------------------------ checks


def test_a_core_acts_between_the_factors_and_is_trained_alone(bert):
    adapter = random_adapter(bert, 4)
    draw = torch.Generator().manual_seed(5)
    cored = {s: replace(f, core=torch.randn(4, 4, generator=draw).to(f.A)) for s, f in adapter.factors.items()}
    folded = {s: LoraFactors(f.core @ f.A, f.B, f.scaling) for s, f in cored.items()}
    server = ServerModel(adapter.with_factors(cored))
    same = logits_of(bert, ServerModel(adapter.with_factors(folded)))
    assert torch.allclose(logits_of(bert, server), same, atol=1e-5)
    part = replace(AdapterSlice.everything(server.adapter.shape, frozenset()), extras=False)
    active = bert.activate(server, part)
    assert {kind for _, kind, _ in active.trained()} == {"core"}
    bert.logits(*batch(bert)).square().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.any() for _, _, tensor in active.trained())
    assert all(f.A.grad is None and f.B.grad is None for f in active.adapter.factors.values())


def test_adapters_that_do_not_fit_are_refused(bert):
    adapter = random_adapter(bert, 4)
    slot = next(iter(adapter.factors))
    f = adapter.factors[slot]
    with pytest.raises(ValueError, match="no LoRA layer"):
        bert.show(ServerModel(adapter, {"bert.pooler.dense": f}))
    with pytest.raises(ValueError, match="head"):
        bert.show(ServerModel(adapter.with_factors(adapter.factors, {})))
    other = federated("llama").initial_adapter(0)
    with pytest.raises(ValueError, match=r"head|no LoRA layer"):
        bert.show(ServerModel(other))


def test_making_a_model_does_not_move_the_global_generator():
    made = network("bert")
    before = torch.random.get_rng_state()
    FederatedModel(made, ModelConfig(name="random"), num_labels=CLASSES)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_device_and_precision_are_checked(monkeypatch):
    with pytest.raises(InputError, match=r"training\.device"):
        checked_device("gpu")
    with pytest.raises(InputError, match=r"training\.device"):
        checked_device("meta")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match=r"no 'cuda' here"):
        checked_device("cuda")
    with pytest.raises(InputError, match=r"training\.precision: unknown precision 'fp8'.*fp32"):
        checked_precision("fp8", torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    with pytest.raises(InputError, match="no bf16 instructions"):
        checked_precision("bf16", torch.device("cpu"))


def test_batches_reach_the_cpu_without_a_copy_and_a_gpu_through_pinned_memory(monkeypatch):
    arrays = {"input_ids": np.arange(6).reshape(2, 3), "labels": np.array([1, 0])}
    here = on_device(arrays, torch.device("cpu"))
    arrays["labels"][1] = 7
    assert here["labels"].tolist() == [1, 7]
    asked = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: asked.append("pinned") or self)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, device, non_blocking: asked.append((device, non_blocking)) or self
    )
    there = on_device(arrays, torch.device("cuda"))
    assert asked == ["pinned", (torch.device("cuda"), True)] * 2 and set(there) == set(arrays)


def test_bf16_keeps_adapters_in_single_precision(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    exact, model = federated("bert"), federated("bert", precision="bf16")
    adapter = random_adapter(exact, 4)
    active = model.activate(ServerModel(adapter), AdapterSlice.everything(adapter.shape))
    out = model.logits(*batch(model))
    assert out.dtype == torch.float32
    assert all(tensor.dtype == torch.float32 for _, _, tensor in active.trained())
    assert next(model.network.bert.embeddings.parameters()).dtype == torch.bfloat16
    out.square().sum().backward()
    assert all(bool(torch.isfinite(tensor.grad).all()) for _, _, tensor in active.trained())
    difference = (out.detach() - logits_of(exact, ServerModel(adapter))).abs().max()
    assert 0 < float(difference) < 0.05


# ----------------------------------------------------------------------------------------------------------- loading


def save(made, folder):
    made.save_pretrained(folder)
    return str(folder)


def test_loading_a_folder_gives_the_same_model(tmp_path):
    made = network("bert")
    loaded = load_model(ModelConfig(name=save(made.bert, tmp_path), rank=4), num_labels=CLASSES)
    adapter = random_adapter(loaded, 4)
    ours = FederatedModel(made, loaded.config, num_labels=CLASSES)
    assert torch.allclose(logits_of(loaded, ServerModel(adapter)), logits_of(ours, ServerModel(adapter)), atol=1e-6)


def test_a_head_in_the_file_is_kept_and_a_missing_one_is_drawn(tmp_path):
    made = network("bert")
    with_head = load_model(ModelConfig(name=save(made, tmp_path / "head")), num_labels=CLASSES)
    assert torch.equal(with_head.initial_adapter(1).extras["classifier.weight"], made.classifier.weight)
    without = load_model(ModelConfig(name=save(made.bert, tmp_path / "base")), num_labels=CLASSES)
    heads = [without.initial_adapter(seed).extras["classifier.weight"] for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    other_size = load_model(ModelConfig(name=str(tmp_path / "head")), num_labels=CLASSES + 2)
    assert other_size.initial_adapter(1).extras["classifier.weight"].shape[0] == CLASSES + 2


def test_loading_is_silent_and_leaves_the_global_generator(tmp_path, capfd):
    folder = save(network("bert").bert, tmp_path)
    capfd.readouterr()
    before = torch.random.get_rng_state()
    load_model(ModelConfig(name=folder), num_labels=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")


def test_causal_model_loads_with_its_own_head(tmp_path):
    made = network("llama", "causal-lm")
    loaded = load_model(ModelConfig(name=save(made, tmp_path), task="causal-lm"))
    assert logits_of(loaded).shape[-1] == made.config.vocab_size
    assert loaded.initial_adapter(0).extras == {}


def test_loading_errors_are_one_line(tmp_path):
    with pytest.raises(InputError, match=r"model\.name"):
        load_model(ModelConfig(name=str(tmp_path / "nowhere")), num_labels=2)
    made = network("bert")
    broken = {name: value for name, value in made.state_dict().items() if "layer.0.attention.self.query" not in name}
    made.save_pretrained(tmp_path / "broken", state_dict=broken)
    with pytest.raises(InputError, match=r"lack bert\.encoder\.layer\.0\.attention\.self\.query") as error:
        load_model(ModelConfig(name=str(tmp_path / "broken")), num_labels=CLASSES)
    assert "\n" not in str(error.value)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text(made.config.to_json_string())
    with pytest.raises(InputError, match=r"model\.name: cannot load"):
        load_model(ModelConfig(name=str(tmp_path / "empty")), num_labels=CLASSES)


@pytest.mark.skipif(not is_fetched(catalogue()["minilm"]), reason="minilm is not in the cache (airtune fetch minilm)")
def test_minilm_loads_with_every_weight():
    model = load_model(ModelConfig(name="minilm"), num_labels=2)
    assert len(model.shape.slots) == 12 and model.shape.num_layers == 6
    total = sum(value.numel() for name, value in model.network.named_parameters() if ".lora_" not in name)
    assert total == 22_713_216 + 2 * 384 + 2
