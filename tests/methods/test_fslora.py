"""FSLoRA: the sketch is unbiased, really applied, and its slice form is SGD on the whole matrices."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.func import functional_call

from airtune.aggregation.mean import IndependentSampling, Mean
from airtune.compression.dense import Dense
from airtune.errors import InputError
from airtune.lora import AdapterSlice
from airtune.methods.fslora import FSLoRA
from airtune.scheduling.sketching import SketchByRatio, Sketching, equal_parts, kept_components
from airtune.scheduling.work import LocalWork
from airtune.streams import stream
from airtune.training.local import LocalTrainer
from airtune.training.losses import mean_loss
from airtune.types import (
    ClientTask,
    ClientUpdate,
    LocalTraining,
    Pending,
    Plan,
    RoundOutcome,
    ServerModel,
    TaskCost,
    TrainingJob,
)
from synthetic_federation import SyntheticWorld, make_adapter, make_fleet
from tiny_networks import federated, network, random_adapter, tokens

RANK = 4
SGD = LocalTraining(local_steps=3, batch_size=4, learning_rate=0.05, optimizer="sgd")
CLIENTS = [np.arange(0, 14), np.arange(14, 24), np.arange(24, 40)]


@pytest.fixture(scope="module")
def trainer() -> LocalTrainer:
    return LocalTrainer(federated("bert", precision="fp64"), tokens(), CLIENTS, seed=3)


def sketch_matrix(rank: int, kept) -> np.ndarray:
    matrix = np.zeros((rank, rank))
    matrix[kept, kept] = rank / len(kept)
    return matrix


@pytest.mark.parametrize(("rank", "kept"), [(3, 1), (4, 2), (5, 3), (4, 4)])
def test_the_sketch_is_unbiased_and_its_second_moment_is_known(rank: int, kept: int) -> None:
    """Every subset is equally likely, E[S] = I and E[S S'] = rank / kept I; the draws are uniform over the subsets."""
    subsets = list(itertools.combinations(range(rank), kept))
    matrices = [sketch_matrix(rank, list(subset)) for subset in subsets]
    np.testing.assert_allclose(sum(matrices) / len(matrices), np.eye(rank), atol=1e-14)
    second = sum(m @ m.T for m in matrices) / len(matrices)
    np.testing.assert_allclose(second, rank / kept * np.eye(rank), atol=1e-14)
    shape = make_adapter(layers=1, ranks=rank).shape
    slot = next(iter(shape.slots))
    draws = [tuple(Sketching().draw(shape, kept, 5, client).train.components[slot].tolist()) for client in range(2000)]
    count = np.array([draws.count(subset) for subset in subsets])
    assert count.sum() == 2000
    expected = 2000 / len(subsets)
    assert ((count - expected) ** 2 / expected).sum() < 10 + 3 * len(subsets)  # chi-square


def test_the_slice_takes_the_product_of_the_sketched_factors() -> None:
    adapter = make_adapter(dtype=torch.float64)
    part = Sketching().draw(adapter.shape, 2, 0, 7).train
    for slot, taken in part.take(adapter).factors.items():
        whole = adapter.factors[slot]
        sketch = torch.from_numpy(sketch_matrix(RANK, part.components[slot]))
        expected = whole.scaling * whole.B @ sketch @ whole.A
        torch.testing.assert_close(taken.product(), expected, rtol=1e-13, atol=1e-13)


# ------------------------------------------------------------------------------------------------------ real training


def sketched_job(trainer: LocalTrainer, client: int, kept: int, training: LocalTraining = SGD) -> TrainingJob:
    model = ServerModel(random_adapter(trainer.model, 1))
    slices = Sketching().draw(model.adapter.shape, kept, 11, client)
    task = ClientTask(client, slices.receive, slices.train, slices.send, training, Dense(), 1e5, 0.1)
    return TrainingJob(task, model, 1)


def full_matrix_sgd(trainer: LocalTrainer, job: TrainingJob) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Train the whole A and B through dense weights W0 + scaling B S A of an unmodified network, by autograd."""
    plain, adapter = network("bert").double(), job.model.adapter
    weights = {name: value.detach().clone() for name, value in plain.named_parameters()}
    weights.update({name: value.clone() for name, value in adapter.extras.items()})
    trained = {name: (f.A.clone(), f.B.clone()) for name, f in adapter.factors.items()}
    sketch = {n: torch.from_numpy(sketch_matrix(RANK, job.task.train.components[n])) for n in adapter.factors}
    rate = job.task.training.learning_rate
    for indices in trainer.batches(job):
        batch = {name: torch.from_numpy(value) for name, value in trainer.tokens.batch(indices).items()}
        leaves = [t.requires_grad_() for pair in trained.values() for t in pair]
        heads = [weights[name].requires_grad_() for name in adapter.extras]
        merged = dict(weights)
        for name, (a, b) in trained.items():
            merged[f"{name}.weight"] = weights[f"{name}.weight"] + adapter.factors[name].scaling * b @ sketch[name] @ a
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        loss = mean_loss(functional_call(plain, merged, kwargs=inputs).logits, batch["labels"])
        gradients = torch.autograd.grad(loss, leaves + heads)
        moved = [(t - rate * g).detach() for t, g in zip(leaves + heads, gradients, strict=True)]
        pairs = iter(moved[: len(leaves)])
        trained = {name: (next(pairs), next(pairs)) for name in trained}
        weights.update(zip(adapter.extras, moved[len(leaves) :], strict=True))
    return trained


@pytest.mark.parametrize(("client", "kept"), [(0, 1), (1, 2), (2, 3)])
def test_sgd_on_the_slice_is_sgd_on_the_whole_matrices_with_the_sketch(trainer, client: int, kept: int) -> None:
    job = sketched_job(trainer, client, kept)
    result = job.task.train.put(job.model.adapter, trainer.train([job])[0].values)
    for name, (a, b) in full_matrix_sgd(trainer, job).items():
        torch.testing.assert_close(result.factors[name].A, a, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(result.factors[name].B, b, rtol=1e-12, atol=1e-14)
        assert not torch.equal(result.factors[name].B, job.model.adapter.factors[name].B)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_exactly_the_sketched_columns_of_b_and_rows_of_a_change(trainer, optimizer: str) -> None:
    """What the published code fails: there the mask is never applied and everything changes."""
    method = FSLoRA(ratios=(0.25, 0.5, 0.75), training=replace(SGD, optimizer=optimizer, weight_decay=0.01))
    model = ServerModel(random_adapter(trainer.model, 1))
    world = SyntheticWorld(make_fleet(3, memory=1e9))
    plan = method.plan(None, world.observe(1, 0.0, Pending(), model), stream(0, "plan", 1))
    kept = sorted(next(iter(task.train.components.values())).size for task in plan.tasks)
    assert kept == [1, 2, 3]  # no mask is trivial
    for task in plan.tasks:
        outcome = trained_round(trainer, model, plan, [task])
        after, _ = method.aggregate(None, model, outcome)
        for name, before in model.adapter.factors.items():
            chosen = task.train.components[name].tolist()
            rows = [i for i in range(RANK) if not torch.equal(after.adapter.factors[name].A[i], before.A[i])]
            columns = [i for i in range(RANK) if not torch.equal(after.adapter.factors[name].B[:, i], before.B[:, i])]
            assert rows == columns == chosen


def trained_round(trainer: LocalTrainer, model: ServerModel, plan: Plan, tasks: list[ClientTask]) -> RoundOutcome:
    jobs = [TrainingJob(task, model, 1) for task in tasks]
    cost = TaskCost(0.0, 1.0, 1.0, 0, 0, 0.0)
    updates = tuple(
        ClientUpdate(task, result.values, model.version, 0.0, 1.0, cost, result.reports)
        for task, result in zip(tasks, trainer.train(jobs), strict=True)
    )
    return RoundOutcome(plan, make_fleet(3), updates, (), 0.0, 1.0)


def test_with_every_component_a_round_is_federated_averaging(trainer) -> None:
    method = FSLoRA(ratios=(1.0,), training=SGD)
    model = ServerModel(random_adapter(trainer.model, 1))
    world = SyntheticWorld(make_fleet(3, memory=1e9))
    plan = method.plan(None, world.observe(1, 0.0, Pending(), model), stream(0, "plan", 1))
    outcome = trained_round(trainer, model, plan, list(plan.tasks))
    result, _ = method.aggregate(None, model, outcome)
    mean = Mean("uniform")(model, outcome)
    for name, factors in mean.adapter.factors.items():
        torch.testing.assert_close(result.adapter.factors[name].A, factors.A, rtol=1e-14, atol=1e-15)
        torch.testing.assert_close(result.adapter.factors[name].B, factors.B, rtol=1e-14, atol=1e-15)


# ------------------------------------------------------------------------------------------------- unbiased aggregation


@pytest.mark.parametrize("weights", ["examples", "uniform"])
def test_the_sum_over_all_cohorts_is_the_update_of_the_whole_fleet(weights: str) -> None:
    """All 2^6 cohorts, with sketches of different sizes: sum of probability times result = everyone takes part."""
    model = ServerModel(make_adapter(dtype=torch.float64))
    fleet = make_fleet(6, examples=[5, 80, 20, 1, 40, 13])
    chance = np.array([0.9, 0.05, 0.5, 0.3, 1.0, 0.7])
    generator = torch.Generator().manual_seed(0)
    updates = [sketched_update(model, client, float(q), generator) for client, q in enumerate(chance)]
    expected = total(model, [replace(u, task=replace(u.task, probability=1.0)) for u in updates], fleet, weights)
    mean = {key: torch.zeros_like(value) for key, value in expected.items()}
    for drawn in itertools.product([False, True], repeat=6):
        probability = float(np.prod(np.where(drawn, chance, 1.0 - chance)))
        cohort = [update for update, taken in zip(updates, drawn, strict=True) if taken]
        for key, value in total(model, cohort, fleet, weights).items():
            mean[key] += probability * value
    for key, value in expected.items():
        torch.testing.assert_close(mean[key], value, rtol=1e-12, atol=1e-12)


def sketched_update(model: ServerModel, client: int, chance: float, generator: torch.Generator) -> ClientUpdate:
    part = Sketching().draw(model.adapter.shape, 1 + client % 3, 0, client).train
    task = ClientTask(client, part, part, part, SGD, Dense(), 1e5, 0.1, chance)
    start = part.take(model.adapter)
    moved = {
        name: replace(
            f,
            A=f.A + torch.randn(f.A.shape, generator=generator, dtype=f.A.dtype),
            B=f.B + torch.randn(f.B.shape, generator=generator, dtype=f.B.dtype),
        )
        for name, f in start.factors.items()
    }
    extras = {n: t + torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in start.extras.items()}
    cost = TaskCost(0.0, 1.0, 1.0, 0, 0, 0.0)
    return ClientUpdate(task, start.with_factors(moved, extras), 0, 0.0, 1.0, cost, {})


def total(model: ServerModel, updates: list[ClientUpdate], fleet, weights) -> dict[tuple[str, str], torch.Tensor]:
    outcome = RoundOutcome(Plan(()), fleet, tuple(updates), (), 0.0, 1.0)
    result = IndependentSampling(weights)(model, outcome).adapter
    before = {(owner, kind): tensor for owner, kind, tensor in model.adapter.tensors()}
    return {(owner, kind): tensor - before[owner, kind] for owner, kind, tensor in result.tensors()}


# ------------------------------------------------------------------------------------------------------------ planning


def observed(**fleet):
    return SyntheticWorld(make_fleet(**{"size": 6, "memory": 1e9, **fleet})).observe(
        1, 0.0, Pending(), ServerModel(make_adapter(ranks=8))
    )


def test_download_and_upload_are_counted_for_the_slice_only() -> None:
    seen = observed()
    whole = AdapterSlice.everything(seen.shape)
    head = seen.shape.extra_values
    for download in ("slice", "all"):
        plan = FSLoRA(ratios=(0.25,), download=download).plan(None, seen, stream(0, "plan", 1))
        for task in plan.tasks:
            sent = 32 * ((whole.num_values(seen.shape) - head) // 4 + head)
            assert seen.costs.uplink_bits(task) == sent
            assert seen.costs.downlink_bits(task) == (
                sent if download == "slice" else 32 * whole.num_values(seen.shape)
            )


def test_slow_clients_keep_less_and_memory_lowers_ratios() -> None:
    seen = observed(flops=[6e9, 1e9, 2e9, 5e9, 3e9, 4e9])
    work = LocalWork(SGD, Dense())
    by_speed = SketchByRatio().slices(np.arange(6), seen, work, stream(0, "test"))
    kept = [part.train.kept(next(iter(seen.shape.slots))) for part in by_speed]
    assert kept == [4, 1, 1, 4, 2, 2]
    room = work.memory_bytes(Sketching().sized(seen.shape, 2), seen)
    tight = observed(memory=[1e9, 1e9, 1e9, room, 1e9, 1e9], flops=[6e9, 1e9, 2e9, 5e9, 3e9, 4e9])
    limited = SketchByRatio().slices(np.arange(6), tight, work, stream(0, "test"))
    assert limited[3].train.kept(next(iter(seen.shape.slots))) == 2


def test_random_ratios_are_equally_likely_and_new_every_round() -> None:
    seen, work = observed(size=60), LocalWork(SGD, Dense())
    slot = next(iter(seen.shape.slots))
    rounds = [
        [
            p.train.kept(slot)
            for p in SketchByRatio(assign="random").slices(np.arange(60), seen, work, stream(r, "test"))
        ]
        for r in range(20)
    ]
    share = [np.mean(np.array(rounds) == k) for k in (1, 2, 4)]
    np.testing.assert_allclose(share, 1 / 3, atol=0.05)
    assert rounds[0] != rounds[1]


def test_a_sketch_depends_on_round_and_client_not_on_the_cohort() -> None:
    seen, work = observed(), LocalWork(SGD, Dense())
    slicer = SketchByRatio(ratios=(0.5,))

    def drawn(clients, round_index):
        parts = slicer.slices(np.array(clients), seen, work, stream(round_index, "test"))
        names = seen.shape.slots
        return {c: [p.train.components[n].tolist() for n in names] for c, p in zip(clients, parts, strict=True)}

    everyone, few = drawn(range(6), 1), drawn([2, 5], 1)
    assert few == {c: everyone[c] for c in (2, 5)}
    assert drawn([2, 5], 2) != few
    assert len({str(part) for part in everyone.values()}) == 6
    assert len({str(subset) for subset in everyone[0]}) > 1  # one subset per slot


def test_one_subset_for_all_slots_on_request() -> None:
    shape = make_adapter().shape
    parts = Sketching(scope="client").draw(shape, 2, 0, 1).train.components
    assert len({tuple(indices.tolist()) for indices in parts.values()}) == 1
    unequal = make_adapter(ranks={name: 2 + (i % 2) for i, name in enumerate(shape.slots)}).shape
    with pytest.raises(InputError, match=r"scope.*slot"):
        Sketching(scope="client").draw(unequal, 2, 0, 1)


@pytest.mark.parametrize("fields", [{"ratios": ()}, {"ratios": (0.0,)}, {"ratios": (1.5,)}, {"assign": "luck"}])
def test_bad_fields_are_refused(fields) -> None:
    with pytest.raises(InputError, match=next(iter(fields))):
        FSLoRA(**fields)


def test_small_helpers() -> None:
    assert kept_components(make_adapter(ranks=4).shape, (0.125, 0.25, 0.5, 1.0)).tolist() == [1, 2, 4]
    assert equal_parts(np.array([3.0, 1.0, 2.0, 4.0]), 2).tolist() == [1, 0, 0, 1]
    assert equal_parts(np.ones(4), 3).tolist() == [1, 1, 1, 1]
