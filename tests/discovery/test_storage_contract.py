"""The contract of storages on the memory of one process; tests/replicas runs it on a Redis."""

from __future__ import annotations

import time

import pytest
from storage_contract import StorageContract, StorageWorld

from remote_modules.discovery.storage import MemoryStorage
from remote_modules.discovery.tracker_server import open_storage


class MemoryWorld(StorageWorld):
    now_s = 1000.0

    async def open(self, max_records: int) -> None:
        self.storage = MemoryStorage(max_records=max_records, clock=lambda: self.now_s)

    async def close(self) -> None:
        await self.storage.aclose()

    async def let_pass(self, seconds: float) -> None:
        self.now_s += seconds


class TestMemory(StorageContract):
    def make_world(self) -> StorageWorld:
        return MemoryWorld()


def test_memory_is_opened_by_its_name() -> None:
    assert isinstance(open_storage("memory", max_records=1, clock=time.monotonic), MemoryStorage)


@pytest.mark.parametrize("url", ["", "disk", "http://127.0.0.1:6379"])
def test_other_storage_is_refused_by_its_name(url: str) -> None:
    with pytest.raises(ValueError, match=r"must be 'memory' or a redis://.* got "):
        open_storage(url, max_records=1, clock=time.monotonic)
