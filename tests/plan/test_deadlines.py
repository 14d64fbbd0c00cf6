from __future__ import annotations

import pytest

from remote_modules.peers import PeerId
from remote_modules.plan.deadlines import MAX_BACKOFF, MAX_KEYS, SAFETY_FACTOR, Beat, Heartbeat, WorkEstimator

ALICE, BOB = PeerId("alice"), PeerId("bob")


def timeout_s(estimator: WorkEstimator, peer: PeerId = ALICE, kind: str = "prefill", *, work: float = 1000.0) -> float:
    return estimator.timeout_s(peer, kind, work=work, announced_rate=0.0)


# -------------------------------------------------------------------------------- does it get on?


def test_unknown_peer_gets_the_least_timeout() -> None:
    assert timeout_s(WorkEstimator(min_timeout_s=10.0), work=1e9) == 10.0


@pytest.mark.parametrize(("work", "expected_s"), [(100.0, 10.0), (1000.0, 16.0), (10_000.0, 160.0)])
def test_peer_without_answers_yet_is_timed_by_what_it_announces(work: float, expected_s: float) -> None:
    estimator = WorkEstimator(min_timeout_s=10.0)
    assert estimator.timeout_s(ALICE, "prefill", work=work, announced_rate=500.0) == pytest.approx(expected_s)


def test_observed_rate_wins_over_the_announced_one() -> None:
    estimator = WorkEstimator(min_timeout_s=0.1)
    estimator.observe(ALICE, "prefill", work=100.0, took_s=1.0)
    timed_s = estimator.timeout_s(ALICE, "prefill", work=1000.0, announced_rate=1e9)
    assert timed_s == pytest.approx(10.0 * SAFETY_FACTOR)


def test_rates_follow_what_is_observed_smoothly() -> None:
    estimator = WorkEstimator(min_timeout_s=0.1)
    estimator.observe(ALICE, "prefill", work=100.0, took_s=1.0)
    estimator.observe(ALICE, "prefill", work=100.0, took_s=2.0)
    assert timeout_s(estimator) == pytest.approx((0.01 + 0.25 * 0.01) * 1000.0 * SAFETY_FACTOR)
    for _ in range(100):
        estimator.observe(ALICE, "prefill", work=100.0, took_s=2.0)
    assert timeout_s(estimator) == pytest.approx(20.0 * SAFETY_FACTOR)


def test_rates_are_kept_apart_by_peer_and_kind() -> None:
    estimator = WorkEstimator(min_timeout_s=0.1)
    estimator.observe(ALICE, "prefill", work=100.0, took_s=1.0)
    assert timeout_s(estimator, kind="decode") == 0.1
    assert timeout_s(estimator, BOB) == 0.1


def test_work_below_one_counts_as_one() -> None:
    estimator = WorkEstimator(min_timeout_s=0.1)
    estimator.observe(ALICE, "decode", work=0.0, took_s=0.5)
    assert timeout_s(estimator, kind="decode", work=1.0) == pytest.approx(0.5 * SAFETY_FACTOR)


def test_each_miss_doubles_the_timeout_up_to_a_limit() -> None:
    estimator = WorkEstimator(min_timeout_s=10.0)
    timeouts = []
    for _ in range(8):
        estimator.miss(ALICE)
        timeouts.append(timeout_s(estimator))
    assert timeouts == [20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 640.0, 640.0]
    assert timeout_s(estimator, BOB) == 10.0


def test_miss_doubles_what_is_expected_too() -> None:
    estimator = WorkEstimator(min_timeout_s=0.1)
    estimator.observe(ALICE, "prefill", work=100.0, took_s=1.0)
    estimator.miss(ALICE)
    assert timeout_s(estimator) == pytest.approx(2 * 10.0 * SAFETY_FACTOR)


def test_answer_ends_the_backoff() -> None:
    estimator = WorkEstimator(min_timeout_s=10.0)
    estimator.miss(ALICE)
    estimator.observe(ALICE, "decode", work=1.0, took_s=0.001)
    assert timeout_s(estimator) == 10.0


def test_full_table_of_rates_forgets_the_oldest() -> None:
    estimator = WorkEstimator(min_timeout_s=0.1)
    for number in range(MAX_KEYS):
        estimator.observe(PeerId(f"peer-{number}"), "decode", work=1.0, took_s=1.0)
    estimator.observe(PeerId("peer-0"), "decode", work=1.0, took_s=1.0)  # known: nobody is forgotten for it
    assert timeout_s(estimator, PeerId("peer-0"), "decode") > 0.1
    estimator.observe(ALICE, "decode", work=1.0, took_s=1.0)
    assert timeout_s(estimator, PeerId("peer-0"), "decode") == 0.1
    assert timeout_s(estimator, PeerId("peer-1"), "decode") > 0.1
    assert timeout_s(estimator, ALICE, "decode") > 0.1


def test_full_table_of_backoffs_forgets_the_oldest() -> None:
    estimator = WorkEstimator(min_timeout_s=1.0)
    for number in range(MAX_KEYS):
        estimator.miss(PeerId(f"peer-{number}"))
    estimator.miss(PeerId("peer-0"))
    assert timeout_s(estimator, PeerId("peer-0")) == 4.0
    estimator.miss(ALICE)
    assert timeout_s(estimator, PeerId("peer-0")) == 1.0
    assert timeout_s(estimator, PeerId("peer-1")) == 2.0
    assert timeout_s(estimator) == 2.0 <= MAX_BACKOFF


# -------------------------------------------------------------------------------- is it alive?


def heartbeat() -> Heartbeat:
    return Heartbeat(silence_timeout_s=2.0)


def test_beats_come_four_times_in_the_silence_timeout() -> None:
    assert heartbeat().interval_s == 0.5


def test_nothing_awaited_silence_is_no_death() -> None:
    assert heartbeat().beat(1e6, awaits_answer=False) is Beat.NOTHING


@pytest.mark.parametrize(
    ("silent_s", "expected"),
    [
        (0.0, Beat.NOTHING),
        (0.44, Beat.NOTHING),
        (0.46, Beat.PING),
        (0.5, Beat.PING),
        (1.99, Beat.PING),
        (2.0, Beat.DEAD),
        (60.0, Beat.DEAD),
    ],
)
@pytest.mark.parametrize("since", ["request", "bytes"])
def test_silence_leads_to_ping_then_death(silent_s: float, expected: Beat, since: str) -> None:
    heart = heartbeat()
    heart.wait_begins(100.0 if since == "request" else 90.0)
    heart.heard(100.0 if since == "bytes" else 90.0)
    assert heart.beat(100.0 + silent_s, awaits_answer=True) is expected


def test_bytes_at_every_beat_keep_a_peer_alive() -> None:
    heart = heartbeat()
    heart.wait_begins(0.0)
    for tick in range(1, 1000):
        assert heart.beat(tick * 0.5, awaits_answer=True) is Beat.PING
        heart.heard(tick * 0.5 + 0.01)


def test_silence_before_the_request_does_not_count() -> None:
    heart = heartbeat()
    heart.heard(0.0)
    heart.wait_begins(1000.0)
    assert heart.beat(1000.1, awaits_answer=True) is Beat.NOTHING
