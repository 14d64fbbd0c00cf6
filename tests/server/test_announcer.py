from __future__ import annotations

import asyncio
import logging
from functools import partial

import msgspec
import pytest

from remote_modules.discovery.base import Discovery, NobodyToAskError, OverloadedError, Pace
from remote_modules.discovery.merged import MergedDiscovery
from remote_modules.errors import DiscoveryError
from remote_modules.identity import Identity, verify_record
from remote_modules.peers import PeerRecord, PeerState, SignedRecord
from remote_modules.plan.leases import DuplicateIdentityError, LeaseTable
from remote_modules.server.announcer import TAKEOVER, Announcer
from remote_modules.testing.virtual_time import run_virtual

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


# Paces, under virtual time.


class Tracker:
    """A tracker with the real lease table that notes when it was asked, and fails on command."""

    def __init__(self) -> None:
        self.failure: DiscoveryError | None = None
        self.pace: Pace | None = None
        self.asked_s: list[float] = []
        self.table = LeaseTable(max_records=100)

    async def announce(self, signed: SignedRecord) -> Pace | None:
        now_s = asyncio.get_running_loop().time()
        self.asked_s.append(now_s)
        if self.failure is not None:
            raise self.failure
        self.table.announce(signed, verify_record(signed), now_s, 90.0)
        return self.pace

    async def withdraw(self, signed: SignedRecord) -> None:
        self.table.withdraw(verify_record(signed), asyncio.get_running_loop().time())

    async def lookup(self, model_key: str | None) -> list[PeerRecord]:
        return [lease.record for lease in self.table.lookup(model_key, asyncio.get_running_loop().time())]

    async def aclose(self) -> None:
        """Nothing is held."""

    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.asked_s, self.asked_s[1:], strict=False)]


def online(
    discovery: Discovery, *, instance_id: str = "first", first_sequence: int = 2**41, **settings: object
) -> Announcer:
    return Announcer(
        discovery,
        IDENTITY,
        describe=lambda: msgspec.structs.replace(describe(), instance_id=instance_id),
        interval_s=30.0,
        first_sequence=first_sequence,
        **settings,  # type: ignore[arg-type]
    )


def test_renewals_are_jittered_by_a_fifth_and_differ_between_peers() -> None:
    async def main() -> None:
        trackers = [Tracker(), Tracker()]
        both = [online(tracker, first_sequence=2**41 + number) for number, tracker in enumerate(trackers)]
        for one in both:
            await one.set_state(PeerState.ONLINE)
            one.start()
        await asyncio.sleep(3000.0)
        for one, tracker in zip(both, trackers, strict=True):
            await one.stop()
            assert 80 <= len(tracker.asked_s) <= 126
            assert 24.0 <= min(tracker.gaps()) < 26.0
            assert 34.0 < max(tracker.gaps()) <= 36.0
        assert trackers[0].asked_s[1:] != trackers[1].asked_s[1:]

    run_virtual(main())


def test_source_that_is_down_is_tried_for_ever_and_ever_less_often_up_to_the_interval() -> None:
    async def main() -> None:
        tracker = Tracker()
        tracker.failure = DiscoveryError("down")
        one = online(tracker)
        await one.set_state(PeerState.ONLINE)
        one.start()
        await asyncio.sleep(3600.0)
        longest = [1.0, 2.0, 4.0, 8.0, 16.0]
        assert all(gap <= most for gap, most in zip(tracker.gaps(), longest, strict=False))
        assert 25.0 < max(tracker.gaps()) <= 30.0
        assert min(tracker.gaps()[5:]) < 5.0  # full jitter: from nothing to all of it
        tracker.failure = None
        down_until_s, num_asked = 3600.0, len(tracker.asked_s)
        await asyncio.sleep(60.0)
        assert tracker.asked_s[num_asked] - down_until_s <= 30.0  # listed again within an interval
        assert len(await tracker.lookup(None)) == 1
        await one.stop()

    run_virtual(main())


def test_all_of_many_peers_are_listed_again_within_an_interval_and_not_all_at_once() -> None:
    async def main() -> None:
        tracker = Tracker()
        tracker.table = LeaseTable(max_records=1000)
        tracker.failure = DiscoveryError("down")
        peers = []
        for number in range(200):
            identity = Identity.from_seed(number.to_bytes(32, "big"))
            record = msgspec.structs.replace(describe(), peer_id=identity.peer_id)
            one = Announcer(
                tracker,
                identity,
                describe=partial(msgspec.structs.replace, record),
                interval_s=30.0,
                first_sequence=2**41,
            )
            await one.set_state(PeerState.ONLINE)
            one.start()
            peers.append(one)
        await asyncio.sleep(300.0)
        tracker.failure = None
        tracker.asked_s.clear()
        await asyncio.sleep(30.0)
        assert len(await tracker.lookup(None)) == 200
        seconds = [int(asked_s) for asked_s in tracker.asked_s if asked_s < 3615.0]
        peak = max(map(seconds.count, seconds))
        assert peak <= 3 * 200 / 15  # the mean rate, threefold
        for one in peers:
            await one.stop()

    run_virtual(main())


@pytest.mark.parametrize(("bounds", "interval_s"), [((300.0, 300.0), 300.0), ((0.1, 5.0), 5.0), ((0.1, 90.0), 30.0)])
def test_bounds_that_a_source_sets_are_kept(bounds: tuple[float, float], interval_s: float) -> None:
    async def main() -> None:
        tracker = Tracker()
        tracker.pace = Pace(shortest_s=bounds[0], longest_s=bounds[1])
        one = online(tracker)
        await one.set_state(PeerState.ONLINE)
        one.start()
        await asyncio.sleep(10_000.0)
        await one.stop()
        assert 0.8 * interval_s <= min(tracker.gaps())
        assert max(tracker.gaps()) <= 1.2 * interval_s

    run_virtual(main())


@pytest.mark.parametrize(("retry_after_s", "shortest", "longest"), [(7.0, 7.0, 14.0), (1e9, 900.0, 1800.0)])
def test_overloaded_source_is_left_alone_for_as_long_as_it_asks(
    retry_after_s: float, shortest: float, longest: float
) -> None:
    async def main() -> None:
        tracker = Tracker()
        tracker.failure = OverloadedError("busy", retry_after_s=retry_after_s)
        one = online(tracker)
        await one.set_state(PeerState.ONLINE)
        one.start()
        await asyncio.sleep(5000.0)
        await one.stop()
        assert shortest <= min(tracker.gaps())
        assert max(tracker.gaps()) <= longest

    run_virtual(main())


def test_dead_source_does_not_change_the_pace_of_the_others() -> None:
    async def main() -> None:
        good, dead = Tracker(), Tracker()
        dead.failure = DiscoveryError("down")
        one = online(MergedDiscovery([good, dead]))
        await one.set_state(PeerState.ONLINE)
        one.start()
        await asyncio.sleep(600.0)
        await one.stop()
        assert 24.0 <= min(good.gaps())
        assert max(good.gaps()) <= 36.0
        assert len(dead.asked_s) > len(good.asked_s)

    run_virtual(main())


def test_source_without_anybody_to_tell_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        good, empty = Tracker(), Tracker()
        empty.failure = NobodyToAskError("nobody")
        one = online(MergedDiscovery([good, empty]))
        await one.set_state(PeerState.ONLINE)
        one.start()
        await asyncio.sleep(100.0)
        await one.stop()
        assert len(empty.asked_s) > 3

    run_virtual(main())
    assert caplog.records == []


def test_trackers_that_share_their_leases_are_both_content(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        first, second = Tracker(), Tracker()
        second.table = first.table
        one = online(MergedDiscovery([first, second]))
        await one.set_state(PeerState.ONLINE)
        one.start()
        await asyncio.sleep(600.0)
        for tracker in (first, second):
            assert 24.0 <= min(tracker.gaps())
        await one.stop()

    run_virtual(main())
    assert [entry for entry in caplog.records if entry.levelno >= logging.WARNING] == []


# One identity, two instances.


def test_newest_instance_wins_and_the_older_stops_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        tracker = Tracker()
        reasons: list[DuplicateIdentityError] = []
        old = online(tracker, on_replaced=reasons.append)
        await old.set_state(PeerState.ONLINE)
        old.start()
        await asyncio.sleep(100.0)
        new = online(tracker, instance_id="second", first_sequence=2**41 + 100_000)
        await new.set_state(PeerState.ONLINE)
        new.start()
        await asyncio.sleep(40.0)  # an interval and its jitter
        assert reasons == [old.replaced]
        num_asked = len(tracker.asked_s)
        await old.set_state(PeerState.DRAINING)
        await old.stop()
        assert len(tracker.asked_s) == num_asked
        await asyncio.sleep(1000.0)
        assert new.replaced is None
        (record,) = await tracker.lookup(None)
        assert (record.instance_id, record.state) == ("second", PeerState.ONLINE)
        await new.stop()
        assert await tracker.lookup(None) == []

    run_virtual(main())
    (error,) = [entry.getMessage() for entry in caplog.records if entry.levelno == logging.ERROR]
    assert error.startswith("stopped announcing: duplicate identity: ")
    assert error.endswith("give each server its own identity file")


@pytest.mark.parametrize("is_old_alive", [False, True])
def test_newest_instance_wins_though_its_clock_is_an_hour_behind(is_old_alive: bool) -> None:
    async def main() -> None:
        tracker = Tracker()
        old = online(tracker)
        await old.set_state(PeerState.ONLINE)
        if is_old_alive:
            old.start()
        new = online(tracker, instance_id="second", first_sequence=2**41 - 3_600_000)
        await new.set_state(PeerState.ONLINE)
        new.start()
        (record,) = await tracker.lookup(None)
        assert (record.instance_id, record.sequence) == ("second", 2**41 + 1 + TAKEOVER + 1)
        await asyncio.sleep(1000.0)
        assert (old.replaced is not None) == is_old_alive
        assert new.replaced is None
        assert [record.instance_id for record in await tracker.lookup(None)] == ["second"]
        await new.stop()
        await old.stop()

    run_virtual(main())


def test_old_record_repeated_by_a_stranger_stops_nobody() -> None:
    async def main() -> None:
        tracker = Tracker()
        one = online(tracker)
        await one.set_state(PeerState.ONLINE)
        ancient = msgspec.structs.replace(describe(), instance_id="ancient", sequence=2**41 - 5)
        tracker.failure = DuplicateIdentityError("duplicate identity", newest=IDENTITY.sign_record(ancient))
        one.start()
        await asyncio.sleep(100.0)
        assert one.replaced is None
        tracker.failure = None
        await asyncio.sleep(30.0)
        assert len(await tracker.lookup(None)) == 1
        await one.stop()

    run_virtual(main())
