"""Bottleneck adapters: the formula, slices that add up, FLOPs, one's own folder, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from airtune.compression.dense import Dense
from airtune.devices.latency import TransformerShape, backward_flops, forward_flops, rank_table
from airtune.errors import InputError
from airtune.experiment.combinations import check_combination
from airtune.lora import AdapterSlice
from airtune.methods import method_class
from airtune.training.evaluation import score
from airtune.training.export import export_adapter, export_kind
from airtune.training.local import LocalTrainer
from airtune.training.saved import open_adapter
from airtune.training.shapes import FAMILIES, ModelConfig
from airtune.types import ClientTask, LocalTraining, ServerModel, TrainingJob
from tiny_networks import CLASSES, LAYERS, WIDTH, federated, network, random_adapter, rows, tokens

SQUARE = [family for family in FAMILIES if family not in ("qwen3", "gemma")]


@pytest.fixture(scope="module")
def model():
    return federated(adapter="bottleneck", precision="fp64")


@pytest.fixture
def server(model):
    return ServerModel(random_adapter(model, 4))


def logits(model, batch=None):
    batch = rows(model.config.task).batch(np.arange(6)) if batch is None else batch
    with torch.no_grad():
        return model.output({name: torch.from_numpy(values) for name, values in batch.items()})


def by_hand(server, seed=0):
    """Return a plain network in which the formula is written out."""
    made = network(seed=seed).double()
    with torch.no_grad():
        for name, value in server.adapter.extras.items():
            made.get_parameter(name).copy_(value)
    for name, slots in server.adapter.placement.items():
        dense, f = made.get_submodule(name), server.adapter.factors[slots[0]]

        def behind(module, args, y, f=f):
            return y + f.scaling * torch.relu(y @ f.A.T) @ f.B.T

        dense.register_forward_hook(behind)
    return made


@pytest.mark.parametrize("family", SQUARE)
def test_it_stands_behind_the_attentions_output_and_begins_as_nothing(family):
    made = federated(family, adapter="bottleneck")
    for slot in made.shape.slots.values():
        assert slot.in_features == slot.out_features == WIDTH
    assert len(made.shape.slots) == LAYERS
    bare = federated(family)
    bare.show(ServerModel(bare.initial_adapter(0)))
    made.show(ServerModel(replace(made.initial_adapter(0), extras=bare.initial_adapter(0).extras)))
    assert torch.equal(logits(made), logits(bare))
    made.show(ServerModel(random_adapter(made)))
    assert not torch.allclose(logits(made), logits(bare), atol=1e-3)


def test_the_formula(model, server):
    model.show(server)
    rows = tokens().batch(np.arange(6))
    ids, mask = torch.from_numpy(rows["input_ids"]), torch.from_numpy(rows["attention_mask"])
    with torch.no_grad():
        expected = by_hand(server)(input_ids=ids, attention_mask=mask).logits
    assert torch.allclose(logits(model), expected, atol=1e-10)


def test_trained_and_frozen_components_add_up_and_absent_ones_do_nothing(model, server):
    model.show(server)
    whole = logits(model)
    part = AdapterSlice.truncation(model.shape, 2)
    model.activate(server, replace(part, outside="frozen"))
    assert torch.allclose(logits(model), whole, atol=1e-12)
    model.activate(server, part)
    assert not torch.allclose(logits(model), whole, atol=1e-3)
    model.show(server)
    assert torch.equal(logits(model), whole)  # nothing of the last client is left


def test_training_moves_what_is_trained_and_lowers_the_loss(model, server):
    train = AdapterSlice.top_layers(model.shape, 1, "frozen")
    everything = AdapterSlice.everything(model.shape)
    training = LocalTraining(local_steps=30, batch_size=8, learning_rate=0.02, lora_dropout=0.1)
    task = ClientTask(0, everything, train, train, training, Dense(), 1e5, 0.1)
    trainer = LocalTrainer(model, tokens(), [np.arange(40)], seed=0)
    first = trainer.train([TrainingJob(task, server, 1, 0)])[0]
    again = trainer.train([TrainingJob(task, server, 1, 0)])[0]
    assert all(
        torch.equal(a, b) for (_, _, a), (_, _, b) in zip(first.values.tensors(), again.values.tensors(), strict=True)
    )
    after = ServerModel(train.put(server.adapter, first.values))
    assert score(model, after, tokens()).metrics()["loss"] < 0.9 * score(model, server, tokens()).metrics()["loss"]
    lowest = next(name for name, slot in model.shape.slots.items() if slot.layer == 0)
    assert torch.equal(after.adapter.factors[lowest].B, server.adapter.factors[lowest].B)


def test_the_cost_model_counts_what_torch_executes():
    made = federated(adapter="bottleneck")
    made.network.set_attn_implementation("eager")
    shape = TransformerShape.from_config(made.config_json)
    ids = torch.randint(2, 61, (8, 24), generator=torch.Generator().manual_seed(0))
    for depth in range(1, LAYERS + 1):
        made.activate(ServerModel(random_adapter(made)), AdapterSlice.top_layers(made.shape, depth, "absent"))
        with FlopCounterMode(display=False) as forward:
            loss = made.logits(ids, torch.ones_like(ids)).square().mean()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        trained = rank_table(shape, {n: 4 * (s.layer >= LAYERS - depth) for n, s in made.shape.slots.items()})
        expected = forward_flops(shape, trained, 24, 8, "classification", CLASSES)
        assert float(expected) == pytest.approx(forward.get_total_flops(), rel=0.01)
        expected = backward_flops(shape, trained, 24, 8, "classification", CLASSES)
        assert float(expected) == pytest.approx(backward.get_total_flops(), rel=0.02)


def test_the_folder_opens_without_a_federation(tmp_path):
    made = federated(adapter="bottleneck")
    single = ServerModel(random_adapter(made, 4))
    made.show(single)
    assert export_kind(made) == "airtune"
    export_adapter(made, single, tmp_path / "adapter")
    network().bert.save_pretrained(tmp_path / "base")
    opened = open_adapter(tmp_path / "adapter", base=str(tmp_path / "base"))
    assert torch.allclose(logits(opened), logits(made), atol=1e-6)


def test_what_has_no_meaning_is_refused(model, server):
    with pytest.raises(InputError, match="square"):
        federated(adapter="bottleneck", target_modules=("intermediate.dense",))
    name = next(iter(server.adapter.factors))
    with pytest.raises(ValueError, match="merged"):
        model.show(ServerModel(server.adapter, base_update={name: server.adapter.factors[name]}))
    bottleneck = ModelConfig(adapter="bottleneck")
    for name in ("fedadapter", "fedit", "fedra", "hierfedlora", "legend", "fslora"):
        check_combination(bottleneck, method_class(name)(), name)
    for name in ("flora", "flexlora", "fedex-lora", "hetlora", "lora-fair", "fedsvd", "ffa-lora", "fed-sb"):
        with pytest.raises(InputError, match=r"model\.adapter: bottleneck"):
            check_combination(bottleneck, method_class(name)(), name)
    with pytest.raises(InputError, match=r"model\.adapter: bottleneck"):
        check_combination(bottleneck, method_class("legend")(variant="C"), "legend")
    with pytest.raises(InputError, match=r"training\.optimizer: bottleneck"):
        check_combination(bottleneck, method_class("fedit")(training=LocalTraining(optimizer="lora-rite")), "fedit")
