"""The cohort engine against the readable twin: the same numbers for every model, slice, optimizer and setting."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from airtune.errors import InputError
from airtune.lora import AdapterSlice, merge
from airtune.training.cohort.batches import Packing
from airtune.training.cohort.memory import automatic_budget, block_clients, free_bytes
from airtune.training.cohort.trainer import CohortTrainer
from airtune.training.local import LocalTrainer
from airtune.types import LocalTraining, OrthogonalityPenalty, ProximalPenalty, SamplePrivacy, ServerModel, TailPenalty
from cohort_jobs import CLIENTS, SLICES, copies, job, moved, slices, with_cores, worst_distance
from tiny_networks import federated, random_adapter, rows, tokens

FAMILIES = (
    ("bert", "sequence-classification"),
    ("roberta", "sequence-classification"),
    ("mpnet", "sequence-classification"),
    ("gpt2", "sequence-classification"),
    ("llama", "causal-lm"),
    ("vit", "image-classification"),
)
OPTIMIZERS = ("adamw", "sgd", "lora-plus", "lora-rite", "lora-pro")
EXACT = 1e-9  # relative, in double precision: rounding grows through Adam's quotients


class Pair:
    """Both engines on one model."""

    def __init__(self, family: str, task: str, precision: str = "fp64", **fields: Any) -> None:
        self.model = federated(family, task, precision=precision, **fields)
        self.tokens = rows(task)
        self.server = ServerModel(random_adapter(self.model, 4))
        self.twin = LocalTrainer(self.model, self.tokens, CLIENTS, 7)
        self.cohort = CohortTrainer(self.model, self.tokens, CLIENTS, 7)

    def distance(self, jobs: list[Any]) -> float:
        found = self.cohort.train(jobs)
        assert all(moved(t, j.task.train.take(j.model.adapter)) for t, j in zip(found, jobs, strict=True))
        return worst_distance(found, self.twin.train(jobs))


_PAIRS: dict[tuple[Any, ...], Pair] = {}


def pair(family: str = "bert", task: str = "sequence-classification", precision: str = "fp64", **fields: Any) -> Pair:
    key = (family, task, precision, *fields.items())
    if key not in _PAIRS:
        _PAIRS[key] = Pair(family, task, precision, **fields)
    return _PAIRS[key]


def jobs_of(server: ServerModel, kind: str, **training: Any) -> list[Any]:
    return [job(server, client, *part, **training) for client, part in enumerate(slices(server, kind))]


# ------------------------------------------------------------------------------------------------------------ equality


@pytest.mark.parametrize("kind", SLICES)
@pytest.mark.parametrize(("family", "task"), FAMILIES)
def test_every_slice_of_every_family_trains_as_alone(family: str, task: str, kind: str) -> None:
    both = pair(family, task)
    if kind == "head alone" and task == "causal-lm":
        return  # it has no head of its own
    assert both.distance(jobs_of(both.server, kind)) < EXACT


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["full", "unequal ranks", "frozen A", "frozen B, unequal ranks", "sketch"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_every_optimizer_steps_as_alone(family: str, kind: str, optimizer: str) -> None:
    both = pair(family)
    momentum = 0.5 if optimizer == "sgd" else 0.0
    assert both.distance(jobs_of(both.server, kind, optimizer=optimizer, momentum=momentum, weight_decay=0.02)) < 1e-7


@pytest.mark.parametrize(("family", "task"), FAMILIES)
def test_single_precision_agrees_to_five_digits(family: str, task: str) -> None:
    both = pair(family, task, "fp32")
    for kind in ("full", "unequal ranks", "depth, frozen below", "sketch", "frozen A"):
        jobs = jobs_of(both.server, kind, optimizer="sgd", learning_rate=0.05)
        assert both.distance(jobs) < 1e-5


def test_settings_are_each_clients_own() -> None:
    both = pair("bert")
    numbers = [
        {"local_steps": 2, "batch_size": 3, "learning_rate": 0.01, "weight_decay": 0.1},
        {"local_steps": None, "epochs": 2.0, "batch_size": 4, "learning_rate": 0.02, "head_learning_rate": 0.001},
        {"local_steps": 7, "batch_size": 9, "learning_rate": 0.005, "max_grad_norm": 0.1},
    ]
    for optimizer in ("adamw", "sgd"):
        jobs = [job(both.server, client, optimizer=optimizer, **own) for client, own in enumerate(numbers)]
        assert both.distance(jobs) < EXACT


def test_clients_with_other_models_and_mixed_slices_go_together() -> None:
    both = pair("bert")
    other = ServerModel(random_adapter(both.model, 9))
    jobs = [job(server, c, *part) for server in (both.server, other) for c, part in enumerate(slices(server, "sketch"))]
    jobs += [replace(j, round=2) for kind in ("full", "depth, frozen below") for j in jobs_of(other, kind)]
    jobs += [replace(j, cycle=1) for j in jobs_of(both.server, "factors without head")]
    jobs += [replace(j, round=3) for j in jobs_of(other, "factors without head")]
    assert both.distance(jobs) < EXACT


def test_cores_and_shared_slots() -> None:
    both = pair("bert")
    server = with_cores(both.server)
    shape = server.adapter.shape
    inner = [AdapterSlice(AdapterSlice.truncation(shape, k).components, frozenset()) for k in (4, 2, 4)]
    assert both.distance([job(server, client, part) for client, part in enumerate(inner)]) < EXACT
    assert both.distance([job(server, client) for client in range(3)]) < EXACT
    shared = pair("bert", adapter="msp-lora")
    assert len(shared.server.adapter.shape.slots) > len(both.server.adapter.shape.slots)
    for kind in ("full", "unequal ranks", "frozen A"):
        assert shared.distance(jobs_of(shared.server, kind)) < EXACT


@pytest.mark.parametrize("dense", [False, True])
def test_what_was_merged_into_the_base_acts_for_all(dense: bool) -> None:
    both = pair("gpt2")
    update = {}
    for slot, f in random_adapter(both.model, 11).factors.items():
        merged = merge(None, f)
        for _ in range(12 if dense else 0):
            merged = merge(merged, f)
        update[slot] = merged
    server = replace(both.server, base_update=update)
    jobs = [*jobs_of(server, "full"), *(replace(j, round=2) for j in jobs_of(both.server, "full"))]
    assert both.distance(jobs) < EXACT


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_dropout_draws_are_the_twins(family: str) -> None:
    both = pair(family)
    jobs = jobs_of(both.server, "unequal ranks", lora_dropout=0.3)
    assert both.distance(jobs) < EXACT
    small = CohortTrainer(both.model, both.tokens, CLIENTS, 7, micro_batch_tokens=20)  # batches are cut
    assert worst_distance(small.train(jobs), both.twin.train(jobs)) < EXACT
    assert worst_distance(both.cohort.train(jobs), both.cohort.train(jobs_of(both.server, "unequal ranks"))) > 1e-3


@pytest.mark.parametrize("kind", ["unequal ranks", "frozen A", "frozen B, unequal ranks"])
@pytest.mark.parametrize("form", ["proximal", "tail", "cosine", "off-diagonal", "identity", "mixed"])
def test_penalties_pull_as_alone(form: str, kind: str) -> None:
    both = pair("bert")

    def penalties(client: int) -> tuple[Any, ...]:
        weight = 0.2 * (client + 1)
        if form == "proximal":
            return (ProximalPenalty(weight),)
        if form == "tail":
            return (TailPenalty(weight, dict.fromkeys(list(both.server.adapter.factors)[client:], 1)),)
        return (OrthogonalityPenalty(weight, form), ProximalPenalty(1.0))  # type: ignore[arg-type]

    jobs = [job(both.server, c, *part, penalties=penalties(c)) for c, part in enumerate(slices(both.server, kind))]
    assert both.distance(jobs) < 1e-8


@given(data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_cohort_trains_as_alone(data: st.DataObject) -> None:
    both = pair("bert")
    shape = both.server.adapter.shape

    def one(client: int) -> Any:
        ranks = {slot: data.draw(st.integers(0, 4)) for slot in shape.slots}
        train = AdapterSlice.truncation(shape, ranks)
        train = replace(train, outside=data.draw(st.sampled_from(["absent", "frozen"])))
        train = replace(train, tensors=data.draw(st.sampled_from([frozenset({"B"}), frozenset({"A", "B"})])))
        numbers = {
            "local_steps": data.draw(st.integers(1, 4)),
            "batch_size": data.draw(st.integers(1, 6)),
            "learning_rate": data.draw(st.floats(1e-4, 1e-2)),
            "optimizer": data.draw(st.sampled_from(["adamw", "sgd"])),
            "max_grad_norm": data.draw(st.sampled_from([None, 0.5])),
        }
        return job(both.server, client, train, AdapterSlice.everything(shape), **numbers)

    jobs = [one(client) for client in data.draw(st.permutations(range(3)))]
    budget = data.draw(st.integers(12, 200))
    engine = CohortTrainer(both.model, both.tokens, CLIENTS, 7, micro_batch_tokens=budget)
    assert worst_distance(engine.train(jobs), both.twin.train(jobs)) < 1e-7


@pytest.mark.parametrize("receive_all", [False, True])
def test_a_prefix_cache_serves_both_engines(receive_all: bool) -> None:
    model, data = federated("bert", precision="fp64"), tokens()
    top = {name for name in model.shape.slots if ".layer.1." in name}
    zero = model.initial_adapter(0)
    acting = random_adapter(model, 4)
    factors = {name: (acting if name in top else zero).factors[name] for name in zero.factors}
    server = ServerModel(zero.with_factors(factors))
    whole = AdapterSlice.everything(server.adapter.shape)
    parts = [AdapterSlice({n: np.arange(k) for n in top}, outside="frozen") for k in (1, 2, 4)]
    jobs = [job(server, c, part, whole if receive_all else None) for c, part in enumerate(parts)]
    twin = LocalTrainer(model, data, CLIENTS, 7).train(jobs)
    model.cache_prefix(1e9)
    assert model.prefix is not None
    assert worst_distance(CohortTrainer(model, data, CLIENTS, 7, threads=2).train(jobs), twin) < EXACT
    assert model.prefix.depth == 1 and model.prefix.computed > 0


@pytest.mark.parametrize(("family", "task"), [("bert", "sequence-classification"), ("llama", "causal-lm")])
def test_checkpointing_keeps_less_and_changes_nothing(family: str, task: str) -> None:
    both = pair(family, task)
    parameters = {p.untyped_storage().data_ptr() for p in both.model.network.parameters()}
    engine = CohortTrainer(both.model, both.tokens, CLIENTS, 7, checkpointing=True)
    jobs = jobs_of(both.server, "unequal ranks")
    kept = [_peak(chosen, jobs, parameters) for chosen in (both.cohort, engine)]
    assert kept[1] < 0.7 * kept[0]
    assert worst_distance(engine.train(jobs), both.cohort.train(jobs)) == 0.0
    with pytest.raises(InputError, match=r"training\.checkpointing: dropout would be drawn twice"):
        engine.train([job(both.server, lora_dropout=0.1)])


# ------------------------------------------------------------------------------------------------- what must not matter


def test_threads_work_side_by_side_to_the_same_bits() -> None:
    both = pair("bert", precision="fp32")
    jobs = [j for kind in ("unequal ranks", "depth, frozen below", "sketch") for j in jobs_of(both.server, kind)]
    before = torch.get_num_threads()
    engines = [CohortTrainer(both.model, both.tokens, CLIENTS, 7, threads=2) for _ in range(2)]
    first, second = (engine.train(jobs) for engine in engines)
    assert torch.get_num_threads() == before
    assert worst_distance(first, second) == 0.0
    assert engines[0].work == engines[1].work and engines[0].work.passes > 0
    assert worst_distance(first, both.cohort.train(jobs)) < 1e-4


def test_neither_micro_batches_nor_the_order_of_jobs_matter() -> None:
    both = pair("bert", precision="fp32")
    jobs = [j for kind in ("full", "sketch") for j in jobs_of(both.server, kind, optimizer="sgd")]
    reference = both.cohort.train(jobs)
    for budget in (1, 12, 40, 100):
        engine = CohortTrainer(both.model, both.tokens, CLIENTS, 7, micro_batch_tokens=budget)
        assert worst_distance(engine.train(jobs), reference) < 1e-5
    turned = both.cohort.train(jobs[::-1])[::-1]
    assert worst_distance(turned, reference) < 1e-5
    assert worst_distance(both.cohort.train(jobs), reference) == 0.0


def test_a_diverged_client_is_lost_and_poisons_nobody() -> None:
    both = pair("bert", precision="fp32")
    sane = [job(both.server, client, optimizer="sgd") for client in (0, 1)]
    lost = [job(both.server, 2, optimizer="sgd", learning_rate=rate, local_steps=5) for rate in (1e30, math.inf)]
    found = both.cohort.train([sane[0], lost[0], sane[1], lost[1]])
    twins = both.twin.train([sane[0], lost[0], sane[1], lost[1]])
    assert worst_distance([found[0], found[2]], [twins[0], twins[2]]) < 1e-5
    for mine, other in ((found[1], twins[1]), (found[3], twins[3])):
        assert math.isnan(mine.reports["loss"]) and mine.reports["steps"] == other.reports["steps"]
        start = both.server.adapter.tensors()
        assert all(torch.equal(a, b) for (_, _, a), (_, _, b) in zip(mine.values.tensors(), start, strict=True))


def test_network_and_inputs_are_left_as_they_were() -> None:
    both = pair("bert")
    server = {(o, k): t.clone() for o, k, t in both.server.adapter.tensors()}
    network = copies(both.model)
    ids = torch.arange(2, 12)[None]
    before = both.model.logits(ids, torch.ones_like(ids))
    with torch.random.fork_rng(devices=[]):
        state = torch.random.get_rng_state()
        both.cohort.train(jobs_of(both.server, "full", lora_dropout=0.2))
        assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(t, server[o, k]) for o, k, t in both.server.adapter.tensors())
    assert all(torch.equal(t, network[name]) for name, t in both.model.network.named_parameters())
    assert torch.equal(both.model.logits(ids, torch.ones_like(ids)), before)


def test_a_failure_leaves_the_network_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    both = pair("bert")
    monkeypatch.setattr("airtune.training.cohort.block.loss_by_example", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        both.cohort.train(jobs_of(both.server, "full"))
    monkeypatch.undo()
    assert not any("forward" in vars(module) for module in both.model.network.modules())
    assert both.distance(jobs_of(both.server, "full")) < EXACT


# ----------------------------------------------------------------------------------------------------- batches, memory


@given(
    st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=9), min_size=1, max_size=12),
    st.integers(1, 200),
    st.integers(0, 100),
)
def test_micro_batches_hold_every_row_once_within_the_budget(drawn: list[list[int]], budget: int, launch: int) -> None:
    lengths = np.array([n for batch in drawn for n in batch], dtype=np.int64)
    ends = np.cumsum([len(batch) for batch in drawn])
    batches = [(k, np.arange(end - len(batch), end)) for k, (batch, end) in enumerate(zip(drawn, ends, strict=True))]
    found = Packing(budget, launch).pack(batches, lengths)
    assert sorted(np.concatenate([m.indices for m in found]).tolist()) == list(range(len(lengths)))
    for micro in found:
        assert micro.rows * micro.length <= budget or micro.rows == 1
        assert micro.length == lengths[micro.indices].max()
        assert sum(part.rows for part in micro.segments) == micro.rows
        assert sum(part.clients for part in micro.segments) == len(micro.chunks)
        owners = {int(row): k for k, rows in batches for row in rows}
        assert all(owners[int(row)] == chunk.member for chunk in micro.chunks for row in chunk.rows)
        for part in micro.segments:
            sizes = {len(chunk.rows) for chunk in micro.chunks[part.first : part.first + part.clients]}
            assert sizes == {part.rows // part.clients}


def test_kept_activations_and_stacks_stay_within_the_memory_budget() -> None:
    model, data = federated("bert"), tokens(200)
    clients = [np.arange(k, 200, 20) for k in range(20)]
    server = ServerModel(random_adapter(model, 4))
    jobs = [job(server, client, batch_size=10, local_steps=2) for client in range(20)]
    parameters = {p.untyped_storage().data_ptr() for p in model.network.parameters()}
    peaks = []
    for budget in (600_000, 2_400_000):
        engine = CohortTrainer(model, data, clients, 7, memory_budget=budget)
        peaks.append(_peak(engine, jobs, parameters))
        assert peaks[-1] <= budget
    assert peaks[1] > 1.5 * peaks[0]
    with pytest.raises(InputError, match=r"training\.memory_budget: 1000 bytes do not hold one example of 12 tokens"):
        CohortTrainer(model, data, clients, 7, memory_budget=1000)
    with pytest.raises(InputError, match=r"training\.micro_batch_tokens: 100000 do not fit"):
        CohortTrainer(model, data, clients, 7, memory_budget=600_000, micro_batch_tokens=100_000)


def _peak(engine: CohortTrainer, jobs: list[Any], parameters: set[int]) -> int:
    """Return the most bytes that a forward pass keeps for its backward pass, beside the network's own."""
    kept: dict[int, int] = {}
    peak = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal peak
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
            peak = max(peak, sum(kept.values()))
        return tensor

    def forget(*_: Any) -> None:
        kept.clear()

    handle = engine.model.network.register_forward_pre_hook(forget)
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            engine.train(jobs)
    finally:
        handle.remove()
    return peak


def test_automatic_budget_is_half_of_what_is_free() -> None:
    device = torch.device("cpu")
    free, budget = free_bytes(device), automatic_budget(device)
    assert budget % (64 * 2**20) == 0
    assert budget <= 0.6 * free or budget == 64 * 2**20
    assert block_clients(1, 10**6, 4) == 1
    assert block_clients(10**12, 10, 4) > 100


def test_padding_is_counted() -> None:
    both = pair("bert", precision="fp32")
    engine = CohortTrainer(both.model, both.tokens, CLIENTS, 7)
    found = engine.train(jobs_of(both.server, "full"))
    assert engine.work.tokens == sum(t.reports["tokens"] for t in found)
    assert 0.0 <= engine.work.padding_share < 0.5


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"base_dropout": True}, r"training\.base_dropout: .*valid: false, or training\.engine = \"twin\""),
        ({"optimizer": "galore"}, r"training\.optimizer: the cohort engine has no galore; valid: adamw.*twin"),
        ({"privacy": SamplePrivacy()}, r"training\.privacy: .*twin"),
    ],
)
def test_training_that_it_cannot_do_is_refused(fields: dict[str, Any], problem: str) -> None:
    both = pair("bert")
    with pytest.raises(InputError, match=problem):
        both.cohort.train([job(both.server, **fields)])
    with pytest.raises(InputError, match=problem):
        both.cohort.check(LocalTraining(**fields))


@pytest.mark.parametrize("adapter", ["dora", "mole"])
def test_adapters_without_a_stacked_form_are_refused(adapter: str) -> None:
    model = federated("bert", adapter=adapter)
    with pytest.raises(InputError, match=rf"model\.adapter: the cohort engine has no {adapter}.*twin"):
        CohortTrainer(model, tokens(), CLIENTS, 7)


def test_batch_normalisation_and_strange_heads_are_refused() -> None:
    coupled = federated("bert")
    coupled.network.bert.pooler.add_module("norm", nn.BatchNorm1d(4))
    with pytest.raises(InputError, match=r"bert\.pooler\.norm normalises over a batch, which would couple clients"):
        CohortTrainer(coupled, tokens(), CLIENTS, 7)
    strange = federated("bert")
    strange.network.classifier = nn.Bilinear(1, 1, 1)
    with pytest.raises(InputError, match="the head's classifier is no linear layer"):
        CohortTrainer(strange, tokens(), CLIENTS, 7)


def test_clients_without_work_are_named() -> None:
    model = federated("bert")
    server = ServerModel(random_adapter(model))
    engine = CohortTrainer(model, tokens(), [*CLIENTS, np.arange(0)], 7)
    with pytest.raises(ValueError, match="client 3 has no examples"):
        engine.train([job(server, 3)])
    with pytest.raises(ValueError, match="client 0: its slice trains nothing"):
        engine.train([job(server, 0, AdapterSlice({}, extras=False))])
    assert engine.train([]) == []
