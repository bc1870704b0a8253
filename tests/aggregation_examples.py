"""Random adapters and round outcomes for the tests of the server's rules: no model, no radio."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from airtune.lora import BOTH, Adapter, AdapterSlice, LoraFactors
from airtune.types import (
    ClientTask,
    ClientUpdate,
    Fleet,
    Group,
    LocalTraining,
    LostTask,
    Plan,
    RoundOutcome,
    ServerModel,
    TaskCost,
)

SIZES: Mapping[str, tuple[int, int]] = {"layer0.q": (24, 40), "layer0.v": (40, 24), "layer1.q": (24, 24)}
NO_COST = TaskCost(0.0, 0.0, 0.0, 0, 0, 0.0)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.empty(shape, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_factors(
    rank: int,
    sizes: tuple[int, int] = (24, 40),
    *,
    seed: int = 0,
    scaling: float = 2.0,
    dtype: torch.dtype = torch.float64,
) -> LoraFactors:
    """Return factors of a layer with sizes (in, out)."""
    inputs, outputs = sizes
    return LoraFactors(
        A=normal(rank, inputs, seed=2 * seed, dtype=dtype),
        B=normal(outputs, rank, seed=2 * seed + 1, dtype=dtype),
        scaling=scaling,
    )


def random_adapter(
    rank: int = 6,
    *,
    seed: int = 0,
    scaling: float = 2.0,
    dtype: torch.dtype = torch.float64,
    zero_b: bool = False,
    sizes: Mapping[str, tuple[int, int]] = SIZES,
) -> Adapter:
    factors = {
        name: random_factors(rank, size, seed=1000 * seed + place, scaling=scaling, dtype=dtype)
        for place, (name, size) in enumerate(sizes.items())
    }
    if zero_b:
        factors = {name: replace(f, B=torch.zeros_like(f.B)) for name, f in factors.items()}
    return Adapter(
        factors=factors,
        placement={name: (name,) for name in factors},
        layer={name: int(name[5]) for name in factors},
        num_layers=2,
        extras={"classifier.weight": normal(2, 24, seed=7000 + seed, dtype=dtype)},
    )


def fleet(examples: Sequence[int]) -> Fleet:
    count = len(examples)
    ones = np.ones(count)
    return Fleet(
        device=("phone",) * count,
        flops_per_second=ones * 1e12,
        memory_bytes=ones * 1e10,
        transmit_power=ones,
        energy_per_flop=ones * 1e-12,
        receive_power=ones,
        num_examples=np.array(examples, dtype=np.int64),
    )


def task(
    client: int,
    send: AdapterSlice,
    *,
    train: AdapterSlice | None = None,
    receive: AdapterSlice | None = None,
) -> ClientTask:
    return ClientTask(
        client=client,
        receive=receive or send,
        train=train or send,
        send=send,
        training=LocalTraining(),
        compressor=None,  # type: ignore[arg-type]
        bandwidth=1.0,
        transmit_power=1.0,
    )


def outcome(updates: Sequence[ClientUpdate], examples: Sequence[int], *, lost: Sequence[LostTask] = ()) -> RoundOutcome:
    tasks = tuple(part.task for part in (*updates, *lost))
    return RoundOutcome(
        plan=Plan((Group(tasks),)),
        fleet=fleet(examples),
        updates=tuple(updates),
        lost=tuple(lost),
        start_time=0.0,
        end_time=1.0,
    )


def update(client_task: ClientTask, values: Adapter, *, version: int = 0) -> ClientUpdate:
    return ClientUpdate(client_task, values, version, 0.0, 1.0 + client_task.client, NO_COST, {})


def trained(model: ServerModel, send: AdapterSlice, *, seed: int, spread: float = 0.5) -> Adapter:
    """Return what a client would send after training: the slice's tensors moved by noise, the others untouched."""
    start = send.take(model.adapter)
    factors: dict[str, LoraFactors] = {}
    for place, (name, f) in enumerate(start.factors.items()):
        a = spread * normal(*f.A.shape, seed=9000 + 100 * seed + 2 * place, dtype=f.A.dtype)
        b = spread * normal(*f.B.shape, seed=9001 + 100 * seed + 2 * place, dtype=f.B.dtype)
        core = f.core
        if core is not None:
            core = core + spread * normal(*core.shape, seed=5001 + 100 * seed + place, dtype=core.dtype)
        factors[name] = replace(
            f, A=f.A + a if "A" in send.tensors else f.A, B=f.B + b if "B" in send.tensors else f.B, core=core
        )
    extras = {
        name: value + normal(*value.shape, seed=400 + seed, dtype=value.dtype) for name, value in start.extras.items()
    }
    return start.with_factors(factors, extras)


def round_of(
    model: ServerModel,
    examples: Sequence[int],
    *,
    ranks: Sequence[int] | None = None,
    tensors: frozenset[str] = BOTH,
    seed: int = 0,
    spread: float = 0.5,
) -> RoundOutcome:
    """Return a round in which every client trains its first `ranks[k]` components (all of them without `ranks`)."""
    shape = model.adapter.shape
    updates = []
    for client in range(len(examples)):
        rank = shape.max_rank if ranks is None else ranks[client]
        send = replace(AdapterSlice.truncation(shape, rank), tensors=frozenset(tensors))  # type: ignore[arg-type]
        values = trained(model, send, seed=seed * 50 + client, spread=spread)
        updates.append(update(task(client, send), values, version=model.version))
    return outcome(updates, examples)


def ideal(result: RoundOutcome, slot: str) -> Tensor:
    """Return ``sum_k p_k s_k B_k A_k`` of a round by dense products, p_k by examples."""
    weights = np.array([float(result.fleet.num_examples[u.task.client]) for u in result.updates])
    weights /= weights.sum()
    exact = [u.values.factors[slot].cast(torch.float64).product() for u in result.updates]
    return torch.stack([w * product for w, product in zip(weights, exact, strict=True)]).sum(0)


def effective(model: ServerModel, slot: str) -> Tensor:
    """Return what the model adds to the base weight of a module: merged updates and the adapter."""
    total = sum(model.adapter.factors[name].cast(torch.float64).product() for name in model.adapter.placement[slot])
    merged = model.base_update.get(slot)
    if merged is None:
        return total
    exact = merged.cast(torch.float64) if isinstance(merged, LoraFactors) else merged
    return total + exact.product().double()


def relative(error: Tensor, reference: Tensor) -> float:
    return float(error.norm() / reference.norm().clamp_min(1e-300))
