"""A federation without a model: synthetic adapters, fleets, costs and updates, for tests of methods.

Everything is a pure function of its arguments. Updates are fabricated, not trained: the server's values plus noise
that depends on (seed, client, round) only, inside the slice that the client sends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from airtune.lora import Adapter, AdapterShape, LoraFactors
from airtune.streams import stream
from airtune.types import (
    ClientTask,
    ClientUpdate,
    Fleet,
    LinkState,
    LostTask,
    Observation,
    Pending,
    Plan,
    RoundOutcome,
    ServerModel,
    TailPenalty,
    TaskCost,
)

MODULES = {"query": (6, 5), "value": (6, 4)}  # in_features, out_features


def make_adapter(
    layers: int = 3, ranks: int | Mapping[str, int] = 4, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Adapter:
    """Return an adapter of two slots per layer and a head, with B away from zero."""
    generator = torch.Generator().manual_seed(seed)
    factors: dict[str, LoraFactors] = {}
    for layer in range(layers):
        for module, (width, out) in MODULES.items():
            name = f"layer.{layer}.{module}"
            rank = ranks if isinstance(ranks, int) else ranks[name]
            factors[name] = LoraFactors(
                A=torch.randn(rank, width, generator=generator).to(dtype),
                B=torch.randn(out, rank, generator=generator).to(dtype),
                scaling=2.0,
            )
    return Adapter(
        factors=factors,
        placement={name: (name,) for name in factors},
        layer={name: int(name.split(".")[1]) for name in factors},
        num_layers=layers,
        extras={"head.weight": torch.randn(3, 6, generator=generator).to(dtype)},
    )


def make_fleet(
    size: int = 7,
    *,
    flops: Any = None,
    memory: Any = None,
    examples: Any = None,
    labels: Any = None,
) -> Fleet:
    """Return a fleet whose devices differ in speed, memory and number of examples."""
    grid = np.arange(size)
    return Fleet(
        device=tuple(f"device-{i}" for i in range(size)),
        flops_per_second=np.broadcast_to(1e9 * (1.0 + grid) if flops is None else flops, (size,)).astype(float),
        memory_bytes=np.broadcast_to(3e4 * 1.5**grid if memory is None else memory, (size,)).astype(float),
        transmit_power=np.full(size, 0.2),
        energy_per_flop=np.full(size, 1e-10),
        receive_power=np.full(size, 0.5),
        num_examples=np.broadcast_to(20 + 5 * grid if examples is None else examples, (size,)).astype(np.int64),
        label_counts=labels,
    )


def make_links(size: int, seed: int = 0) -> LinkState:
    """Return a cell in which gains differ by a factor of about ten."""
    gain = 1e-10 * np.exp(stream(seed, "test gains").normal(0.0, 0.8, size))
    return LinkState(
        uplink_gain=gain,
        downlink_gain=gain,
        noise_density=4e-21,
        uplink_bandwidth=1e6,
        downlink_bandwidth=5e6,
        downlink_power=10.0,
    )


@dataclass(frozen=True)
class SyntheticCosts:
    """FLOPs, bits and bytes that count layers and components in the way of the real cost model."""

    fleet: Fleet
    shape: AdapterShape
    layer_flops: float = 1e8
    base_bytes: float = 2e4
    layer_bytes: float = 4e3

    def compute_flops(self, task: ClientTask) -> tuple[float, float]:
        steps = task.training.steps(int(self.fleet.num_examples[task.client]))
        forward = self.layer_flops * self.shape.num_layers
        backward = self.layer_flops * task.train.depth(self.shape) + 1e3 * task.train.num_values(self.shape)
        return steps * forward, steps * backward

    def compute_seconds(self, task: ClientTask) -> float:
        return sum(self.compute_flops(task)) / float(self.fleet.flops_per_second[task.client])

    def uplink_bits(self, task: ClientTask) -> int:
        return task.compressor.bits(task.send, self.shape)

    def downlink_bits(self, task: ClientTask) -> int:
        return 32 * task.receive.num_values(self.shape)

    def memory_bytes(self, task: ClientTask) -> float:
        values = task.train.num_values(self.shape)
        return self.base_bytes + self.layer_bytes * task.train.depth(self.shape) + 16 * values

    def compute_joules(self, task: ClientTask) -> float:
        return sum(self.compute_flops(task)) * float(self.fleet.energy_per_flop[task.client])


@dataclass(frozen=True)
class SyntheticWorld:
    """An environment and a runner: the same cost functions, a static or a fading channel, fabricated updates.

    missing : a client whose updates never arrive. noise : size of the fabricated changes.
    """

    fleet: Fleet
    seed: int = 0
    missing: int | None = None
    noise: float = 0.1
    fading: bool = False
    reports: Mapping[int, Mapping[str, float]] = field(default_factory=dict)

    def observe(self, round_index: int, time: float, pending: Pending, model: ServerModel) -> Observation:
        size = self.fleet.size
        return Observation(
            round=round_index,
            time=time,
            fleet=self.fleet,
            links=make_links(size, self.seed + (round_index if self.fading else 0)),
            shape=model.adapter.shape,
            costs=SyntheticCosts(self.fleet, model.adapter.shape),
            idle=np.flatnonzero(self.fleet.num_examples > 0),
            in_flight=np.zeros(0, dtype=np.int64),
            free_bandwidth=1e6,
            reports=pending.reports,
        )

    def run(
        self, plan: Plan, model: ServerModel, pending: Pending, *, round_index: int, time: float
    ) -> tuple[RoundOutcome, Pending]:
        seen = self.observe(round_index, time, pending, model)
        updates: list[ClientUpdate] = []
        lost: list[LostTask] = []
        end = time + 1.0 if not plan.tasks else time
        for group in plan.groups:
            costs = {task.client: self.cost(task, seen) for task in group.tasks}
            cycle = {client: cost.compute_seconds + cost.upload_seconds for client, cost in costs.items()}
            start, own = time + (group.cycles - 1) * max(cycle.values(), default=0.0), model
            for index in range(group.cycles - 1):
                inner = [self.update(t, costs[t.client], own, round_index, time, start, index + 1) for t in group.tasks]
                assert group.combine is not None
                own = group.combine(own, RoundOutcome(Plan((group,)), self.fleet, tuple(inner), (), time, start))
            for task in group.tasks:
                total = times(costs[task.client], group.cycles)
                end = max(end, start + cycle[task.client])
                if task.client == self.missing:
                    lost.append(LostTask(task, "vanished", total))
                    continue
                last = self.update(task, costs[task.client], own, round_index, time, start + cycle[task.client])
                updates.append(replace(last, cost=total, model_version=model.version))
        outcome = RoundOutcome(plan, self.fleet, tuple(updates), tuple(lost), time, end)
        reports = {**pending.reports, **{u.task.client: u.reports for u in updates}}
        return outcome, replace(pending, reports=reports)

    def cost(self, task: ClientTask, seen: Observation) -> TaskCost:
        client, power = np.array([task.client]), np.array([task.transmit_power])
        rate = float(seen.links.uplink_rate(client, np.array([task.bandwidth]), power)[0])
        bits = seen.costs.uplink_bits(task)
        return TaskCost(
            download_seconds=0.0,
            compute_seconds=seen.costs.compute_seconds(task),
            upload_seconds=bits / rate if bits else 0.0,
            uplink_bits=bits,
            downlink_bits=seen.costs.downlink_bits(task),
            joules=seen.costs.compute_joules(task),
        )

    def update(
        self,
        task: ClientTask,
        cost: TaskCost,
        model: ServerModel,
        round_index: int,
        start: float,
        end: float,
        cycle: int = 0,
    ) -> ClientUpdate:
        generator = torch.Generator().manual_seed(100_000 * round_index + 1000 * cycle + task.client)
        values = disturbed(task, model.adapter, self.noise, generator)
        forward, backward = SyntheticCosts(self.fleet, model.adapter.shape).compute_flops(task)
        share = forward / (forward + backward)
        reports = {
            "loss": 1.0 / round_index,
            "forward_seconds": cost.compute_seconds * share,
            "backward_seconds": cost.compute_seconds * (1.0 - share),
            "upload_seconds": cost.upload_seconds,
            **tail_reports(task, task.send.take(model.adapter), values),
        }
        return ClientUpdate(task, values, model.version, start, end, cost, reports)


def times(cost: TaskCost, cycles: int) -> TaskCost:
    """Return the cost of several equal cycles."""
    return TaskCost(
        cycles * cost.download_seconds,
        cycles * cost.compute_seconds,
        cycles * cost.upload_seconds,
        cycles * cost.uplink_bits,
        cycles * cost.downlink_bits,
        cycles * cost.joules,
    )


def disturbed(task: ClientTask, adapter: Adapter, noise: float, generator: torch.Generator) -> Adapter:
    """Return what the client sends: the server's values plus noise on what it trains."""
    start = task.send.take(adapter)
    factors = {
        name: replace(
            f,
            A=f.A + noise * torch.randn(f.A.shape, generator=generator).to(f.A) * ("A" in task.send.tensors),
            B=f.B + noise * torch.randn(f.B.shape, generator=generator).to(f.B) * ("B" in task.send.tensors),
        )
        for name, f in start.factors.items()
    }
    extras = {n: t + noise * torch.randn(t.shape, generator=generator).to(t) for n, t in start.extras.items()}
    return start.with_factors(factors, extras)


def tail_reports(task: ClientTask, before: Adapter, after: Adapter) -> dict[str, float]:
    """Return the norms of the tail that HetLoRA's clients report, if the task has such a penalty."""
    reports: dict[str, float] = {}
    for penalty in task.training.penalties:
        if isinstance(penalty, TailPenalty):
            reports["tail_norm_before"] = tail_norm(before, penalty)
            reports["tail_norm_after"] = tail_norm(after, penalty)
    return reports


def tail_norm(adapter: Adapter, penalty: TailPenalty) -> float:
    """Return the sum over slots of ``||B[:, t:]|| ||A[t:]||``."""
    return sum(
        float(adapter.factors[name].B[:, t:].norm() * adapter.factors[name].A[t:].norm())
        for name, t in penalty.start.items()
        if name in adapter.factors
    )


def same_adapters(one: Adapter, other: Adapter) -> bool:
    """Return whether two adapters are equal to the bit."""
    left, right = list(one.tensors()), list(other.tensors())
    return [part[:2] for part in left] == [part[:2] for part in right] and all(
        torch.equal(a[2], b[2]) for a, b in zip(left, right, strict=True)
    )
