"""A plan without training: what round 1 would cost, by the cost functions that the simulator uses. Imports no torch.

The method sees the same `Observation` as in a run and makes its plan for round 1. Its times are then predicted from
what a planner knows: the *estimated* channel (a run's clock uses the true one), and `Assumptions` of the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from airtune.aggregation.declaring import reshaped
from airtune.devices.latency import TransformerShape
from airtune.errors import NoResultError
from airtune.experiment.assumptions import EQUAL_SHARES, Assumptions, assume
from airtune.experiment.config import Experiment
from airtune.experiment.store import Plain, plain
from airtune.experiment.world import cell_of, nominal_fleet
from airtune.lora import Adapter, AdapterShape, LoraFactors
from airtune.scheduling.work import ChoosesRanks
from airtune.simulation.cell import Cell
from airtune.simulation.costs import CostModel
from airtune.streams import stream
from airtune.training.catalogue import read_config
from airtune.training.shapes import LINEAR_BYTES, adapter_shape, placement_of
from airtune.types import ClientTask, Floats, Group, Observation, Pending, Plan, ServerModel
from airtune.wireless.units import linear_to_db

SCHEMA = 1
NO_SOLVER: Plain = {"status": "none", "objective": None, "iterations": None, "branch": None, "gap": None}


@dataclass(frozen=True)
class PredictedTask:
    """What a task would take: seconds, bits (one cycle) and joules (all cycles)."""

    task: ClientTask
    download: float
    compute: float
    upload: float
    bits: int
    joules: float

    @property
    def busy(self) -> float:
        """Return the seconds of one cycle."""
        return self.download + self.compute + self.upload


def plan_round(experiment: Experiment, examples: Floats | None = None) -> Plain:
    """Return the plan of round 1 and its prediction, as ``airtune plan --json`` prints it.

    Parameters
    ----------
    examples : [clients], where the partition is known (after pilots); None: equal shares.

    Raises
    ------
    InputError : something in the experiment does not fit; one line naming the field.
    NoResultError : the planner finds no plan.
    """
    assumed = assume(experiment)
    if examples is not None:
        assumed = replace(assumed, notes=tuple(note for note in assumed.notes if note != EQUAL_SHARES))
    cell, model = planned_world(experiment, assumed, examples)
    method, seed = experiment.method, experiment.seed
    seen = cell.observe(1, 0.0, Pending(), model)
    plan = method.plan(method.init(model, cell.fleet), seen, stream(seed, "plan", 1))
    plan.check(seen)
    groups = [predict_group(group, seen, cell, 1.0 / len(plan.groups)) for group in plan.groups]
    ends = [_end(group, tasks) for group, tasks in zip(plan.groups, groups, strict=True)]
    round_s = max(ends, default=0.0) or cell.idle_seconds
    if not np.isfinite(round_s):
        lost = [part.task.client for tasks in groups for part in tasks if not np.isfinite(part.busy)]
        raise NoResultError(f"plan: clients {lost[:8]} have no link, so the round never ends")
    tasks = [part for group in groups for part in group]
    bits = sum(group.cycles * part.bits for group, parts in zip(plan.groups, groups, strict=True) for part in parts)
    return _plain_plan(experiment, cell, plan, tasks, round_s, bits, seen, assumed)


def predict_group(group: Group, seen: Observation, cell: Cell, band_share: float) -> list[PredictedTask]:
    """Return what each task of a group takes, from the estimated channel.

    band_share : part of the downlink band that the group has.
    """
    tasks = group.tasks
    if not tasks:
        return []
    clients = np.array([task.client for task in tasks])
    bandwidth = np.array([task.bandwidth for task in tasks])
    power = np.array([task.transmit_power for task in tasks])
    bits = np.array([seen.costs.uplink_bits(task) for task in tasks])
    compute = np.array([seen.costs.compute_seconds(task) for task in tasks])
    download = _download_seconds(tasks, clients, seen, cell, band_share)
    with np.errstate(divide="ignore"):
        upload = np.where(bits > 0, bits / seen.links.uplink_rate(clients, bandwidth, power), 0.0)
    joules = np.array([seen.costs.compute_joules(task) for task in tasks])
    joules = joules + power * upload + seen.fleet.receive_power[clients] * download
    columns = zip(tasks, download, compute, upload, bits, group.cycles * joules, strict=True)
    return [PredictedTask(t, float(d), float(c), float(u), int(b), float(j)) for t, d, c, u, b, j in columns]


def _download_seconds(
    tasks: tuple[ClientTask, ...], clients: Any, seen: Observation, cell: Cell, band_share: float
) -> Floats:
    rate = seen.links.downlink_rate(clients) * band_share
    with np.errstate(divide="ignore"):
        if cell.downlink == "unicast":
            return np.array([seen.costs.downlink_bits(task) for task in tasks]) / (rate / len(tasks))
        return np.full(len(tasks), cell.costs.broadcast_bits(tasks) / rate.min())


def _end(group: Group, tasks: list[PredictedTask]) -> float:
    """Return when the group's cut-off ends it, seconds from the start of the round."""
    if not tasks:
        return 0.0
    busy = np.sort([part.busy for part in tasks])
    end = float(busy[-1])
    if group.cutoff.min_updates is not None:
        end = float(busy[min(max(group.cutoff.min_updates, 1), len(busy)) - 1])
    end += (group.cycles - 1) * float(busy[-1])
    return end if group.cutoff.deadline is None else min(end, group.cutoff.deadline)


# --------------------------------------------------------------------------------------------------------------- world


def planned_world(experiment: Experiment, assumed: Assumptions, examples: Floats | None) -> tuple[Cell, ServerModel]:
    """Return the cell and a model of which only the sizes are real."""
    config = read_config(experiment.model.name)
    shape = adapter_shape(config, experiment.model, assumed.classes)
    if isinstance(experiment.method, ChoosesRanks):
        ranks = experiment.method.ranks(shape)
        shape = adapter_shape(config, experiment.model, assumed.classes, ranks)
    shape = reshaped(experiment.method, shape)
    clients = experiment.fleet.clients
    held = np.full(clients, assumed.examples) if examples is None else examples.astype(np.int64)
    costs = CostModel(
        fleet=nominal_fleet(experiment.fleet, held),
        shape=shape,
        network=TransformerShape.from_config(config),
        tokens=np.full(clients, assumed.tokens),
        head="causal" if experiment.model.task == "causal-lm" else "classification",
        classes=max(assumed.classes or 2, 2),
        value_bytes=2 if experiment.engine.precision == "bf16" else 4,
        linear_bytes=LINEAR_BYTES[experiment.model.base_weights],
    )
    return cell_of(experiment, costs), ServerModel(_sizes_only(shape))


def _sizes_only(shape: AdapterShape) -> Adapter:
    """Return an adapter of zeros that take no memory."""

    def zeros(*size: int) -> Any:
        return np.broadcast_to(np.float32(0.0), size)

    return Adapter(
        factors={
            name: LoraFactors(
                zeros(s.rank, s.in_features),
                zeros(s.out_features, s.rank),
                s.scaling,
                core=zeros(s.rank, s.rank) if s.core else None,
            )
            for name, s in shape.slots.items()
        },
        placement=placement_of(shape),
        layer={name: slot.layer for name, slot in shape.slots.items()},
        num_layers=shape.num_layers,
        extras={name: zeros(*size) for name, size in shape.extras.items()},
    )


# -------------------------------------------------------------------------------------------------------------- output


def _plain_plan(
    experiment: Experiment,
    cell: Cell,
    plan: Plan,
    tasks: list[PredictedTask],
    round_s: float,
    uplink_bits: int,
    seen: Observation,
    assumed: Assumptions,
) -> Plain:
    notes = {**plan.notes, "assumed": assumed.notes}
    joules = sum(part.joules for part in tasks)
    return plain(
        {
            "schema": SCHEMA,
            "method": experiment.label,
            "predicted": {
                **_predicted(experiment, plan.notes, len(tasks), round_s, uplink_bits, joules),
                "straggler": _straggler(tasks, cell),
            },
            "clients": _clients(tasks, seen, cell, experiment.seed),
            "solver": notes.pop("solver", NO_SOLVER),
            "curves": notes.pop("curves", []),
            "notes": notes,
        }
    )


def _predicted(
    experiment: Experiment, notes: Mapping[str, Any], cohort: int, round_s: float, uplink_bits: float, joules: float
) -> Plain:
    """Return seconds, bits and joules of a round and in all.

    Where the cohort is drawn by chance and the method knows the mean over cohorts, seconds and bits are that mean;
    what the drawn round takes is kept under ``drawn``, and ``to_target`` has the rounds of the method's own model.
    """
    drawn: Plain = {"round_s": round_s, "uplink_bits": uplink_bits, "energy_j": joules}
    expected = notes.get("expected_round_s")
    if expected is None:
        return {**_until_the_end(experiment, round_s), **drawn}
    mean = {"round_s": expected, "uplink_bits": notes.get("expected_uplink_bits", uplink_bits)}
    return {
        **_until_the_end(experiment, expected),
        **mean,
        "energy_j": joules,
        "means_over_cohorts": ["round_s", "total_s", "uplink_bits"],
        "drawn": {"clients": cohort, **drawn},
        "to_target": {
            "rounds": notes["expected_rounds"],
            "total_s": notes["expected_total_s"],
            "gain_over_uniform": notes.get("gain_over_uniform"),
            "time_measure": notes["time_measure"],
        },
    }


def _until_the_end(experiment: Experiment, round_s: float) -> Plain:
    """Return the rounds that ``[stop]`` allows and their seconds."""
    stop = experiment.stop
    rounds = stop.rounds
    if stop.fleet_seconds is not None:
        by_time = int(np.ceil(stop.fleet_seconds / round_s))
        rounds = by_time if rounds is None else min(rounds, by_time)
    return {"rounds": rounds, "total_s": None if rounds is None else rounds * round_s}


def _straggler(tasks: list[PredictedTask], cell: Cell) -> Mapping[str, Any] | None:
    if not tasks:
        return None
    slowest = max(tasks, key=lambda part: part.busy)
    parts = {"download": slowest.download, "compute": slowest.compute, "upload": slowest.upload}
    client = slowest.task.client
    longest = max(parts, key=lambda name: parts[name])
    return {"client": client, "device": cell.fleet.device[client], "seconds": slowest.busy, "longest": longest}


def _clients(tasks: list[PredictedTask], seen: Observation, cell: Cell, seed: int) -> list[Plain]:
    clients = np.array([part.task.client for part in tasks], dtype=np.int64)
    places = getattr(cell.channel, "positions", None)
    positions = None if places is None or not len(clients) else places(seed, clients, 0.0)
    gains = linear_to_db(seen.links.uplink_gain[clients])
    rows: list[Plain] = []
    for index, part in enumerate(tasks):
        task = part.task
        row: Plain = {
            "client": task.client,
            "device": cell.fleet.device[task.client],
            "probability": task.probability,
            **_size(task),
            "depth": task.train.depth(seen.shape),
            "keep_ratio": getattr(task.compressor, "keep_ratio", 1.0),
            "bandwidth_hz": task.bandwidth,
            "transmit_power_w": task.transmit_power,
            "download_s": part.download,
            "compute_s": part.compute,
            "upload_s": part.upload,
            "uplink_bits": part.bits,
            "rate_bps": part.bits / part.upload if part.upload > 0.0 else None,
            "energy_j": part.joules,
            "gain_db": gains[index],
        }
        if positions is not None:
            row.update(x_m=positions[index, 0], y_m=positions[index, 1])
        rows.append(row)
    return rows


def _size(task: ClientTask) -> Plain:
    """Return the rank where every slot that is trained has the same, else the number of components."""
    ranks = {len(indices) for indices in task.train.components.values() if len(indices)}
    return {"rank": ranks.pop()} if len(ranks) == 1 else {"components": task.train.total_components()}
