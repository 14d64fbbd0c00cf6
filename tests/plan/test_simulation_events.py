"""The queue of events: order, limits, virtual time."""

from __future__ import annotations

import math

import pytest

from remote_modules.plan.simulation.events import EventQueue


def test_events_come_by_time_and_those_of_one_instant_in_order() -> None:
    queue = EventQueue()
    seen: list[tuple[float, str]] = []

    def note(name: str) -> None:
        seen.append((queue.now_s, name))

    queue.add(2.0, note, "late")
    queue.add(1.0, note, "first")
    queue.add(1.0, note, "second")
    assert len(queue) == 3
    queue.run_until(5.0)
    assert seen == [(1.0, "first"), (1.0, "second"), (2.0, "late")]
    assert (queue.now_s, queue.num_handled, len(queue)) == (5.0, 3, 0)


def test_events_up_to_the_end_are_handled_and_later_ones_wait() -> None:
    queue = EventQueue()
    seen: list[float] = []
    for at_s in (1.0, 2.0, 2.5):
        queue.add(at_s, lambda: seen.append(queue.now_s))
    queue.run_until(2.0)
    assert (seen, queue.now_s, len(queue)) == ([1.0, 2.0], 2.0, 1)
    queue.run_until(1.0)
    assert queue.now_s == 2.0  # time does not go back


def test_handler_may_add_events() -> None:
    queue = EventQueue()
    seen: list[float] = []

    def tick() -> None:
        seen.append(queue.now_s)
        queue.add(queue.now_s + 1.0, tick)

    queue.add(0.0, tick)
    queue.run_until(3.5)
    assert seen == [0.0, 1.0, 2.0, 3.0]


def test_event_at_infinity_never_comes() -> None:
    queue = EventQueue()
    queue.add(math.inf, lambda: None)
    assert len(queue) == 0


@pytest.mark.parametrize("at_s", [0.5, math.nan])
def test_event_in_the_past_is_refused(at_s: float) -> None:
    queue = EventQueue()
    queue.run_until(1.0)
    with pytest.raises(ValueError, match=r"expected a time from 1\.0 s on, got (0\.5|nan)"):
        queue.add(at_s, lambda: None)
