"""The stored prefix: logits and updates as without it, no more bytes than allowed, and when it is not used."""

import logging

import numpy as np
import pytest
import torch

from airtune.compression.dense import Dense
from airtune.errors import InputError
from airtune.lora import AdapterSlice, LoraFactors
from airtune.training.evaluation import score
from airtune.training.local import LocalTrainer
from airtune.training.shapes import FAMILIES
from airtune.types import ClientTask, LocalTraining, ServerModel, TrainingJob
from tiny_networks import LAYERS, classification, federated, random_adapter, rows, tokens

CLIENTS = [np.arange(0, 20), np.arange(20, 40)]


def cached(*args, limit=1e9, **fields):
    model = federated(*args, **fields)
    model.cache_prefix(limit)
    return model


def top(model, outside="absent"):
    return AdapterSlice.top_layers(model.shape, 1, outside)


def tops_only(model, seed=0):
    """Return a server whose adapter acts in the last layer alone."""
    adapter = random_adapter(model, seed)
    factors = {
        name: LoraFactors(f.A, f.B if adapter.layer[name] == LAYERS - 1 else torch.zeros_like(f.B), f.scaling)
        for name, f in adapter.factors.items()
    }
    return ServerModel(adapter.with_factors(factors))


def job(server, train, client=0, **training):
    settings = LocalTraining(**{"local_steps": 5, "batch_size": 4, "learning_rate": 0.01, **training})
    task = ClientTask(client, train, train, train, settings, Dense(), bandwidth=1e5, transmit_power=0.1)
    return TrainingJob(task, server, 1, 0)


def trained(model, server, train, **training):
    trainer = LocalTrainer(model, rows(model.config.task), CLIENTS, seed=3)
    return trainer.train([job(server, train, client, **training) for client in range(2)])


def distance(first, second):
    """Return the largest difference of two lists of results, relative to the largest value of each tensor."""
    gaps = []
    for one, other in zip(first, second, strict=True):
        pairs = zip(one.values.tensors(), other.values.tensors(), strict=True)
        gaps += [float((a - b).abs().max() / b.abs().max().clamp_min(1e-3)) for (_, _, a), (_, _, b) in pairs]
    return max(gaps)


DECODERS = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma")
CASES = [(f, classification(f)) for f in FAMILIES] + [(f, "causal-lm") for f in DECODERS]


@pytest.mark.parametrize(("family", "task"), CASES)
def test_logits_and_updates_are_those_of_the_whole_network(family, task):
    plain, model = federated(family, task), cached(family, task)
    server, data = tops_only(plain), rows(task)
    expected, found = score(plain, server, data).loss, score(model, server, data).loss
    assert model.prefix.computed == len(data)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)
    if task != "causal-lm":
        first = trained(model, server, top(model))
        assert model.prefix.hits and model.prefix.computed == len(data)
        assert distance(first, trained(plain, server, top(plain))) < 1e-4  # AdamW magnifies rounding
        sgd = {"optimizer": "sgd", "learning_rate": 0.1}
        assert distance(trained(model, server, top(model), **sgd), trained(plain, server, top(plain), **sgd)) < 1e-5


def test_in_double_precision_the_difference_is_rounding():
    plain, model = federated(precision="fp64"), cached(precision="fp64")
    server = tops_only(plain)
    assert distance(trained(model, server, top(model)), trained(plain, server, top(plain))) < 1e-9


def test_a_sample_gives_the_same_bits_whatever_stands_beside_it_and_whatever_is_stored():
    model, small = cached(), cached(limit=3000)
    server, data = tops_only(model), tokens()
    whole = score(model, server, data, batch_size=64).loss
    model.activate(server, AdapterSlice({}, outside="frozen", extras=False))
    alone, wide = data.batch([3]), data.batch([3, int(data.lengths.argmax())])
    states = [
        model.prefix._of_batch(model._forward, model.inputs, model.inputs.arguments(_tensors(batch)))
        for batch in (alone, wide)
    ]
    assert torch.equal(*(found[0, : data.lengths[3]] for found in states))
    assert np.array_equal(score(small, server, data, batch_size=64).loss, whole)  # recomputed, not stored
    assert small.prefix.dropped > 0


def _tensors(batch):
    return {name: torch.from_numpy(values) for name, values in batch.items()}


def test_no_more_bytes_than_allowed_are_held_and_what_is_dropped_is_logged_once(caplog):
    model = cached(limit=10_000)
    server = tops_only(model)
    with caplog.at_level(logging.WARNING):
        first = score(model, server, tokens()).loss
        assert np.array_equal(score(model, server, tokens()).loss, first)
    held = sum(t.numel() * t.element_size() + len(key[1]) for key, t in model.prefix._states.items())
    assert 0 < model.prefix.bytes == held <= 10_000
    assert len([r for r in caplog.records if "full" in r.message]) == 1
    assert model.prefix.dropped > 0


def test_what_changes_the_prefix_is_seen():
    """D1 with a changed prefix, merged updates below, and a trained lower layer run every layer; zeros do not act."""
    model = cached()
    changed = ServerModel(random_adapter(model))
    name = next(iter(changed.adapter.factors))
    merged = ServerModel(tops_only(model).adapter, base_update={name: changed.adapter.factors[name]})
    everything = AdapterSlice.everything(model.shape)
    for server, train, expected in (
        (tops_only(model), top(model, "absent"), 1),
        (tops_only(model), top(model, "frozen"), 1),  # D1, nobody has trained the prefix yet
        (changed, top(model, "absent"), 1),
        (changed, top(model, "frozen"), 0),
        (merged, top(model, "absent"), 0),
        (tops_only(model), everything, 0),  # B is zero and trained: it will act
    ):
        model.activate(server, train)
        assert model.prefix.depth == expected
    plain = federated()
    frozen = top(model, "frozen")
    task = ClientTask(0, everything, frozen, frozen, LocalTraining(local_steps=3), Dense(), 1e5, 0.1)
    trainers = [LocalTrainer(m, tokens(), CLIENTS, seed=3) for m in (model, plain)]
    both = [trainer.train([TrainingJob(task, changed, 1, 0)]) for trainer in trainers]
    assert distance(*both) == 0.0
    assert model.prefix.computed == 0


def test_a_changed_prefix_is_logged_once_and_an_unchanged_one_is_not(caplog):
    """D1 after somebody has trained the layers below: all layers run, and the log says why."""
    model = cached()
    changed = ServerModel(random_adapter(model))
    with caplog.at_level(logging.WARNING):
        for server, train in ((tops_only(model), top(model, "frozen")), (changed, top(model, "absent"))):
            model.activate(server, train)
        model.activate(changed, AdapterSlice.everything(model.shape))
        assert not caplog.records
        for _ in range(2):
            model.activate(changed, top(model, "frozen"))
    assert [r.message for r in caplog.records if "have changed from layer 0 on" in r.message] == [
        r.message for r in caplog.records
    ]
    assert len(caplog.records) == 1


def test_states_serve_other_clients_rounds_and_evaluations():
    model = cached()
    server = tops_only(model)
    trained(model, server, top(model))
    before = model.prefix.computed
    trained(model, tops_only(model, 5), top(model))
    score(model, server, tokens().select(np.arange(10)))
    assert model.prefix.computed - before <= 10
    again = model.prefix.computed
    score(model, server, tokens().select(np.arange(10)))
    assert model.prefix.computed == again


def test_layers_are_as_before_after_an_error():
    model = cached()
    server = tops_only(model)
    expected = score(model, server, tokens()).loss
    with (
        pytest.raises(RuntimeError, match="stop"),
        model.prefix.skipping(model._forward, model.inputs, model.inputs.arguments(_tensors(tokens().batch([0])))),
    ):
        raise RuntimeError("stop")
    assert np.array_equal(score(model, server, tokens()).loss, expected)
    assert not any("forward" in layer.__dict__ for layer in model.network.bert.encoder.layer)


def test_base_dropout_and_sizes_without_meaning_are_refused():
    model = cached()
    with pytest.raises(InputError, match="base_dropout"):
        trained(model, tops_only(model), top(model), base_dropout=True)
    with pytest.raises(InputError, match="prefix_cache"):
        model.cache_prefix(0)


def test_a_network_without_a_plain_list_of_layers_is_refused():
    model = federated()
    model.network.bert.encoder.layer = torch.nn.Sequential(*model.network.bert.encoder.layer)
    with pytest.raises(InputError, match="plain list of layers"):
        model.cache_prefix(1e6)


def test_dora_touches_every_adapted_layer():
    model = cached(adapter="dora")
    model.activate(ServerModel(model.initial_adapter(0)), top(model))
    assert model.prefix.depth == 0
