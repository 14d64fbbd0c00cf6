from __future__ import annotations

import pytest

from remote_modules.client.stats import WATERFALL_STEPS, ClientStats, HopTiming, StatsRecorder
from remote_modules.peers import PeerId
from remote_modules.plan.routing import Hop
from remote_modules.spans import Span

FIRST, SECOND = Hop(PeerId("alice-of-many"), Span(0, 2)), Hop(PeerId("bob-of-many"), Span(2, 4))


def timing(hop: Hop, total_s: float = 1.0) -> HopTiming:
    return HopTiming(hop=hop, num_tokens=1, total_s=total_s, queue_s=0.25, compute_s=0.5)


@pytest.mark.parametrize(("total_s", "wire_s"), [(1.0, 0.25), (0.75, 0.0), (0.5, 0.0)])
def test_wire_time_is_what_neither_queue_nor_compute_explains(total_s: float, wire_s: float) -> None:
    assert timing(FIRST, total_s).wire_s == wire_s


def test_new_recorder_shows_zeros() -> None:
    stats = StatsRecorder().snapshot()
    assert stats == ClientStats(
        steps=0,
        failovers=0,
        reroutes=0,
        replayed_tokens=0,
        handed_over_tokens=0,
        copied_bytes=0,
        promotions=0,
        forks=0,
        kept_backwards=0,
        recomputed_backwards=0,
        forwarded=0,
        stall_seconds=0.0,
        hedges=0,
        hedges_won=0,
        waiting_for=(),
        bytes_sent=0,
        bytes_received=0,
        adapters_sent=0,
        adapter_bytes=0,
        history_bytes=0,
        history_disk_bytes=0,
        wire="",
        route=(),
        waterfall=(),
    )
    assert str(stats) == "steps=0 failovers=0 replayed_tokens=0 route none"


def test_finished_passes_are_counted_and_the_last_route_is_shown() -> None:
    recorder = StatsRecorder()
    recorder.finish((FIRST,), [timing(FIRST)])
    recorder.finish((FIRST, SECOND), [timing(FIRST), timing(SECOND)])
    stats = recorder.snapshot()
    assert stats.steps == 2
    assert stats.route == (FIRST, SECOND)
    assert stats.waterfall == ((timing(FIRST),), (timing(FIRST), timing(SECOND)))
    assert str(stats) == "steps=2 failovers=0 replayed_tokens=0 route 0:2 alice- => 2:4 bob-of"


def test_snapshot_carries_every_counter() -> None:
    recorder = StatsRecorder(
        failovers=1,
        reroutes=2,
        replayed_tokens=3,
        stall_s=4.5,
        hedges=7,
        hedges_won=6,
        waiting_for=(FIRST.span,),
        bytes_sent=5,
        bytes_received=6,
    )
    recorder.handed_over_tokens, recorder.copied_bytes, recorder.promotions, recorder.forks = 7, 8, 9, 10
    recorder.kept_backwards, recorder.recomputed_backwards = 11, 12
    recorder.finish((), [])
    stats = recorder.snapshot()
    assert (stats.steps, stats.failovers, stats.reroutes, stats.replayed_tokens, stats.stall_seconds) == (
        1,
        1,
        2,
        3,
        4.5,
    )
    assert (stats.hedges, stats.hedges_won, stats.waiting_for) == (7, 6, (FIRST.span,))
    assert (stats.bytes_sent, stats.bytes_received) == (5, 6)
    assert (stats.handed_over_tokens, stats.copied_bytes, stats.promotions, stats.forks) == (7, 8, 9, 10)
    assert (stats.kept_backwards, stats.recomputed_backwards) == (11, 12)


def test_snapshot_does_not_follow_later_passes() -> None:
    recorder = StatsRecorder()
    before = recorder.snapshot()
    timings = [timing(FIRST)]
    recorder.finish((FIRST,), timings)
    timings.clear()
    assert (before.steps, before.waterfall) == (0, ())
    assert recorder.snapshot().waterfall == ((timing(FIRST),),)


def test_waterfall_keeps_the_last_steps_only() -> None:
    recorder = StatsRecorder()
    for number in range(WATERFALL_STEPS + 5):
        recorder.finish((FIRST,), [timing(FIRST, float(number))])
    waterfall = recorder.snapshot().waterfall
    assert [timings[0].total_s for timings in waterfall] == list(range(5, WATERFALL_STEPS + 5))
