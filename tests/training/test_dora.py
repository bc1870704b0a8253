"""DoRA: PEFT's own layer as the oracle on a client, linear between clients, and loadable afterwards."""

from dataclasses import replace

import numpy as np
import peft
import pytest
import torch

from aggregation_examples import outcome, relative, update
from airtune.aggregation.mean import Mean
from airtune.aggregation.residual import ResidualMerge
from airtune.aggregation.stacking import Stacking
from airtune.compression.dense import Dense
from airtune.devices.latency import TransformerShape
from airtune.devices.profiles import load_profile
from airtune.errors import InputError
from airtune.federation import Stop, begin, run
from airtune.lora import ONLY_A, ONLY_B, AdapterSlice, LoraFactors
from airtune.methods.fedit import FedIT
from airtune.methods.fedsa_lora import FedSALoRA
from airtune.methods.ffa_lora import FFALoRA
from airtune.methods.flexlora import FlexLoRA
from airtune.methods.flora import FLoRA
from airtune.methods.hetlora import HetLoRA
from airtune.methods.rolora import RoLoRA
from airtune.simulation.cell import Cell
from airtune.simulation.costs import CostModel
from airtune.simulation.fleet import fleet_of
from airtune.simulation.runner import SimulatedRunner
from airtune.training.dora import row_norms
from airtune.training.evaluation import score
from airtune.training.export import export_adapter
from airtune.training.local import LocalTrainer
from airtune.training.losses import mean_loss
from airtune.training.shapes import ModelConfig, gain_name, is_gain
from airtune.types import ClientTask, LocalTraining, ProximalPenalty, ServerModel, TrainingJob
from tiny_networks import federated, network, random_adapter, tokens

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
ROWS = [np.arange(0, 14), np.arange(14, 26), np.arange(26, 40)]


def server_of(model, seed=4):
    """Return a model whose B are not zero and whose gains are not one."""
    adapter = random_adapter(model, seed)
    draw = torch.Generator().manual_seed(seed)
    extras = {
        name: 0.5 + torch.rand(value.shape, generator=draw, dtype=value.dtype) if is_gain(name) else value
        for name, value in adapter.extras.items()
    }
    return ServerModel(replace(adapter, extras=extras))


def job_of(server, client=0, train=None, **training):
    whole = AdapterSlice.everything(server.adapter.shape)
    train = whole if train is None else train
    settings = LocalTraining(**{"local_steps": 4, "batch_size": 4, "learning_rate": 0.01, **training})
    return TrainingJob(ClientTask(client, whole, train, train, settings, Dense(), 1e5, 0.1), server, 1)


def weight_of(model, server, module):
    """Return the dense weight of a module: diag(gain) W0, the adapter, and what was merged."""
    total = server.adapter.extras[gain_name(module)][:, None] * model.base_weight(module)
    total = total + server.adapter.module_product(module)
    merged = server.base_update.get(module)
    return total if merged is None else total + merged.product()


def logits(model, server):
    arrays = tokens(6).batch(range(6))
    ids, mask = torch.from_numpy(arrays["input_ids"]), torch.from_numpy(arrays["attention_mask"])
    model.show(server)
    with torch.no_grad():
        return model.logits(ids, mask)


@pytest.fixture(scope="module")
def exact():
    return federated("bert", precision="fp64", adapter="dora")


# ------------------------------------------------------------------------------------------------------------ one layer


def test_norms_need_no_dense_product():
    draw = torch.Generator().manual_seed(0)
    w, a, b = (torch.randn(*size, generator=draw, dtype=torch.float64) for size in ((6, 9), (3, 9), (6, 3)))
    assert torch.allclose(row_norms(w, LoraFactors(a, b, 1.7)), (w + 1.7 * b @ a).norm(dim=1))
    assert torch.equal(row_norms(torch.zeros(6, 9).double(), LoraFactors(a, 0 * b, 1.7)), torch.zeros(6).double())


@pytest.mark.parametrize(("family", "precision"), [("bert", "fp64"), ("gpt2", "fp64"), ("llama", "fp64")])
def test_it_is_the_dense_weight(family, precision):
    """The layers compute diag(gain) W0 + s B A, biases untouched; before round 1 that is the base model."""
    model = federated(family, precision=precision, adapter="dora")
    plain = federated(family, precision=precision)
    first = ServerModel(model.initial_adapter(0))
    assert all(torch.equal(v, torch.ones_like(v)) for n, v in first.adapter.extras.items() if is_gain(n))
    head = {name: v for name, v in first.adapter.extras.items() if not is_gain(name)}
    base = ServerModel(replace(plain.initial_adapter(0), extras=head))
    assert torch.allclose(logits(model, first), logits(plain, base), atol=1e-12)
    server = server_of(model)
    wanted = {module: weight_of(model, server, module) for module in server.adapter.factors}
    dense = federated(family, precision=precision)
    head = {name: v for name, v in server.adapter.extras.items() if not is_gain(name)}
    dense.show(ServerModel(replace(dense.initial_adapter(0), extras=head)))
    for module, weight in wanted.items():
        layer = dense.network.get_submodule(module)
        layer.base_layer.weight.data = weight.T.clone() if layer.fan_in_fan_out else weight.clone()
    with torch.no_grad():
        arrays = tokens(6).batch(range(6))
        ids, mask = torch.from_numpy(arrays["input_ids"]), torch.from_numpy(arrays["attention_mask"])
        assert torch.allclose(logits(model, server), dense.logits(ids, mask), atol=1e-10)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_local_training_is_that_of_peft(family, tmp_path):
    """SGD on A, B, magnitudes and head of PEFT's own DoRA model, from the exported folder."""
    model = federated(family, precision="fp64", adapter="dora")
    server = server_of(model)
    trainer = LocalTrainer(model, tokens(), ROWS, seed=7)
    job = job_of(server, optimizer="sgd", learning_rate=0.05)
    export_adapter(model, server, tmp_path / "adapter")
    base = network(family)
    base.config.pad_token_id = model.pad_token_id
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True).double().eval()
    step = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.05)
    for indices in trainer.batches(job):
        batch = {name: torch.from_numpy(values) for name, values in trainer.tokens.batch(indices).items()}
        ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, model.pad_token_id)
        step.zero_grad()
        mean_loss(theirs(input_ids=ids, attention_mask=batch["attention_mask"]).logits, batch["labels"]).backward()
        step.step()
    values = trainer.train([job])[0].values
    after = replace(server, adapter=job.task.train.put(server.adapter, values))
    arrays = tokens(6).batch(range(6))
    ids, mask = torch.from_numpy(arrays["input_ids"]), torch.from_numpy(arrays["attention_mask"])
    with torch.no_grad():
        wanted = theirs(input_ids=ids.masked_fill(mask == 0, model.pad_token_id), attention_mask=mask).logits
    moved = (logits(model, after) - logits(model, server)).abs().max()
    assert moved > 1e-2
    assert (logits(model, after) - wanted).abs().max() < 1e-5 * moved


def test_a_zero_row_of_the_base_stays_finite_and_trains(tmp_path):
    model = federated("bert", precision="fp64", adapter="dora")
    module = next(iter(model.shape.slots))
    model.network.get_submodule(module).base_layer.weight.data[3] = 0.0
    server = ServerModel(model.initial_adapter(0))
    values = LocalTrainer(model, tokens(), ROWS, seed=7).train([job_of(server, local_steps=8)])[0].values
    assert all(bool(torch.isfinite(tensor).all()) for _, _, tensor in values.tensors())
    assert values.extras[gain_name(module)][3] == 1.0
    assert values.factors[module].B[3].norm() > 0


# ----------------------------------------------------------------------------------------------------- slices, training


def test_gains_train_with_b_and_at_its_rate(exact):
    server, trainer = server_of(exact), LocalTrainer(exact, tokens(), ROWS, seed=7)
    whole = AdapterSlice.everything(server.adapter.shape)
    still = trainer.train([job_of(server, head_learning_rate=0.0)])[0].values
    for name, value in server.adapter.extras.items():
        assert torch.equal(still.extras[name], value) != is_gain(name)
    fixed = trainer.train([job_of(server, train=replace(whole, tensors=ONLY_A))])[0].values
    assert all(torch.equal(fixed.extras[n], v) for n, v in server.adapter.extras.items() if is_gain(n))
    top = trainer.train([job_of(server, train=AdapterSlice.top_layers(server.adapter.shape, 1))])[0].values
    for name, slot in server.adapter.shape.slots.items():
        same = torch.equal(top.extras[gain_name(name)], server.adapter.extras[gain_name(name)])
        assert same == (slot.layer == 0)


def test_a_client_that_learns_nothing_sends_what_it_got(exact):
    server, trainer = server_of(exact), LocalTrainer(exact, tokens(), ROWS, seed=7)
    before = {(owner, kind): tensor for owner, kind, tensor in server.adapter.tensors()}
    for fields in ({"learning_rate": 1e-30}, {"penalties": (ProximalPenalty(0.0),), "learning_rate": 1e-30}):
        values = trainer.train([job_of(server, optimizer="sgd", **fields)])[0].values
        assert all(torch.allclose(t, before[o, k], rtol=1e-12, atol=1e-14) for o, k, t in values.tensors())
    diverged = trainer.train([job_of(server, optimizer="sgd", learning_rate=1e300)])[0]
    assert np.isnan(diverged.reports["loss"])
    assert all(torch.equal(tensor, before[owner, kind]) for owner, kind, tensor in diverged.values.tensors())


@pytest.mark.parametrize("optimizer", ["adamw", "lora-rite", "lora-pro", "lora-plus"])
def test_it_learns_with_every_optimizer(optimizer):
    model = federated("bert", adapter="dora")
    trainer = LocalTrainer(model, tokens(), ROWS, seed=7)
    server = ServerModel(model.initial_adapter(0))
    rate = {"lora-plus": 1e-3, "lora-rite": 3e-2}.get(optimizer, 1e-2)
    job = job_of(server, local_steps=40, learning_rate=rate, optimizer=optimizer)
    values = trainer.train([job])[0].values
    after = replace(server, adapter=job.task.train.put(server.adapter, values))
    first, last = (score(model, each, trainer.tokens).metrics(ROWS[0])["loss"] for each in (server, after))
    assert last < 0.9 * first
    with pytest.raises(InputError, match="galore descends the weight itself"):
        trainer.train([job_of(server, train=replace(job.task.train, tensors=ONLY_B), optimizer="galore")])


# ------------------------------------------------------------------------------------------------------ between clients


def round_of(model, server, tensors, rounds=12):
    trainer = LocalTrainer(model, tokens(), ROWS, seed=7)
    part = AdapterSlice.everything(server.adapter.shape, tensors)
    jobs = [job_of(server, client, part, local_steps=rounds, learning_rate=0.03) for client in range(3)]
    results = trainer.train(jobs)
    return outcome([update(job.task, r.values) for job, r in zip(jobs, results, strict=True)], [len(r) for r in ROWS])


def mean_weight(model, server, result, module):
    parts = [
        len(ROWS[u.task.client]) / 40 * weight_of(model, replace(server, adapter=u.values), module)
        for u in result.updates
    ]
    return torch.stack(parts).sum(0)


@pytest.mark.parametrize(
    ("rule", "tensors"), [(Mean(), ONLY_B), (Stacking(), ONLY_B | ONLY_A), (ResidualMerge(), ONLY_B | ONLY_A)]
)
def test_exact_rules_stay_exact(exact, rule, tensors):
    """The mean of the clients' dense DoRA weights: with a common A, by stacking, by the residual."""
    server = ServerModel(exact.initial_adapter(0))
    result = round_of(exact, server, tensors)
    after = rule(server, result)
    for module in server.adapter.factors:
        wanted = mean_weight(exact, server, result, module)
        change = wanted - weight_of(exact, server, module)
        assert relative(weight_of(exact, after, module) - wanted, change) < 1e-6


def test_averaging_magnitudes_is_far_off(exact):
    """The control: with a common A, means of B of the decomposed weight and of magnitudes miss the mean weight."""
    server = ServerModel(exact.initial_adapter(0))
    result = round_of(exact, server, ONLY_B)
    for module in server.adapter.factors:
        base = exact.base_weight(module)
        b, mu = 0.0, 0.0
        for u in result.updates:
            gain, f, p = u.values.extras[gain_name(module)], u.values.factors[module], len(ROWS[u.task.client]) / 40
            inner = f.B / gain[:, None]
            b, mu = b + p * inner, mu + p * gain * row_norms(base, replace(f, B=inner))
        a, scaling = server.adapter.factors[module].A, server.adapter.factors[module].scaling
        v = base + scaling * b @ a
        naive = (mu / v.norm(dim=1))[:, None] * v
        wanted = mean_weight(exact, server, result, module)
        assert relative(naive - wanted, wanted - base) > 1e-3


def test_merged_updates_lie_outside_of_the_decomposition(exact):
    server = ServerModel(exact.initial_adapter(0))
    after = Stacking()(server, round_of(exact, server, ONLY_A | ONLY_B))
    again = Stacking()(after, round_of(exact, after, ONLY_A | ONLY_B))
    result = round_of(exact, after, ONLY_A | ONLY_B)
    module = next(iter(server.adapter.factors))
    wanted = mean_weight(exact, after, result, module)
    assert relative(weight_of(exact, again, module) - wanted, wanted - weight_of(exact, after, module)) < 1e-6


# --------------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("zero_row", [False, True])
def test_peft_opens_it_with_the_same_logits(family, zero_row, tmp_path):
    model = federated(family, adapter="dora")
    server = server_of(model)
    base = network(family)
    base.config.pad_token_id = model.pad_token_id
    slots = list(model.shape.slots)
    if zero_row:
        server = ServerModel(model.initial_adapter(0))
        for each in (model.network.get_submodule(slots[0]).base_layer, base.get_submodule(slots[0])):
            (each.weight.data.T if family == "gpt2" else each.weight.data)[3] = 0.0
    elif family == "bert":
        server = replace(server, base_update={slots[1]: random_adapter(model, 9).factors[slots[1]].truncate(2)})
    export_adapter(model, server, tmp_path / "adapter")
    opened = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    arrays = tokens(6).batch(range(6))
    ids, mask = torch.from_numpy(arrays["input_ids"]), torch.from_numpy(arrays["attention_mask"])
    with torch.no_grad():
        theirs = opened(input_ids=ids.masked_fill(mask == 0, model.pad_token_id), attention_mask=mask).logits
    assert (logits(model, server) - theirs).abs().max() <= 1e-5


def test_kinds_and_scalings():
    assert (
        ModelConfig(rank=4, alpha=8.0, adapter="rslora").scaling
        == 4.0
        == ModelConfig(rank=4, alpha=8.0, rank_stabilized=True).scaling
    )
    assert ModelConfig(rank=4, alpha=8.0).scaling == 2.0 == ModelConfig(rank=4, alpha=8.0, adapter="dora").scaling
    with pytest.raises(InputError, match=r"model\.adapter: unknown name 'loha'.*dora"):
        ModelConfig(adapter="loha")


# ----------------------------------------------------------------------------------------------------------- whole runs


METHODS = [FedIT(), FLoRA(), FFALoRA(), FlexLoRA(), RoLoRA(), FedSALoRA(), HetLoRA(lowest_rank=2)]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_methods_carry_it(method):
    """Two rounds in a simulated cell: gains move, are finite, and are counted as one value per row and direction."""
    model = federated("bert", adapter="dora")
    method = replace(method, training=LocalTraining(local_steps=3, batch_size=4, learning_rate=0.01))
    fleet = fleet_of([load_profile("jetson-tx2")] * 3, np.array([len(rows) for rows in ROWS]))
    network_shape = TransformerShape.from_config(model.config_json)
    costs = CostModel(fleet, model.shape, network_shape, tokens=np.full(3, 8.0), constant_bytes=0.0)
    cell = Cell(nominal=fleet, costs=costs, seed=0, downlink="unicast")
    runner = SimulatedRunner(cell, cell.costs, LocalTrainer(model, tokens(), ROWS, 0), 0)
    first = begin(method, ServerModel(model.initial_adapter(0)), cell)
    rounds = list(run(method, first, cell, runner, stop=Stop(2), seed=0, evaluate=lambda m: {"loss": 0.0}))
    after, record = rounds[-1]
    extras = model.shape.extra_values
    plain = federated("bert").shape.extra_values
    assert extras - plain == sum(slot.out_features for slot in model.shape.slots.values())
    assert all(client.bits_up >= 32 * extras for client in record.clients)
    for name, value in after.model.adapter.extras.items():
        if is_gain(name):
            assert bool(torch.isfinite(value).all()) and (value - 1).abs().max() > 1e-4
