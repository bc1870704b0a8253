"""The clocks: events come in order of time, then priority, then scheduling; the wall clock really waits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airtune.clock import VirtualClock, WallClock


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(-2, 2)), max_size=40))
def test_events_come_in_a_deterministic_order(events: list[tuple[float, int]]) -> None:
    clock: VirtualClock[int] = VirtualClock()
    for index, (at, priority) in enumerate(events):
        clock.schedule(at, index, priority)
    seen = []
    while clock.peek() is not None:
        due = clock.peek()
        seen.append(clock.step())
        assert clock.now == due
    assert seen == sorted(range(len(events)), key=lambda i: (events[i][0], events[i][1], i))


def test_the_past_cannot_be_scheduled() -> None:
    clock: VirtualClock[str] = VirtualClock(10.0)
    with pytest.raises(ValueError, match="cannot schedule"):
        clock.schedule(9.0, "too late")
    with pytest.raises(ValueError, match="cannot schedule"):
        clock.schedule(float("nan"), "never")


def test_advance_never_goes_back() -> None:
    clock: VirtualClock[str] = VirtualClock()
    clock.advance(5.0)
    clock.advance(3.0)
    assert clock.now == 5.0


def test_the_wall_clock_sleeps_until_the_event_is_due() -> None:
    slept: list[float] = []
    clock: WallClock[str] = WallClock(sleep=slept.append)
    clock.schedule(100.0, "late")
    clock.schedule(0.0, "due")
    assert clock.step() == "due" and slept == []
    assert clock.step() == "late"
    assert 99.0 < slept[0] <= 100.0
