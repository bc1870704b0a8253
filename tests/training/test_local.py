"""The readable twin: determinism, no leak between clients, and arithmetic against plain torch written out here."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from airtune.compression.dense import Dense
from airtune.errors import InputError
from airtune.lora import AdapterSlice
from airtune.streams import stream
from airtune.training.data import client_batches
from airtune.training.evaluation import evaluate
from airtune.training.layers import SeededDropout
from airtune.training.local import LocalTrainer
from airtune.training.losses import loss_by_example, mean_loss
from airtune.types import (
    ClientTask,
    LocalTraining,
    OrthogonalityPenalty,
    ProximalPenalty,
    ServerModel,
    TailPenalty,
    TrainingJob,
)
from tiny_networks import LAYERS, federated, random_adapter, tokens

CLIENTS = [np.arange(0, 12), np.arange(12, 17), np.arange(17, 40), np.arange(0)]


def task_of(client, train, receive=None, **training):
    settings = LocalTraining(**{"local_steps": 4, "batch_size": 4, "learning_rate": 0.01, **training})
    receive = train if receive is None else receive
    return ClientTask(client, receive, train, train, settings, Dense(), bandwidth=1e5, transmit_power=0.1)


def job_of(server, client=0, train=None, receive=None, round_index=1, cycle=0, **training):
    train = AdapterSlice.everything(server.adapter.shape) if train is None else train
    return TrainingJob(task_of(client, train, receive, **training), server, round_index, cycle)


@pytest.fixture(scope="module")
def exact():
    """In double precision, for arithmetic."""
    return federated("bert", precision="fp64")


@pytest.fixture(scope="module")
def trainer():
    return LocalTrainer(federated("bert"), tokens(), CLIENTS, seed=7)


@pytest.fixture
def server(trainer):
    return ServerModel(random_adapter(trainer.model, 4))


def flat(result):
    return {(owner, kind): tensor for owner, kind, tensor in result.values.tensors()}


def same(first, second):
    a, b = flat(first), flat(second)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) and first.reports == second.reports


# -------------------------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("dropout", [{}, {"lora_dropout": 0.2}, {"base_dropout": True}])
def test_training_is_a_pure_function_of_its_address(trainer, server, dropout):
    job = job_of(server, **dropout)
    first = trainer.train([job])[0]
    others = [job_of(server, 1, **dropout), job_of(server, 0, round_index=2, **dropout)]
    others.append(job_of(server, 0, cycle=1, **dropout))
    again = trainer.train([*others, job])
    assert same(again[-1], first)
    assert not any(same(other, first) for other in again[:-1])
    elsewhere = LocalTrainer(trainer.model, trainer.tokens, CLIENTS, seed=8).train([job])[0]
    assert not same(elsewhere, first)


@pytest.mark.parametrize("dropout", [{}, {"lora_dropout": 0.2}, {"base_dropout": True}])
def test_the_global_generator_is_neither_read_nor_moved(trainer, server, dropout):
    job = job_of(server, **dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        before = torch.random.get_rng_state()
        first = trainer.train([job])[0]
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.manual_seed(2)
        assert same(trainer.train([job])[0], first)


def test_dropout_changes_training_and_stays_off_afterwards(trainer, server):
    plain = trainer.train([job_of(server)])[0]
    assert not same(trainer.train([job_of(server, lora_dropout=0.3)])[0], plain)
    assert not same(trainer.train([job_of(server, base_dropout=True)])[0], plain)
    assert not trainer.model.network.training
    assert same(trainer.train([job_of(server)])[0], plain)


def test_seeded_dropout_keeps_the_mean_and_its_share():
    draw = SeededDropout(0.25, torch.Generator().manual_seed(0))
    out = draw(torch.ones(200, 200, dtype=torch.float64))
    assert set(out.unique().tolist()) == {0.0, 1 / 0.75}
    assert float((out == 0).double().mean()) == pytest.approx(0.25, abs=0.01)


# -------------------------------------------------------------------------------------------- no leak between clients


def test_a_client_does_not_see_what_another_one_learnt(trainer, server):
    slices = [
        AdapterSlice.everything(server.adapter.shape),
        AdapterSlice.truncation(server.adapter.shape, 2),
        AdapterSlice.top_layers(server.adapter.shape, 1),
        AdapterSlice.sketch(server.adapter.shape, 2, np.random.default_rng(0)),
        AdapterSlice.everything(server.adapter.shape, frozenset({"B"})),
    ]
    jobs = [job_of(server, client, part, max_grad_norm=1.0) for client in (0, 1, 2) for part in slices]
    alone = [trainer.train([job])[0] for job in jobs]
    order = np.random.default_rng(1).permutation(len(jobs))
    together = trainer.train([jobs[i] for i in order])
    assert all(same(together[place], alone[i]) for place, i in enumerate(order))


def test_a_diverged_client_poisons_nobody(trainer, server):
    sane = job_of(server)
    before = trainer.train([sane])[0]
    poisoned, after = trainer.train([job_of(server, 2, optimizer="sgd", learning_rate=1e30), sane])
    assert math.isnan(poisoned.reports["loss"])
    assert poisoned.reports["steps"] < 4 + 1
    assert all(bool(torch.isfinite(tensor).all()) for tensor in flat(poisoned).values())
    assert same(after, before)


def test_divergence_in_the_last_step_is_seen(trainer, server):
    result = trainer.train([job_of(server, local_steps=1, optimizer="sgd", learning_rate=float("inf"))])[0]
    assert math.isnan(result.reports["loss"])


def test_inputs_are_not_modified(trainer, server):
    copies = [tensor.clone() for _, _, tensor in server.adapter.tensors()]
    trainer.train([job_of(server)])
    assert all(torch.equal(t, c) for (_, _, t), c in zip(server.adapter.tensors(), copies, strict=True))


# ---------------------------------------------------------------------------------------------------- what is returned


def test_only_the_slice_changes(trainer, server):
    for part in (
        AdapterSlice.truncation(server.adapter.shape, 2),
        AdapterSlice.everything(server.adapter.shape, frozenset({"A"})),
        AdapterSlice({name: np.arange(4) for name in server.adapter.factors}, extras=False),
    ):
        values = trainer.train([job_of(server, train=part)])[0].values
        start = part.take(server.adapter)
        assert values.shape == start.shape
        trained = {(owner, kind) for owner, kind, _ in part.payload(start)}
        was = {(owner, kind): tensor for owner, kind, tensor in start.tensors()}
        for owner, kind, tensor in values.tensors():
            assert torch.equal(tensor, was[owner, kind]) == ((owner, kind) not in trained)


def test_reports_count_what_was_done(trainer, server):
    job = job_of(server, 1, local_steps=3, batch_size=2)
    batches = trainer.batches(job)
    reports = trainer.train([job])[0].reports
    assert reports["steps"] == 3 and reports["examples"] == sum(map(len, batches))
    assert reports["tokens"] == sum(int(trainer.tokens.lengths[b].sum()) for b in batches)
    assert set(reports) == {"loss", "examples", "tokens", "steps"}
    one_step = trainer.train([job_of(server, 1, local_steps=1, batch_size=8)])[0].reports
    local = trainer.tokens.select(CLIENTS[1])
    assert one_step["loss"] == pytest.approx(evaluate(trainer.model, server, local)["loss"], rel=1e-5)


def test_epochs_give_the_steps(trainer, server):
    reports = trainer.train([job_of(server, 0, local_steps=None, epochs=2.0, batch_size=5)])[0].reports
    assert reports["steps"] == 2 * math.ceil(12 / 5)


def test_batches_come_from_the_addressed_stream(trainer, server):
    job = job_of(server, 2, round_index=3, cycle=1)
    rng = stream(7, "batches", 3, 2, 1)
    expected = client_batches(trainer.tokens, CLIENTS[2], 4, rng=rng, steps=4)
    assert all(np.array_equal(a, b) for a, b in zip(trainer.batches(job), expected, strict=True))


def test_training_learns(trainer):
    model = trainer.model
    server = ServerModel(model.initial_adapter(0))
    whole = LocalTrainer(model, trainer.tokens, [np.arange(40)], seed=0)
    job = job_of(server, local_steps=60, batch_size=8)
    learnt = ServerModel(AdapterSlice.everything(model.shape).put(server.adapter, whole.train([job])[0].values))
    assert evaluate(model, server, trainer.tokens)["accuracy"] < 0.6
    assert evaluate(model, learnt, trainer.tokens)["accuracy"] > 0.9


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_causal_models_learn(family):
    model = federated(family, "causal-lm")
    trainer = LocalTrainer(model, tokens(8, "causal-lm"), [np.arange(8)], seed=0)
    server = ServerModel(model.initial_adapter(0))
    result = trainer.train([job_of(server, local_steps=30, batch_size=8)])[0]
    learnt = ServerModel(AdapterSlice.everything(model.shape).put(server.adapter, result.values))
    assert evaluate(model, learnt, trainer.tokens)["loss"] < evaluate(model, server, trainer.tokens)["loss"] - 0.5


# ---------------------------------------------------------------------------------------------------------- arithmetic


def hand_sgd(model, server, part, batches, data, *, rate, head_rate, momentum=0.0):
    """Train with the formulas on the full matrices: W x + s (r/k) B S A x, S the selection of the slice's components.

    Uses no slice, no sub-adapter and no optimizer of torch; the head and the gradients are autograd's.
    """
    adapter, network = server.adapter, model.network
    model.show(server)
    a = {n: f.A.clone().requires_grad_() for n, f in adapter.factors.items()}
    b = {n: f.B.clone().requires_grad_() for n, f in adapter.factors.items()}
    extras = {n: t.clone().requires_grad_() for n, t in adapter.extras.items()}
    masks = {n: torch.zeros(f.rank, dtype=torch.float64) for n, f in adapter.factors.items()}
    for name, indices in part.components.items():
        masks[name][indices] = adapter.factors[name].rank / len(indices) if part.unbiased else 1.0
    state = {}
    for indices in batches:
        arrays = {k: torch.from_numpy(v) for k, v in data.batch(indices).items()}
        weights = dict(extras)
        for name, f in adapter.factors.items():
            base = network.get_submodule(name).base_layer.weight
            weights[f"{name}.base_layer.weight"] = base + f.scaling * (b[name] @ torch.diag(masks[name]) @ a[name])
            for kind in "AB":  # PEFT's own parts contribute nothing
                weights[f"{name}.lora_{kind}.part0.weight"] = torch.zeros_like({"A": f.A, "B": f.B}[kind])
        out = torch.func.functional_call(
            network, weights, kwargs={"input_ids": arrays["input_ids"], "attention_mask": arrays["attention_mask"]}
        )
        leaves = [*a.values(), *b.values(), *extras.values()]
        grads = torch.autograd.grad(functional.cross_entropy(out.logits, arrays["labels"]), leaves)
        with torch.no_grad():
            for place, (leaf, grad) in enumerate(zip(leaves, grads, strict=True)):
                state[place] = momentum * state[place] + grad if place in state else grad
                leaf -= (head_rate if place >= 2 * len(a) else rate) * state[place]
    return a, b, extras


def sketch_of(adapter):
    return AdapterSlice.sketch(adapter.shape, 2, np.random.default_rng(3))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("kind", ["sketch", "truncation", "everything"])
def test_sgd_in_slices_is_sgd_on_the_full_matrices_with_the_selection(exact, kind, momentum):
    server, data = ServerModel(random_adapter(exact, 4)), tokens()
    shape = server.adapter.shape
    part = {
        "sketch": sketch_of(server.adapter),
        "truncation": AdapterSlice.truncation(shape, 3),
        "everything": AdapterSlice.everything(shape),
    }[kind]
    trainer = LocalTrainer(exact, data, CLIENTS, seed=7)
    rates = {"learning_rate": 0.05, "head_learning_rate": 0.02}
    job = job_of(server, train=part, optimizer="sgd", momentum=momentum, **rates)
    ours = part.put(server.adapter, trainer.train([job])[0].values)
    batches = trainer.batches(job)
    a, b, extras = hand_sgd(exact, server, part, batches, data, rate=0.05, head_rate=0.02, momentum=momentum)
    for name, factors in ours.factors.items():
        assert torch.allclose(factors.A, a[name].detach(), rtol=0, atol=1e-13)
        assert torch.allclose(factors.B, b[name].detach(), rtol=0, atol=1e-13)
        assert not torch.equal(factors.A, server.adapter.factors[name].A)
    assert all(torch.allclose(ours.extras[name], extras[name].detach(), rtol=0, atol=1e-13) for name in extras)


def test_adamw_is_its_formula(exact):
    server, data = ServerModel(random_adapter(exact, 4)), tokens()
    part = AdapterSlice.everything(exact.shape)
    trainer = LocalTrainer(exact, data, CLIENTS, seed=7)
    job = job_of(server, weight_decay=0.1, learning_rate=0.01)
    ours = trainer.train([job])[0].values
    active = exact.activate(server, part)
    leaves = [tensor for _, _, tensor in active.trained()]
    moments = [(torch.zeros_like(t), torch.zeros_like(t)) for t in leaves]
    for step, indices in enumerate(trainer.batches(job), start=1):
        arrays = {k: torch.from_numpy(v) for k, v in data.batch(indices).items()}
        loss = functional.cross_entropy(exact.logits(arrays["input_ids"], arrays["attention_mask"]), arrays["labels"])
        for leaf, (m, v), g in zip(leaves, moments, torch.autograd.grad(loss, leaves), strict=True):
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g**2)
            with torch.no_grad():
                leaf.mul_(1 - 0.01 * 0.1)
                leaf -= 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    for (_, _, got), (_, _, wanted) in zip(ours.tensors(), active.values().tensors(), strict=True):
        assert torch.allclose(got, wanted, rtol=0, atol=1e-13)


def test_clipping_limits_the_norm_over_factors_and_head(exact):
    server = ServerModel(random_adapter(exact, 4))
    trainer = LocalTrainer(exact, tokens(), CLIENTS, seed=7)
    moves = {}
    for limit in (None, 1e-3):
        job = job_of(server, local_steps=1, optimizer="sgd", learning_rate=1.0, max_grad_norm=limit)
        result = trainer.train([job])[0].values
        pairs = zip(result.tensors(), server.adapter.tensors(), strict=True)
        moves[limit] = torch.cat([(new - old).flatten() for (_, _, new), (_, _, old) in pairs])
    assert float(moves[1e-3].norm()) == pytest.approx(1e-3, rel=1e-2)
    assert float(moves[None].norm()) > 1e-2
    assert float(functional.cosine_similarity(moves[None], moves[1e-3], dim=0)) == pytest.approx(1.0, abs=1e-9)


def test_frozen_lower_layers_act_during_training(exact):
    server = ServerModel(random_adapter(exact, 4))
    trainer = LocalTrainer(exact, tokens(), CLIENTS, seed=7)
    whole = AdapterSlice.everything(exact.shape)
    losses = {}
    for outside in ("frozen", "absent"):
        train = AdapterSlice.top_layers(exact.shape, LAYERS - 1, outside)
        job = job_of(server, train=train, receive=whole, local_steps=1, batch_size=12)
        losses[outside] = trainer.train([job])[0].reports["loss"]
    local = trainer.tokens.select(CLIENTS[0])
    assert losses["frozen"] == pytest.approx(evaluate(exact, server, local)["loss"], rel=1e-12)
    assert losses["absent"] != pytest.approx(losses["frozen"], rel=1e-6)


# ----------------------------------------------------------------------------------------------------------- penalties


def test_penalties_act_on_training_but_not_on_the_reported_loss(trainer, server):
    tail = TailPenalty(0.5, dict.fromkeys(server.adapter.factors, 2))
    plain = trainer.train([job_of(server)])[0]
    for penalty in (tail, ProximalPenalty(10.0), OrthogonalityPenalty(0.5)):
        result = trainer.train([job_of(server, penalties=(penalty,))])[0]
        assert not torch.equal(next(iter(flat(result).values())), next(iter(flat(plain).values())))
        first = [trainer.train([job_of(server, local_steps=1, penalties=p)])[0] for p in ((), (penalty,))]
        assert first[0].reports["loss"] == first[1].reports["loss"]


def test_a_strong_proximal_term_holds_the_client_back(trainer, server):
    def moved(weight):
        job = job_of(server, local_steps=20, optimizer="sgd", penalties=(ProximalPenalty(weight),))
        result = trainer.train([job])[0].values
        return sum(
            float((new - old).square().sum())
            for (_, _, new), (_, _, old) in zip(result.tensors(), server.adapter.tensors(), strict=True)
        )

    assert moved(50.0) < 0.5 * moved(0.0)


def test_tail_norms_are_reported_and_shrink(trainer, server):
    tail = TailPenalty(1.0, dict.fromkeys(server.adapter.factors, 2))
    reports = trainer.train([job_of(server, local_steps=20, penalties=(tail,))])[0].reports
    before = sum(float(f.B[:, 2:].norm() * f.A[2:].norm()) for f in server.adapter.factors.values())
    assert reports["tail_norm_before"] == pytest.approx(before, rel=1e-5)
    assert 0 < reports["tail_norm_after"] < before
    fresh = ServerModel(trainer.model.initial_adapter(0))
    assert trainer.train([job_of(fresh, penalties=(tail,))])[0].reports["tail_norm_before"] == 0


# ----------------------------------------------------------------------------------------------------------- bad input


def test_bad_jobs_are_refused(trainer, server):
    with pytest.raises(ValueError, match="client 3 has no examples"):
        trainer.train([job_of(server, 3)])
    with pytest.raises(ValueError, match="trains nothing"):
        trainer.train([job_of(server, train=AdapterSlice({}, extras=False))])
    with pytest.raises(InputError, match=r"training\.optimizer: unknown name 'adam'.*adamw"):
        trainer.train([job_of(server, optimizer="adam")])


# --------------------------------------------------------------------------------------------------------------- losses


def test_losses_are_those_of_the_transformers_library():
    for task in ("sequence-classification", "causal-lm"):
        family = "llama"
        model, data = federated(family, task), tokens(6, task)
        arrays = {name: torch.from_numpy(values) for name, values in data.batch(range(6)).items()}
        with torch.no_grad():
            out = model.network(**arrays)
            ours = mean_loss(model.logits(arrays["input_ids"], arrays["attention_mask"]), arrays["labels"])
        assert float(ours) == pytest.approx(float(out.loss), rel=1e-5)


def test_token_losses_ignore_padding_and_the_first_token():
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, 3, 4], [1, 2, -100, -100]])
    losses, weights = loss_by_example(logits, labels)
    assert weights.tolist() == [3.0, 1.0]
    assert float(losses[1]) == pytest.approx(float(-logits[1, 0].log_softmax(-1)[2]))
