"""BeamLoRA: which components go, what replaces them, and that moments move with them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from airtune.compression.dense import Dense
from airtune.devices.latency import TransformerShape
from airtune.devices.profiles import load_profile
from airtune.errors import InputError
from airtune.experiment.combinations import check_combination
from airtune.experiment.schema import read, write
from airtune.federation import Stop, begin, run
from airtune.lora import ONLY_B, AdapterSlice, LoraFactors
from airtune.methods import method_class
from airtune.methods.flora import FLoRA
from airtune.simulation.cell import Cell
from airtune.simulation.costs import CostModel
from airtune.simulation.fleet import fleet_of
from airtune.simulation.runner import SimulatedRunner
from airtune.training.beam import Gate, Search, kept_components, kept_share, memory_of
from airtune.training.local import LocalTrainer
from airtune.training.shapes import ModelConfig
from airtune.types import Beam, ClientTask, LocalTraining, ProximalPenalty, ServerModel, TrainingJob
from tiny_networks import federated, random_adapter, tokens

ROWS = [np.arange(0, 14), np.arange(14, 26), np.arange(26, 40)]


def normal(*size, seed):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def job_of(server, client=0, tensors=frozenset({"A", "B"}), **training):
    whole = AdapterSlice.everything(server.adapter.shape, tensors)
    settings = LocalTraining(**{"local_steps": 12, "batch_size": 4, "learning_rate": 0.01, **training})
    return TrainingJob(ClientTask(client, whole, whole, whole, settings, Dense(), 1e5, 0.1), server, 1)


def logits(model, ids_of=6):
    arrays = tokens(ids_of).batch(range(ids_of))
    with torch.no_grad():
        return model.logits(*(torch.from_numpy(arrays[name]) for name in ("input_ids", "attention_mask")))


@pytest.fixture(scope="module")
def exact():
    return federated("bert", precision="fp64", adapter="beam-lora")


def test_importance_sums_to_the_rank_and_is_one_at_first():
    assert torch.equal(Gate(torch.zeros(4), 0.05).importance(), torch.ones(4))
    p = Gate(normal(6, seed=0) / 10, 0.05).importance()
    assert float(p.sum()) == pytest.approx(6.0) and float(p.max() - p.min()) > 1


def test_the_smallest_set_over_all_slots_is_kept():
    p = {"a": torch.tensor([2.0, 0.1, 0.9]), "b": torch.tensor([0.05, 1.95])}
    assert {n: k.tolist() for n, k in kept_components(p, 0.95).items()} == {
        "a": [True, False, True],
        "b": [False, True],
    }
    assert {n: k.tolist() for n, k in kept_components(p, 0.5).items()} == {
        "a": [True, False, False],
        "b": [False, True],
    }
    assert all(bool(k.all()) for k in kept_components(p, 1.0).values())
    beam = Beam(first_share=0.9)
    assert kept_share(beam, 0, 10) == pytest.approx(0.9) and kept_share(beam, 10, 10) == pytest.approx(1.0)
    assert kept_share(beam, 5, 10) == pytest.approx(0.95)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_copy_has_values_and_moments_of_the_snapshot(kind):
    """The public code loses the moments."""
    a, b = normal(4, 7, seed=1).requires_grad_(), normal(5, 4, seed=2).requires_grad_()
    z = torch.tensor([0.03, -0.2, 0.1, 0.04], dtype=torch.float64).requires_grad_()
    tensors = [a, b, z]
    step = torch.optim.AdamW(tensors, lr=0.01) if kind == "adamw" else torch.optim.SGD(tensors, lr=1e-7, momentum=0.9)
    gate = Gate(z, 0.05)
    factors = LoraFactors(A=a, B=b, scaling=1.0)
    rng = np.random.default_rng(0)
    search = Search(
        Beam(every=4, first_share=0.8), {"slot": factors}, {"slot": gate}, memory_of(step), steps=8, rng=rng
    )
    states = {}
    for t in range(1, 5):
        step.zero_grad()
        ((b * gate.importance()) @ a + normal(5, 7, seed=9)).square().sum().backward()
        step.step()
        states[t] = {
            tensor: {"value": tensor.detach().clone()}
            | {key: v.clone() for key, v in step.state[tensor].items() if v is not None and v.shape == tensor.shape}
            for tensor in tensors
        }
        order = gate.importance().detach().argsort()
        search.after(t)
    assert search.replaced == 1
    pruned, copied = int(order[0]), int(order[-1])
    moments = {"adamw": {"exp_avg", "exp_avg_sq"}, "sgd": {"momentum_buffer"}}[kind]
    for tensor, pick in ((a, lambda v, i: v[i]), (b, lambda v, i: v[:, i])):
        now = {"value": tensor.detach(), **step.state[tensor]}
        assert moments <= states[2][tensor].keys()
        for key in ("value", *moments):
            assert torch.equal(pick(now[key], pruned), pick(states[2][tensor][key], copied))
            assert torch.equal(pick(now[key], copied), pick(states[4][tensor][key], copied))
            assert not torch.equal(pick(now[key], pruned), pick(now[key], copied))
    mean = (states[4][z]["value"][pruned] + states[4][z]["value"][copied]) / 2
    assert float(z[pruned].detach()) == float(z[copied].detach()) == pytest.approx(float(mean))
    rest = [i for i in range(4) if i not in (pruned, copied)]
    for key in moments:
        assert float(step.state[z][key][[pruned, copied]].abs().max()) == 0.0
        assert torch.equal(step.state[z][key][rest], states[4][z][key][rest])
    assert torch.equal(z.detach()[rest], states[4][z]["value"][rest])


def test_what_is_sent_is_plain_lora_with_the_same_outputs(exact):
    """The gate folded into B: the server's model computes what the client's network computed at the end."""
    server = ServerModel(random_adapter(exact, 4))
    trainer = LocalTrainer(exact, tokens(), ROWS, seed=7)
    job = job_of(server, beam=Beam(every=4, first_share=0.7))
    result = trainer.train([job])[0]
    client = logits(exact)
    assert result.reports["replaced"] > 0
    exact.show(replace(server, adapter=job.task.train.put(server.adapter, result.values)))
    assert torch.allclose(logits(exact), client, atol=1e-12)
    exact.show(server)
    assert not torch.allclose(logits(exact), client, atol=1e-3)


def test_gates_train_and_nothing_else_changes_without_replacements(exact):
    """One step: A and B move as in LoRA (equal gates are ones); the gates move along."""
    server = ServerModel(random_adapter(exact, 4))
    plain = federated("bert", precision="fp64")
    settings = {"local_steps": 1, "optimizer": "sgd", "learning_rate": 1e-3}
    beam, lora = (
        LocalTrainer(model, tokens(), ROWS, seed=7).train([job_of(server, **settings)])[0] for model in (exact, plain)
    )
    assert beam.reports.pop("replaced") == 0.0 and beam.reports == lora.reports
    for slot, f in lora.values.factors.items():
        got = beam.values.factors[slot]
        assert torch.allclose(got.A, f.A, atol=1e-14)
        gate = (got.B / f.B)[0]
        assert torch.allclose(got.B, f.B * gate, atol=1e-12) and float((gate - 1).abs().max()) > 1e-6
        assert float(gate.sum()) == pytest.approx(len(gate))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lora-plus", "lora-pro"])
def test_it_is_a_pure_function_of_its_address_and_leaves_nothing_behind(optimizer):
    model = federated("bert", adapter="beam-lora")
    server = ServerModel(random_adapter(model, 4))
    trainer = LocalTrainer(model, tokens(), ROWS, seed=7)
    fields = {"beam": Beam(every=4, first_share=0.7), "penalties": (ProximalPenalty(0.01),), "optimizer": optimizer}
    job = job_of(server, learning_rate=1e-3, **fields)
    first, _, again = trainer.train([job, job_of(server, 1, learning_rate=1e-3, **fields), job])
    assert first.reports == again.reports and first.reports["replaced"] > 0
    pairs = zip(first.values.tensors(), again.values.tensors(), strict=True)
    assert all(torch.equal(one[2], other[2]) for one, other in pairs)


def test_what_it_refuses(exact):
    server = ServerModel(random_adapter(exact, 4))
    trainer = LocalTrainer(exact, tokens(), ROWS, seed=7)
    with pytest.raises(InputError, match="one of which is not trained"):
        trainer.train([job_of(server, tensors=ONLY_B)])
    with pytest.raises(InputError, match="lora-rite does not have"):
        trainer.train([job_of(server, optimizer="lora-rite")])
    beam = ModelConfig(adapter="beam-lora")
    for name in ("flora", "flexlora", "fedex-lora", "florist"):
        check_combination(beam, method_class(name)(), name)
        with pytest.raises(InputError, match="lora-rite does not have"):
            check_combination(beam, method_class(name)(training=LocalTraining(optimizer="lora-rite")), name)
    for name in (
        "fedit",
        "ffa-lora",
        "rolora",
        "fedsa-lora",
        "legend",
        "hetlora",
        "hierfedlora",
        "fed-sb",
        "lora-fair",
    ):
        with pytest.raises(InputError, match=rf"model\.adapter: beam-lora.*{name} averages factors"):
            check_combination(beam, method_class(name)(), name)
    table = {"beam": {"every": 6}}
    assert read(LocalTraining, write(LocalTraining, read(LocalTraining, table, "training")), "training").beam.every == 6
    for fields in ({"every": 1}, {"first_share": 0.0}, {"temperature": 0.0}):
        with pytest.raises(InputError, match=rf"^{next(iter(fields))}:"):
            Beam(**fields)


def test_flora_carries_it():
    model = federated("bert", adapter="beam-lora")
    training = LocalTraining(local_steps=8, batch_size=4, learning_rate=0.01, beam=Beam(first_share=0.8))
    fleet = fleet_of([load_profile("jetson-tx2")] * 3, np.array([len(rows) for rows in ROWS]))
    network_shape = TransformerShape.from_config(model.config_json)
    costs = CostModel(fleet, model.shape, network_shape, tokens=np.full(3, 8.0), constant_bytes=0.0)
    cell = Cell(nominal=fleet, costs=costs, seed=0)
    runner = SimulatedRunner(cell, cell.costs, LocalTrainer(model, tokens(), ROWS, 0), 0)
    method = FLoRA(training=training)
    first = begin(method, ServerModel(model.initial_adapter(0)), cell)
    after, record = list(run(method, first, cell, runner, stop=Stop(2), seed=0, evaluate=lambda m: {"loss": 0.0}))[-1]
    assert after.model.base_update and len(record.arrived) == 3
    assert {reports["replaced"] > 0 for reports in after.pending.reports.values()} == {True}
