"""On which connections steps go, and when those are opened: sessions of one client at the same peers."""

from __future__ import annotations

import asyncio

import pytest

from remote_modules.client import lanes
from remote_modules.client.swarm import Swarm
from remote_modules.net import client_connection
from remote_modules.net.client_connection import ClientConnection
from remote_modules.peers import PeerId
from remote_modules.testing.simulation import SimulatedSwarm

from .test_slow_peers import Generation, run, settled, slow_down, started

SPANS = ("0:2", "2:4")
TOKEN_BYTES = 32 * 4  # the prompts have four
DIAL_S = 0.04  # a round trip each for the link and the hello


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are large, and single tokens are not."""
    for module in (lanes, client_connection):
        monkeypatch.setattr(module, "LARGE_BYTES", 2 * TOKEN_BYTES)


def links(swarm: SimulatedSwarm, client: Swarm, lane: str) -> list[ClientConnection]:
    """Those that are open."""
    found = [client.open_connection(PeerId(peer.identity.peer_id), lane) for peer in swarm.peers]
    return [link for link in found if link is not None]


def test_hops_of_a_new_route_are_dialled_at_once() -> None:
    async def main() -> None:
        swarm = await started(SPANS)
        client = swarm.client()
        await client.refresh()
        generation = Generation(client, swarm)
        first_s = await generation.step()
        assert first_s - await generation.step() == pytest.approx(DIAL_S)
        await generation.session.close()
        await settled(swarm, client)

    run(main)


def test_session_alone_has_one_connection() -> None:
    async def main() -> None:
        swarm = await started(SPANS)
        client = swarm.client()
        for _ in range(2):  # one after the other
            generation = Generation(client, swarm)
            await generation.steps(3)
            await generation.session.close()
        assert len(links(swarm, client, "step")) == 2
        assert not links(swarm, client, "prefill")
        await settled(swarm, client)

    run(main)


def test_prompt_of_a_second_session_goes_on_a_connection_of_its_own() -> None:
    async def main() -> None:
        swarm = await started(SPANS)
        client = swarm.client()
        first, second = Generation(client, swarm), Generation(client, swarm)
        await first.steps(2)
        before = [link.bytes_sent for link in links(swarm, client, "step")]
        await second.step()
        assert [link.bytes_sent for link in links(swarm, client, "step")] == before
        apart = links(swarm, client, "prefill")
        assert len(apart) == 2
        assert apart[0].bytes_sent > 4 * TOKEN_BYTES  # the second hop has the prompt from the first
        after = [link.bytes_sent for link in links(swarm, client, "prefill")]
        await asyncio.gather(first.steps(3), second.steps(3))
        assert [link.bytes_sent for link in links(swarm, client, "prefill")] == after
        await first.session.close()
        await second.session.close()
        await settled(swarm, client)

    run(main)


def test_token_does_not_wait_behind_a_prompt_that_is_under_way() -> None:
    async def main() -> None:
        swarm = await started(SPANS)
        client = swarm.client()
        first, second = Generation(client, swarm), Generation(client, swarm)
        await first.steps(2)
        await first.session.close()
        prompt = asyncio.create_task(second.step())  # alone: on the usual connection
        await asyncio.sleep(0.005)
        assert not links(swarm, client, "prefill")
        third = Generation(client, swarm)
        third.tokens = third._new = third.tokens[:, :1]
        await third.step()
        assert prompt.done()
        assert len(links(swarm, client, "prefill")) == 1  # of the first hop, where they met
        for generation in (second, third):
            await generation.steps(2)
            await generation.session.close()
        await settled(swarm, client)

    run(main)


def test_prompt_that_is_cancelled_leaves_nothing_at_peers() -> None:
    async def main() -> None:
        swarm = await started(SPANS)
        client = swarm.client()
        first, second = Generation(client, swarm), Generation(client, swarm)
        await first.steps(2)
        slow_down(first.peer(1), 1.0)
        prompt = asyncio.create_task(second.step())
        await asyncio.sleep(0.5)  # the first hop has done it, the second is at it
        assert len(links(swarm, client, "prefill")) == 2
        prompt.cancel()
        with pytest.raises(asyncio.CancelledError):
            await prompt
        await first.session.close()
        await asyncio.sleep(2.0)
        assert [peer.kv_bytes for peer in swarm.peers] == [0, 0]
        await second.session.close()
        await settled(swarm, client)

    run(main)
