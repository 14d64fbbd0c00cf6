"""One suite for everything that calls itself a `LeaseStorage`; each kind subclasses it and says how to make one."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from records import make_identity, make_record

from remote_modules.discovery.storage import LeaseStorage
from remote_modules.errors import DiscoveryError
from remote_modules.peers import PeerRecord, PeerState
from remote_modules.plan.leases import CLOCKED_SEQUENCE, DuplicateIdentityError, StaleRecordError, TableFullError

__all__ = ["StorageContract", "StorageWorld"]

IDENTITIES = {identity.peer_id: identity for identity in map(make_identity, range(1, 41))}
ALICE, BOB, CAROL, *_ = IDENTITIES.values()


class StorageWorld(ABC):
    """A storage, and the passing of time on its clock."""

    storage: LeaseStorage

    @abstractmethod
    async def open(self, max_records: int) -> None:
        """Make ``storage``, empty."""

    @abstractmethod
    async def close(self) -> None:
        """Free what was opened."""

    @abstractmethod
    async def let_pass(self, seconds: float) -> None:
        """Return when so much time has passed."""

    async def announce(self, record: PeerRecord, lease_s: float = 90.0) -> None:
        signed = IDENTITIES[record.peer_id].sign_record(record)  # type: ignore[index]
        await self.storage.announce(signed, record, lease_s)

    async def seen(self, model_key: str | None = None) -> list[PeerRecord]:
        listing = await self.storage.lookup(model_key)
        assert all(lease.expires_at_s > listing.now_s >= lease.announced_at_s for lease in listing.leases)
        return sorted((lease.record for lease in listing.leases), key=lambda record: record.model)


def alice(sequence: int = 1, instance_id: str = "first", **changes: Any) -> PeerRecord:
    return make_record(ALICE, **{"sequence": sequence, "instance_id": instance_id, "model": "a", **changes})


def bob(**changes: Any) -> PeerRecord:
    return make_record(BOB, **{"model": "b", **changes})


class StorageContract(ABC):
    @abstractmethod
    def make_world(self) -> StorageWorld:
        """A world that is not open yet."""

    def run(self, scenario: Callable[[StorageWorld], Awaitable[None]], *, max_records: int = 3) -> None:
        async def main() -> None:
            world = self.make_world()
            await world.open(max_records)
            try:
                await scenario(world)
            finally:
                await world.close()

        asyncio.run(main())

    def test_new_storage_is_empty(self) -> None:
        async def scenario(world: StorageWorld) -> None:
            assert await world.seen() == []
            assert await world.seen("tiny-key") == []
            assert await world.storage.count() == 0

        self.run(scenario)

    def test_announced_record_is_found_with_its_proof(self) -> None:
        async def scenario(world: StorageWorld) -> None:
            await world.announce(alice())
            (lease,) = (await world.storage.lookup("tiny-key")).leases
            assert lease.record == alice()
            assert lease.signed == ALICE.sign_record(alice())
            assert (lease.instance_id, lease.sequence, lease.model_key) == ("first", 1, "tiny-key")
            assert lease.expires_at_s - lease.announced_at_s == pytest.approx(90.0, abs=0.01)

        self.run(scenario)

    def test_models_are_told_apart(self) -> None:
        async def scenario(world: StorageWorld) -> None:
            await world.announce(alice(model_key="one"))
            await world.announce(bob(model_key="two"))
            assert await world.seen("two") == [bob(model_key="two")]
            assert await world.seen("three") == []
            assert await world.seen() == [alice(model_key="one"), bob(model_key="two")]
            assert await world.storage.count() == 2

        self.run(scenario)

    def test_peer_that_changes_its_model_leaves_the_old_one(self) -> None:
        async def scenario(world: StorageWorld) -> None:
            await world.announce(alice(1, model_key="one"))
            await world.announce(alice(2, model_key="two"))
            assert await world.seen("one") == []
            assert await world.seen("two") == [alice(2, model_key="two")]

        self.run(scenario)

    def test_expired_lease_is_gone_and_forgotten(self) -> None:
        async def scenario(world: StorageWorld) -> None:
            await world.announce(alice(9), lease_s=0.1)
            await world.announce(bob())
            await world.let_pass(0.15)
            assert await world.seen() == [bob()]
            assert await world.storage.count() == 1
            await world.announce(alice(3))
            assert await world.seen() == [alice(3), bob()]

        self.run(scenario)

    def test_renewal_extends_the_lease(self) -> None:
        async def scenario(world: StorageWorld) -> None:
            await world.announce(alice(1), lease_s=0.1)
            await world.announce(alice(2), lease_s=90.0)
            await world.let_pass(0.15)
            assert await world.seen() == [alice(2)]

        self.run(scenario)

    def test_shorter_lease_counts_too(self) -> None:
        async def scenario(world: StorageWorld) -> None:
            await world.announce(alice(1), lease_s=90.0)
            await world.announce(alice(2), lease_s=0.1)
            await world.let_pass(0.15)
            assert await world.seen("tiny-key") == []
            assert await world.storage.count() == 0

        self.run(scenario)

    @pytest.mark.parametrize("sequence", [4, 5])
    def test_stale_sequence_is_refused_with_proof_and_changes_nothing(self, sequence: int) -> None:
        async def scenario(world: StorageWorld) -> None:
            await world.announce(alice(5))
            with pytest.raises(StaleRecordError, match=f"sequence {sequence}, already seen 5") as caught:
                await world.announce(alice(sequence, end=8))
            assert caught.value.newest == ALICE.sign_record(alice(5))
            assert await world.seen() == [alice(5)]

        self.run(scenario)

    def test_replaced_instance_is_told_so_with_proof(self) -> None:
        async def scenario(world: StorageWorld) -> None:
            await world.announce(alice(7, "first"))
            await world.announce(alice(0, "second"))
            with pytest.raises(DuplicateIdentityError, match="duplicate identity") as caught:
                await world.announce(alice(8, "first"))
            assert caught.value.newest == ALICE.sign_record(alice(0, "second"))
            assert await world.seen() == [alice(0, "second")]

        self.run(scenario)

    def test_old_record_cannot_oust_one_that_counts_from_a_clock(self) -> None:
        async def scenario(world: StorageWorld) -> None:
            await world.announce(alice(CLOCKED_SEQUENCE + 10, "second"))
            with pytest.raises(StaleRecordError):
                await world.announce(alice(CLOCKED_SEQUENCE + 5, "yesterday"))
            assert await world.seen() == [alice(CLOCKED_SEQUENCE + 10, "second")]

        self.run(scenario)

    def test_full_storage_refuses_another_peer_but_renews_those_it_has(self) -> None:
        async def scenario(world: StorageWorld) -> None:
            await world.announce(alice())
            await world.announce(bob())
            with pytest.raises(TableFullError, match="tracker is full: 2 peers"):
                await world.announce(make_record(CAROL))
            await world.announce(alice(2))
            assert await world.seen() == [alice(2), bob()]

        self.run(scenario, max_records=2)

    def test_expired_leases_make_room(self) -> None:
        async def scenario(world: StorageWorld) -> None:
            await world.announce(alice(), lease_s=0.1)
            await world.let_pass(0.15)
            await world.announce(bob())
            assert await world.seen() == [bob()]

        self.run(scenario, max_records=1)

    def test_withdrawal_ends_the_lease_and_makes_room(self) -> None:
        async def scenario(world: StorageWorld) -> None:
            await world.announce(alice())
            await world.storage.withdraw(alice(2))
            assert await world.seen("tiny-key") == []
            await world.storage.withdraw(alice(3))  # unknown by now: no error
            await world.announce(bob())
            assert await world.seen() == [bob()]

        self.run(scenario, max_records=1)

    def test_withdrawal_needs_more_than_the_public_record(self) -> None:
        async def scenario(world: StorageWorld) -> None:
            await world.announce(alice(7))
            with pytest.raises(StaleRecordError):
                await world.storage.withdraw(alice(7))
            with pytest.raises(DiscoveryError, match="runs as another instance"):
                await world.storage.withdraw(alice(9, "second"))
            assert await world.seen() == [alice(7)]

        self.run(scenario)

    def test_announced_drain_serves_as_withdrawal(self) -> None:
        async def scenario(world: StorageWorld) -> None:
            await world.announce(alice(7, state=PeerState.DRAINING))
            await world.storage.withdraw(alice(7, state=PeerState.DRAINING))
            assert await world.seen() == []

        self.run(scenario)

    def test_of_many_a_sample_is_given(self) -> None:
        async def scenario(world: StorageWorld) -> None:
            records = [make_record(identity) for identity in IDENTITIES.values()]
            for record in records:
                await world.announce(record)
            known = {record.peer_id for record in records}
            samples = [await world.storage.lookup("tiny-key", limit=30) for _ in range(2)]
            for sample in samples:
                found = {lease.record.peer_id for lease in sample.leases}
                assert len(found) == len(sample.leases) == 30
                assert found < known
            everything = await world.storage.lookup(None, limit=len(records))
            assert {lease.record.peer_id for lease in everything.leases} == known

        self.run(scenario, max_records=len(IDENTITIES))

    def test_of_announcements_at_once_the_newest_stays(self) -> None:
        async def scenario(world: StorageWorld) -> None:
            outcomes = await asyncio.gather(
                *(world.announce(alice(sequence)) for sequence in range(1, 6)), return_exceptions=True
            )
            refused = [outcome for outcome in outcomes if outcome is not None]
            assert all(isinstance(outcome, StaleRecordError) for outcome in refused)
            (record,) = await world.seen()
            assert outcomes[record.sequence - 1] is None
            assert record.sequence == 5

        self.run(scenario)

    def test_full_storage_is_not_overfilled_at_once(self) -> None:
        async def scenario(world: StorageWorld) -> None:
            records = [make_record(identity) for identity in IDENTITIES.values()]
            outcomes = await asyncio.gather(*map(world.announce, records), return_exceptions=True)
            refused = [outcome for outcome in outcomes if outcome is not None]
            assert len(refused) == len(records) - 3
            assert {type(outcome) for outcome in refused} == {TableFullError}
            assert await world.storage.count() == 3

        self.run(scenario)

    def test_closing_twice_is_harmless(self) -> None:
        async def scenario(world: StorageWorld) -> None:
            await world.announce(alice())
            await world.storage.aclose()
            await world.storage.aclose()

        self.run(scenario)
