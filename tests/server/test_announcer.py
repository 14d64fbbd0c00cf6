from __future__ import annotations

import asyncio
import logging

import pytest

from remote_modules.discovery.base import Discovery
from remote_modules.errors import DiscoveryError
from remote_modules.identity import Identity, verify_record
from remote_modules.peers import PeerRecord, PeerState, SignedRecord
from remote_modules.server.announcer import Announcer

IDENTITY = Identity.from_seed(b"a" * 32)


class Notebook:
    """A `Discovery` that writes down what it is told, and fails on command."""

    def __init__(self) -> None:
        self.is_down = False
        self.announced: list[PeerRecord] = []
        self.withdrawn: list[PeerRecord] = []
        self.written = asyncio.Event()

    async def announce(self, signed: SignedRecord) -> None:
        self.written.set()
        self._fail_on_command()
        self.announced.append(verify_record(signed))

    async def withdraw(self, signed: SignedRecord) -> None:
        self._fail_on_command()
        self.withdrawn.append(verify_record(signed))

    async def lookup(self, model_key: str | None) -> list[PeerRecord]:
        return []

    async def aclose(self) -> None:
        """Nothing is held."""

    def _fail_on_command(self) -> None:
        if self.is_down:
            raise DiscoveryError("tracker is down")


def describe() -> PeerRecord:
    return PeerRecord(
        peer_id=IDENTITY.peer_id,
        instance_id="first",
        sequence=0,
        model="tiny",
        model_key="tiny-key",
        num_blocks=8,
        start=0,
        end=4,
        addresses=("127.0.0.1:4000",),
        state=PeerState.JOINING,
    )


def announcer(discovery: Discovery, *, interval_s: float = 3600.0) -> Announcer:
    return Announcer(discovery, IDENTITY, describe=describe, interval_s=interval_s, first_sequence=1000)


def test_new_announcer_says_nothing() -> None:
    async def main() -> None:
        notebook = Notebook()
        new = announcer(notebook)
        await new.stop()
        assert new.signed is None
        assert notebook.announced == notebook.withdrawn == []

    asyncio.run(main())


def test_change_of_state_is_announced_at_once_with_a_higher_sequence() -> None:
    async def main() -> None:
        notebook = Notebook()
        new = announcer(notebook)
        await new.set_state(PeerState.ONLINE)
        await new.set_state(PeerState.DRAINING)
        told = [(record.state, record.sequence) for record in notebook.announced]
        assert told == [(PeerState.ONLINE, 1001), (PeerState.DRAINING, 1002)]
        assert new.signed is not None
        assert verify_record(new.signed) == notebook.announced[-1]

    asyncio.run(main())


def test_record_is_renewed_each_interval() -> None:
    async def main() -> None:
        notebook = Notebook()
        new = announcer(notebook, interval_s=0.001)
        await new.set_state(PeerState.ONLINE)
        new.start()
        while len(notebook.announced) < 4:
            notebook.written.clear()
            await asyncio.wait_for(notebook.written.wait(), 1.0)
        await new.stop()
        assert [record.sequence for record in notebook.announced[:4]] == [1001, 1002, 1003, 1004]
        assert {record.state for record in notebook.announced} == {PeerState.ONLINE}

    asyncio.run(main())


def test_stop_withdraws_once_and_renews_no_more() -> None:
    async def main() -> None:
        notebook = Notebook()
        new = announcer(notebook)
        await new.set_state(PeerState.ONLINE)
        new.start()
        await new.stop()
        await new.stop()
        assert [record.sequence for record in notebook.withdrawn] == [1002]
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_stop_before_anything_was_said_withdraws_nothing() -> None:
    async def main() -> None:
        notebook = Notebook()
        new = announcer(notebook)
        new.start()
        await new.stop()
        assert notebook.withdrawn == []

    asyncio.run(main())


def test_abandoned_record_is_neither_renewed_nor_withdrawn() -> None:
    async def main() -> None:
        notebook = Notebook()
        new = announcer(notebook)
        new.abandon()
        await new.set_state(PeerState.ONLINE)
        new.start()
        new.abandon()
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1
        assert len(notebook.announced) == 1
        assert notebook.withdrawn == []

    asyncio.run(main())


def test_discovery_down_is_logged_once_and_mended_by_a_renewal(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "remote_modules.server.announcer")

    async def main() -> None:
        notebook = Notebook()
        notebook.is_down = True
        new = announcer(notebook, interval_s=0.001)
        await new.set_state(PeerState.ONLINE)
        new.start()
        for _ in range(3):
            notebook.written.clear()
            await asyncio.wait_for(notebook.written.wait(), 1.0)
        notebook.is_down = False
        while not notebook.announced:
            notebook.written.clear()
            await asyncio.wait_for(notebook.written.wait(), 1.0)
        await new.stop()

    asyncio.run(main())
    assert [record.getMessage() for record in caplog.records] == [
        "announce failed, trying again at least every 0 s: tracker is down",
        "announced again state=online",
    ]


def test_record_that_cannot_be_withdrawn_is_left_to_its_lease(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "remote_modules.server.announcer")

    async def main() -> None:
        notebook = Notebook()
        new = announcer(notebook)
        await new.set_state(PeerState.ONLINE)
        new.start()
        notebook.is_down = True
        await new.stop()

    asyncio.run(main())
    assert [record.getMessage() for record in caplog.records] == [
        "record not withdrawn, its lease will run out: tracker is down"
    ]
