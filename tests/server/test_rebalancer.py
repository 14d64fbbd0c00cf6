"""Whole swarms of rebalancers over a fake discovery, under virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from random import Random
from typing import Any

import msgspec
import pytest

from remote_modules.errors import DiscoveryError, RemoteModulesError
from remote_modules.peers import PeerId, PeerRecord, PeerState
from remote_modules.plan.rebalance import Member, MoveCost, Proposal, Rule, elect
from remote_modules.plan.throughput import Holder, Layout, coverage
from remote_modules.server import rebalancer
from remote_modules.server.rebalancer import Rebalancer
from remote_modules.spans import Span
from remote_modules.testing.virtual_time import run_virtual

NUM_BLOCKS = 12
LAYOUT = Layout(NUM_BLOCKS)
RULE = Rule(check_interval_s=5.0, heal_turn_s=20.0, turn_s=200.0)
LOAD_S = 30.0


class Swarm:
    """Discovery that everybody sees at once, and what it saw."""

    def __init__(self) -> None:
        self.records: dict[str, PeerRecord] = {}
        self.is_down = False
        self.servers: list[FakeServer] = []
        self.urgent: list[bool] = []
        self.silent: set[str] = set()  # listed, but they do not answer
        self.num_asked = 0
        self.events: list[tuple[float, str, str]] = []
        self.held_back: dict[str, dict[str, PeerRecord]] = {}  # stale views, by who sees them

    def put(self, record: PeerRecord) -> None:
        self.records[record.peer_id] = record

    async def answers(self, record: PeerRecord) -> bool:
        self.num_asked += 1
        return record.peer_id not in self.silent

    def lookup_of(self, name: str) -> Callable[[], Awaitable[Sequence[PeerRecord]]]:
        async def lookup() -> Sequence[PeerRecord]:
            if self.is_down:
                raise DiscoveryError("tracker is down")
            return list(self.held_back.pop(name, self.records).values())

        return lookup

    def serving(self) -> tuple[float, ...]:
        online = [record for record in self.records.values() if record.state is PeerState.ONLINE]
        return coverage(NUM_BLOCKS, [Holder(record.span, record.decode_tokens_per_s) for record in online])


class FakeServer:
    """Takes `LOAD_S` virtual seconds to move."""

    def __init__(self, swarm: Swarm, name: str, span: str, tokens_per_s: float, max_blocks: int = 6) -> None:
        self.swarm, self.name, self.span = swarm, name, Span.parse(span)
        self.is_stuck = False
        self.record = PeerRecord(
            peer_id=name,
            instance_id="first",
            sequence=1,
            model="tiny",
            model_key="key",
            num_blocks=NUM_BLOCKS,
            start=self.span.start,
            end=self.span.end,
            addresses=("127.0.0.1:1",),
            state=PeerState.ONLINE,
            decode_tokens_per_s=tokens_per_s,
            max_blocks=max_blocks,
        )
        swarm.put(self.record)
        swarm.servers.append(self)

    def announce(self, span: Span, state: PeerState, what: str) -> None:
        self.swarm.events.append((asyncio.get_running_loop().time(), self.name, what))
        self.swarm.put(msgspec.structs.replace(self.record, start=span.start, end=span.end, state=state))

    def move_cost(self) -> MoveCost:
        return MoveCost(handover_s=1e9 if self.is_stuck else LOAD_S)

    async def claim(self, span: Span) -> None:
        self.announce(span, PeerState.JOINING, f"claims {span}")
        await asyncio.sleep(0.01)

    async def release(self) -> None:
        self.announce(self.span, PeerState.ONLINE, "releases")

    async def move(self, span: Span, *, is_urgent: bool = False) -> None:
        self.swarm.urgent.append(is_urgent)
        await asyncio.sleep(LOAD_S)
        if self.is_stuck:
            raise RemoteModulesError("disk is full")
        self.span = span
        self.announce(span, PeerState.ONLINE, f"holds {span}")

    def rebalancer(self) -> Rebalancer:
        return Rebalancer(
            self,
            PeerId(self.name),
            LAYOUT,
            lookup=self.swarm.lookup_of(self.name),
            answers=self.swarm.answers,
            token_bytes=100,
            rule=RULE,
            rng=Random(self.name),
            clock=asyncio.get_running_loop().time,
        )


def run_swarm(
    swarm: Swarm, for_s: float, *, meanwhile: Callable[[], Awaitable[None]] | None = None
) -> list[Rebalancer]:
    async def main() -> list[Rebalancer]:
        rebalancers = [server.rebalancer() for server in swarm.servers]
        tasks = [asyncio.ensure_future(one.run()) for one in rebalancers]
        if meanwhile is not None:
            await meanwhile()
        await asyncio.sleep(for_s)
        for task in tasks:
            task.cancel()
        assert all(
            isinstance(done, asyncio.CancelledError) for done in await asyncio.gather(*tasks, return_exceptions=True)
        )
        return rebalancers

    return run_virtual(main())


def crowded(*, number: int = 4) -> Swarm:
    swarm = Swarm()
    for index in range(number):
        FakeServer(swarm, f"left-{index}", "0:6", 60.0)
    FakeServer(swarm, "right", "6:12", 60.0)
    return swarm


def test_swarm_balances_itself_one_after_the_other() -> None:
    swarm = crowded()
    rebalancers = run_swarm(swarm, 1500.0)
    assert sum(one.num_moves for one in rebalancers) in (1, 2, 3)
    assert min(swarm.serving()) >= 20.0
    assert not any(swarm.urgent)
    busy: set[str] = set()
    for _, name, what in swarm.events:
        if what.startswith("claims"):
            assert not busy
            busy.add(name)
        else:
            busy.discard(name)


def test_sole_holder_dies_one_other_covers_its_blocks() -> None:
    swarm = crowded(number=3)
    swarm.servers.pop()

    async def kill() -> None:
        await asyncio.sleep(1.0)  # before anybody looks
        assert swarm.events == []
        del swarm.records["right"]
        assert min(swarm.serving()) == 0.0

    run_swarm(swarm, 1.5 * RULE.check_interval_s + LOAD_S, meanwhile=kill)
    assert swarm.urgent == [True]
    healed = [(at_s, name) for at_s, name, what in swarm.events if what.startswith("claims")]
    assert len(healed) == 1
    assert healed[0][0] <= 1.5 * RULE.check_interval_s
    assert min(swarm.serving()) > 0


def test_elected_server_does_not_move_the_next_one_heals() -> None:
    swarm = Swarm()
    for name in ("a", "b"):
        FakeServer(swarm, name, "0:6", 60.0)
    swarm.servers = swarm.servers[1:]  # 'a' is first in rank, and hangs

    rebalancers = run_swarm(swarm, RULE.heal_turn_s + 3 * RULE.check_interval_s + LOAD_S)
    assert rebalancers[0].num_moves == 1
    (at_s, name, what), *_ = swarm.events
    assert (name, what) == ("b", "claims 6:12")
    assert at_s >= RULE.heal_turn_s
    assert min(swarm.serving()) == 10.0


def test_two_with_stale_views_move_at_once_one_gives_way() -> None:
    swarm = Swarm()
    for name in ("a", "b"):
        FakeServer(swarm, name, "0:6", 60.0)
    FakeServer(swarm, "c", "0:6", 60.0)

    async def main() -> tuple[Span | None, Span | None]:
        first, second = swarm.servers[0].rebalancer(), swarm.servers[1].rebalancer()
        view = dict(swarm.records)
        swarm.held_back["b"] = {name: view[name] for name in "bc"}  # does not see 'a'
        moved = await asyncio.gather(first.check(), second.check())
        assert (first.num_yields, second.num_yields) == (0, 1)
        return moved[0], moved[1]

    assert run_virtual(main()) == (Span(6, 12), None)
    assert [what for _, name, what in swarm.events if name == "b"] == ["claims 6:12", "releases"]
    assert min(swarm.serving()) == 10.0


def test_nobody_leaves_blocks_to_one_that_is_listed_but_does_not_answer(caplog: pytest.LogCaptureFixture) -> None:
    swarm = Swarm()
    for name in ("a", "b"):
        FakeServer(swarm, name, "0:6", 60.0)
    swarm.servers[1:] = []
    swarm.silent.add("b")
    caplog.set_level("INFO")

    async def lease_ends() -> None:
        await asyncio.sleep(60.0)
        assert swarm.events == []
        swarm.silent.clear()

    run_swarm(swarm, 60.0, meanwhile=lease_ends)
    assert swarm.num_asked > 1
    assert "stays span=0:6: nobody else who holds block 0 answers" in caplog.text
    assert swarm.events[0][1:] == ("a", "claims 6:12")


def test_move_that_fails_takes_the_claim_back_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    swarm = Swarm()
    for name in ("a", "b"):
        FakeServer(swarm, name, "0:6", 60.0)
    swarm.servers[0].is_stuck = True
    run_swarm(swarm, 60.0)
    assert [what for _, name, what in swarm.events if name == "a"][:2] == ["claims 6:12", "releases"]
    assert "not rebalanced: disk is full" in caplog.text
    assert swarm.records["a"].span == Span(0, 6)


def test_costly_move_for_balance_is_left_to_the_next() -> None:
    swarm = crowded()
    swarm.servers[0].is_stuck = True
    run_swarm(swarm, 1500.0)
    names = {name for _, name, _ in swarm.events}
    assert names
    assert "left-0" not in names
    assert min(swarm.serving()) >= 20.0


def test_tracker_that_is_down_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    swarm = crowded()
    swarm.is_down = True

    async def mend() -> None:
        await asyncio.sleep(300.0)
        assert swarm.events == []
        swarm.is_down = False

    caplog.set_level("INFO")
    run_swarm(swarm, 300.0, meanwhile=mend)
    assert "not rebalanced: tracker is down" in caplog.text
    assert min(swarm.serving()) >= 20.0


def test_election_is_made_anew_only_for_a_swarm_that_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    swarm = crowded()
    elected: list[Sequence[Member]] = []

    def counted(layout: Layout, members: Sequence[Member], **options: Any) -> tuple[Proposal, ...]:
        elected.append(members)
        return elect(layout, members, **options)

    monkeypatch.setattr(rebalancer, "elect", counted)

    async def main() -> None:
        last = swarm.servers[-1].rebalancer()
        for _ in range(3):
            await last.check()
        del swarm.records["left-0"]
        await last.check()

    run_virtual(main())
    assert [len(members) for members in elected] == [5, 4]
