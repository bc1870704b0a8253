"""Jobs of every kind for the cohort engine, and how far two trainers are apart on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from airtune.compression.dense import Dense
from airtune.lora import Adapter, AdapterSlice, LoraFactors
from airtune.training.model import FederatedModel
from airtune.types import ClientTask, LocalTraining, ServerModel, Trained, TrainingJob

CLIENTS = [np.arange(0, 12), np.arange(12, 17), np.arange(17, 40)]


def job(
    server: ServerModel,
    client: int = 0,
    train: AdapterSlice | None = None,
    receive: AdapterSlice | None = None,
    round_index: int = 1,
    cycle: int = 0,
    **training: Any,
) -> TrainingJob:
    """Return a job of three steps of four examples; other fields go to `LocalTraining`."""
    train = AdapterSlice.everything(server.adapter.shape) if train is None else train
    settings = LocalTraining(**{"local_steps": 3, "batch_size": 4, "learning_rate": 0.01, **training})
    task = ClientTask(client, train if receive is None else receive, train, train, settings, Dense(), 1e5, 0.1)
    return TrainingJob(task, server, round_index, cycle)


def slices(server: ServerModel, kind: str) -> list[tuple[AdapterSlice, AdapterSlice | None]]:
    """Return (train, receive) of three clients."""
    shape = server.adapter.shape
    whole = AdapterSlice.everything(shape)
    rng = np.random.default_rng(0)
    match kind:
        case "full":
            return [(whole, None)] * 3
        case "unequal ranks":
            return [(AdapterSlice.truncation(shape, rank), None) for rank in (1, 4, 2)]
        case "depth, frozen below":
            return [(AdapterSlice.top_layers(shape, depth), whole) for depth in (1, 2, 1)]
        case "depth, absent below":
            return [(AdapterSlice.top_layers(shape, depth, "absent"), None) for depth in (1, 2, 1)]
        case "sketch":
            return [(AdapterSlice.sketch(shape, kept, rng), None) for kept in (2, 1, 3)]
        case "frozen A":
            return [(AdapterSlice.everything(shape, frozenset({"B"})), None)] * 3
        case "frozen B, unequal ranks":
            parts = [AdapterSlice.truncation(shape, rank) for rank in (1, 4, 2)]
            return [(replace(part, tensors=frozenset({"A"})), None) for part in parts]
        case "other components frozen":
            parts = [AdapterSlice({slot: rng.permutation(4)[:k] for slot in shape.slots}) for k in (1, 2, 3)]
            parts = [replace(p, components={s: np.sort(i) for s, i in p.components.items()}) for p in parts]
            return [(replace(part, outside="frozen"), AdapterSlice.truncation(shape, 3)) for part in parts]
        case "factors without head":
            return [(AdapterSlice(whole.components, extras=False), None)] * 3
        case "head alone":
            return [(AdapterSlice({}, outside="frozen"), whole)] * 3
        case _:
            raise AssertionError(kind)


SLICES = (
    "full",
    "unequal ranks",
    "depth, frozen below",
    "depth, absent below",
    "sketch",
    "frozen A",
    "frozen B, unequal ranks",
    "other components frozen",
    "factors without head",
    "head alone",
)


def with_cores(server: ServerModel) -> ServerModel:
    """Return the server with a random core in every slot (Fed-SB)."""
    draw = torch.Generator().manual_seed(5)
    factors: dict[str, LoraFactors] = {}
    for slot, f in server.adapter.factors.items():
        core = 0.3 * torch.randn((f.rank, f.rank), generator=draw, dtype=f.A.dtype)
        factors[slot] = replace(f, core=core)
    return replace(server, adapter=server.adapter.with_factors(factors))


def distance(first: Trained, second: Trained) -> float:
    """Return the largest relative difference of a tensor or a report; infinite where the two differ in kind."""
    worst = 0.0
    pairs = zip(first.values.tensors(), second.values.tensors(), strict=True)
    for (owner, kind, a), (wanted_owner, wanted_kind, b) in pairs:
        if (owner, kind, a.shape, a.dtype) != (wanted_owner, wanted_kind, b.shape, b.dtype):
            return math.inf
        worst = max(worst, float((a - b).norm()) / max(float(b.norm()), 1e-12))
    if first.reports.keys() != second.reports.keys():
        return math.inf
    for name, wanted in second.reports.items():
        if math.isnan(wanted) != math.isnan(first.reports[name]):
            return math.inf
        if not math.isnan(wanted):
            worst = max(worst, abs(first.reports[name] - wanted) / max(abs(wanted), 1e-12))
    return worst


def worst_distance(first: Sequence[Trained], second: Sequence[Trained]) -> float:
    """Return the largest distance of two trainers' results."""
    return max(distance(a, b) for a, b in zip(first, second, strict=True))


def moved(trained: Trained, start: Adapter) -> bool:
    """Return whether training changed anything."""
    pairs = zip(trained.values.tensors(), start.tensors(), strict=True)
    return any(not torch.equal(a.double(), b.double()) for (_, _, a), (_, _, b) in pairs)


def copies(model: FederatedModel) -> dict[str, Any]:
    """Return copies of all of a network's parameters, to see that a trainer leaves them as they were."""
    return {name: value.detach().clone() for name, value in model.network.named_parameters()}
