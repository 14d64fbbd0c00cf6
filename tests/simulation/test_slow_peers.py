"""Peers that are slow, gray, gone or unwanted: who is asked, how often, and what the user waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch

from remote_modules.client.passes import backward, forward
from remote_modules.client.session import SessionState
from remote_modules.client.swarm import Swarm
from remote_modules.config import ClientConfig
from remote_modules.errors import NoRouteError, SpanUnavailable
from remote_modules.plan.routing import Demand, Hop
from remote_modules.spans import Span
from remote_modules.testing.memory_network import CLIENT
from remote_modules.testing.simulation import SimulatedPeer, SimulatedSwarm
from remote_modules.testing.virtual_time import run_virtual

from .oracle import local_blocks
from .scenario import blocks_of
from .tiny import TinyModel, call_of, tiny_model

PAIRS = ("0:2", "0:2", "2:4", "2:4")
SPANS = ("0:4", "0:4")
STEP_S = 0.08  # two hops: two delays of 10 ms and 20 ms of computing each


def model() -> TinyModel:
    return tiny_model(4, ("0:2", "2:4", "0:4"))


def local_pass(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of the local blocks, and the gradient of ``inputs`` for a gradient of ones."""
    leaf = inputs.clone().requires_grad_()
    outputs = local_blocks(model(), leaf, call_of(inputs))
    (grad,) = torch.autograd.grad(outputs, leaf, torch.ones_like(inputs))
    return outputs.detach(), grad


async def started(spans: tuple[str, ...], config: ClientConfig | None = None, *, seed: int = 5) -> SimulatedSwarm:
    swarm = SimulatedSwarm(seed, [model().holdings[span] for span in spans], config=config)
    await swarm.start()
    return swarm


def slow_down(peer: SimulatedPeer, compute_s: float) -> None:
    assert peer.handler is not None
    peer.handler.executor.compute_s = compute_s  # type: ignore[attr-defined]


class Generation:
    """A session that goes on greedily, and what the local model says to it."""

    def __init__(self, client: Swarm, swarm: SimulatedSwarm) -> None:
        self.session = SessionState(client, blocks_of(model()), lambda callback: callback())
        self.tokens = torch.tensor([[5, 9, 2, 33]])
        self.longest_s = 0.0
        self._swarm = swarm
        self._new = self.tokens

    async def step(self) -> float:
        """One token, equal to the local model's; the seconds that it took."""
        began_s = self._swarm.clock()
        new = model().embed(self._new)
        outputs = await self.session.step({"hidden_states": new}, call_of(new))
        took_s = self._swarm.clock() - began_s
        self.longest_s = max(self.longest_s, took_s)
        self._new = model().logits(outputs["hidden_states"][:, -1:]).argmax(-1)
        with torch.no_grad():
            expected = model().local(self.tokens, use_cache=False).logits[:, -1:].argmax(-1)
        assert torch.equal(self._new, expected)
        self.tokens = torch.cat([self.tokens, self._new], dim=1)
        return took_s

    async def steps(self, count: int) -> None:
        for _ in range(count):
            await self.step()

    def peer(self, hop: int) -> SimulatedPeer:
        return self._swarm.peer_of(self.session.route[hop].peer_id)


async def train(client: Swarm, swarm: SimulatedSwarm, *, rows: int = 1) -> float:
    """One forward and backward, equal to the local model's; the seconds that they took."""
    inputs = model().embed(torch.tensor([[4, 8, 15, 16]] * rows))
    began_s = swarm.clock()
    outputs, _, segments = await forward(client, blocks_of(model()), {"hidden_states": inputs}, call_of(inputs))
    grads, _ = await backward(client, segments, {"hidden_states": torch.ones_like(inputs)})
    took_s = swarm.clock() - began_s
    expected, expected_grad = local_pass(inputs)
    assert torch.equal(outputs["hidden_states"], expected)
    assert torch.equal(grads["hidden_states"], expected_grad)
    return took_s


async def settled(swarm: SimulatedSwarm, client: Swarm) -> None:
    """Nothing is left at peers once the client has closed."""
    await client.aclose()
    await asyncio.sleep(1.0)
    assert [peer.kv_bytes for peer in swarm.peers] == [0] * len(swarm.peers)
    assert [peer.handler.executor.load for peer in swarm.peers if peer.handler is not None] == [0] * len(swarm.peers)
    swarm.stop()


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    run_virtual(main())


# -------------------------------------------------------------------------------- hedging


@pytest.mark.parametrize("hop", [0, 1])
def test_step_that_a_live_peer_does_not_answer_is_done_by_another(hop: int) -> None:
    async def main() -> None:
        swarm = await started(PAIRS)
        client = swarm.client()
        generation = Generation(client, swarm)
        await generation.steps(6)
        slow = generation.peer(hop)
        slow_down(slow, 60.0)
        assert await generation.step() < 1.0
        assert generation.peer(hop) is not slow
        assert (client.stats.hedges, client.stats.hedges_won, client.stats.failovers) == (1, 1, 1)
        await asyncio.sleep(1.0)
        instance_id = client.router.instance_of(slow.identity.peer_id)
        assert not client.router.breakers.is_backing_off(slow.identity.peer_id, instance_id, now_s=swarm.clock())
        slow_down(slow, 0.02)
        await asyncio.sleep(61.0)
        await generation.steps(6)
        assert client.stats.hedges == 1
        await generation.session.close()
        await settled(swarm, client)

    run(main)


def test_frozen_peer_is_outrun_long_before_it_is_found_dead() -> None:
    async def main() -> None:
        swarm = await started(PAIRS)
        client = swarm.client()
        generation = Generation(client, swarm)
        await generation.steps(6)
        frozen = generation.peer(0)
        frozen.freeze()
        assert await generation.step() < 1.0
        await asyncio.sleep(2.5)
        peer_id, now_s = frozen.identity.peer_id, swarm.clock()
        assert client.router.instance_of(peer_id) == frozen.instance_id
        assert not client.router.breakers.is_usable(peer_id, frozen.instance_id, now_s=now_s)
        assert client.open_connection(peer_id, "step") is None  # the ping in the background got no answer
        await generation.session.close()
        await client.aclose()
        swarm.stop()

    run(main)


@pytest.mark.parametrize("hedge", [True, False])
def test_frozen_peer_stalls_no_longer_than_the_bar(hedge: bool) -> None:
    async def main() -> None:
        for step in range(8):
            swarm = await started(PAIRS, ClientConfig(hedge=hedge))
            client = swarm.client()
            generation = Generation(client, swarm)
            await generation.steps(step)
            (swarm.peers[0] if step == 0 else generation.peer(0)).freeze()
            assert await generation.step() < 3.5 + (3.0 if step == 0 else 0.0)  # a dial takes 3 s to fail
            await client.aclose()
            swarm.stop()

    run(main)


def test_pass_without_a_session_that_a_peer_does_not_answer_is_done_by_another() -> None:
    async def main() -> None:
        swarm = await started(PAIRS)
        client = swarm.client()
        for _ in range(12):
            await train(client, swarm)
        assert client.stats.hedges == 0
        for peer in (swarm.peers[0], swarm.peers[2]):
            slow_down(peer, 60.0)
        times = [await train(client, swarm) for _ in range(12)]
        assert max(times) < 4 * STEP_S + 4 * 0.3
        assert 1 <= client.stats.hedges_won <= client.stats.hedges <= 4
        await asyncio.sleep(130.0)
        await settled(swarm, client)

    run(main)


@pytest.mark.parametrize(
    ("spans", "slow_span"),
    [(("0:4", "0:2", "2:4"), "0:4"), (("0:2", "2:4", "0:4"), "0:2"), (("0:2", "2:4", "0:4"), "2:4")],
    ids=["one-by-two", "first-by-longer", "last-by-longer"],
)
def test_rivals_may_have_other_cuts(spans: tuple[str, ...], slow_span: str) -> None:
    async def main() -> None:
        spares = tuple(spans[1:]) if slow_span == "0:4" else ("0:4",)
        swarm = await started(spans)
        spare_ids = tuple(peer.identity.peer_id for peer in swarm.peers if str(peer.span) in spares)
        (slow,) = (peer for peer in swarm.peers if str(peer.span) == slow_span)
        swarm.config = ClientConfig(blocked_peers=spare_ids)
        client = swarm.client()
        generation = Generation(client, swarm)
        await generation.steps(6)
        for _ in range(4):
            await train(client, swarm)
        inputs = model().embed(torch.tensor([[4, 8, 15, 16]]))
        outputs, _, segments = await forward(client, blocks_of(model()), {"hidden_states": inputs}, call_of(inputs))
        client.config = ClientConfig()
        await client.refresh()
        slow_down(slow, 30.0)
        assert await generation.step() < 1.5
        assert client.stats.hedges_won == 1
        assert slow.identity.peer_id not in {hop.peer_id for hop in generation.session.route}
        await generation.steps(3)
        began_s = swarm.clock()
        grads, _ = await backward(client, segments, {"hidden_states": torch.ones_like(inputs)})
        assert swarm.clock() - began_s < 1.5
        assert client.stats.hedges_won == 2
        expected, expected_grad = local_pass(inputs)
        assert torch.equal(outputs["hidden_states"], expected)
        assert torch.equal(grads["hidden_states"], expected_grad)
        await generation.session.close()
        await asyncio.sleep(70.0)
        await settled(swarm, client)

    run(main)


def test_nobody_else_holds_the_blocks_slow_peer_is_waited_for() -> None:
    async def main() -> None:
        swarm = await started(("0:2", "2:4"))
        client = swarm.client()
        generation = Generation(client, swarm)
        await generation.steps(6)
        slow_down(generation.peer(0), 20.0)
        assert 20.0 < await generation.step() < 21.0
        assert (client.stats.hedges, client.stats.failovers) == (0, 0)
        await generation.session.close()
        await settled(swarm, client)

    run(main)


def test_hedging_can_be_turned_off() -> None:
    async def main() -> None:
        swarm = await started(PAIRS, ClientConfig(hedge=False, min_request_timeout_s=5.0))
        client = swarm.client()
        generation = Generation(client, swarm)
        await generation.steps(6)
        slow_down(generation.peer(0), 4.0)
        assert await generation.step() > 4.0
        assert (client.stats.hedges, client.stats.failovers) == (0, 0)
        await client.aclose()
        swarm.stop()

    run(main)


def test_rival_that_is_slow_too_loses_and_its_cache_is_freed() -> None:
    async def main() -> None:
        swarm = await started(SPANS)
        client = swarm.client()
        generation = Generation(client, swarm)
        await generation.steps(6)
        first = generation.peer(0)
        slow_down(first, 1.0)
        (other,) = (peer for peer in swarm.peers if peer is not first)
        slow_down(other, 5.0)
        assert 1.0 < await generation.step() < 1.2
        assert generation.peer(0) is first
        assert (client.stats.hedges, client.stats.hedges_won, client.stats.failovers) == (1, 0, 0)
        await asyncio.sleep(10.0)
        assert other.kv_bytes == 0
        assert first.kv_bytes > 0
        await generation.session.close()
        await settled(swarm, client)

    run(main)


@pytest.mark.parametrize("who", ["first", "rival", "both"])
def test_crash_during_a_hedge_changes_no_token(who: str) -> None:
    async def main() -> None:
        swarm = await started(("0:4", "0:4", "0:4"))
        client = swarm.client()
        generation = Generation(client, swarm)
        await generation.steps(6)
        first = generation.peer(0)
        for peer in swarm.peers:
            slow_down(peer, 1.5)
        loop = asyncio.get_running_loop()
        rivals: list[SimulatedPeer] = []

        def lose() -> None:
            rivals.extend(peer for peer in swarm.peers if peer is not first and peer.handler and peer.kv_bytes)
            assert len(rivals) == 1, "the hedge is under way"
            for peer in ([first] if who != "rival" else []) + (rivals if who != "first" else []):
                peer.crash()

        loop.call_later(0.8, lose)
        assert await generation.step() < 6.0
        assert rivals
        assert client.stats.hedges == 1
        await generation.steps(2)
        await generation.session.close()
        await client.aclose()
        swarm.stop()

    run(main)


def test_slow_swarm_is_not_asked_twice_for_ever() -> None:
    async def main() -> None:
        swarm = await started(SPANS)
        client = swarm.client()
        generation = Generation(client, swarm)
        await generation.steps(6)
        rng = Random(1)
        for _ in range(60):
            for peer in swarm.peers:
                slow_down(peer, rng.choice([0.02, 0.02, 0.02, 1.0]))
            await generation.step()
        assert 1 <= client.stats.hedges <= 8 + 0.1 * 66 + 60  # the reserve, the ratio, one a second
        await generation.session.close()
        await asyncio.sleep(2.0)
        await settled(swarm, client)

    run(main)


# -------------------------------------------------------------------------------- ten times slower for half a minute


@pytest.mark.parametrize("how", ["latency", "compute"])
def test_peer_that_is_slow_for_a_while_costs_little_and_is_used_again(how: str) -> None:
    async def main() -> None:
        swarm = await started(SPANS)
        client = swarm.client()
        for _ in range(10):
            await train(client, swarm)
        slow, other = swarm.peers
        if how == "latency":
            slow.host.delay_s *= 10
        else:
            slow_down(slow, 0.2)
        times = []
        began_s = swarm.clock()
        while swarm.clock() < began_s + 30.0:
            times.append(await train(client, swarm))
        best_s = 2 * 0.04
        assert len(times) >= 0.7 * 30.0 / best_s
        assert client.stats.failovers == client.stats.hedges_won  # nobody was banned
        slow.host.delay_s = other.host.delay_s
        slow_down(slow, 0.02)
        used = []
        for _ in range(90):
            await asyncio.sleep(1.0)
            await train(client, swarm)
            used += [hop.peer_id for hop in client.stats.route]
        assert used.count(slow.identity.peer_id) >= 10
        await settled(swarm, client)

    run(main)


def test_session_is_told_to_leave_a_slow_peer_and_to_stay_where_all_are_equal() -> None:
    async def main() -> None:
        swarm = await started(SPANS)
        client = swarm.client()
        generation = Generation(client, swarm)
        await generation.steps(10)
        demand = Demand(num_tokens=1, kv_tokens=300, bytes_per_token=128, is_decode=True)
        slow = generation.peer(0)
        (other,) = (peer for peer in swarm.peers if peer is not slow)
        await client.connect(other.identity.peer_id, "step")

        def better() -> tuple[Hop, ...] | None:
            return client.better_route(generation.session.route, demand, generation.session.position)

        assert better() is None
        slow.host.delay_s = 0.1
        await generation.steps(8)
        assert client.stats.hedges == 0
        assert better() == (Hop(other.identity.peer_id, Span(0, 4)),)
        slow.host.delay_s = 0.01
        await generation.steps(20)
        assert better() is None
        await generation.session.close()
        await settled(swarm, client)

    run(main)


# -------------------------------------------------------------------------------- gray, dead, gone


def fail_some(peer: SimulatedPeer, rng: Random, part: float) -> list[float]:
    """Let the peer refuse some of its work as its own fault; the times of all that it was asked."""
    assert peer.handler is not None
    asked: list[float] = []
    executor = peer.handler.executor
    work = executor.run

    async def run_some(priority: Any, job: Any, **limits: Any) -> Any:
        asked.append(asyncio.get_running_loop().time())
        if rng.random() < part:
            raise RuntimeError("a gray failure")
        return await work(priority, job, **limits)

    executor.run = run_some  # type: ignore[assignment,method-assign]
    return asked


def test_peer_that_fails_often_gets_fewer_and_fewer_requests_and_changes_no_gradient() -> None:
    async def main() -> None:
        swarm = await started(SPANS)
        client = swarm.client()
        asked = fail_some(swarm.peers[0], Random(3), 1.0)
        for _ in range(600):
            await train(client, swarm)
            await asyncio.sleep(0.2)
        assert client.stats.failovers == len(asked)
        late = [time_s for time_s in asked if time_s > asked[0] + 60.0]
        assert len(asked) <= 20
        assert len(late) <= 10
        await settled(swarm, client)

    run(main)


def test_peer_that_fails_at_times_is_used_and_changes_no_gradient() -> None:
    async def main() -> None:
        swarm = await started(SPANS)
        client = swarm.client()
        asked = fail_some(swarm.peers[0], Random(3), 0.05)
        for _ in range(300):
            await train(client, swarm)
        assert client.stats.failovers >= 5
        assert len(asked) >= 100
        await settled(swarm, client)

    run(main)


def test_dead_peer_is_probed_once_for_each_back_off_by_all_passes_together() -> None:
    async def main() -> None:
        swarm = await started(SPANS)
        client = swarm.client()
        for _ in range(5):
            await asyncio.gather(*(train(client, swarm) for _ in range(4)))
        dead = swarm.peers[0]
        dead.crash()
        dials: list[float] = []
        connect = swarm.network.connect

        async def count(address: str, connection: Any, source: str = CLIENT) -> None:
            if address == dead.host.address:
                dials.append(swarm.clock())
            await connect(address, connection, source)

        swarm.network.connect = count  # type: ignore[method-assign]
        began_s = swarm.clock()
        while swarm.clock() < began_s + 25.0:  # its lease runs for 30 s
            times = await asyncio.gather(*(train(client, swarm) for _ in range(4)))
            assert max(times) < 2.0
        assert 2 <= len(dials) <= 10
        assert all(later - earlier >= 0.2 for earlier, later in zip(dials[2:], dials[3:], strict=False))
        await client.aclose()
        swarm.stop()

    run(main)


@pytest.mark.parametrize("how", ["crash", "freeze"])
@pytest.mark.parametrize("absent_s", [1.0, 20.0, 63.0])
def test_only_holder_that_comes_back_is_used_within_two_seconds(how: str, absent_s: float) -> None:
    async def main() -> None:
        swarm = await started(("0:2", "2:4"))
        client = swarm.client()
        generation = Generation(client, swarm)
        await generation.steps(3)
        gone = swarm.peers[1]
        back_s: list[float] = []
        waiting: list[tuple[Span, ...]] = []

        async def come_back() -> None:
            await asyncio.sleep(absent_s)
            waiting.append(client.stats.snapshot().waiting_for)
            back_s.append(swarm.clock())
            if how == "crash":
                await gone.start()
            else:
                gone.thaw()

        (gone.crash if how == "crash" else gone.freeze)()
        returning = asyncio.get_running_loop().create_task(come_back())
        await generation.step()
        await returning
        assert swarm.clock() - back_s[0] <= 2.3  # the bar of 2 s, and a replay
        if absent_s > 1.0 and how == "crash":
            assert waiting == [(Span(2, 4),)]
        assert client.stats.waiting_for == ()
        await generation.steps(2)
        await client.aclose()
        swarm.stop()

    run(main)


def test_nobody_comes_back_the_deadline_names_the_blocks() -> None:
    async def main() -> None:
        swarm = await started(("0:2", "2:4"), ClientConfig(pass_deadline_s=15.0))
        client = swarm.client()
        generation = Generation(client, swarm)
        await generation.steps(2)
        swarm.peers[1].crash()
        began_s = swarm.clock()
        with pytest.raises(SpanUnavailable) as caught:
            await generation.step()
        assert caught.value.missing == (Span(2, 4),)
        assert 15.0 <= swarm.clock() - began_s < 16.5
        await swarm.peers[1].start()
        await generation.steps(2)  # the history is still there
        await client.aclose()
        swarm.stop()

    run(main)


def test_dead_swarm_is_not_met_with_a_storm() -> None:
    async def main() -> None:
        swarm = await started(("0:4", "0:4", "0:4"), ClientConfig(pass_deadline_s=60.0))
        client = swarm.client()
        await train(client, swarm)
        dials: list[float] = []
        connect = swarm.network.connect

        async def count(address: str, connection: Any, source: str = CLIENT) -> None:
            dials.append(swarm.clock())
            await connect(address, connection, source)

        swarm.network.connect = count  # type: ignore[method-assign]
        for peer in swarm.peers:
            peer.crash()
        passes = [asyncio.get_running_loop().create_task(train(client, swarm)) for _ in range(20)]
        await asyncio.gather(*passes, return_exceptions=True)
        assert all(isinstance(one.exception(), NoRouteError) for one in passes)
        assert 1 <= len(dials) <= 3 * 31  # while records live: each peer once a second
        await client.aclose()
        swarm.stop()

    run(main)


# -------------------------------------------------------------------------------- whom the user lets us use


def test_blocked_and_allowed_peers_are_respected() -> None:
    async def main() -> None:
        swarm = await started(("0:4", "0:4", "0:4"))
        first, second, third = (peer.identity.peer_id for peer in swarm.peers)
        for fields, expected in (
            ({"blocked_peers": (first[:6], second)}, {third}),
            ({"allowed_peers": (second[:8],)}, {second}),
            ({"allowed_peers": (first, second), "blocked_peers": (first[:10],)}, {second}),
        ):
            swarm.config = replace(swarm.config, **fields)
            client = swarm.client()
            used = set()
            for _ in range(8):
                await train(client, swarm)
                used |= {hop.peer_id for hop in client.stats.route}
            assert used == expected
            await client.aclose()
            swarm.config = ClientConfig()
        swarm.stop()

    run(main)


def test_nobody_that_may_be_used_is_said_so() -> None:
    async def main() -> None:
        swarm = await started(SPANS, ClientConfig(allowed_peers=("aaaaaa",), pass_deadline_s=1.0))
        client = swarm.client()
        with pytest.raises(SpanUnavailable, match=r"\(2 more are excluded by allowed_peers or blocked_peers\)"):
            await train(client, swarm)
        await client.aclose()
        swarm.stop()

    run(main)
