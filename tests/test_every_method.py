"""The conformance table: what holds for every method, in five fleets, on synthetic adapters without a model.

To add a method, add its row to `method_rows.py`. Methods of other installed packages take part by themselves.
"""

from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from airtune import methods
from airtune.errors import InputError
from airtune.experiment import checkpoint
from airtune.experiment.config import read_experiment
from airtune.experiment.toml import write_toml
from airtune.federation import Progress, Stop, begin, run
from airtune.lora import Adapter
from airtune.scheduling.work import ChoosesRanks
from airtune.streams import stream
from airtune.types import Method, Observation, Plan, RoundOutcome, ServerModel
from method_rows import ROWS, Row, third_party_rows
from synthetic_federation import SyntheticWorld, make_adapter, make_fleet, same_adapters

ALL_ROWS = [*ROWS, *third_party_rows()]
WORLDS = {
    "one client": SyntheticWorld(make_fleet(1, memory=1e6)),
    "seven clients": SyntheticWorld(make_fleet(7)),
    "one without examples": SyntheticWorld(make_fleet(7, examples=[30, 0, 20, 25, 10, 40, 15])),
    "all slow but one": SyntheticWorld(make_fleet(7, flops=[1e8] * 6 + [1e11], memory=1e6)),
    "one arrival missing": SyntheticWorld(make_fleet(7), missing=5),
}

each_row = pytest.mark.parametrize("row", ALL_ROWS, ids=lambda row: f"{row.name}-{ALL_ROWS.index(row)}")
each_world = pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)


def first_model(method: Any, seed: int = 0) -> ServerModel:
    ranks = method.ranks(make_adapter().shape) if isinstance(method, ChoosesRanks) else 4
    return ServerModel(make_adapter(ranks=ranks, seed=seed))


def progress_of(row: Row, world: SyntheticWorld, rounds: int, seed: int = 0) -> Progress:
    """Return the progress after some rounds."""
    progress = begin(row.method, first_model(row.method), world)
    return continue_to(row.method, progress, world, rounds, seed)


def continue_to(method: Method[Any], progress: Progress, world: SyntheticWorld, rounds: int, seed: int = 0) -> Progress:
    steps = run(method, progress, world, world, stop=Stop(rounds), seed=seed, evaluate=lambda _: {})
    return ([progress] + [after for after, _ in steps])[-1]


def observed(row: Row, world: SyntheticWorld, progress: Progress) -> Observation:
    return world.observe(progress.round + 1, progress.time, progress.pending, progress.model)


def planned(row: Row, world: SyntheticWorld, progress: Progress, seed: int = 0) -> tuple[Observation, Plan]:
    seen = observed(row, world, progress)
    return seen, row.method.plan(progress.state, seen, stream(seed, "plan", seen.round))


def outcome_of(row: Row, world: SyntheticWorld, progress: Progress) -> RoundOutcome:
    _, plan = planned(row, world, progress)
    outcome, _ = world.run(plan, progress.model, progress.pending, round_index=progress.round + 1, time=progress.time)
    return outcome


def frozen(value: Any) -> Any:
    """Return nested tuples that are equal exactly where two objects are."""
    if is_dataclass(value) and not isinstance(value, type):
        return (type(value).__name__, *(frozen(getattr(value, entry.name)) for entry in fields(value)))
    if isinstance(value, np.ndarray):
        return (value.shape, str(value.dtype), value.tobytes())
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), str(value.dtype), value.detach().double().numpy().tobytes())
    if isinstance(value, dict):
        return tuple((frozen(key), frozen(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(frozen(item) for item in value)
    if isinstance(value, frozenset):
        return tuple(sorted(map(repr, value)))
    return repr(value)


# ----------------------------------------------------------------------------------------------------------- planning


@each_world
@each_row
def test_five_rounds_run_and_every_plan_passes_its_check(row: Row, world: SyntheticWorld) -> None:
    """`run` checks each plan; nobody without examples is chosen; the model stays finite and keeps its shape."""
    start = begin(row.method, first_model(row.method), world)
    for progress, record in run(row.method, start, world, world, stop=Stop(5), seed=3, evaluate=lambda _: {}):
        assert all(world.fleet.num_examples[client] > 0 for client in record.cohort)
        assert len(set(record.cohort)) == len(record.cohort)
        assert progress.model.adapter.shape == start.model.adapter.shape
        assert all(bool(torch.isfinite(tensor).all()) for _, _, tensor in progress.model.adapter.tensors())


@each_world
@each_row
def test_same_seed_same_plan_another_seed_another_plan(row: Row, world: SyntheticWorld) -> None:
    progress = progress_of(row, world, 1)
    plans = [frozen(planned(row, world, progress, seed)[1]) for seed in (0, 0, 1, 2, 3, 4, 5, 6, 7)]
    assert plans[0] == plans[1]
    if "seed" in row.exceptions:
        assert len(set(plans)) == 1, row.exceptions["seed"]
    elif world.fleet.size > 1:
        assert len(set(plans)) > 1


@each_world
@each_row
def test_inputs_are_not_modified(row: Row, world: SyntheticWorld) -> None:
    progress = progress_of(row, world, 1)
    seen = observed(row, world, progress)
    before = frozen((progress.state, progress.model, seen.fleet, seen.links, seen.idle, row.method))
    plan = row.method.plan(progress.state, seen, stream(0, "plan", 2))
    outcome, _ = world.run(plan, progress.model, progress.pending, round_index=2, time=progress.time)
    given = frozen((plan, outcome.updates))
    row.method.aggregate(progress.state, progress.model, outcome)
    assert frozen((progress.state, progress.model, seen.fleet, seen.links, seen.idle, row.method)) == before
    assert frozen((plan, outcome.updates)) == given


# --------------------------------------------------------------------------------------------------------- aggregation


@each_world
@each_row
def test_aggregation_does_not_depend_on_the_order_of_arrival(row: Row, world: SyntheticWorld) -> None:
    progress = progress_of(row, world, 1)
    outcome = outcome_of(row, world, progress)
    results = [
        row.method.aggregate(progress.state, progress.model, replace(outcome, updates=updates))
        for updates in (outcome.updates, outcome.updates[::-1])
    ]
    assert frozen(results[0]) == frozen(results[1])


@each_world
@each_row
def test_a_round_without_updates_leaves_the_model_as_it_is(row: Row, world: SyntheticWorld) -> None:
    progress = progress_of(row, world, 1)
    outcome = replace(outcome_of(row, world, progress), updates=())
    model, _ = row.method.aggregate(progress.state, progress.model, outcome)
    assert model.version == progress.model.version
    assert frozen(model) == frozen(progress.model)


@each_world
@each_row
def test_clients_that_change_nothing_are_a_fixed_point(row: Row, world: SyntheticWorld) -> None:
    world = replace(world, noise=0.0)
    progress = progress_of(row, world, 0)
    model, _ = row.method.aggregate(progress.state, progress.model, outcome_of(row, world, progress))
    if row.exact and "fixed point" not in row.exceptions:
        assert same_adapters(model.adapter, progress.model.adapter)
    moved = distance(model, progress.model)
    if "fixed point" not in row.exceptions:
        assert moved < 1e-5
    elif world.fleet.size > 1 and world.missing is None and len(set(world.fleet.memory_bytes)) > 1:
        assert moved > 1e-5, f"holds after all: {row.exceptions['fixed point']}"


def distance(one: ServerModel, other: ServerModel) -> float:
    """Return the largest difference of the models' weights, relative to the other's, and of the extras."""
    largest = 0.0
    for module in other.adapter.placement:
        a, b = weight(one, module), weight(other, module)
        largest = max(largest, float((a - b).norm() / b.norm().clamp_min(1e-9)))
    for name, extra in other.adapter.extras.items():
        largest = max(largest, float((one.adapter.extras[name] - extra).norm() / extra.norm()))
    return largest


def weight(model: ServerModel, module: str) -> torch.Tensor:
    product = model.adapter.module_product(module)
    return product + model.base_update[module].product() if module in model.base_update else product


@each_world
@each_row
def test_what_no_client_sends_does_not_change(row: Row, world: SyntheticWorld) -> None:
    progress = progress_of(row, world, 1)
    outcome = outcome_of(row, world, progress)
    model, _ = row.method.aggregate(progress.state, progress.model, outcome)
    changed = 0
    for name, before in progress.model.adapter.factors.items():
        sent = {int(i) for u in outcome.updates for i in u.task.send.components.get(name, ())}
        rest = [i for i in range(before.rank) if i not in sent]
        if not model.base_update:
            after = model.adapter.factors[name]
            changed += not torch.equal(after.A[rest], before.A[rest])
            changed += not torch.equal(after.B[:, rest], before.B[:, rest])
    assert changed == 0 or "unsent" in row.exceptions


@each_world
@each_row
def test_every_upload_lies_in_its_slice_and_within_its_bound(row: Row, world: SyntheticWorld) -> None:
    progress = progress_of(row, world, 1)
    seen, plan = planned(row, world, progress)
    outcome, _ = world.run(plan, progress.model, progress.pending, round_index=2, time=progress.time)
    shape = progress.model.adapter.shape
    for update in outcome.updates:
        task = update.task
        start = task.send.take(progress.model.adapter)
        rng = stream(0, "compressor", task.client)
        payload, _ = task.compressor.encode(task.send, update.values, start, {}, rng)
        decoded: Adapter = task.compressor.decode(task.send, payload, start)
        assert payload.bits <= task.compressor.bits(task.send, shape) == seen.costs.uplink_bits(task)
        assert decoded.shape.slots.keys() == {name for name in shape.slots if task.send.kept(name)}
        assert all(decoded.factors[name].rank == task.send.kept(name) for name in decoded.factors)
        for name, components in task.send.components.items():
            assert set(components.tolist()) <= set(task.train.components.get(name, np.zeros(0)).tolist())
            assert set(components.tolist()) <= set(task.receive.components.get(name, np.zeros(0)).tolist())


# ------------------------------------------------------------------------------------------------ configuration, resume


@each_row
def test_configuration_to_toml_to_configuration_is_the_identity(row: Row) -> None:
    import tomllib

    experiment = read_experiment({"method": "fedit", "fleet": {"devices": {"jetson-tx2": 2}}})
    model = replace(experiment.model, adapter=getattr(row.method, "only_adapter", "lora"))
    written = write_toml(replace(experiment, model=model, method_name=row.name, method=row.method).plain())
    again = read_experiment(tomllib.loads(written))
    assert again.method == row.method
    assert again.method_name == row.name


@each_world
@each_row
def test_a_checkpoint_after_round_two_continues_to_the_same_round_five(
    row: Row, world: SyntheticWorld, tmp_path: Path
) -> None:
    through = progress_of(row, world, 5)
    checkpoint.save(tmp_path, progress_of(row, world, 2))
    resumed = continue_to(row.method, checkpoint.load(tmp_path), world, 5)
    assert frozen((resumed.model, resumed.state, resumed.time)) == frozen((through.model, through.state, through.time))


@each_row
def test_the_docstring_names_its_paper_and_cite_finds_it(row: Row) -> None:
    kind = methods.method_class(row.name)
    assert kind is type(row.method)
    text = inspect.getdoc(kind) or ""
    assert "Parameters\n----------" in text
    for entry in fields(kind):
        assert entry.name in text, f"{entry.name} is not documented"
    if not hasattr(kind, "arxiv"):
        assert row.name in ("composed", "deadline", "first-arrivals", "staleness")  # parts, not methods of a paper
        with pytest.raises(InputError, match="no paper of its own"):
            methods.cite(row.name)
        return
    assert kind.arxiv in text
    assert "epartures" in text or "eparture" in text
    assert kind.arxiv in methods.cite(row.name)


def test_every_method_of_the_registry_has_a_row() -> None:
    assert {row.name for row in ALL_ROWS} >= set(methods.method_names())
