"""The contract of storages on a Redis, and what only it can do wrong."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from records import make_identity, make_record
from storage_contract import StorageContract, StorageWorld

from remote_modules.discovery.redis_storage import RedisStorage
from remote_modules.discovery.storage import LeaseStorage, StorageDownError
from remote_modules.discovery.tracker_server import open_storage
from remote_modules.plan.leases import StaleRecordError

from .redis_support import RedisServer

ALICE, BOB = make_identity(1), make_identity(2)


class RedisWorld(StorageWorld):
    def __init__(self, url: str) -> None:
        self._url = url

    async def open(self, max_records: int) -> None:
        self.storage = RedisStorage(self._url, max_records=max_records)

    async def close(self) -> None:
        await self.storage.aclose()

    async def let_pass(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class TestRedis(StorageContract):
    @pytest.fixture(autouse=True)
    def _find(self, redis_server: RedisServer) -> None:
        self._url = redis_server.url

    def make_world(self) -> StorageWorld:
        return RedisWorld(self._url)


def run_two(redis_server: RedisServer) -> tuple[LeaseStorage, LeaseStorage]:
    first, second = (open_storage(redis_server.url, max_records=100, clock=lambda: 0.0) for _ in range(2))
    return first, second


def test_what_one_replica_takes_the_other_has(redis_server: RedisServer) -> None:
    async def main() -> None:
        first, second = run_two(redis_server)
        try:
            record = make_record(ALICE, sequence=5)
            await first.announce(ALICE.sign_record(record), record, 90.0)
            assert [lease.record for lease in (await second.lookup(None)).leases] == [record]
            with pytest.raises(StaleRecordError):
                await second.announce(ALICE.sign_record(record), record, 90.0)
            await second.withdraw(make_record(ALICE, sequence=6))
            assert (await first.lookup(None)).leases == []
        finally:
            await first.aclose()
            await second.aclose()

    asyncio.run(main())


def test_race_of_two_replicas_has_one_winner(redis_server: RedisServer) -> None:
    async def main() -> None:
        first, second = run_two(redis_server)
        try:
            for sequence in range(1, 30):
                records = [make_record(ALICE, sequence=sequence, end=end) for end in (4, 8)]
                outcomes = await asyncio.gather(
                    *(
                        storage.announce(ALICE.sign_record(record), record, 90.0)
                        for storage, record in zip((first, second), records, strict=True)
                    ),
                    return_exceptions=True,
                )
                assert sorted(type(outcome).__name__ for outcome in outcomes) == ["NoneType", "StaleRecordError"]
                (lease,) = (await first.lookup(None)).leases
                assert lease.record == records[outcomes.index(None)]
        finally:
            await first.aclose()
            await second.aclose()

    asyncio.run(main())


def test_nothing_stays_once_all_leases_have_ended(redis_server: RedisServer) -> None:
    async def main() -> None:
        storage = RedisStorage(redis_server.url, max_records=100)
        try:
            for identity in (ALICE, BOB):
                record = make_record(identity)
                await storage.announce(identity.sign_record(record), record, 0.05)
            assert len(redis_server.keys()) == 4
            await asyncio.sleep(0.1)
            assert await storage.count() == 0
            assert redis_server.keys() == []
        finally:
            await storage.aclose()

    asyncio.run(main())


def test_dead_redis_is_one_typed_line(tmp_path: Path) -> None:
    async def main() -> None:
        server = RedisServer(tmp_path)
        server.start()
        storage = RedisStorage(server.url, max_records=100)
        record = make_record(ALICE)
        try:
            await storage.announce(ALICE.sign_record(record), record, 90.0)
            server.kill()
            for call in (
                storage.count(),
                storage.lookup(None),
                storage.announce(ALICE.sign_record(record), record, 1.0),
            ):
                with pytest.raises(StorageDownError, match=r"storage does not answer: .*; try again later") as caught:
                    await call
                assert str(caught.value).isprintable()
            server.start()
            assert await storage.count() == 0
            await storage.announce(ALICE.sign_record(record), record, 90.0)
            assert await storage.count() == 1
        finally:
            await storage.aclose()
            server.kill()

    asyncio.run(main())


def test_foreign_data_is_told_apart(redis_server: RedisServer) -> None:
    async def main() -> None:
        import redis.asyncio

        storage = RedisStorage(redis_server.url, max_records=100)
        client = redis.asyncio.Redis.from_url(redis_server.url)
        try:
            key = f"{{remote-modules}}:lease:{ALICE.peer_id}"
            await client.hset(key, mapping={"version": "1", "payload": "x", "retired": "x", "at_ms": "1"})
            record = make_record(ALICE)
            with pytest.raises(StorageDownError, match="give it a database of its own"):
                await storage.announce(ALICE.sign_record(record), record, 90.0)
        finally:
            await client.aclose()
            await storage.aclose()

    asyncio.run(main())
