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
)
from remote_modules.peers import PeerId
from remote_modules.plan.recovery import (
    MAX_BANS,
    Action,
    BanTable,
    Failure,
    GiveUp,
    Recovery,
    Replay,
    Reroute,
    Wait,
    failure_of,
)

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


def ban_table() -> BanTable:
    return BanTable(ban_s=1.0, max_ban_s=8.0)


def recovery(bans: BanTable, *, deadline_s: float = 100.0, seed: int = 0) -> Recovery:
    return Recovery(bans, deadline_s=deadline_s, rng=Random(seed))


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


# -------------------------------------------------------------------------------- bans


def test_failures_in_a_row_double_the_ban_up_to_its_limit() -> None:
    bans = ban_table()
    assert [bans.ban(ALICE, "first", now_s=10.0) for _ in range(6)] == [11.0, 12.0, 14.0, 18.0, 18.0, 18.0]


def test_ban_ends_at_its_time() -> None:
    bans = ban_table()
    bans.ban(ALICE, "first", now_s=10.0)
    assert bans.is_banned(ALICE, "first", now_s=10.999)
    assert not bans.is_banned(ALICE, "first", now_s=11.0)


def test_peer_never_banned_is_free() -> None:
    assert not ban_table().is_banned(ALICE, "first", now_s=0.0)


def test_restarted_peer_starts_clean() -> None:
    bans = ban_table()
    bans.ban(ALICE, "first", now_s=10.0)
    bans.ban(ALICE, "first", now_s=10.0)
    assert not bans.is_banned(ALICE, "second", now_s=10.0)
    assert bans.ban(ALICE, "second", now_s=10.0) == 11.0


def test_success_forgets_the_strikes() -> None:
    bans = ban_table()
    bans.ban(ALICE, "first", now_s=10.0)
    bans.clear(ALICE)
    bans.clear(BOB)
    assert not bans.is_banned(ALICE, "first", now_s=10.0)
    assert bans.ban(ALICE, "first", now_s=10.0) == 11.0


def test_avoided_peer_gets_no_strike() -> None:
    bans = ban_table()
    bans.avoid(ALICE, "first", until_s=15.0)
    assert bans.is_banned(ALICE, "first", now_s=14.0)
    assert bans.ban(ALICE, "first", now_s=20.0) == 21.0


def test_avoided_peer_keeps_the_strikes_it_has() -> None:
    bans = ban_table()
    bans.ban(ALICE, "first", now_s=0.0)
    bans.avoid(ALICE, "first", until_s=5.0)
    assert bans.ban(ALICE, "first", now_s=10.0) == 12.0
    bans.avoid(ALICE, "second", until_s=15.0)
    assert bans.ban(ALICE, "second", now_s=20.0) == 21.0


def test_full_table_forgets_the_ban_that_ends_first() -> None:
    bans = ban_table()
    for number in range(MAX_BANS):
        bans.avoid(PeerId(f"peer-{number}"), "first", until_s=100.0 + (number - 7) % MAX_BANS)
    bans.ban(PeerId("peer-0"), "first", now_s=0.0)  # known already: nobody is forgotten for it
    assert bans.is_banned(PeerId("peer-7"), "first", now_s=0.0)
    bans.clear(PeerId("peer-0"))
    bans.avoid(ALICE, "first", until_s=1000.0)
    assert bans.is_banned(PeerId("peer-7"), "first", now_s=0.0)  # there was room
    bans.avoid(BOB, "first", until_s=1000.0)
    assert not bans.is_banned(PeerId("peer-7"), "first", now_s=0.0)
    assert bans.is_banned(PeerId("peer-8"), "first", now_s=0.0)
    assert bans.is_banned(ALICE, "first", now_s=0.0)
    assert bans.is_banned(BOB, "first", now_s=0.0)


# -------------------------------------------------------------------------------- a hop failed


@pytest.mark.parametrize(
    ("error", "action", "banned_until_s", "is_strike"),
    [
        (UNREACHABLE, Reroute(), 11.0, True),
        (TIMEOUT, Reroute(), 11.0, True),
        (NONSENSE, Reroute(), 11.0, True),
        (refused(RefusalReason.INTERNAL), Reroute(), 11.0, True),
        (refused(RefusalReason.NOT_SERVED), Reroute(), 11.0, False),
        (refused(RefusalReason.BUSY, 5.0), Reroute(), 15.0, False),
        (refused(RefusalReason.BUSY), Reroute(), 11.0, False),
        (refused(RefusalReason.OUT_OF_MEMORY, 0.5), Reroute(), 10.5, False),
        (refused(RefusalReason.DRAINING), Reroute(), 11.0, False),
        (refused(RefusalReason.SESSION_LOST), Replay(), 10.0, False),
    ],
    ids=id_of,
)
def test_hop_failed_action_and_ban_follow_from_the_failure(
    error: RemoteModulesError, action: Action, banned_until_s: float, *, is_strike: bool
) -> None:
    bans = ban_table()
    decider = recovery(bans)
    assert decider.on_hop_failed(ALICE, "first", error, now_s=10.0) == action
    assert decider.num_failures == 1
    assert not bans.is_banned(ALICE, "first", now_s=banned_until_s)
    assert bans.is_banned(ALICE, "first", now_s=banned_until_s - 0.001) == (banned_until_s > 10.0)
    assert not bans.is_banned(BOB, "first", now_s=10.0)
    assert bans.ban(ALICE, "first", now_s=20.0) == (22.0 if is_strike else 21.0)


def test_bad_request_gives_up_and_bans_nobody() -> None:
    bans = ban_table()
    decider = recovery(bans)
    error = refused(RefusalReason.BAD_REQUEST)
    assert decider.on_hop_failed(ALICE, "first", error, now_s=10.0) == GiveUp(error)
    assert not bans.is_banned(ALICE, "first", now_s=10.0)
    assert decider.num_failures == 0


def test_session_lost_three_times_in_a_row_bans_and_reroutes() -> None:
    bans = ban_table()
    decider = recovery(bans)
    error = refused(RefusalReason.SESSION_LOST)
    actions = [decider.on_hop_failed(ALICE, "first", error, now_s=10.0) for _ in range(3)]
    assert actions == [Replay(), Replay(), Reroute()]
    assert bans.is_banned(ALICE, "first", now_s=10.0)


def test_session_lost_is_counted_for_each_peer_and_since_its_last_success() -> None:
    decider = recovery(ban_table())
    error = refused(RefusalReason.SESSION_LOST)
    for peer in (ALICE, BOB):
        for _ in range(2):
            assert decider.on_hop_failed(peer, "first", error, now_s=10.0) == Replay()
    decider.on_hop_done(ALICE)
    assert decider.on_hop_failed(ALICE, "first", error, now_s=10.0) == Replay()
    assert decider.on_hop_failed(BOB, "first", error, now_s=10.0) == Reroute()


@pytest.mark.parametrize("error", [TIMEOUT, refused(RefusalReason.SESSION_LOST)], ids=["timeout", "session-lost"])
def test_hop_failed_at_the_deadline_gives_up_and_bans(error: RemoteModulesError) -> None:
    bans = ban_table()
    decider = recovery(bans, deadline_s=50.0)
    assert not isinstance(decider.on_hop_failed(ALICE, "first", error, now_s=49.9), GiveUp)
    assert decider.on_hop_failed(ALICE, "first", error, now_s=50.0) == GiveUp(error)
    assert bans.is_banned(ALICE, "first", now_s=50.0)


def test_hop_done_ends_the_bans_growth() -> None:
    bans = ban_table()
    decider = recovery(bans)
    decider.on_hop_failed(ALICE, "first", TIMEOUT, now_s=10.0)
    decider.on_hop_done(ALICE)
    assert bans.ban(ALICE, "first", now_s=20.0) == 21.0


# -------------------------------------------------------------------------------- no route


@pytest.mark.parametrize("seed", range(5))
def test_no_route_waits_double_within_jitter_up_to_the_limit(seed: int) -> None:
    decider = recovery(ban_table(), seed=seed)
    for full_s in (0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0):
        action = decider.on_no_route(NO_ROUTE, now_s=10.0)
        assert isinstance(action, Wait)
        assert full_s / 2 <= action.wait_s <= full_s


def test_wait_is_drawn_from_the_given_generator() -> None:
    waits = [recovery(ban_table(), seed=seed).on_no_route(NO_ROUTE, now_s=0.0) for seed in (1, 1, 2)]
    assert waits[0] == waits[1] != waits[2]


def test_success_starts_the_waits_afresh() -> None:
    decider = recovery(ban_table())
    for _ in range(5):
        decider.on_no_route(NO_ROUTE, now_s=0.0)
    decider.on_hop_done(ALICE)
    action = decider.on_no_route(NO_ROUTE, now_s=0.0)
    assert isinstance(action, Wait)
    assert action.wait_s <= 0.1


def test_wait_never_passes_the_deadline() -> None:
    action = recovery(ban_table(), deadline_s=10.0).on_no_route(NO_ROUTE, now_s=9.99)
    assert isinstance(action, Wait)
    assert action.wait_s == pytest.approx(0.01)


def test_no_route_at_the_deadline_gives_up() -> None:
    error = NoRouteError("no route")
    assert recovery(ban_table(), deadline_s=10.0).on_no_route(error, now_s=10.0) == GiveUp(error)
    assert error.__cause__ is None


def test_no_route_at_the_deadline_names_the_last_failure_as_cause() -> None:
    error = NoRouteError("no route")
    decider = recovery(ban_table(), deadline_s=10.0)
    decider.on_hop_failed(ALICE, "first", UNREACHABLE, now_s=1.0)
    decider.on_hop_failed(ALICE, "first", TIMEOUT, now_s=2.0)
    assert decider.on_no_route(error, now_s=10.0) == GiveUp(error)
    assert error.__cause__ is TIMEOUT
