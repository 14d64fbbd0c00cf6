from __future__ import annotations

import math

import pytest

from remote_modules.peers import PeerId
from remote_modules.plan.deadlines import MAX_BACKOFF, MAX_KEYS, Beat, Heartbeat, WorkEstimator

ALICE, BOB = PeerId("alice"), PeerId("bob")


def estimator(*, min_s: float = 2.0, max_s: float = 30.0) -> WorkEstimator:
    return WorkEstimator(min_timeout_s=min_s, max_timeout_s=max_s)


def taught(*took_s: float, work: float = 100.0, kind: str = "prefill", **limits: float) -> WorkEstimator:
    learner = estimator(**limits)
    for seconds in took_s:
        learner.observe(ALICE, kind, work=work, took_s=seconds)
    return learner


def timeout_s(learner: WorkEstimator, peer: PeerId = ALICE, kind: str = "prefill", *, work: float = 100.0) -> float:
    return learner.timeout_s(peer, kind, work=work, announced_rate=0.0)


def patience_s(learner: WorkEstimator, peer: PeerId = ALICE, kind: str = "prefill", *, work: float = 100.0) -> float:
    return learner.patience_s(peer, kind, work=work)


# -------------------------------------------------------------------------------- does it get on?


def test_unknown_peer_gets_the_longest_timeout() -> None:
    assert timeout_s(estimator(), work=1e9) == 30.0


@pytest.mark.parametrize(("work", "expected_s"), [(100.0, 30.0), (1000.0, 30.0), (10_000.0, 160.0)])
def test_peer_without_answers_yet_is_timed_by_what_it_announces(work: float, expected_s: float) -> None:
    assert estimator().timeout_s(ALICE, "prefill", work=work, announced_rate=500.0) == pytest.approx(expected_s)


def test_steady_peer_gets_four_times_what_it_takes() -> None:
    learner = taught(*[1.0] * 100)
    assert timeout_s(learner) == pytest.approx(4.0, rel=1e-6)
    assert learner.timeout_s(ALICE, "prefill", work=100.0, announced_rate=1e9) == pytest.approx(4.0, rel=1e-6)


def test_first_answer_counts_as_half_as_uncertain() -> None:
    assert timeout_s(taught(1.0)) == 4 * (1.0 + 4 * 0.5)


def test_timeout_follows_mean_and_deviation() -> None:
    learner = taught(1.0, 2.0)
    mean_s, deviation_s = 1.0 + 0.25 * 1.0, 0.5 + 0.25 * (1.0 - 0.5)
    assert timeout_s(learner) == pytest.approx(4 * (mean_s + 4 * deviation_s))


def test_peer_of_changing_speed_gets_more_than_a_steady_one() -> None:
    changing = taught(*[0.5, 1.5] * 50)
    assert timeout_s(changing) > 2 * timeout_s(taught(*[1.0] * 100))


@pytest.mark.parametrize(("took_s", "expected_s"), [(0.001, 2.0), (0.4, 2.0), (1.0, 4.0), (10.0, 30.0), (40.0, 60.0)])
def test_timeout_has_limits_but_known_slow_work_is_given_its_time(took_s: float, expected_s: float) -> None:
    assert timeout_s(taught(*[took_s] * 100)) == pytest.approx(expected_s, rel=1e-6)


def test_transfer_comes_on_top() -> None:
    learner = taught(*[0.01] * 10)
    assert learner.timeout_s(ALICE, "prefill", work=100.0, announced_rate=0.0, transfer_s=7.0) == 9.0


def test_times_are_kept_apart_by_peer_and_kind() -> None:
    learner = taught(*[1.0] * 100)
    assert timeout_s(learner, kind="decode") == 30.0
    assert timeout_s(learner, BOB) == 30.0


def test_times_are_kept_apart_by_size_of_the_work() -> None:
    learner = taught(*[0.8] * 100, work=1.0)
    for _ in range(100):
        learner.observe(ALICE, "prefill", work=1000.0, took_s=5.0)
    assert timeout_s(learner, work=1.0) == pytest.approx(3.2, rel=1e-6)
    assert timeout_s(learner, work=1000.0) == pytest.approx(20.0, rel=1e-6)


def test_unknown_size_is_judged_by_the_nearest_one_scaled_up_only() -> None:
    learner = taught(*[0.8] * 100, work=100.0)
    assert timeout_s(learner, work=200.0) == pytest.approx(6.4, rel=1e-6)
    assert timeout_s(learner, work=1.0) == pytest.approx(3.2, rel=1e-6)
    learner.observe(ALICE, "prefill", work=1600.0, took_s=1.6)
    assert learner.patience_s(ALICE, "prefill", work=400.0) == math.inf  # as near to 1,600 as to 100: the larger


def test_work_below_one_counts_as_one() -> None:
    assert timeout_s(taught(*[0.8] * 100, work=0.0), work=1.0) == pytest.approx(3.2, rel=1e-6)


def test_each_miss_doubles_the_timeout_up_to_a_limit() -> None:
    learner = taught(*[0.001] * 20)
    timeouts = []
    for _ in range(8):
        learner.miss(ALICE)
        timeouts.append(timeout_s(learner))
    assert timeouts == [4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 128.0, 128.0]
    assert timeout_s(learner, BOB) == 30.0


def test_answer_ends_the_backoff() -> None:
    learner = taught(*[0.001] * 20)
    learner.miss(ALICE)
    learner.observe(ALICE, "decode", work=1.0, took_s=0.001)
    assert timeout_s(learner) == 2.0


def test_full_table_of_times_forgets_the_oldest() -> None:
    learner = estimator(max_s=3.0)
    for number in range(MAX_KEYS):
        learner.observe(PeerId(f"peer-{number}"), "decode", work=1.0, took_s=0.01)
    learner.observe(PeerId("peer-0"), "decode", work=1.0, took_s=0.01)  # known: nobody is forgotten for it
    assert timeout_s(learner, PeerId("peer-0"), "decode", work=1.0) == 2.0
    learner.observe(ALICE, "decode", work=1.0, took_s=0.01)
    assert timeout_s(learner, PeerId("peer-0"), "decode", work=1.0) == 3.0
    assert timeout_s(learner, PeerId("peer-1"), "decode", work=1.0) == 2.0
    assert timeout_s(learner, ALICE, "decode", work=1.0) == 2.0


def test_full_table_of_backoffs_forgets_the_oldest() -> None:
    learner = estimator(max_s=3.0)
    for number in range(MAX_KEYS):
        learner.miss(PeerId(f"peer-{number}"))
    learner.miss(PeerId("peer-0"))
    assert timeout_s(learner, PeerId("peer-0")) == 12.0
    learner.miss(ALICE)
    assert timeout_s(learner, PeerId("peer-0")) == 3.0
    assert timeout_s(learner, PeerId("peer-1")) == 6.0
    assert timeout_s(learner) == 6.0 <= MAX_BACKOFF * 3.0


# -------------------------------------------------------------------------------- is it slower than expected?


def test_nothing_is_expected_before_three_answers() -> None:
    learner = estimator()
    for _ in range(3):
        assert patience_s(learner) == math.inf
        learner.observe(ALICE, "prefill", work=100.0, took_s=1.0)
    assert patience_s(learner) < 10.0
    assert patience_s(learner, BOB) == math.inf
    assert patience_s(learner, kind="decode") == math.inf


def test_steady_peer_is_slow_at_three_times_what_it_takes() -> None:
    assert patience_s(taught(*[0.1] * 100)) == pytest.approx(0.3, rel=1e-6)


def test_peer_of_changing_speed_is_given_more() -> None:
    assert patience_s(taught(*[0.05, 0.15] * 50)) == pytest.approx(0.6, rel=0.15)


def test_peer_that_became_slow_is_soon_expected_to_be() -> None:
    assert patience_s(taught(*[0.1] * 100, *[1.0] * 8)) > 3.0


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


def test_expected_time_is_the_mean_of_such_work() -> None:
    learner = WorkEstimator(min_timeout_s=2.0, max_timeout_s=30.0)
    assert learner.expected_s(ALICE, "forward", work=100.0) is None
    learner.observe(ALICE, "forward", work=100.0, took_s=0.5)
    assert learner.expected_s(ALICE, "forward", work=100.0) == 0.5
    assert learner.expected_s(ALICE, "forward", work=200.0) == 1.0
