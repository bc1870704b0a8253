"""MoLE: gates against a dense reference, one expert alone is plain LoRA, frozen experts stay, the export opens."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from airtune.compression.dense import Dense
from airtune.deploy.jobs import pack_job, unpack_job
from airtune.errors import InputError
from airtune.lora import NEITHER, Adapter, AdapterSlice
from airtune.training.export import export_adapter, export_kind
from airtune.training.gates import gate_names, is_gate
from airtune.training.local import LocalTrainer
from airtune.training.model import FederatedModel
from airtune.training.mole import balance
from airtune.training.saved import open_adapter
from airtune.training.shapes import ModelConfig, adapter_shape
from airtune.types import BalancePenalty, ClientTask, LocalTraining, ServerModel, TrainingJob
from tiny_networks import CLASSES, WIDTH, federated, network, random_adapter, tokens

ROWS = [np.arange(0, 14), np.arange(14, 26), np.arange(26, 40)]
EXPERTS = 3
FAMILIES = ["bert", "roberta", "mpnet", "distilbert", "electra", "gpt2", "gpt_neox", "llama", "qwen3", "gemma"]


def gated(model, seed=4):
    """Return a server's model of which neither a factor nor a gate is zero; e is large, as a score is a mean."""
    adapter = random_adapter(model, seed)
    draw = torch.Generator().manual_seed(seed + 2)
    extras = {
        name: 0.3 * value.shape[-1] * torch.randn(value.shape, generator=draw, dtype=value.dtype)
        if is_gate(name)
        else value
        for name, value in adapter.extras.items()
    }
    return ServerModel(adapter.with_factors(adapter.factors, extras))


def batch(count=6):
    arrays = tokens(count).batch(range(count))
    return tuple(torch.from_numpy(arrays[name]) for name in ("input_ids", "attention_mask"))


def logits(model, server, ids=None, mask=None):
    model.show(server)
    if ids is None:
        ids, mask = batch()
    with torch.no_grad():
        return model.logits(ids, mask)


def expert_slice(adapter, expert, **fields):
    shape = adapter.shape
    kept = {slots[expert]: np.arange(shape.slots[slots[expert]].rank) for slots in adapter.placement.values()}
    return AdapterSlice(kept, **fields)


def job_of(server, train=None, client=0, **training):
    train = AdapterSlice.everything(server.adapter.shape) if train is None else train
    whole = AdapterSlice.everything(server.adapter.shape)
    settings = LocalTraining(**{"local_steps": 4, "batch_size": 4, "learning_rate": 0.01, **training})
    return TrainingJob(ClientTask(client, whole, train, train, settings, Dense(), 1e5, 0.1), server, 1)


@pytest.fixture(scope="module")
def exact():
    return federated("bert", precision="fp64", adapter="mole", experts=EXPERTS)


# ---------------------------------------------------------------------------------------------------------- the gates


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_computes_what_dense_matrices_say(family):
    """Every adapted module of every family, from its own input: dense products, gates by the docstring's formula."""
    model = federated(family, precision="fp64", adapter="mole", experts=EXPERTS)
    server = gated(model)
    ids, mask = batch()
    seen = {}

    def keep(name):
        return lambda module, inputs, output: seen.update({name: (inputs[0], output, module.base_layer(inputs[0]))})

    handles = [model.network.get_submodule(m).register_forward_hook(keep(m)) for m in server.adapter.placement]
    logits(model, server, ids, mask)
    for handle in handles:
        handle.remove()
    gates = {}
    for module, slots in server.adapter.placement.items():
        x, output, base = seen[module]
        products = [server.adapter.factors[slot].product() for slot in slots]
        layer = server.adapter.layer[slots[0]]
        if layer not in gates:
            mean = torch.stack([row[kept.bool()].mean(dim=0) for row, kept in zip(x, mask, strict=True)])
            o = torch.cat([mean @ product.T for product in products], dim=1)
            o = o / (o.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
            weight, temperature = (server.adapter.extras[name] for name in gate_names(layer))
            gates[layer] = functional.softmax(o @ weight.T / o.shape[1] / temperature.exp(), dim=1)
            assert torch.allclose(gates[layer].sum(dim=1), torch.ones(len(x), dtype=x.dtype))
            assert gates[layer].std(dim=0).min() > 1e-4  # they depend on the text
        wanted = base + sum(gates[layer][:, e, None, None] * (x @ p.T) for e, p in enumerate(products))
        assert torch.allclose(output, wanted, atol=1e-10)
    assert len(gates) == 2


def test_gates_do_not_see_padding(exact):
    server = gated(exact)
    ids, mask = batch()
    alone = torch.cat(
        [logits(exact, server, row[None, : m.sum()], m[None, : m.sum()]) for row, m in zip(ids, mask, strict=True)]
    )
    longer = [functional.pad(t, (0, 5)) for t in (ids, mask)]
    assert torch.allclose(logits(exact, server, ids, mask), alone, atol=1e-10)
    assert torch.allclose(logits(exact, server, *longer), alone, atol=1e-10)


def test_fresh_gates_are_equal_and_cost_what_the_shape_says():
    model = federated("bert", precision="fp64", adapter="mole", experts=EXPERTS)
    server = ServerModel(random_adapter(model, 4))
    plain = federated("bert", precision="fp64")
    mean = {
        module: [replace(server.adapter.factors[s], scaling=server.adapter.factors[s].scaling / EXPERTS) for s in slots]
        for module, slots in server.adapter.placement.items()
    }
    flat = {f"{module}/{i}": f for module, parts in mean.items() for i, f in enumerate(parts)}
    placement = {module: tuple(f"{module}/{i}" for i in range(EXPERTS)) for module in mean}
    head = {name: value for name, value in server.adapter.extras.items() if not is_gate(name)}
    layer = dict.fromkeys(flat, 0)
    other = ServerModel(Adapter(flat, placement, layer, 2, head))
    assert torch.allclose(logits(model, server), logits(plain, other), atol=1e-12)
    for name, size in model.shape.extras.items():
        assert tuple(server.adapter.extras[name].shape) == size
    assert model.shape.extras["layer1.gate"] == (EXPERTS, EXPERTS * WIDTH)
    values = AdapterSlice.everything(model.shape).num_values(model.shape)
    gates = 2 * (EXPERTS * EXPERTS * WIDTH + 1)
    assert values == EXPERTS * 2 * 2 * 4 * 2 * WIDTH + gates + CLASSES * WIDTH + CLASSES


def test_absent_experts_leave_the_others_with_gates_that_sum_to_one(exact):
    server = gated(exact)
    shape = server.adapter.shape
    kept = {s: np.arange(4) for slots in server.adapter.placement.values() for s in (slots[0], slots[2])}
    active = exact.activate(server, AdapterSlice(kept))
    ids, mask = batch()
    exact.logits(ids, mask)
    for router in active.routers:
        assert torch.all(router.now[:, 1] == 0) and torch.all(router.now[:, [0, 2]] > 0)
        assert torch.allclose(router.now.sum(dim=1), torch.ones(len(ids), dtype=torch.float64))
    assert len(active.routers) == 2 and len(shape.slots) == 4 * EXPERTS


@pytest.mark.parametrize("expert", range(EXPERTS))
def test_an_expert_alone_is_plain_lora(exact, expert):
    """Trained values are those of the plain twin; the gates get a gradient of zero."""
    server = gated(exact)
    train = expert_slice(server.adapter, expert)
    found = LocalTrainer(exact, tokens(), ROWS, seed=7).train([job_of(server, train)])[0]
    plain = federated("bert", precision="fp64")
    factors = {m: server.adapter.factors[slots[expert]] for m, slots in server.adapter.placement.items()}
    head = {name: value for name, value in server.adapter.extras.items() if not is_gate(name)}
    same = ServerModel(plain.initial_adapter(0).with_factors(factors, head))
    wanted = LocalTrainer(plain, tokens(), ROWS, seed=7).train([job_of(same)])[0]
    for module, slots in server.adapter.placement.items():
        for kind in ("A", "B"):
            ours = getattr(found.values.factors[slots[expert]], kind)
            assert torch.allclose(ours, getattr(wanted.values.factors[module], kind), atol=1e-9)
    assert set(found.values.factors) == set(train.components)
    for name, value in server.adapter.extras.items():
        if is_gate(name):
            assert torch.equal(found.values.extras[name], value)
        else:
            assert torch.allclose(found.values.extras[name], wanted.values.extras[name], atol=1e-9)


# ----------------------------------------------------------------------------------------------------- their training


def test_training_the_gates_leaves_the_experts_and_lowers_the_loss(exact):
    server = gated(exact)
    gates = replace(AdapterSlice.everything(server.adapter.shape), tensors=NEITHER)
    job = job_of(server, gates, local_steps=30, batch_size=14, learning_rate=0.02)
    trainer = LocalTrainer(exact, tokens(), ROWS, seed=7)
    found = trainer.train([job])[0].values
    assert all(torch.equal(found.factors[s].A, f.A) for s, f in server.adapter.factors.items())
    assert all(torch.equal(found.factors[s].B, f.B) for s, f in server.adapter.factors.items())
    moved = [name for name, value in server.adapter.extras.items() if not torch.equal(found.extras[name], value)]
    assert set(moved) == set(server.adapter.extras)

    def loss(extras):
        exact.show(ServerModel(server.adapter.with_factors(server.adapter.factors, extras)))
        with torch.no_grad():
            return float(trainer._loss(trainer.tokens.batch(ROWS[0])))

    only_gates = {n: found.extras[n] if is_gate(n) else v for n, v in server.adapter.extras.items()}
    assert loss(found.extras) < loss(server.adapter.extras) - 0.1
    assert loss(only_gates) != loss(server.adapter.extras)


@pytest.mark.parametrize("wide", [WIDTH, 3 * WIDTH])
def test_steps_of_adam_move_scores_by_the_learning_rate_and_not_by_the_width(wide):
    """Else gates of an ordinary width are at 0 or 1 after a few steps at the rate of a head."""
    config = ModelConfig(name="random", rank=4, alpha=8.0, adapter="mole", experts=EXPERTS)
    model = FederatedModel(network("bert", hidden_size=wide), config, num_labels=CLASSES, precision="fp64")
    server = ServerModel(random_adapter(model, 4))
    gates = replace(AdapterSlice.everything(server.adapter.shape), tensors=NEITHER)
    steps, rate = 4, 0.03
    job = job_of(server, gates, local_steps=steps, head_learning_rate=rate)
    found = LocalTrainer(model, tokens(), ROWS, seed=7).train([job])[0].values
    active = model.activate(ServerModel(server.adapter.with_factors(server.adapter.factors, found.extras)), gates)
    model.logits(*batch())
    for router in active.routers:
        logs = router.now.detach().log()
        ratios = logs.amax(dim=1) - logs.amin(dim=1)
        assert 0.0 < float(ratios.max()) < 2 * steps * rate * 1.5


def test_gradients_of_the_gates_are_those_of_finite_differences(exact):
    server = gated(exact)
    gates = replace(AdapterSlice.everything(server.adapter.shape), tensors=NEITHER)
    trainer = LocalTrainer(exact, tokens(), ROWS, seed=7)

    def total(adapter):
        active = exact.activate(ServerModel(adapter), gates)
        loss = trainer._loss(trainer.tokens.batch(ROWS[1])) + 0.5 * balance(active.routers)
        return loss, active

    loss, active = total(server.adapter)
    loss.backward()
    for name in ("layer0.gate", "layer1.gate_log_temperature"):
        gradient, value = active.adapter.extras[name].grad, server.adapter.extras[name]
        direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(1), dtype=value.dtype)
        both = []
        for sign in (1, -1):
            extras = {**server.adapter.extras, name: value + sign * 1e-5 * direction}
            with torch.no_grad():
                both.append(float(total(server.adapter.with_factors(server.adapter.factors, extras))[0]))
        assert (both[0] - both[1]) / 2e-5 == pytest.approx(float((gradient * direction).sum()), rel=1e-5)


def test_the_balance_is_least_at_equal_gates_and_evens_them_out(exact):
    server = ServerModel(random_adapter(exact, 4))
    whole = AdapterSlice.everything(server.adapter.shape)
    active = exact.activate(server, whole)
    exact.logits(*batch())
    assert balance(active.routers).item() == pytest.approx(EXPERTS * np.log(EXPERTS))
    gates = replace(whole, tensors=NEITHER)
    trainer = LocalTrainer(exact, tokens(), ROWS, seed=7)

    def trained(start, weight, steps):
        job = job_of(start, gates, local_steps=steps, learning_rate=0.1, penalties=(BalancePenalty(weight),))
        extras = trainer.train([job])[0].values.extras
        return ServerModel(start.adapter.with_factors(start.adapter.factors, extras))

    def spread_of(model):
        active = exact.activate(model, whole)
        exact.logits(*batch())
        return balance(active.routers).item()

    skewed = trained(server, -5.0, 20)
    spread = [spread_of(trained(skewed, weight, 40)) for weight in (0.0, 50.0)]
    assert EXPERTS * np.log(EXPERTS) <= spread[1] < EXPERTS * np.log(EXPERTS) + 0.3 < spread[0]
    plain = federated("bert")
    other = LocalTrainer(plain, tokens(), ROWS, seed=7)
    first = ServerModel(random_adapter(plain, 4))
    with_term = other.train([job_of(first, penalties=(BalancePenalty(1.0),))])[0].values
    assert torch.equal(
        with_term.extras["classifier.weight"], other.train([job_of(first)])[0].values.extras["classifier.weight"]
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_clients_do_not_see_one_another(precision):
    model = federated("bert", precision=precision, adapter="mole")
    server = gated(model)
    trainer = LocalTrainer(model, tokens(), ROWS, seed=7)
    first = trainer.train([job_of(server)])[0]
    alone = job_of(server, expert_slice(server.adapter, 1), client=1)
    again = trainer.train([alone, job_of(server, client=2), job_of(server)])[2]
    for (_, _, a), (_, _, b) in zip(first.values.tensors(), again.values.tensors(), strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------ exports and refusals


def test_the_folder_opens_with_the_same_logits(tmp_path):
    network("bert").save_pretrained(tmp_path / "base")
    config = ModelConfig(name=str(tmp_path / "base"), rank=4, alpha=8.0, adapter="mole", experts=EXPERTS)
    model = FederatedModel(network("bert"), config, num_labels=CLASSES)
    server = gated(model)
    assert export_kind(model) == "airtune"
    export_adapter(model, server, tmp_path / "adapter")
    opened = open_adapter(tmp_path / "adapter")
    ids, mask = batch()
    wanted = logits(model, server, ids, mask)
    with torch.no_grad():
        assert torch.allclose(opened.logits(ids, mask), wanted, atol=1e-5)
        direct = opened.network(input_ids=ids, attention_mask=mask).logits
    assert torch.allclose(direct, wanted, atol=1e-5) and not any(p.requires_grad for p in opened.network.parameters())
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"model\.name"):
        open_adapter(tmp_path / "adapter")
    moved = open_adapter(tmp_path / "adapter", base=str(tmp_path / "moved"))
    with torch.no_grad():
        assert torch.allclose(moved.logits(ids, mask), wanted, atol=1e-5)
    with pytest.raises(InputError, match=r"no adapter of airtune's own"):
        open_adapter(tmp_path / "moved")


def test_what_it_refuses():
    with pytest.raises(InputError, match=r"model\.experts: 1 leaves nothing to choose from"):
        ModelConfig(adapter="mole", experts=1)
    with pytest.raises(InputError, match=r"model\.adapter: mole's gates see the whole text"):
        ModelConfig(adapter="mole", task="causal-lm")
    config = {"model_type": "roberta", "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16}
    shape = adapter_shape(config, ModelConfig(adapter="mole", rank=2, experts=4), 2)
    assert len(shape.slots) == 2 * 2 * 4


def test_a_job_with_gates_travels_to_a_device_and_trains_the_same(exact):
    server = gated(exact)
    gates = replace(AdapterSlice.everything(server.adapter.shape), tensors=NEITHER)
    job = job_of(server, gates, penalties=(BalancePenalty(0.5),))
    trainer = LocalTrainer(exact, tokens(), ROWS, seed=7)
    here, there = (trainer.train([each])[0] for each in (job, unpack_job(pack_job(job))))
    assert here.reports == there.reports
    for (_, _, a), (_, _, b) in zip(here.values.tensors(), there.values.tensors(), strict=True):
        assert torch.equal(a, b)


def test_gates_see_the_same_texts_over_a_stored_prefix():
    """With the adapter in the last layer only, the states of the first may be stored: the gates do not notice."""
    plain = federated("bert", precision="fp64", adapter="mole", experts=EXPERTS, top_layers=1)
    server = gated(plain)
    wanted = logits(plain, server)
    plain.cache_prefix(1e6)
    assert torch.allclose(logits(plain, server), wanted, atol=1e-10) and plain.prefix.depth == 1
    assert plain.prefix.computed == 6 and list(plain.shape.extras)[-1] == "layer1.gate_log_temperature"
