from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from remote_modules.plan.admission import MAX_RETRY_S, MIN_RETRY_S, UNKNOWN_JOB_S, AdmissionQueue, Ticket

DECODE, PREFILL, TRAINING = range(3)


@dataclass(slots=True, eq=False, kw_only=True)
class Job(Ticket):
    name: str


def job(client: int, name: str = "", *, priority: int = DECODE, deadline_s: float = math.inf) -> Job:
    return Job(priority=priority, client=client, deadline_s=deadline_s, name=name)


def queue_of(*jobs: Job, max_waiting: int = 100) -> AdmissionQueue[Job]:
    queue: AdmissionQueue[Job] = AdmissionQueue(max_waiting=max_waiting)
    for each in jobs:
        assert queue.put(each, now_s=0.0) == []
    return queue


def drained(queue: AdmissionQueue[Job], now_s: float = 0.0) -> list[str]:
    names = []
    while (taken := queue.take(now_s=now_s)[0]) is not None:
        names.append(taken.name)
    assert len(queue) == 0
    return names


def test_priority_goes_before_arrival() -> None:
    queue = queue_of(job(1, "t", priority=TRAINING), job(1, "p", priority=PREFILL), job(1, "d"))
    assert len(queue) == 3
    assert drained(queue) == ["d", "p", "t"]


def test_clients_take_turns_each_with_its_oldest_first() -> None:
    queue = queue_of(*(job(1, f"a{n}") for n in range(4)), job(2, "b0"), job(3, "c0"), job(2, "b1"))
    assert drained(queue) == ["a0", "b0", "c0", "a1", "b1", "a2", "a3"]


def test_client_that_comes_back_goes_behind_those_who_wait() -> None:
    queue = queue_of(job(1, "a0"), job(2, "b0"), job(2, "b1"))
    assert queue.take(now_s=0.0)[0] is not None
    queue.put(job(1, "a1"), now_s=0.0)
    assert drained(queue) == ["b0", "a1", "b1"]


def test_full_queue_refuses_the_newcomer_that_has_its_share() -> None:
    queue = queue_of(job(1, "a0"), job(2, "b0"), max_waiting=2)
    late = job(1, "a1")
    assert queue.put(late, now_s=0.0) == [late]
    assert drained(queue) == ["a0", "b0"]


def test_full_queue_takes_from_the_client_that_holds_most() -> None:
    jobs = [job(1, "a0", priority=TRAINING), job(1, "a1", priority=TRAINING), job(1, "a2"), job(2, "b0")]
    queue = queue_of(*jobs, max_waiting=4)
    assert queue.put(job(3, "c0", priority=PREFILL), now_s=0.0) == [jobs[1]]
    assert drained(queue) == ["a2", "b0", "c0", "a0"]


def test_more_urgent_work_is_not_displaced() -> None:
    queue = queue_of(job(1, "a0"), job(1, "a1"), job(1, "a2"), max_waiting=3)
    late = job(2, "b0", priority=TRAINING)
    assert queue.put(late, now_s=0.0) == [late]


def test_share_of_each_client_is_equal_in_the_end() -> None:
    queue = queue_of(*(job(1, f"a{n}") for n in range(8)), max_waiting=8)
    refused = [old.name for n in range(5) for old in queue.put(job(2, f"b{n}"), now_s=0.0)]
    assert refused == ["a7", "a6", "a5", "a4", "b4"]


def test_ticket_past_its_deadline_is_never_taken() -> None:
    late, good = job(1, "late", deadline_s=5.0), job(1, "good", deadline_s=6.0)
    queue = queue_of(late, good)
    assert queue.take(now_s=5.0) == (good, [late])
    alone = job(1, "late", deadline_s=5.0)
    assert queue_of(alone).take(now_s=7.0) == (None, [alone])


def test_ticket_past_its_deadline_makes_room() -> None:
    late = job(1, "late", deadline_s=5.0)
    queue = queue_of(late, job(1, "a1"), max_waiting=2)
    assert queue.put(job(1, "a2"), now_s=5.0) == [late]
    assert drained(queue) == ["a1", "a2"]


def test_empty_queue_has_nothing() -> None:
    queue = queue_of()
    assert queue.take(now_s=0.0) == (None, [])
    assert queue.clear() == []


def test_removed_ticket_is_gone() -> None:
    first, second = job(1, "a0"), job(1, "a1")
    queue = queue_of(first, second, job(2, "b0"))
    assert queue.remove(first)
    assert not queue.remove(first)
    assert not queue.remove(job(9))
    assert not queue.remove(job(9, priority=TRAINING))
    assert drained(queue) == ["a1", "b0"]


def test_cleared_queue_gives_all_back() -> None:
    jobs = [job(1, "a0"), job(2, "b0", priority=TRAINING)]
    queue = queue_of(*jobs)
    assert set(queue.clear()) == set(jobs)
    assert len(queue) == 0


def test_hint_is_the_time_that_the_queue_takes() -> None:
    queue = queue_of(job(1), job(1))
    assert queue.retry_after_s == pytest.approx(2 * UNKNOWN_JOB_S)
    for _ in range(100):
        queue.done(took_s=2.0)
    assert queue.retry_after_s == pytest.approx(4.0)
    assert queue_of().retry_after_s == MIN_RETRY_S
    for _ in range(100):
        queue.done(took_s=1000.0)
    assert queue.retry_after_s == MAX_RETRY_S


def grouped(client: int, name: str, group: object = "g", *, rows: int = 1, deadline_s: float = math.inf) -> Job:
    return Job(priority=DECODE, client=client, deadline_s=deadline_s, name=name, group=group, rows=rows)


def together(queue: AdmissionQueue[Job], *, room: int = 100, now_s: float = 0.0) -> list[str]:
    first, _ = queue.take(now_s=now_s)
    assert first is not None
    return [first.name, *(each.name for each in queue.take_like(first, room=room - first.rows, now_s=now_s))]


def test_tickets_of_one_group_are_taken_together() -> None:
    queue = queue_of(grouped(1, "a"), grouped(2, "b"), grouped(2, "other", "h"), grouped(3, "c"))
    assert together(queue) == ["a", "b", "c"]
    assert drained(queue) == ["other"]


def test_tickets_without_a_group_are_taken_alone() -> None:
    queue = queue_of(job(1, "a"), job(2, "b"), grouped(3, "c"))
    assert together(queue) == ["a"]
    assert together(queue) == ["b"]
    assert together(queue) == ["c"]  # nobody waits any more


def test_clients_take_turns_within_a_batch() -> None:
    queue = queue_of(*(grouped(1, f"a{n}") for n in range(4)), grouped(2, "b0"), grouped(2, "b1"))
    assert together(queue, room=4) == ["a0", "b0", "a1", "b1"]
    assert drained(queue) == ["a2", "a3"]


def test_a_batch_has_no_more_rows_than_there_is_room_for() -> None:
    queue = queue_of(grouped(1, "a", rows=2), grouped(2, "wide", rows=3), grouped(3, "c", rows=2))
    assert together(queue, room=4) == ["a", "c"]
    assert drained(queue) == ["wide"]


def test_nobody_joins_a_batch_whose_client_no_longer_waits() -> None:
    queue = queue_of(grouped(1, "a"), grouped(2, "late", deadline_s=1.0))
    assert together(queue, now_s=2.0) == ["a"]


def test_several_jobs_at_once_count_as_so_many() -> None:
    queue, alone = queue_of(), queue_of()
    queue.done(took_s=8.0, num_jobs=8)
    for _ in range(8):
        alone.done(took_s=1.0)
    for each in (queue, alone):
        each.put(job(1), now_s=0.0)
    assert queue.retry_after_s == pytest.approx(alone.retry_after_s)


def patient(name: str, times: int) -> Job:
    return Job(priority=PREFILL, client=9, deadline_s=math.inf, name=name, patience=times)


def test_patience_ends_after_so_many_others() -> None:
    queue = queue_of(patient("p0", 2), patient("p1", 2), *(job(1, f"d{n}") for n in range(6)), job(2, "t", priority=2))
    assert drained(queue) == ["d0", "d1", "p0", "d2", "d3", "p1", "d4", "d5", "t"]


def test_patience_counts_from_the_last_turn() -> None:
    queue = queue_of(patient("p0", 1), job(1, "d0"))
    assert drained(queue) == ["d0", "p0"]
    for each in (patient("p1", 1), job(1, "d1"), job(1, "d2")):
        queue.put(each, now_s=0.0)
    assert drained(queue) == ["d1", "p1", "d2"]
