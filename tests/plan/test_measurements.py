from __future__ import annotations

import math
from typing import Any

import pytest
from records import make_identity, make_record

from remote_modules.peers import PeerId
from remote_modules.plan.candidates import Candidate
from remote_modules.plan.measurements import HALF_LIFE_S, LARGE_BYTES, LOAD_FRESH_S, MAX_PEERS, Measurements, Sample

IDENTITY = make_identity(1)
ALICE = IDENTITY.peer_id
RECORD = make_record(
    IDENTITY, decode_tokens_per_s=100.0, prefill_tokens_per_s=1000.0, free_kv_tokens=5000, load=3, start=2, end=6
)


def sample(**changes: Any) -> Sample:
    fields: dict[str, Any] = {
        "kind": "decode",
        "work": 4.0,
        "num_bytes": 1000,
        "total_s": 0.1,
        "queue_s": 0.02,
        "compute_s": 0.03,
        "load": 1,
        "free_kv_tokens": 700,
    }
    return Sample(**(fields | changes))


def measured(*samples: Sample, rtt_s: float | None = 0.01) -> Measurements:
    measurements = Measurements()
    for one in samples:
        measurements.observe(ALICE, one, rtt_s=rtt_s, now_s=0.0)
    return measurements


def candidate(measurements: Measurements, *, now_s: float = 0.0, rtt_s: float | None = 0.01) -> Candidate:
    return measurements.candidate(RECORD, rtt_s=rtt_s, group="f32", now_s=now_s)


@pytest.mark.parametrize("rtt_s", [None, 0.01])
def test_stranger_is_what_it_announces(rtt_s: float | None) -> None:
    assert candidate(Measurements(), rtt_s=rtt_s) == Candidate(
        peer_id=ALICE,
        span=RECORD.span,
        rtt_s=rtt_s,
        decode_tokens_per_s=100.0,
        prefill_tokens_per_s=1000.0,
        free_kv_tokens=5000,
        load=3,
        group="f32",
        bandwidth_bytes_per_s=None,
    )


def test_answer_overrides_what_is_announced() -> None:
    found = candidate(measured(sample()))
    assert found.rtt_s == pytest.approx(0.05)
    assert found.decode_tokens_per_s == pytest.approx(4.0 / 0.03)
    assert found.prefill_tokens_per_s == 1000.0
    assert (found.load, found.free_kv_tokens) == (1, 700)
    assert found.bandwidth_bytes_per_s is None


@pytest.mark.parametrize("kind", ["prefill", "forward"])
def test_prefill_tells_of_the_prefill_speed(kind: str) -> None:
    found = candidate(measured(sample(kind=kind, work=400.0)))
    assert found.decode_tokens_per_s == 100.0
    assert found.prefill_tokens_per_s == pytest.approx(400.0 / 0.03)


def test_backward_tells_of_the_link_alone() -> None:
    found = candidate(measured(sample(kind="backward", work=400.0)))
    assert (found.decode_tokens_per_s, found.prefill_tokens_per_s) == (100.0, 1000.0)
    assert found.rtt_s == pytest.approx(0.05)


def test_large_request_tells_of_the_bandwidth_not_of_the_round_trip() -> None:
    measurements = measured(sample(num_bytes=LARGE_BYTES, total_s=0.19))
    found = candidate(measurements)
    assert found.rtt_s == 0.01
    assert found.bandwidth_bytes_per_s == pytest.approx(LARGE_BYTES / (0.14 - 0.01))
    assert measurements.bandwidth_bytes_per_s(ALICE, now_s=0.0) == found.bandwidth_bytes_per_s
    assert measurements.bandwidth_bytes_per_s(PeerId("bob"), now_s=0.0) is None


def test_measured_round_trip_is_taken_off_before_that_of_the_connection() -> None:
    found = candidate(measured(sample(), sample(num_bytes=LARGE_BYTES, total_s=0.19)))
    assert found.bandwidth_bytes_per_s == pytest.approx(LARGE_BYTES / (0.14 - 0.05))


def test_unknown_round_trip_counts_as_transfer() -> None:
    found = candidate(measured(sample(num_bytes=LARGE_BYTES, total_s=0.19), rtt_s=None))
    assert found.bandwidth_bytes_per_s == pytest.approx(LARGE_BYTES / 0.14)


def test_bandwidth_beyond_measure_is_finite() -> None:
    found = candidate(measured(sample(num_bytes=10**9, total_s=0.05)))
    assert found.bandwidth_bytes_per_s == pytest.approx(1e11)


@pytest.mark.parametrize(
    ("lie", "rtt_s"), [({"compute_s": 1e6}, 1e-6), ({"compute_s": 0.0, "queue_s": 0.0}, 0.1), ({"queue_s": 1e6}, 1e-6)]
)
def test_peer_that_lies_about_its_share_of_the_time_gains_nothing(lie: dict[str, float], rtt_s: float) -> None:
    found = candidate(measured(sample(**lie)))
    assert found.rtt_s == pytest.approx(rtt_s)
    if "compute_s" in lie and lie["compute_s"]:
        assert found.decode_tokens_per_s == pytest.approx(4.0 / 0.1)


def test_work_below_one_counts_as_one() -> None:
    assert candidate(measured(sample(work=0.0))).decode_tokens_per_s == pytest.approx(1.0 / 0.03)


def test_measurements_are_smoothed() -> None:
    found = candidate(measured(sample(total_s=0.15), sample(total_s=0.55)))
    assert found.rtt_s == pytest.approx(0.1 + 0.25 * 0.4)
    found = candidate(measured(sample(total_s=0.15), *[sample(total_s=0.55)] * 20))
    assert found.rtt_s == pytest.approx(0.5, rel=0.01)


def test_slow_time_is_half_forgotten_in_fifteen_seconds_and_then_all_of_it() -> None:
    measurements = measured(sample(total_s=0.15), *[sample(total_s=1.05)] * 200)
    now_to_then = [candidate(measurements, now_s=now_s).rtt_s for now_s in (0.0, HALF_LIFE_S, 8 * HALF_LIFE_S)]
    assert now_to_then == pytest.approx([1.0, math.sqrt(0.1), 0.1], rel=0.02)


def test_new_sample_counts_against_what_is_left_of_the_old_ones() -> None:
    measurements = measured(sample(total_s=0.15), *[sample(total_s=1.05)] * 200)
    measurements.observe(ALICE, sample(total_s=0.15), rtt_s=None, now_s=20 * HALF_LIFE_S)
    assert candidate(measurements, now_s=20 * HALF_LIFE_S).rtt_s == pytest.approx(0.1, rel=0.01)


def test_speed_and_bandwidth_recover_too() -> None:
    fast, slow = sample(num_bytes=LARGE_BYTES), sample(num_bytes=LARGE_BYTES, total_s=5.0, compute_s=0.3)
    measurements = measured(fast, *[slow] * 100)
    now, later = (candidate(measurements, now_s=now_s) for now_s in (0.0, 20 * HALF_LIFE_S))
    assert (now.decode_tokens_per_s, later.decode_tokens_per_s) == pytest.approx((40 / 3, 400 / 3), rel=0.01)
    assert now.bandwidth_bytes_per_s is not None
    assert later.bandwidth_bytes_per_s is not None
    assert later.bandwidth_bytes_per_s == pytest.approx(LARGE_BYTES / 0.04, rel=0.01)
    assert now.bandwidth_bytes_per_s < 0.02 * later.bandwidth_bytes_per_s


def test_load_of_an_old_answer_gives_way_to_the_announcement() -> None:
    measurements = measured(sample())
    assert candidate(measurements, now_s=LOAD_FRESH_S - 0.1).load == 1
    old = candidate(measurements, now_s=LOAD_FRESH_S)
    assert (old.load, old.free_kv_tokens) == (3, 5000)


def test_lag_counts_as_round_trip() -> None:
    measurements = measured(sample())
    measurements.observe_lag(ALICE, 2.05, now_s=0.0)
    assert candidate(measurements).rtt_s == pytest.approx(0.05 + 0.25 * 2.0)
    measurements = Measurements()
    measurements.observe_lag(ALICE, 2.0, now_s=0.0)
    found = candidate(measurements)
    assert found.rtt_s == pytest.approx(2.0)
    assert found.load == 3


def test_full_table_forgets_the_oldest() -> None:
    measurements = measured(sample())
    for number in range(MAX_PEERS - 1):
        measurements.observe_lag(PeerId(f"peer-{number}"), 1.0, now_s=0.0)
    measurements.observe_lag(PeerId("peer-0"), 1.0, now_s=0.0)  # known: nobody is forgotten for it
    assert candidate(measurements).load == 1
    measurements.observe_lag(PeerId("one-more"), 1.0, now_s=0.0)
    assert candidate(measurements).load == 3


def test_answer_that_waited_for_requests_of_ours_says_nothing_of_the_link() -> None:
    measurements = measured(sample(num_bytes=LARGE_BYTES, is_alone=False), sample(is_alone=False))
    assert measurements.bandwidth_bytes_per_s(ALICE, now_s=0.0) is None
    candidate = measurements.candidate(RECORD, rtt_s=0.5, group="", now_s=0.0)
    assert candidate.rtt_s == 0.5
    assert candidate.decode_tokens_per_s == pytest.approx(4.0 / 0.03)
