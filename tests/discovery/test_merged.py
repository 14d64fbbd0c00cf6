from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import cast

import pytest
from discovery_support import FakeSource, make_signed
from records import make_identity, make_record

from remote_modules.discovery.base import Discovery, NobodyToAskError
from remote_modules.discovery.exchange import ExchangeDiscovery
from remote_modules.discovery.known_peers import KnownPeers
from remote_modules.discovery.merged import GRACE_S, MergedDiscovery, build_discovery
from remote_modules.errors import DiscoveryError
from remote_modules.peers import PeerRecord
from remote_modules.testing.virtual_time import run_virtual

ALICE, BOB = make_identity(1), make_identity(2)


@pytest.fixture
def one() -> FakeSource:
    return FakeSource([make_record(ALICE, sequence=1)], name="one")


@pytest.fixture
def two() -> FakeSource:
    return FakeSource([make_record(ALICE, sequence=2), make_record(BOB)], name="two")


def test_lookup_merges_the_newest_of_each_peer(one: FakeSource, two: FakeSource) -> None:
    records = asyncio.run(MergedDiscovery([one, two]).lookup("tiny-key"))
    assert records == [make_record(ALICE, sequence=2), make_record(BOB)]


def test_one_working_source_is_enough(one: FakeSource, two: FakeSource) -> None:
    one.is_down = True

    async def main() -> None:
        merged = MergedDiscovery([one, two])
        assert len(await merged.lookup(None)) == 2
        await merged.announce(make_signed(ALICE))
        await merged.withdraw(make_signed(ALICE))

    asyncio.run(main())
    assert two.announced == two.withdrawn == [make_signed(ALICE)]


def test_source_that_knows_nobody_is_no_failure(one: FakeSource) -> None:
    one.is_down = True
    assert asyncio.run(MergedDiscovery([one, FakeSource([])]).lookup(None)) == []


CALLS: dict[str, Callable[[Discovery], Awaitable[object]]] = {
    "announce": lambda discovery: discovery.announce(make_signed(ALICE)),
    "withdraw": lambda discovery: discovery.withdraw(make_signed(ALICE)),
    "lookup": lambda discovery: discovery.lookup(None),
}


@pytest.mark.parametrize("call", CALLS)
def test_all_sources_failing_names_each_failure(call: str, one: FakeSource, two: FakeSource) -> None:
    one.is_down = two.is_down = True

    async def main() -> None:
        with pytest.raises(DiscoveryError, match=f"{call} failed at every source: one is down; two is down"):
            await CALLS[call](MergedDiscovery([one, two]))

    asyncio.run(main())


def test_failing_source_is_logged_once_and_once_when_it_recovers(
    one: FakeSource, two: FakeSource, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        merged = MergedDiscovery([one, two])
        for one.is_down in (True, True, True, False, False, True):
            await merged.lookup(None)

    with caplog.at_level(logging.INFO):
        asyncio.run(main())
    assert [(entry.levelname, entry.message) for entry in caplog.records] == [
        ("WARNING", "discovery source fails call=lookup source=0: one is down"),
        ("INFO", "discovery source works again call=lookup source=0"),
        ("WARNING", "discovery source fails call=lookup source=0: one is down"),
    ]


def test_sources_are_asked_at_the_same_time() -> None:
    class Meeting(FakeSource):
        """Answers once both of its kind were asked."""

        def __init__(self, events: list[asyncio.Event], index: int) -> None:
            super().__init__([])
            self.mine, self.other = events[index], events[1 - index]

        async def announce(self, signed: object) -> None:
            self.mine.set()
            await asyncio.wait_for(self.other.wait(), 2.0)

    async def main() -> None:
        events = [asyncio.Event(), asyncio.Event()]
        await MergedDiscovery([Meeting(events, 0), Meeting(events, 1)]).announce(make_signed(ALICE))

    asyncio.run(main())


def test_closing_closes_every_source(one: FakeSource, two: FakeSource) -> None:
    asyncio.run(MergedDiscovery([one, two]).aclose())
    assert (one.num_closed, two.num_closed) == (1, 1)


class FakeExchange(FakeSource):
    """An `ExchangeDiscovery` in memory: what it finds by asking, it remembers."""

    def __init__(self, records: list[PeerRecord]) -> None:
        super().__init__(records, name="exchange")
        self.is_due = False
        self.num_asked = 0

    async def lookup(self, model_key: str | None) -> list[PeerRecord]:
        self.num_asked += 1
        if not self.records:
            raise NobodyToAskError("nobody")
        return await super().lookup(model_key)

    def recall(self, model_key: str | None) -> list[PeerRecord]:
        return self.records


def with_exchange(sources: list[FakeSource], exchange: FakeExchange) -> MergedDiscovery:
    return MergedDiscovery(sources, exchange=cast(ExchangeDiscovery, exchange))


def test_peers_are_asked_first_then_when_due_and_else_remembered(one: FakeSource) -> None:
    async def main() -> None:
        exchange = FakeExchange([make_record(BOB)])
        merged = with_exchange([one], exchange)
        for due, num_asked in ((False, 1), (False, 1), (True, 2), (False, 2)):
            exchange.is_due = due
            assert await merged.lookup(None) == [make_record(ALICE), make_record(BOB)]
            assert exchange.num_asked == num_asked

    asyncio.run(main())


@pytest.mark.parametrize("trouble", ["down", "empty"])
def test_peers_are_asked_at_once_when_others_fail_or_find_nobody(trouble: str, one: FakeSource) -> None:
    async def main() -> None:
        exchange = FakeExchange([make_record(BOB)])
        merged = with_exchange([one], exchange)
        await merged.lookup(None)
        if trouble == "down":
            one.is_down = True
        else:
            one.records = []
        for num_asked in (2, 3, 4):
            assert await merged.lookup(None) == [make_record(BOB)]
            assert exchange.num_asked == num_asked

    asyncio.run(main())


def test_exchange_that_knows_nobody_hides_no_failure_and_is_none(
    one: FakeSource, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        merged = with_exchange([one], FakeExchange([]))
        assert await merged.lookup(None) == [make_record(ALICE)]
        assert caplog.records == []
        one.is_down = True
        with pytest.raises(DiscoveryError, match="^lookup failed at every source: one is down$"):
            await merged.lookup(None)

    asyncio.run(main())


def test_exchange_is_announced_to_and_closed_like_the_others(one: FakeSource) -> None:
    async def main() -> None:
        exchange = FakeExchange([])
        merged = with_exchange([one], exchange)
        assert merged.sources == (one, exchange)
        await merged.announce(make_signed(ALICE))
        await merged.withdraw(make_signed(ALICE, sequence=2))
        await merged.aclose()
        assert (exchange.announced, exchange.withdrawn) == ([make_signed(ALICE)], [make_signed(ALICE, sequence=2)])
        assert exchange.num_closed == 1

    asyncio.run(main())


class SlowSource(FakeSource):
    """Answers when it is too late."""

    async def lookup(self, model_key: str | None) -> list[PeerRecord]:
        await asyncio.sleep(1000.0)
        raise AssertionError("was waited for")


def test_source_that_does_not_answer_holds_a_lookup_up_for_two_seconds(
    one: FakeSource, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        merged = MergedDiscovery([SlowSource([]), one])
        assert await merged.lookup(None) == [make_record(ALICE)]
        assert asyncio.get_running_loop().time() == pytest.approx(GRACE_S)

    run_virtual(main())
    assert [entry.message for entry in caplog.records] == [
        "discovery source fails call=lookup source=0: no answer within 2.0 s of the first"
    ]


def test_source_that_found_nobody_cuts_off_none_that_may() -> None:
    class Late(FakeSource):
        async def lookup(self, model_key: str | None) -> list[PeerRecord]:
            await asyncio.sleep(4.0)
            return await super().lookup(model_key)

    async def main() -> None:
        assert await MergedDiscovery([FakeSource([]), Late([make_record(BOB)])]).lookup(None) == [make_record(BOB)]

    run_virtual(main())


def test_exchange_is_among_the_sources_when_a_table_is_given() -> None:
    merged = build_discovery(mdns=False, peers=["127.0.0.1:1"], known=KnownPeers())
    assert [type(source).__name__ for source in merged.sources] == ["StaticDiscovery", "ExchangeDiscovery"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"mdns": True}, ["MdnsDiscovery"]),
        ({"mdns": False, "peers": ["127.0.0.1:1"]}, ["StaticDiscovery"]),
        (
            {"trackers": ["http://a", "http://b", "http://a"], "mdns": True, "peers": ["127.0.0.1:1"]},
            ["StaticDiscovery", "MdnsDiscovery", "TrackerClient", "TrackerClient"],
        ),
    ],
)
def test_settings_name_the_sources(settings: dict[str, object], expected: list[str]) -> None:
    merged = build_discovery(**settings)  # type: ignore[arg-type]
    assert [type(source).__name__ for source in merged.sources] == expected


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"mdns": False}, ValueError, "at least one source"),
        ({"trackers": ["tracker:8000"]}, ValueError, "http:// or https://"),
        ({"trackers": "http://a"}, TypeError, "must be a list"),
        ({"peers": "127.0.0.1:1"}, TypeError, "must be a list"),
        ({"peers": ["127.0.0.1"]}, ValueError, "HOST:PORT"),
        ({"mdns_interfaces": ["eth0"]}, ValueError, "IPv4"),
    ],
)
def test_bad_settings_are_refused_before_any_io(
    settings: dict[str, object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        build_discovery(**settings)  # type: ignore[arg-type]


def test_importing_discovery_imports_neither_aiohttp_nor_zeroconf() -> None:
    code = (
        "import sys, remote_modules.discovery, remote_modules.discovery.merged\n"
        "sys.exit(len({'aiohttp', 'zeroconf', 'prometheus_client'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=environment, timeout=20)
