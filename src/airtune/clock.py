"""Time: a virtual clock for simulation and a wall clock for real devices, behind one interface.

The virtual clock is a heap of (time, priority, sequence number, event). The sequence number makes ties deterministic.
This is the only module that may import `time`.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

Event = TypeVar("Event")


class Clock(Protocol[Event]):
    """What the runners need of time."""

    @property
    def now(self) -> float:
        """Return the current time in seconds since the start of the run."""
        ...

    def schedule(self, at: float, event: Event, priority: int = 0) -> None:
        """Put an event at a time in seconds, not before now."""
        ...

    def peek(self) -> float | None:
        """Return the time of the next event, or None if there is none."""
        ...

    def step(self) -> Event:
        """Move to the next event and return it; IndexError if there is none."""
        ...


class VirtualClock(Generic[Event]):
    """A clock that jumps from event to event; equal times go by priority, then by the order of scheduling."""

    def __init__(self, now: float = 0.0) -> None:
        """Start at `now` seconds."""
        self._now = now
        self._heap: list[tuple[float, int, int, Event]] = []
        self._sequence = 0

    @property
    def now(self) -> float:
        """Return the current virtual time in seconds."""
        return self._now

    def schedule(self, at: float, event: Event, priority: int = 0) -> None:
        """Put an event at a virtual time; a time before now is a bug and raises ValueError."""
        if not at >= self._now:
            raise ValueError(f"cannot schedule at {at} s: the clock shows {self._now} s")
        heapq.heappush(self._heap, (at, priority, self._sequence, event))
        self._sequence += 1

    def peek(self) -> float | None:
        """Return the time of the next event, or None."""
        return self._heap[0][0] if self._heap else None

    def step(self) -> Event:
        """Move to the next event and return it."""
        self._now, _, _, event = heapq.heappop(self._heap)
        return event

    def advance(self, to: float) -> None:
        """Move to a time without an event; never backwards."""
        self._now = max(self._now, to)


class WallClock(Generic[Event]):
    """The same interface in real time: `step` sleeps until the next event is due."""

    def __init__(self, now: float = 0.0, sleep: Callable[[float], None] = time.sleep) -> None:
        """Start at `now` seconds."""
        self._zero = time.monotonic() - now
        self._events: VirtualClock[Event] = VirtualClock(now)
        self._sleep = sleep

    @property
    def now(self) -> float:
        """Return the seconds since the start of the run."""
        return time.monotonic() - self._zero

    def schedule(self, at: float, event: Event, priority: int = 0) -> None:
        """Put an event at a time; one that is already due is returned by the next `step`."""
        self._events.schedule(max(at, self._events.now), event, priority)

    def peek(self) -> float | None:
        """Return the time of the next event, or None."""
        return self._events.peek()

    def step(self) -> Event:
        """Wait until the next event is due and return it."""
        due = self._events.peek()
        if due is not None and due > self.now:
            self._sleep(due - self.now)
        return self._events.step()


def host_seconds() -> float:
    """Return the host's monotonic time: for timings.jsonl only, never for anything that decides."""
    return time.perf_counter()
