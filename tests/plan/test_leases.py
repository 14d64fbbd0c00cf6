from __future__ import annotations

from typing import Any

import pytest
from records import make_identity, make_record

from remote_modules.errors import DiscoveryError
from remote_modules.peers import PeerRecord, PeerState
from remote_modules.plan.leases import (
    CLOCKED_SEQUENCE,
    MAX_RETIRED,
    DuplicateIdentityError,
    LeaseTable,
    StaleRecordError,
    TableFullError,
    merge_records,
    reannounce_after,
)

ALICE, BOB, CAROL = make_identity(1), make_identity(2), make_identity(3)


def announce(table: LeaseTable, record: PeerRecord, now_s: float = 0.0, lease_s: float = 90.0) -> None:
    identity = {who.peer_id: who for who in (ALICE, BOB, CAROL)}[record.peer_id]  # type: ignore[index]
    table.announce(identity.sign_record(record), record, now_s, lease_s)


def alice(sequence: int = 1, instance_id: str = "first", **changes: Any) -> PeerRecord:
    return make_record(ALICE, sequence=sequence, instance_id=instance_id, **changes)


def seen(table: LeaseTable, now_s: float = 0.0, model_key: str | None = None) -> list[tuple[str, int]]:
    leases = table.lookup(model_key, now_s)
    return [(lease.record.instance_id, lease.record.sequence) for lease in leases]


@pytest.fixture
def table() -> LeaseTable:
    return LeaseTable(max_records=2)


def test_announced_record_is_found_with_its_proof(table: LeaseTable) -> None:
    record = alice()
    announce(table, record, 5.0)
    (lease,) = table.lookup(None, 6.0)
    assert lease.record == record
    assert lease.signed == ALICE.sign_record(record)
    assert (lease.announced_at_s, lease.expires_at_s) == (5.0, 95.0)


def test_lookup_by_model_key_finds_only_that_model(table: LeaseTable) -> None:
    announce(table, alice(model_key="a"))
    announce(table, make_record(BOB, model_key="b"))
    assert [lease.record.model_key for lease in table.lookup("b", 0.0)] == ["b"]
    assert table.lookup("c", 0.0) == []
    assert len(table.lookup(None, 0.0)) == 2


def test_lease_ends_exactly_when_it_expires(table: LeaseTable) -> None:
    announce(table, alice(), 10.0, lease_s=90.0)
    assert seen(table, 99.99) == [("first", 1)]
    assert seen(table, 100.0) == []


def test_renewal_extends_the_lease(table: LeaseTable) -> None:
    announce(table, alice(1), 0.0)
    announce(table, alice(2), 60.0)
    assert seen(table, 149.0) == [("first", 2)]


@pytest.mark.parametrize("sequence", [4, 5])
def test_stale_sequence_is_refused_and_changes_nothing(table: LeaseTable, sequence: int) -> None:
    announce(table, alice(5), 0.0)
    with pytest.raises(StaleRecordError, match=f"stale record: .* sequence {sequence}, already seen 5") as caught:
        announce(table, alice(sequence), 60.0)
    assert caught.value.newest == ALICE.sign_record(alice(5))
    assert seen(table, 89.0) == [("first", 5)]
    assert seen(table, 90.0) == []


def test_expired_lease_forgets_sequence_and_instances(table: LeaseTable) -> None:
    announce(table, alice(5), 0.0)
    announce(table, alice(1, "second"), 1.0)
    announce(table, alice(3, "first"), 91.0)
    assert seen(table, 91.0) == [("first", 3)]


def test_restarted_peer_replaces_its_dead_instance_though_it_counts_from_zero(table: LeaseTable) -> None:
    announce(table, alice(500, "first"))
    announce(table, alice(0, "second"))
    assert seen(table) == [("second", 0)]


def test_replaced_instance_that_goes_on_is_told_of_duplicate_identity(table: LeaseTable) -> None:
    announce(table, alice(1, "first"), 0.0)
    announce(table, alice(1, "second"), 1.0)
    with pytest.raises(
        DuplicateIdentityError, match="duplicate identity: .* 'first' was replaced by .* 'second'"
    ) as caught:
        announce(table, alice(2, "first"), 2.0)
    assert caught.value.newest == ALICE.sign_record(alice(1, "second"))
    assert seen(table, 2.0) == [("second", 1)]


def test_only_the_latest_replaced_instances_are_remembered() -> None:
    table = LeaseTable(max_records=2)
    for number in range(MAX_RETIRED + 2):
        announce(table, alice(1, f"i{number}"))
    with pytest.raises(DiscoveryError, match="duplicate identity"):
        announce(table, alice(9, "i1"))
    announce(table, alice(9, "i0"))
    assert seen(table) == [("i0", 9)]


def test_old_record_of_a_dead_instance_cannot_oust_one_that_counts_from_a_clock(table: LeaseTable) -> None:
    announce(table, alice(CLOCKED_SEQUENCE + 10, "second"))
    with pytest.raises(DiscoveryError, match="stale record"):
        announce(table, alice(CLOCKED_SEQUENCE + 5, "yesterday"))
    announce(table, alice(CLOCKED_SEQUENCE + 11, "third"))
    assert seen(table) == [("third", CLOCKED_SEQUENCE + 11)]


def test_instance_id_with_control_characters_is_escaped_in_the_message(table: LeaseTable) -> None:
    announce(table, alice(1, "\x1b[31m\n"))
    announce(table, alice(1, "second"))
    with pytest.raises(DiscoveryError) as caught:
        announce(table, alice(2, "\x1b[31m\n"))
    assert str(caught.value).isprintable()


def test_full_table_refuses_another_peer_but_renews_those_it_has(table: LeaseTable) -> None:
    announce(table, alice(1))
    announce(table, make_record(BOB))
    with pytest.raises(TableFullError, match="tracker is full: 2 peers"):
        announce(table, make_record(CAROL))
    announce(table, alice(2))
    assert seen(table) == [("first", 2), ("first", 1)]


def test_full_table_drops_expired_leases_first(table: LeaseTable) -> None:
    announce(table, alice(), 0.0, lease_s=10.0)
    announce(table, make_record(BOB), 0.0, lease_s=90.0)
    announce(table, make_record(CAROL), 10.0)
    assert {lease.record.peer_id for lease in table.lookup(None, 10.0)} == {BOB.peer_id, CAROL.peer_id}


def test_withdrawal_with_higher_sequence_ends_the_lease(table: LeaseTable) -> None:
    announce(table, alice(1))
    table.withdraw(alice(2), 1.0)
    assert seen(table, 1.0) == []


def test_withdrawal_of_unknown_peer_is_no_error(table: LeaseTable) -> None:
    table.withdraw(alice(), 0.0)
    assert seen(table) == []


def test_announcement_repeated_by_a_stranger_does_not_withdraw(table: LeaseTable) -> None:
    announce(table, alice(7))
    with pytest.raises(DiscoveryError, match="stale record"):
        table.withdraw(alice(7), 1.0)
    assert seen(table, 1.0) == [("first", 7)]


def test_announced_draining_record_serves_as_withdrawal(table: LeaseTable) -> None:
    announce(table, alice(7, state=PeerState.DRAINING))
    table.withdraw(alice(7, state=PeerState.DRAINING), 1.0)
    assert seen(table, 1.0) == []


def test_older_draining_record_does_not_withdraw(table: LeaseTable) -> None:
    announce(table, alice(7))
    with pytest.raises(DiscoveryError, match="stale record"):
        table.withdraw(alice(6, state=PeerState.DRAINING), 1.0)
    assert seen(table, 1.0) == [("first", 7)]


def test_other_instance_cannot_withdraw_the_present_one(table: LeaseTable) -> None:
    announce(table, alice(1, "first"))
    announce(table, alice(1, "second"))
    with pytest.raises(DiscoveryError, match="runs as another instance"):
        table.withdraw(alice(9, "first"), 1.0)
    assert seen(table, 1.0) == [("second", 1)]


def test_merge_keeps_the_highest_sequence_of_each_peer() -> None:
    bob = make_record(BOB)
    merged = merge_records([[alice(2), bob], [], [alice(3)], [alice(1)]])
    assert merged == [alice(3), bob]


def test_merge_of_equal_sequences_keeps_the_first_source() -> None:
    reached, announced = alice(addresses=("127.0.0.1:1",)), alice(addresses=("10.0.0.1:1",))
    assert merge_records([[reached], [announced]]) == [reached]


def test_merge_of_nothing_is_nothing() -> None:
    assert merge_records([]) == []


def test_peer_that_changes_its_model_is_found_under_the_new_one_only(table: LeaseTable) -> None:
    announce(table, alice(1, model_key="a"))
    announce(table, make_record(BOB, model_key="a"))
    announce(table, alice(2, model_key="b"))
    assert seen(table, model_key="a") == [("first", 1)]
    assert seen(table, model_key="b") == [("first", 2)]


def test_count_is_of_live_leases(table: LeaseTable) -> None:
    announce(table, alice(), 0.0, lease_s=10.0)
    announce(table, make_record(BOB), 0.0, lease_s=20.0)
    assert [table.count(now_s) for now_s in (9.0, 10.0, 20.0)] == [2, 1, 0]
    assert len(table) == 0


def test_renewal_for_a_shorter_time_counts(table: LeaseTable) -> None:
    announce(table, alice(1), 0.0, lease_s=90.0)
    announce(table, alice(2), 0.0, lease_s=10.0)
    assert table.count(10.0) == 0


def test_peers_that_come_and_go_leave_nothing_behind(table: LeaseTable) -> None:
    announce(table, make_record(BOB))
    for sequence in range(1000):
        announce(table, alice(2 * sequence))
        table.withdraw(alice(2 * sequence + 1), 0.0)
    assert len(table._expiries) < 70
    assert seen(table, 89.0) == [("first", 1)]
    assert seen(table, 90.0) == []
    assert table._expiries == []


# Hearsay: alice is said to have lived at some time; leases of 90 s.


def hear(table: LeaseTable, record: PeerRecord, at_s: float, now_s: float = 100.0) -> bool:
    identity = {who.peer_id: who for who in (ALICE, BOB, CAROL)}[record.peer_id]  # type: ignore[index]
    return table.hear(identity.sign_record(record), record, at_s=at_s, now_s=now_s, lease_s=90.0, via="10.0.0.1")


def test_heard_peer_lives_one_lease_from_when_it_was_known_to(table: LeaseTable) -> None:
    assert hear(table, alice(), 40.0)
    (lease,) = table.lookup(None, 129.9)
    assert (lease.record, lease.announced_at_s, lease.expires_at_s, lease.via) == (alice(), 40.0, 130.0, "10.0.0.1")
    assert table.lookup(None, 130.0) == []


def test_hearsay_that_is_a_lease_old_is_not_taken(table: LeaseTable) -> None:
    assert not hear(table, alice(), 10.0)
    assert seen(table, 100.0) == []


def test_same_record_heard_again_counts_from_the_latest_sign_of_life(table: LeaseTable) -> None:
    assert hear(table, alice(), 40.0)
    assert not hear(table, alice(), 60.0)
    assert not hear(table, alice(), 50.0)
    assert [lease.expires_at_s for lease in table.lookup(None, 100.0)] == [150.0]


def test_newer_hearsay_replaces_and_older_is_ignored(table: LeaseTable) -> None:
    assert hear(table, alice(5), 90.0)
    assert not hear(table, alice(4), 99.0)
    assert hear(table, alice(6), 80.0)
    assert hear(table, alice(1, "second"), 85.0)
    assert not hear(table, alice(7, "first"), 99.0)
    assert seen(table, 100.0) == [("second", 1)]


def test_full_table_hears_of_nobody_else(table: LeaseTable) -> None:
    announce(table, make_record(BOB), 100.0)
    announce(table, make_record(CAROL), 0.0, lease_s=100.0)
    assert hear(table, alice(), 99.0)  # carol's lease has ended
    assert not hear(table, make_record(CAROL), 99.0)
    assert len(table.lookup(None, 100.0)) == 2


@pytest.mark.parametrize(
    ("num_peers", "seconds"), [(0, 0.0), (1000, 2.0), (15_000, 30.0), (30_000, 60.0), (150_000, 300.0), (10**9, 300.0)]
)
def test_interval_grows_with_the_number_of_peers_up_to_a_limit(num_peers: int, seconds: float) -> None:
    assert reannounce_after(num_peers, interval_s=30.0, max_announces_per_s=1000.0) == seconds
