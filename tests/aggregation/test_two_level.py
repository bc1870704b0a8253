"""HierFedLoRA's two levels through the simulated runner, against a nested mean written out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from airtune.lora import Adapter
from airtune.methods.hierfedlora import HierFedLoRA
from airtune.scheduling.slicing import depth_slices
from airtune.simulation.cell import Cell
from airtune.streams import stream
from airtune.types import LocalTraining, Pending, Plan, RoundOutcome, ServerModel, Trained, TrainingJob
from small_world import LAYERS, make_cell, make_model, make_runner

EXAMPLES = (10, 40, 25, 5, 70)
CYCLES = (2, 3)
METHOD = HierFedLoRA(groups=2, grouping="random", fixed_depth=LAYERS, training=LocalTraining(local_steps=2))


def moved(value: torch.Tensor, client: int, cycle: int) -> torch.Tensor:
    """Return what training makes of a value: depends on the value, the client and the cycle."""
    return value * (1.0 - 0.07 * (client + 1)) + 0.3 * (client - 2) + 0.01 * (cycle + 1)


@dataclass
class Moves:
    """A trainer that does that to all that it trains."""

    def train(self, jobs: Sequence[TrainingJob]) -> list[Trained]:
        return [Trained(self._moved(job), {"loss": 1.0}) for job in jobs]

    def _moved(self, job: TrainingJob) -> Adapter:
        values, where = job.task.train.take(job.model.adapter), (job.task.client, job.cycle)
        factors = {n: replace(f, A=moved(f.A, *where), B=moved(f.B, *where)) for n, f in values.factors.items()}
        return values.with_factors(factors, {n: moved(t, *where) for n, t in values.extras.items()})


def planned(cell: Cell, model: ServerModel, depths: Sequence[int], cycles: Sequence[int]) -> Plan:
    """Return the method's own plan with these depths and cycles for its two groups."""
    seen = cell.observe(1, 0.0, Pending(), model)
    plan = METHOD.plan(METHOD.init(model, cell.fleet), seen, stream(0, "plan", 1))
    groups = []
    for group, depth, count in zip(plan.groups, depths, cycles, strict=True):
        parts = depth_slices(model.adapter.shape, depth, "frozen")
        tasks = [replace(t, receive=parts.receive, train=parts.train, send=parts.send) for t in group.tasks]
        groups.append(replace(group, tasks=tuple(tasks), cycles=count))
    plan = replace(plan, groups=tuple(groups))
    plan.check(seen)
    return plan


def one_round(
    depths: Sequence[int], cycles: Sequence[int]
) -> tuple[list[list[int]], ServerModel, RoundOutcome, ServerModel]:
    """Return the groups' members, the model before, the outcome and the model after."""
    cell, model = make_cell(5, num_examples=EXAMPLES), make_model()
    plan = planned(cell, model, depths, cycles)
    outcome, _ = make_runner(cell, Moves()).run(plan, model, Pending(), round_index=1, time=0.0)  # type: ignore[arg-type]
    after, _ = METHOD.aggregate(METHOD.init(model, cell.fleet), model, outcome)
    return [[task.client for task in group.tasks] for group in plan.groups], model, outcome, after


def by_hand(value: torch.Tensor, groups: Sequence[Sequence[int]], cycles: Sequence[int]) -> torch.Tensor:
    """Return (2) over (1) of the specification for one tensor: sum_g n_g theta_g / sum_g n_g, f_g cycles each."""
    total, weight = torch.zeros_like(value), 0
    for members, count in zip(groups, cycles, strict=True):
        own, size = value, sum(EXAMPLES[i] for i in members)
        for cycle in range(count):
            own = sum((EXAMPLES[i] / size * moved(own, i, cycle) for i in members), torch.zeros_like(value))
        total, weight = total + size * own, weight + size
    return total / weight


def test_two_groups_of_unequal_frequency_and_depth_are_the_nested_mean() -> None:
    groups, before, _, after = one_round((3, 2), CYCLES)
    assert sorted(len(members) for members in groups) == [2, 3]
    for name, start in before.adapter.factors.items():
        owners = [g for g, depth in enumerate((3, 2)) if before.adapter.layer[name] >= LAYERS - depth]
        expected = [groups[g] for g in owners], [CYCLES[g] for g in owners]
        for kind in ("A", "B"):
            wanted = by_hand(getattr(start, kind), *expected)
            torch.testing.assert_close(getattr(after.adapter.factors[name], kind), wanted, rtol=1e-5, atol=1e-5)


def test_equal_depths_are_plain_two_level_fedavg() -> None:
    """Every tensor, the head included, is one nested mean over all clients; and the number of cycles matters."""
    groups, before, outcome, after = one_round((LAYERS, LAYERS), CYCLES)
    for (_, _, start), (owner, kind, found) in zip(before.adapter.tensors(), after.adapter.tensors(), strict=True):
        wanted = by_hand(start, groups, CYCLES)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, msg=f"{owner} {kind}")
        assert not torch.allclose(found, by_hand(start, groups, (1, 1)), rtol=1e-3, atol=1e-3)
    sent = {u.task.client: u.cost.uplink_bits for u in outcome.updates}
    for members, count in zip(groups, CYCLES, strict=True):
        assert {sent[i] for i in members} == {count * min(sent.values()) // min(CYCLES)}


@pytest.mark.parametrize("cycles", [(1, 1), (2, 2)])
def test_a_client_counts_by_its_examples_whatever_its_group(cycles: tuple[int, int]) -> None:
    """One cycle at equal depth: groups do not matter, it is FedAvg; with two cycles they do."""
    groups, before, _, after = one_round((LAYERS, LAYERS), cycles)
    everyone = [[i for members in groups for i in members]]
    name = next(iter(before.adapter.factors))
    flat = by_hand(before.adapter.factors[name].A, everyone, cycles[:1])
    close = torch.allclose(after.adapter.factors[name].A, flat, rtol=1e-5, atol=1e-5)
    assert close == (cycles == (1, 1))
