"""Tasks on their way: when they arrive, what they cost, and where a round cuts off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from airtune.clock import VirtualClock
from airtune.types import ClientTask, Cutoff, Group, InFlight, LostTask, TaskCost

NOTHING = TaskCost(0.0, 0.0, 0.0, 0, 0, 0.0)
_EARLIER = Group((), Cutoff(late="keep"))  # the group of what was in flight before this round


@dataclass(frozen=True)
class Flight:
    """One task on its way; `lost_because` is set if its update will never be usable."""

    task: ClientTask
    group: Group
    model_version: int
    started_at: float
    arrival_time: float
    round: int
    cost: TaskCost
    lost_because: str | None = None


def step_to_cutoff(
    flights: Sequence[Flight], groups: Sequence[Group], start: float, idle_seconds: float
) -> tuple[list[Flight], list[Flight], float]:
    """Step the clock to the end of the round: return arrivals in order, everything else, and the end in seconds.

    Each group waits for its own cut-off; the round ends with the last of them. What was in flight before counts
    towards the first group. A task that is lost holds up its group until the moment its update was due.
    """
    ends = [_group_end(_members(flights, groups, index), group, start) for index, group in enumerate(groups)]
    if not groups:
        ends = [_group_end(flights, Group(()), start)]
    end = max(ends)
    if end <= start:  # nobody took part
        end = start + idle_seconds
    clock: VirtualClock[Flight] = VirtualClock(start)
    for flight in flights:
        if math.isfinite(flight.arrival_time):
            clock.schedule(max(flight.arrival_time, start), flight)
    limits = {id(group): limit for group, limit in zip(groups, ends, strict=False)}
    arrived: list[Flight] = []
    while (due := clock.peek()) is not None and due <= end:
        flight = clock.step()
        if flight.lost_because is None and due <= limits.get(id(flight.group), end):
            arrived.append(flight)
    taken = {id(flight) for flight in arrived}
    return arrived, [flight for flight in flights if id(flight) not in taken], end


def _members(flights: Sequence[Flight], groups: Sequence[Group], index: int) -> list[Flight]:
    ours = {id(group) for group in groups}
    return [f for f in flights if f.group is groups[index] or (index == 0 and id(f.group) not in ours)]


def _group_end(flights: Sequence[Flight], group: Group, start: float) -> float:
    cutoff = group.cutoff
    good = sorted(max(f.arrival_time, start) for f in flights if f.lost_because is None)
    due = [f.arrival_time if math.isfinite(f.arrival_time) else start + busy_before_upload(f) for f in flights]
    end = max(due, default=start)
    if cutoff.min_updates is not None and len(good) >= cutoff.min_updates:
        end = good[max(cutoff.min_updates, 1) - 1]
    if cutoff.deadline is not None:
        end = min(end, start + cutoff.deadline)
    return max(end, start)


def busy(cost: TaskCost) -> float:
    """Return the seconds from the start of a task until its update is there."""
    return cost.download_seconds + cost.compute_seconds + cost.upload_seconds


def busy_before_upload(flight: Flight) -> float:
    """Return the seconds until a task could have begun to send."""
    return flight.cost.download_seconds + flight.cost.compute_seconds


def plus(a: TaskCost, b: TaskCost) -> TaskCost:
    """Return the sum of two costs."""
    return TaskCost(
        a.download_seconds + b.download_seconds,
        a.compute_seconds + b.compute_seconds,
        a.upload_seconds + b.upload_seconds,
        a.uplink_bits + b.uplink_bits,
        a.downlink_bits + b.downlink_bits,
        a.joules + b.joules,
    )


def resume(flight: InFlight) -> Flight:
    """Return a task that was in flight before this round."""
    return Flight(
        task=flight.task,
        group=_EARLIER,
        model_version=flight.model_version,
        started_at=flight.started_at,
        arrival_time=flight.arrival_time,
        round=flight.round,
        cost=flight.cost,
    )


def keep(flight: Flight) -> InFlight:
    """Return a task that stays in flight after this round."""
    return InFlight(
        task=flight.task,
        model_version=flight.model_version,
        started_at=flight.started_at,
        arrival_time=flight.arrival_time,
        round=flight.round,
        cost=flight.cost,
    )


def lose(flight: Flight) -> LostTask:
    """Return a task that is lost, with the reason ("late" if nothing else) and what it has cost."""
    return LostTask(flight.task, flight.lost_because or "late", _finite(flight.cost))


def _finite(cost: TaskCost) -> TaskCost:
    return cost if math.isfinite(cost.upload_seconds) else replace(cost, upload_seconds=0.0, uplink_bits=0)
