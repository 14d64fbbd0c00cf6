from __future__ import annotations

from random import Random

import pytest

from remote_modules.errors import (
    NoRouteError,
    PeerError,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
    RefusalReason,
    RemoteModulesError,
    RemoteProtocolError,
    SpanUnavailable,
)
from remote_modules.peers import PeerId
from remote_modules.plan.breakers import Breakers, RetryBudget
from remote_modules.plan.recovery import (
    Action,
    Failure,
    GiveUp,
    Recovery,
    Replay,
    Reroute,
    Wait,
    failure_of,
)
from remote_modules.spans import Span

ALICE, BOB = PeerId("alice"), PeerId("bob")
NO_ROUTE = NoRouteError("no route for blocks 0:4")
TIMEOUT = PeerTimeout("peer 'alice' gives no sign of life", peer_id=ALICE)
UNREACHABLE = PeerUnreachable("cannot reach peer 'alice'", peer_id=ALICE)
NONSENSE = RemoteProtocolError("expected a frame")


def refused(reason: RefusalReason, retry_after_s: float | None = None) -> PeerRefused:
    return PeerRefused("no", peer_id=ALICE, reason=reason, retry_after_s=retry_after_s)


def id_of(value: object) -> str | None:
    """Test id of an error; others get theirs from pytest."""
    if isinstance(value, PeerRefused):
        return value.reason.value + ("-hint" if value.retry_after_s else "")
    return type(value).__name__ if isinstance(value, RemoteModulesError) else None


class Half(Random):
    """Draws the middle of every range: back-offs of 0.3, 0.5, 0.9 s and so on."""

    def random(self) -> float:
        return 0.5


def table() -> Breakers:
    return Breakers(base_s=0.2, max_s=60.0, rng=Half())


def recovery(
    breakers: Breakers, *, deadline_s: float = 100.0, rng: Random | None = None, budget: RetryBudget | None = None
) -> Recovery:
    return Recovery(breakers, budget or RetryBudget(), deadline_s=deadline_s, rng=rng or Half())


def is_usable(breakers: Breakers, now_s: float, peer: PeerId = ALICE) -> bool:
    return breakers.is_usable(peer, "first", now_s=now_s, is_needed=True)


# -------------------------------------------------------------------------------- which failure an error is


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (UNREACHABLE, Failure.UNREACHABLE),
        (TIMEOUT, Failure.TIMEOUT),
        (NONSENSE, Failure.NONSENSE),
        (PeerError("wrong shape", peer_id=ALICE), Failure.NONSENSE),
        (refused(RefusalReason.BAD_REQUEST), Failure.BAD_REQUEST),
        (refused(RefusalReason.NOT_SERVED), Failure.NOT_SERVED),
        (refused(RefusalReason.SESSION_LOST), Failure.SESSION_LOST),
        (refused(RefusalReason.OUT_OF_MEMORY), Failure.BUSY),
        (refused(RefusalReason.BUSY), Failure.BUSY),
        (refused(RefusalReason.DRAINING), Failure.BUSY),
        (refused(RefusalReason.INTERNAL), Failure.INTERNAL),
    ],
    ids=id_of,
)
def test_error_means_one_failure(error: RemoteModulesError, failure: Failure) -> None:
    assert failure_of(error) is failure


def test_every_refusal_reason_means_a_failure() -> None:
    assert {failure_of(refused(reason)) for reason in RefusalReason} < set(Failure)


# -------------------------------------------------------------------------------- a hop failed


@pytest.mark.parametrize(
    ("error", "action", "unused_until_s", "is_failure"),
    [
        (UNREACHABLE, Reroute(), 10.3, True),
        (TIMEOUT, Reroute(), 10.3, True),
        (NONSENSE, Reroute(), 10.3, True),
        (refused(RefusalReason.INTERNAL), Reroute(), 11.0, False),
        (refused(RefusalReason.NOT_SERVED), Reroute(), 11.0, False),
        (refused(RefusalReason.BUSY, 5.0), Reroute(), 15.0, False),
        (refused(RefusalReason.BUSY), Reroute(), 11.0, False),
        (refused(RefusalReason.OUT_OF_MEMORY, 0.5), Reroute(), 10.5, False),
        (refused(RefusalReason.DRAINING), Reroute(), 11.0, False),
        (refused(RefusalReason.SESSION_LOST), Replay(), 10.0, False),
    ],
    ids=id_of,
)
def test_hop_failed_action_and_breaker_follow_from_the_failure(
    error: RemoteModulesError, action: Action, unused_until_s: float, *, is_failure: bool
) -> None:
    breakers = table()
    decider = recovery(breakers)
    assert decider.on_hop_failed(ALICE, "first", error, now_s=10.0) == action
    assert decider.num_failures == 1
    assert is_usable(breakers, unused_until_s)
    assert is_usable(breakers, unused_until_s - 0.001) == (unused_until_s == 10.0)
    assert is_usable(breakers, 10.0, BOB)
    assert breakers.is_backing_off(ALICE, "first", now_s=10.0) == is_failure


def test_bad_request_gives_up_and_blames_nobody() -> None:
    breakers = table()
    decider = recovery(breakers)
    error = refused(RefusalReason.BAD_REQUEST)
    assert decider.on_hop_failed(ALICE, "first", error, now_s=10.0) == GiveUp(error)
    decider.blame(ALICE, "first", error, now_s=10.0)
    assert is_usable(breakers, 10.0)
    assert decider.num_failures == 0


def test_internal_errors_of_a_peer_add_up() -> None:
    breakers = table()
    decider = recovery(breakers)
    for tick in range(3):
        assert not breakers.is_backing_off(ALICE, "first", now_s=10.0 + tick)
        decider.on_hop_failed(ALICE, "first", refused(RefusalReason.INTERNAL), now_s=10.0 + tick)
    assert breakers.is_backing_off(ALICE, "first", now_s=12.0)


def test_busy_peers_never_open_their_breakers() -> None:
    breakers = table()
    decider = recovery(breakers)
    for reason in (RefusalReason.BUSY, RefusalReason.DRAINING, RefusalReason.OUT_OF_MEMORY, RefusalReason.NOT_SERVED):
        for tick in range(10):
            decider.on_hop_failed(ALICE, "first", refused(reason), now_s=float(tick))
    assert not breakers.is_backing_off(ALICE, "first", now_s=9.0)


def test_session_lost_three_times_in_a_row_is_a_hard_failure() -> None:
    breakers = table()
    decider = recovery(breakers)
    error = refused(RefusalReason.SESSION_LOST)
    actions = [decider.on_hop_failed(ALICE, "first", error, now_s=10.0) for _ in range(3)]
    assert actions == [Replay(), Replay(), Reroute()]
    assert breakers.is_backing_off(ALICE, "first", now_s=10.0)


def test_session_lost_is_counted_for_each_peer_and_since_its_last_success() -> None:
    decider = recovery(table())
    error = refused(RefusalReason.SESSION_LOST)
    for peer in (ALICE, BOB):
        for _ in range(2):
            assert decider.on_hop_failed(peer, "first", error, now_s=10.0) == Replay()
    decider.on_hop_done(ALICE, "first")
    assert decider.on_hop_failed(ALICE, "first", error, now_s=10.0) == Replay()
    assert decider.on_hop_failed(BOB, "first", error, now_s=10.0) == Reroute()


@pytest.mark.parametrize("error", [TIMEOUT, refused(RefusalReason.SESSION_LOST)], ids=["timeout", "session-lost"])
def test_hop_failed_at_the_deadline_gives_up_and_blames(error: RemoteModulesError) -> None:
    breakers = table()
    decider = recovery(breakers, deadline_s=50.0)
    assert not isinstance(decider.on_hop_failed(ALICE, "first", error, now_s=49.0), GiveUp)
    assert decider.on_hop_failed(ALICE, "first", error, now_s=50.0) == GiveUp(error)
    assert breakers.is_backing_off(ALICE, "first", now_s=50.0)


def test_hop_done_closes_the_breaker() -> None:
    breakers = table()
    decider = recovery(breakers)
    decider.on_hop_failed(ALICE, "first", TIMEOUT, now_s=10.0)
    decider.on_hop_done(ALICE, "first")
    assert is_usable(breakers, 10.0)


def test_beyond_the_budget_reroutes_wait_longer_and_longer_but_never_give_up() -> None:
    budget = RetryBudget(floor=3.0)
    decider = recovery(table(), budget=budget)
    actions = [decider.on_hop_failed(ALICE, "first", TIMEOUT, now_s=10.0) for _ in range(8)]
    assert actions == [Reroute()] * 3 + [Reroute(wait_s) for wait_s in (0.1, 0.2, 0.4, 0.8, 1.0)]
    for _ in range(10):
        decider.on_hop_done(ALICE, "first")
    assert decider.on_hop_failed(ALICE, "first", TIMEOUT, now_s=10.0) == Reroute()


def test_failure_that_another_microbatch_met_takes_no_retry() -> None:
    decider = recovery(table(), budget=RetryBudget(floor=0.0))
    error = PeerUnreachable("gone", peer_id=ALICE)
    assert decider.on_hop_failed(ALICE, "first", error, now_s=0.0, is_known=True) == Reroute()
    action = decider.on_hop_failed(ALICE, "first", error, now_s=0.0)
    assert isinstance(action, Reroute)
    assert action.wait_s > 0.0


def test_wait_beyond_the_budget_ends_at_the_deadline() -> None:
    decider = recovery(table(), budget=RetryBudget(floor=0.0), deadline_s=10.05)
    action = decider.on_hop_failed(ALICE, "first", TIMEOUT, now_s=10.0)
    assert isinstance(action, Reroute)
    assert action.wait_s == pytest.approx(0.05)


# -------------------------------------------------------------------------------- no route


@pytest.mark.parametrize("seed", range(5))
def test_no_route_waits_anywhere_below_a_doubling_limit(seed: int) -> None:
    decider = recovery(table(), rng=Random(seed))
    for longest_s in (0.2, 0.4, 0.8, 1.6, 2.0, 2.0):
        action = decider.on_no_route(NO_ROUTE, now_s=10.0)
        assert isinstance(action, Wait)
        assert 0.0 <= action.wait_s <= longest_s


def test_waits_of_many_clients_are_spread_over_the_whole_time() -> None:
    first = [recovery(table(), rng=Random(seed)).on_no_route(NO_ROUTE, now_s=0.0) for seed in range(200)]
    waits = [action.wait_s for action in first if isinstance(action, Wait)]
    assert [sum(low <= wait < low + 0.05 for wait in waits) > 25 for low in (0.0, 0.05, 0.1, 0.15)] == [True] * 4


def test_wait_is_drawn_from_the_given_generator() -> None:
    waits = [recovery(table(), rng=Random(seed)).on_no_route(NO_ROUTE, now_s=0.0) for seed in (1, 1, 2)]
    assert waits[0] == waits[1] != waits[2]


def test_success_starts_the_waits_afresh() -> None:
    decider = recovery(table())
    for _ in range(5):
        decider.on_no_route(NO_ROUTE, now_s=0.0)
    decider.on_hop_done(ALICE, "first")
    assert decider.on_no_route(NO_ROUTE, now_s=0.0) == Wait(0.1)


def test_wait_never_passes_the_deadline() -> None:
    action = recovery(table(), deadline_s=10.0).on_no_route(NO_ROUTE, now_s=9.99)
    assert isinstance(action, Wait)
    assert action.wait_s == pytest.approx(0.01)


def test_no_route_at_the_deadline_gives_up_with_the_blocks() -> None:
    error = NoRouteError("no route for blocks 0:4", missing=[Span(0, 4)])
    action = recovery(table(), deadline_s=10.0).on_no_route(error, now_s=10.0)
    assert isinstance(action, GiveUp)
    assert isinstance(action.error, SpanUnavailable)
    assert (str(action.error), action.error.missing) == ("no route for blocks 0:4", (Span(0, 4),))
    assert action.error.__cause__ is None


def test_no_route_at_the_deadline_names_the_last_failure_as_cause() -> None:
    decider = recovery(table(), deadline_s=10.0)
    decider.on_hop_failed(ALICE, "first", UNREACHABLE, now_s=1.0)
    decider.on_hop_failed(ALICE, "first", TIMEOUT, now_s=2.0)
    action = decider.on_no_route(NO_ROUTE, now_s=10.0)
    assert isinstance(action, GiveUp)
    assert action.error.__cause__ is TIMEOUT
