from __future__ import annotations

from random import Random

import pytest

from remote_modules.peers import PeerId
from remote_modules.plan.breakers import MAX_AVOID_S, MAX_PEERS, MIN_REQUESTS, NEEDED_S, PROBE_S, Breakers, RetryBudget

ALICE, BOB = PeerId("alice"), PeerId("bob")
LONGEST_FIRST_S = 0.4  # twice the base


class Half(Random):
    """Draws the middle of every range."""

    def random(self) -> float:
        return 0.5


def table(*, max_s: float = 60.0) -> Breakers:
    """Back-offs of 0.3, 0.5, 0.9, 1.7 s and so on."""
    return Breakers(base_s=0.2, max_s=max_s, rng=Half())


def fail(breakers: Breakers, *, now_s: float = 0.0, is_hard: bool = True, peer: PeerId = ALICE) -> bool:
    return breakers.fail(peer, "first", is_hard=is_hard, now_s=now_s)


def is_usable(breakers: Breakers, now_s: float, *, is_needed: bool = False, instance_id: str = "first") -> bool:
    return breakers.is_usable(ALICE, instance_id, now_s=now_s, is_needed=is_needed)


# -------------------------------------------------------------------------------- closed, open


def test_peer_that_never_failed_is_used() -> None:
    breakers = table()
    assert is_usable(breakers, 0.0)
    assert not breakers.is_backing_off(ALICE, "first", now_s=0.0)
    breakers.succeed(ALICE, "first")
    breakers.claim(ALICE, "first", now_s=0.0)
    breakers.prove(ALICE, "first")
    assert breakers.take_due(now_s=1e9) == []


def test_hard_failure_opens_at_once() -> None:
    breakers = table()
    assert fail(breakers, now_s=10.0)
    assert not is_usable(breakers, 10.0)
    assert breakers.is_backing_off(ALICE, "first", now_s=10.299)
    assert not breakers.is_backing_off(ALICE, "first", now_s=10.3)
    assert breakers.is_usable(BOB, "first", now_s=10.0)
    assert not breakers.is_backing_off(BOB, "first", now_s=10.0)


def test_soft_failure_opens_the_third_time_in_a_row() -> None:
    breakers = table()
    assert [fail(breakers, is_hard=False) for _ in range(3)] == [False, False, True]


def test_success_between_soft_failures_keeps_the_breaker_closed() -> None:
    breakers = table()
    for _ in range(2):
        assert not fail(breakers, is_hard=False)
        assert not fail(breakers, is_hard=False)
        breakers.succeed(ALICE, "first")


@pytest.mark.parametrize(("every", "opens"), [(2, True), (3, True), (4, True), (5, False), (20, False)])
def test_gray_failure_opens_at_a_quarter_of_the_last_requests(every: int, *, opens: bool) -> None:
    breakers = table()
    is_open = []
    for number in range(1, 101):
        if number % every == 0:
            is_open.append(fail(breakers, is_hard=False))
            assert not is_open[-1] or number >= MIN_REQUESTS
            if is_open[-1]:
                break
        else:
            breakers.succeed(ALICE, "first")
    assert any(is_open) == opens


def test_back_off_doubles_with_jitter_up_to_its_limit() -> None:
    rng = Random(7)
    for draws in range(100):
        breakers = Breakers(base_s=0.2, max_s=5.0, rng=rng)
        now_s = 100.0 * draws
        for longest_s in (0.4, 0.8, 1.6, 3.2, 5.0, 5.0):
            fail(breakers, now_s=now_s)
            assert breakers.is_backing_off(ALICE, "first", now_s=now_s + 0.199)
            assert not breakers.is_backing_off(ALICE, "first", now_s=now_s + longest_s)
            now_s += longest_s


def test_jitter_spreads_over_the_whole_range() -> None:
    rng = Random(3)
    early = 0
    for _ in range(400):
        breakers = Breakers(base_s=0.2, max_s=60.0, rng=rng)
        fail(breakers)
        early += not breakers.is_backing_off(ALICE, "first", now_s=0.3)
    assert 150 < early < 250


def test_failures_of_work_given_before_do_not_count_again() -> None:
    breakers = table()
    for _ in range(10):
        assert fail(breakers, now_s=10.0)
    assert not breakers.is_backing_off(ALICE, "first", now_s=10.3)


def test_very_many_failures_do_not_overflow() -> None:
    breakers = table()
    for number in range(2000):
        fail(breakers, now_s=number * 100.0)
    assert breakers.is_backing_off(ALICE, "first", now_s=1999 * 100.0 + 30.0)


def test_restarted_peer_starts_clean() -> None:
    breakers = table()
    fail(breakers)
    fail(breakers, now_s=1.0)
    assert is_usable(breakers, 1.0, instance_id="second")
    assert not breakers.is_backing_off(ALICE, "second", now_s=1.0)
    breakers.claim(ALICE, "second", now_s=1.0)
    breakers.prove(ALICE, "second")
    assert not is_usable(breakers, 1.0)
    breakers.fail(ALICE, "second", is_hard=True, now_s=10.0)
    assert not breakers.is_backing_off(ALICE, "second", now_s=10.3)


def test_success_of_a_new_instance_forgets_the_old_one() -> None:
    breakers = table()
    fail(breakers)
    breakers.succeed(ALICE, "second")
    assert is_usable(breakers, 0.0)


# -------------------------------------------------------------------------------- half-open


def test_after_the_back_off_one_is_sent_to_find_out() -> None:
    breakers = table()
    fail(breakers)
    fail(breakers, peer=BOB)
    assert breakers.take_due(now_s=0.29) == []
    assert breakers.take_due(now_s=0.31) == [(ALICE, "first"), (BOB, "first")]
    assert breakers.take_due(now_s=0.31) == []
    assert not is_usable(breakers, 5.0)
    assert breakers.take_due(now_s=0.31 + PROBE_S) == [(ALICE, "first"), (BOB, "first")]  # nothing was heard


def test_peer_that_is_proved_alive_gets_one_probe() -> None:
    breakers = table()
    fail(breakers)
    breakers.take_due(now_s=0.5)
    breakers.prove(ALICE, "first")
    assert breakers.take_due(now_s=0.5) == []
    assert is_usable(breakers, 0.5)
    breakers.claim(ALICE, "first", now_s=0.5)
    assert not is_usable(breakers, 0.5 + PROBE_S - 0.01)
    assert not is_usable(breakers, 0.5 + PROBE_S - 0.01, is_needed=True)
    assert is_usable(breakers, 0.5 + PROBE_S)  # its pass was given up


def test_probe_that_succeeds_closes_the_breaker() -> None:
    breakers = table()
    fail(breakers)
    breakers.prove(ALICE, "first")
    breakers.claim(ALICE, "first", now_s=0.3)
    breakers.succeed(ALICE, "first")
    assert is_usable(breakers, 0.3)
    breakers.claim(ALICE, "first", now_s=0.3)
    assert is_usable(breakers, 0.3)


def test_probe_that_fails_opens_it_for_longer() -> None:
    breakers = table()
    fail(breakers)
    breakers.prove(ALICE, "first")
    breakers.claim(ALICE, "first", now_s=0.3)
    assert fail(breakers, now_s=1.0, is_hard=False)
    assert breakers.is_backing_off(ALICE, "first", now_s=1.49)
    assert not breakers.is_backing_off(ALICE, "first", now_s=1.5)
    assert not is_usable(breakers, 1.5)  # to be proved again


def test_strikes_are_forgotten_after_eight_successes_in_a_row() -> None:
    breakers = table()
    for successes, back_off_s in ((MIN_REQUESTS - 1, 0.5), (MIN_REQUESTS, 0.3)):
        breakers = table()
        fail(breakers)
        for _ in range(successes):
            breakers.succeed(ALICE, "first")
        fail(breakers, now_s=10.0)
        assert breakers.is_backing_off(ALICE, "first", now_s=10.0 + back_off_s - 0.01)
        assert not breakers.is_backing_off(ALICE, "first", now_s=10.0 + back_off_s)


def test_dead_peer_gets_one_probe_for_each_back_off() -> None:
    breakers = table()
    fail(breakers)
    probes = 0
    for tick in range(12_000):  # two minutes, asked every 10 ms by whoever wants to work
        for peer_id, instance_id in breakers.take_due(now_s=tick / 100):
            probes += 1
            breakers.fail(peer_id, instance_id, is_hard=True, now_s=tick / 100)
        assert not is_usable(breakers, tick / 100)
    assert 7 <= probes <= 10


# -------------------------------------------------------------------------------- needed


def test_peer_that_is_needed_is_tried_after_its_back_off_without_a_proof() -> None:
    breakers = table()
    fail(breakers)
    assert not is_usable(breakers, 0.29, is_needed=True)
    assert not is_usable(breakers, 0.31)
    assert is_usable(breakers, 0.31, is_needed=True)
    breakers.claim(ALICE, "first", now_s=0.31)
    assert not is_usable(breakers, 0.31, is_needed=True)


def test_long_back_off_of_a_peer_that_is_needed_ends_early() -> None:
    breakers = table()
    now_s = 0.0
    for _ in range(20):
        fail(breakers, now_s=now_s)
        assert not is_usable(breakers, now_s + 0.2, is_needed=True)
        now_s += NEEDED_S
        assert is_usable(breakers, now_s, is_needed=True)
        breakers.claim(ALICE, "first", now_s=now_s)
    fail(breakers, now_s=now_s)
    assert breakers.is_backing_off(ALICE, "first", now_s=now_s + 29.0)  # each of these probes was a strike


# -------------------------------------------------------------------------------- avoided


def test_avoided_peer_is_no_failed_one() -> None:
    breakers = table()
    breakers.avoid(ALICE, "first", wait_s=1.0, now_s=10.0)
    assert not is_usable(breakers, 10.999)
    assert not is_usable(breakers, 10.999, is_needed=True)
    assert not breakers.is_backing_off(ALICE, "first", now_s=10.0)
    assert is_usable(breakers, 11.0)
    fail(breakers, now_s=20.0)
    assert not breakers.is_backing_off(ALICE, "first", now_s=20.3)


def test_peer_cannot_ask_to_be_avoided_for_ever() -> None:
    breakers = table()
    breakers.avoid(ALICE, "first", wait_s=86_400.0, now_s=0.0)
    assert is_usable(breakers, MAX_AVOID_S)


def test_full_table_forgets_the_oldest() -> None:
    breakers = table()
    for number in range(MAX_PEERS):
        fail(breakers, peer=PeerId(f"peer-{number}"))
    breakers.avoid(PeerId("peer-0"), "first", wait_s=1.0, now_s=0.0)  # known: nobody is forgotten for it
    assert breakers.is_backing_off(PeerId("peer-0"), "first", now_s=0.0)
    fail(breakers)
    assert not breakers.is_backing_off(PeerId("peer-0"), "first", now_s=0.0)
    assert breakers.is_backing_off(PeerId("peer-1"), "first", now_s=0.0)
    assert breakers.is_backing_off(ALICE, "first", now_s=0.0)


# -------------------------------------------------------------------------------- the retry budget


def taken(budget: RetryBudget, *, now_s: float = 0.0, keep: float = 0.0, tries: int = 1000) -> int:
    return sum(budget.take(now_s=now_s, keep=keep) for _ in range(tries))


def test_new_client_may_retry_a_few_times_at_once() -> None:
    assert taken(RetryBudget(floor=16.0)) == 16


def test_ten_requests_earn_one_retry() -> None:
    budget = RetryBudget(ratio=0.1, floor=4.0)
    assert taken(budget) == 4
    for _ in range(305):
        budget.earn()
    assert taken(budget) == 30


def test_what_is_saved_has_a_limit() -> None:
    budget = RetryBudget()
    for _ in range(10_000):
        budget.earn()
    assert taken(budget) == 100


def test_floor_comes_back_one_a_second_and_no_further() -> None:
    budget = RetryBudget(floor=5.0)
    assert taken(budget, now_s=100.0) == 5
    assert taken(budget, now_s=102.5) == 2
    assert taken(budget, now_s=103.0) == 1
    assert taken(budget, now_s=1000.0) == 5


def test_dead_swarm_is_met_with_one_retry_a_second_in_the_long_run() -> None:
    budget = RetryBudget()
    assert sum(taken(budget, now_s=tick / 10, tries=10) for tick in range(1200)) == pytest.approx(16 + 120, abs=1)


def test_hedges_leave_some_to_failures() -> None:
    budget = RetryBudget(floor=16.0)
    assert taken(budget, keep=8.0) == 8
    assert taken(budget) == 8
