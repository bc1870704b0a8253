"""MSPLoRA: shared parts act in every layer, are trained by all of them, and are counted once."""

from dataclasses import replace

import numpy as np
import peft
import pytest
import torch

from aggregation_examples import outcome, relative, update
from airtune.aggregation.mean import Mean
from airtune.aggregation.stacking import Stacking
from airtune.compression.dense import Dense
from airtune.devices.latency import TransformerShape
from airtune.devices.profiles import load_profile
from airtune.errors import InputError
from airtune.federation import Stop, begin, run
from airtune.lora import ONLY_B, AdapterSlice
from airtune.methods.fedex_lora import FedExLoRA
from airtune.methods.fedit import FedIT
from airtune.methods.flexlora import FlexLoRA
from airtune.methods.flora import FLoRA
from airtune.methods.hierfedlora import HierFedLoRA
from airtune.simulation.cell import Cell
from airtune.simulation.costs import CostModel
from airtune.simulation.fleet import fleet_of
from airtune.simulation.runner import SimulatedRunner
from airtune.training.export import export_adapter
from airtune.training.local import LocalTrainer
from airtune.training.shapes import ModelConfig, adapter_shape, placement_of
from airtune.types import ClientTask, LocalTraining, ServerModel, TrainingJob
from tiny_networks import WIDTH, federated, network, random_adapter, tokens

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
ROWS = [np.arange(0, 14), np.arange(14, 26), np.arange(26, 40)]
ROBERTA = {"model_type": "roberta", "num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072}
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
}


def job_of(server, client=0, tensors=frozenset({"A", "B"}), **training):
    whole = AdapterSlice.everything(server.adapter.shape, tensors)
    settings = LocalTraining(**{"local_steps": 4, "batch_size": 4, "learning_rate": 0.01, **training})
    return TrainingJob(ClientTask(client, whole, whole, whole, settings, Dense(), 1e5, 0.1), server, 1)


def logits(model, server):
    arrays = tokens(6).batch(range(6))
    model.show(server)
    with torch.no_grad():
        return model.logits(*(torch.from_numpy(arrays[name]) for name in ("input_ids", "attention_mask")))


@pytest.fixture(scope="module")
def exact():
    return federated("bert", precision="fp64", adapter="msp-lora")


@pytest.mark.parametrize(
    ("config", "task", "rank", "values"),
    [(ROBERTA, "sequence-classification", 8, 135_168), (LLAMA, "causal-lm", 64, 11_010_048)],
)
def test_shared_slots_are_counted_once(config, task, rank, values):
    """The sizes of RoBERTa-base and LLaMA-2-7B on query and value: 46 % and 33 % of LoRA's."""
    shape = adapter_shape(config, ModelConfig(rank=rank, task=task, adapter="msp-lora"), 2)
    head = shape.extra_values
    assert AdapterSlice.everything(shape).num_values(shape) - head == values
    depth = config["num_hidden_layers"]
    placement = placement_of(shape)
    assert len(placement) == 2 * depth and all(len(slots) == 3 for slots in placement.values())
    by_layer = [shape.slots[placement[module][2]].layer for module in placement]
    assert sorted(by_layer) == sorted([*range(depth), *range(depth)])
    sizes = sorted(len(slot.modules) for slot in shape.slots.values() if slot.rank == rank // 2)
    assert sum(sizes) == 2 * depth and len(sizes) == 6 and max(sizes) - min(sizes) <= 1


def test_every_layer_hears_the_shared_parts(exact):
    """The public code's shared adapters act in their first layer only; each module is asked with the same input."""
    server = ServerModel(random_adapter(exact, 4))
    torch.manual_seed(0)
    inputs = torch.randn(2, 5, WIDTH, dtype=torch.float64)

    def outputs(adapter):
        exact.show(ServerModel(adapter))
        with torch.no_grad():
            return {name: exact.network.get_submodule(name)(inputs) for name in server.adapter.placement}

    before = outputs(server.adapter)
    for slot, f in server.adapter.factors.items():
        after = outputs(server.adapter.with_factors({**server.adapter.factors, slot: replace(f, A=f.A + 0.1)}))
        heard = {name for name in before if not torch.equal(before[name], after[name])}
        assert heard == {*server.adapter.shape.slots[slot].modules}
    assert any(len(slot.modules) == 2 for slot in server.adapter.shape.slots.values())


def test_a_step_moves_shared_parts_by_the_sum_over_their_layers(exact):
    """Gradients of s (sum of B A) in each module, by autograd on dense weights, summed over the modules of a slot."""
    server = ServerModel(random_adapter(exact, 4))
    trainer = LocalTrainer(exact, tokens(), ROWS, seed=7)
    job = job_of(server, local_steps=1, optimizer="sgd", learning_rate=0.1)
    values = trainer.train([job])[0].values
    plain = federated("bert", precision="fp64")
    zero = plain.initial_adapter(0)
    plain.show(ServerModel(replace(zero, extras=server.adapter.extras)))
    weights = {}
    for module in server.adapter.placement:
        weight = plain.network.get_submodule(module).base_layer.weight
        weight.data += server.adapter.module_product(module)
        weights[module] = weight.requires_grad_(True)
    other = LocalTrainer(plain, trainer.tokens, ROWS, seed=7)
    (indices,) = other.batches(job)
    loss = other._loss(trainer.tokens.batch(indices))
    gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
    for slot, f in server.adapter.factors.items():
        total = sum(gradients[module] for module in server.adapter.shape.slots[slot].modules)
        assert torch.allclose(values.factors[slot].A, f.A - 0.1 * f.scaling * f.B.T @ total, atol=1e-12)
        assert torch.allclose(values.factors[slot].B, f.B - 0.1 * f.scaling * total @ f.A.T, atol=1e-12)


@pytest.mark.parametrize(("rule", "tensors"), [(Mean(), ONLY_B), (Stacking(), frozenset({"A", "B"}))])
def test_exact_rules_are_exact_in_every_module(exact, rule, tensors):
    server = ServerModel(exact.initial_adapter(0))
    jobs = [job_of(server, client, tensors, learning_rate=0.03) for client in range(3)]
    results = LocalTrainer(exact, tokens(), ROWS, seed=7).train(jobs)
    sent = [update(job.task, r.values) for job, r in zip(jobs, results, strict=True)]
    after = rule(server, outcome(sent, [len(rows) for rows in ROWS]))
    for module in server.adapter.placement:
        wanted = sum(len(ROWS[u.task.client]) / 40 * u.values.module_product(module) for u in sent)
        got = after.adapter.module_product(module)
        got = got + after.base_update[module].product() if after.base_update else got
        assert relative(got - wanted, wanted) < 1e-6


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_peft_opens_it_with_the_same_logits(family, tmp_path):
    model = federated(family, adapter="msp-lora")
    server = ServerModel(random_adapter(model, 4))
    export_adapter(model, server, tmp_path / "adapter")
    base = network(family)
    base.config.pad_token_id = model.pad_token_id
    opened = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    arrays = tokens(6).batch(range(6))
    ids, mask = torch.from_numpy(arrays["input_ids"]), torch.from_numpy(arrays["attention_mask"])
    with torch.no_grad():
        theirs = opened(input_ids=ids.masked_fill(mask == 0, model.pad_token_id), attention_mask=mask).logits
    assert (logits(model, server) - theirs).abs().max() <= 1e-5


METHODS = [FedIT(), FLoRA(), FlexLoRA(), FedExLoRA(), HierFedLoRA()]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_methods_carry_it(method):
    model = federated("bert", adapter="msp-lora")
    method = replace(method, training=LocalTraining(local_steps=2, batch_size=4, learning_rate=0.01))
    counts = np.array([[len(rows) // 2, len(rows) - len(rows) // 2] for rows in ROWS])
    fleet = fleet_of([load_profile("jetson-tx2")] * 3, np.array([len(rows) for rows in ROWS]), counts)
    network_shape = TransformerShape.from_config(model.config_json)
    costs = CostModel(fleet, model.shape, network_shape, tokens=np.full(3, 8.0), constant_bytes=0.0)
    cell = Cell(nominal=fleet, costs=costs, seed=0, downlink="unicast")
    runner = SimulatedRunner(cell, cell.costs, LocalTrainer(model, tokens(), ROWS, 0), 0)
    first = begin(method, ServerModel(model.initial_adapter(0)), cell)
    after, record = list(run(method, first, cell, runner, stop=Stop(2), seed=0, evaluate=lambda m: {"loss": 0.0}))[-1]
    assert after.model.version == 2 and len(record.arrived) == 3
    if isinstance(method, FedIT):  # query and value: all 4, thirds 2 each in 2 layers, own 1 each in 2 layers
        values = 2 * WIDTH * 2 * (4 + 2 * 2 + 2 * 1) + model.shape.extra_values
        assert all(client.bits_up == client.bits_down == 32 * values for client in record.clients)


def test_what_it_refuses():
    with pytest.raises(InputError, match=r"model\.rank: msp-lora divides rank 3"):
        ModelConfig(rank=3, adapter="msp-lora")
    shape = adapter_shape(ROBERTA, ModelConfig(rank=8, adapter="msp-lora"), 2)
    same = {name: slot.rank for name, slot in shape.slots.items()}
    assert adapter_shape(ROBERTA, ModelConfig(rank=8, adapter="msp-lora"), 2, same) == shape
    with pytest.raises(InputError, match=r"model\.adapter: msp-lora has ranks of its own"):
        adapter_shape(ROBERTA, ModelConfig(rank=8, adapter="msp-lora"), 2, dict.fromkeys(same, 5))
