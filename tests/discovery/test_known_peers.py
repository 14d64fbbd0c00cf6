from __future__ import annotations

from pathlib import Path

import pytest
from discovery_support import make_signed
from records import make_identity, make_record

from remote_modules.discovery.known_peers import KnownPeers
from remote_modules.discovery.peer_cache import PeerCache
from remote_modules.identity import Identity
from remote_modules.plan.leases import StaleRecordError

ALICE, BOB = make_identity(1), make_identity(2)


class World:
    """A table of known peers whose clock is ``now_s``, with leases of 90 s."""

    def __init__(self, folder: Path) -> None:
        self.now_s = 1000.0
        self.known = KnownPeers(
            own_peer_id=BOB.peer_id, cache=PeerCache(folder), lease_s=90.0, clock=lambda: self.now_s
        )

    def hear(self, identity: Identity = ALICE, *, age_s: float = 0.0, via: str = "", **changes: object) -> None:
        record = make_record(identity, **changes)
        self.known.hear(make_signed(identity, **changes), record, at_s=self.now_s - age_s, via=via)

    def seen(self) -> list[int]:
        return [record.sequence for record in self.known.records("tiny-key")]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_peer_is_forgotten_one_lease_after_it_was_known_to_live(world: World) -> None:
    world.hear(age_s=30.0)
    world.now_s += 59.9
    assert world.seen() == [1]
    world.now_s += 0.1
    assert world.seen() == []


def test_dead_peer_is_not_kept_alive_by_those_who_talk_about_it(world: World) -> None:
    """Two tables tell each other of a dead peer for ever, one second of network apart."""
    other = World(Path("/nowhere"))
    other.known = KnownPeers(lease_s=90.0, clock=lambda: world.now_s)
    world.hear()
    for _ in range(300):
        for teller, listener in ((world.known, other.known), (other.known, world.known)):
            asked_s = world.now_s
            world.now_s += 0.5  # the answer takes so long, half of it before it is made
            leases, told_s = teller.leases(None)
            ages_s = [told_s - lease.announced_at_s for lease in leases]
            world.now_s += 0.5
            for lease, age_s in zip(leases, ages_s, strict=True):
                listener.hear(lease.signed, lease.record, at_s=asked_s - age_s)
        if world.now_s >= 1090.0:
            break
    assert world.now_s == 1090.0
    assert world.known.records(None) == other.known.records(None) == []


def test_same_record_heard_from_one_who_knows_better_lives_longer(world: World) -> None:
    world.hear(age_s=60.0)
    world.hear(age_s=10.0)
    world.hear(age_s=70.0)
    world.now_s += 79.0
    assert world.seen() == [1]
    world.now_s += 1.0
    assert world.seen() == []


def test_age_cannot_be_negative(world: World) -> None:
    world.hear(age_s=-500.0)
    world.now_s += 90.0
    assert world.seen() == []


def test_older_record_changes_nothing(world: World) -> None:
    world.hear(sequence=5)
    world.hear(sequence=4, age_s=-10.0)
    assert world.seen() == [5]


def test_own_record_is_no_news(world: World) -> None:
    world.hear(BOB)
    assert world.seen() == []


def test_private_address_named_by_a_public_teller_is_left_out(world: World) -> None:
    world.hear(via="1.2.3.4", addresses=("192.168.0.9:31330",))
    assert world.seen() == []
    world.hear(via="1.2.3.4", addresses=("192.168.0.9:31330", "8.8.8.8:31330"), sequence=2)
    assert [record.addresses for record in world.known.records(None)] == [("8.8.8.8:31330",)]


def test_announcement_must_be_newer(world: World) -> None:
    world.known.announce(make_signed(ALICE, sequence=5), make_record(ALICE, sequence=5), via="127.0.0.1")
    with pytest.raises(StaleRecordError):
        world.known.announce(make_signed(ALICE, sequence=5), make_record(ALICE, sequence=5), via="127.0.0.1")
    assert world.seen() == [5]


def test_withdrawn_peer_is_forgotten_on_disk_too(world: World, tmp_path: Path) -> None:
    world.hear()
    world.known.save()
    assert KnownPeers.kept_in(tmp_path).remembered("tiny-key") == [("127.0.0.1:4000",)]
    world.known.withdraw(make_record(ALICE, sequence=2))
    world.known.save()
    assert world.seen() == []
    assert KnownPeers.kept_in(tmp_path).remembered("tiny-key") == []


def test_addresses_outlive_the_lease_and_the_process(world: World, tmp_path: Path) -> None:
    world.hear(addresses=("127.0.0.1:1", "127.0.0.1:2"))
    world.now_s += 1000.0
    world.known.save()
    assert world.seen() == []
    assert world.known.remembered("tiny-key") == [("127.0.0.1:1", "127.0.0.1:2")]
    assert KnownPeers.kept_in(tmp_path).remembered("tiny-key") == [("127.0.0.1:1", "127.0.0.1:2")]
    assert KnownPeers.kept_in(None).remembered("tiny-key") == []
