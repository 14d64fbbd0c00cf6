"""One test for each mistake that a simulation found, here or in the systems before ours: small, and by name.

A new one is a script (`Script`): what is done to the session or the swarm after which token.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
import torch

from remote_modules.client.call import Named
from remote_modules.client.session import SessionState
from remote_modules.client.swarm import Swarm
from remote_modules.config import ClientConfig
from remote_modules.testing.fault_points import CancelledAt
from remote_modules.testing.memory_network import KEEPALIVE_S
from remote_modules.testing.simulated_device import Ailment, busy
from remote_modules.testing.simulation import SESSION_ORPHAN_S, SWEEP_S, SimulatedPeer, SimulatedSwarm
from remote_modules.testing.virtual_time import run_virtual

from .faults import Weather, restart, twin, upgrade_all, wall_jump
from .oracle import Oracle, positions
from .scenario import blocks_of
from .swarms import SWARMS, swarm_model
from .tiny import PAD, call_of

NUM_TOKENS = 8


@dataclass
class Script:
    """One generation, and what happens after each token.

    Attributes:
        actions: by the number of the token.
        is_ragged: two rows, the first left-padded; else one.
    """

    actions: dict[int, Callable[[Script], Awaitable[None] | None]] = field(default_factory=dict)
    swarm_name: str = "pairs"
    is_ragged: bool = False
    config: ClientConfig = field(default_factory=ClientConfig)
    swarm: SimulatedSwarm = field(init=False)
    client: Swarm = field(init=False)
    session: SessionState = field(init=False)
    tokens: torch.Tensor = field(init=False)
    mask: torch.Tensor | None = field(init=False)
    start: int = 0

    def run(self) -> None:
        """Every token must be the local model's, and every rule hold."""
        run_virtual(self._run())

    async def _run(self) -> None:
        model = swarm_model()
        holdings = [model.holdings[span] for span in SWARMS[self.swarm_name]]
        self.swarm = SimulatedSwarm(3, holdings, config=self.config)
        await self.swarm.start()
        self.client = self.swarm.client()
        self.tokens = torch.tensor([[PAD, 11, 12, 13], [21, 22, 23, 24]] if self.is_ragged else [[11, 12, 13, 14]])
        self.mask = (self.tokens != PAD).long() if self.is_ragged else None
        self.session = SessionState(self.client, blocks_of(model), lambda callback: callback())
        oracle = Oracle(model, None)
        for number in range(NUM_TOKENS):
            outputs = await self.step()
            logits = model.logits(outputs["hidden_states"][:, -1:])
            oracle.note(f"token {number}", self.tokens, self.mask, logits)
            self.start = self.tokens.shape[1]
            self.tokens = torch.cat([self.tokens, logits.argmax(-1)], dim=1)
            if self.mask is not None:
                self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
            if number in self.actions:
                done = self.actions[number](self)
                if done is not None:
                    await done
        await self.session.close()
        await self.client.aclose()
        assert oracle.differences() == []
        assert self.swarm.violations == []
        self.swarm.stop()

    def begin_step(self) -> Coroutine[Any, Any, Named]:
        new = swarm_model().embed(self.tokens[:, self.start :])
        call = call_of(new, positions(self.tokens, self.mask)[:, self.start :], self.mask)
        return self.session.step({"hidden_states": new}, call)

    async def step(self) -> Named:
        return await self.begin_step()

    def peer(self, hop: int) -> SimulatedPeer:
        """The one that does the hop now."""
        return self.swarm.peer_of(self.session.route[hop].peer_id)

    def route_spans(self) -> list[str]:
        return [str(hop.span) for hop in self.session.route]

    def crash_all_in_use(self) -> None:
        for hop in range(len(self.session.route)):
            self.peer(hop).crash()

    def reorder(self, *rows: int) -> None:
        order = torch.tensor(rows)
        self.session.select(order)
        assert self.mask is not None
        self.tokens, self.mask = self.tokens[order], self.mask[order]

    def crop(self, length: int) -> None:
        self.session.crop(length)
        self.start, self.tokens = length, self.tokens[:, : length + 1]
        self.mask = None if self.mask is None else self.mask[:, : length + 1]


HISTORIES = pytest.mark.parametrize("kept", ["each_hop", "first"])


@HISTORIES
def test_beam_reorder_before_a_crash(kept: str) -> None:
    """Petals (2023): the replay buffer was not reordered with the beams, and activations were silently wrong."""
    actions = {2: lambda s: s.reorder(1, 1), 3: Script.crash_all_in_use}
    Script(actions, is_ragged=True, config=ClientConfig(keep_histories=kept)).run()


@HISTORIES
def test_beam_reorder_and_crash_in_the_same_moment(kept: str) -> None:
    """The selection is queued for a cache that is gone: the history has it already, so it must not be done twice."""

    def both(script: Script) -> None:
        script.reorder(1, 0)
        script.crash_all_in_use()

    Script({3: both}, is_ragged=True, config=ClientConfig(keep_histories=kept)).run()


@HISTORIES
def test_rollback_before_a_crash(kept: str) -> None:
    """Petals (2023 to 2024): the buffer was longer than the cache after a rollback, and every replacement failed."""
    actions = {4: lambda s: s.crop(5), 5: Script.crash_all_in_use}
    Script(actions, config=ClientConfig(keep_histories=kept)).run()


def test_failover_in_decode() -> None:
    """Petals (since July 2023): "buffer says 8 tokens, new session says position 0", retried for ever."""
    Script({1: Script.crash_all_in_use}).run()


def test_replacement_has_other_cuts() -> None:
    """A boundary that did not exist needs a history, which the outputs of the hop before it are."""

    async def crash(script: Script) -> None:
        assert script.route_spans() == ["0:4"]
        script.peer(0).crash()
        await script.step()
        assert script.route_spans() == ["0:2", "2:4"]
        script.session.crop(script.start)

    Script({2: crash}, swarm_name="one_holds_all").run()


def test_step_is_cancelled_at_each_of_its_waits() -> None:
    """Some hops did the step and some did not: a later step must not find caches of different lengths."""

    async def cancel(script: Script, at: int) -> None:
        work = CancelledAt(script.begin_step(), at)
        task = asyncio.ensure_future(_awaited(work))
        await asyncio.wait([task])
        assert work.fired
        assert task.cancelled()

    for at in (1, 2):
        Script({3: lambda s, at=at: cancel(s, at)}).run()  # type: ignore[misc]


def test_fork_and_origin_go_different_ways() -> None:
    """A fork shares chunks of history with its origin: what one crops or reorders is not the other's."""

    async def fork(script: Script) -> None:
        other = copy.deepcopy(script.session)
        other.select(torch.tensor([1, 0]))
        other.crop(3)
        script.crash_all_in_use()

    Script({3: fork}, is_ragged=True).run()


def test_half_open_connection_of_a_client_that_lost_power_is_given_up() -> None:
    """A server sends no pings, so connections of clients that were gone without a word held their slots for hours.

    `net.connection` now asks the kernel to find out; here the simulated one does.
    """

    async def lose(script: Script) -> None:
        script.swarm.network.dialler("client").vanish()
        await asyncio.sleep(KEEPALIVE_S + SESSION_ORPHAN_S + SWEEP_S)
        for peer in script.swarm.peers:
            assert peer.handler is not None
            assert (peer.handler.num_connections, len(peer.handler.sessions), peer.kv_bytes) == (0, 0, 0)

    Script({3: lose}).run()


@pytest.mark.parametrize("hedge", [True, False])
def test_half_open_connection_of_a_peer_that_lost_power_stalls_for_a_moment(hedge: bool) -> None:
    """Nothing is refused and nothing answers: only silence tells, unless another peer outruns it."""

    async def lose(script: Script) -> None:
        lost = script.peer(0)
        lost.lose_power()
        began_s = script.swarm.clock()
        await asyncio.wait_for(script.client.refresh(), 1.0)
        await script.step()
        shortest_s, longest_s = (0.25, 1.0) if hedge else (2.0, 3.5)
        assert shortest_s <= script.swarm.clock() - began_s <= longest_s
        assert script.client.stats.hedges_won == (1 if hedge else 0)
        assert script.client.stats.failovers == 1
        assert script.peer(0) is not lost
        script.session.crop(script.start)

    Script({3: lose}, config=ClientConfig(hedge=hedge)).run()


def test_clock_goes_back_an_hour_before_a_restart() -> None:
    """Sequences come from the wall clock: trackers refused the new instance as stale until the old lease was over.

    Now it counts on from the record that stands against it: it is listed as soon as it is started, and stays so.
    """

    async def jump(script: Script) -> None:
        peer, tracker = script.peer(0), script.swarm.tracker
        peer_id, old = peer.identity.peer_id, tracker.live()[peer.identity.peer_id]
        peer.wall_offset_s = -3600.0
        peer.crash()
        await peer.start()
        assert peer.instance_id != old.instance_id
        new = tracker.live()[peer_id]
        assert (new.instance_id, new.sequence > old.sequence) == (peer.instance_id, True)
        await script.client.refresh()
        assert script.client.router.instance_of(peer_id) == peer.instance_id
        await asyncio.sleep(30.0 + 10.0 + 1.0)  # the old lease would be over, and the new one was renewed
        renewed = tracker.live()[peer_id]
        assert (renewed.instance_id, renewed.sequence > new.sequence) == (peer.instance_id, True)

    Script({2: jump}).run()


def test_refusals_of_an_overloaded_swarm_do_not_spin() -> None:
    """All peers of a span say "busy": the client waits for the hinted time, and asks again."""

    async def overload(script: Script) -> None:
        for peer in script.swarm.peers[:2]:
            peer.device.ailment = Ailment("overload", error=busy)
        began_s = script.swarm.clock()
        asyncio.get_running_loop().call_later(3.0, heal, script)
        await script.step()
        assert 3.0 <= script.swarm.clock() - began_s <= 6.0
        assert 1 <= script.swarm.network.fired["overload"] <= 16
        script.session.crop(script.start)

    def heal(script: Script) -> None:
        for peer in script.swarm.peers:
            peer.device.ailment = None

    Script({2: overload}).run()


@pytest.mark.parametrize("fault", [twin, upgrade_all, wall_jump], ids=lambda fault: str(fault.__name__))
def test_planned_change_and_twins_lose_no_token(fault: Callable[..., Awaitable[None]]) -> None:
    """Identities stay while instances change: records of the old ones must not win."""

    async def change(script: Script) -> None:
        weather = Weather(script.swarm, Random(1), ["client"])
        await fault(weather, script.peer(0), 3.0)
        await asyncio.sleep(0.5)
        await script.step()
        script.session.crop(script.start)
        await weather.clear()

    Script({2: change}).run()


def test_peer_that_is_started_twice_while_it_sleeps_announces_once() -> None:
    """The simulator itself: two starts of a suspended peer left an announcer without an owner."""

    async def main() -> None:
        swarm = SimulatedSwarm(3, [swarm_model().holdings["0:4"]])
        (peer,) = swarm.peers
        peer.freeze()
        starts = [asyncio.ensure_future(restart(peer)) for _ in range(2)]
        await asyncio.sleep(1.0)
        peer.thaw()
        await asyncio.gather(*starts)
        names = [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()]
        assert names.count("Announcer._run") == 1
        swarm.stop()

    run_virtual(main())


async def _awaited(work: CancelledAt) -> object:
    return await work
