"""Hops that send their outputs on to each other: whatever is lost, late or wrong on the way changes no token.

Delays in the simulation are such that a direct hop takes as long as one by the client: 20 ms from peer to peer, 10 ms
between client and peer, 20 ms of computing. So the moments of `test_every_step` are those of direct hops, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import torch

from remote_modules.client.session import SessionState
from remote_modules.client.swarm import Swarm
from remote_modules.config import ClientConfig
from remote_modules.net.client_connection import ClientConnection
from remote_modules.plan.edges import DIAL_S, MAX_LOST
from remote_modules.testing.simulated_device import Ailment
from remote_modules.testing.simulation import SimulatedSwarm
from remote_modules.testing.virtual_time import run_virtual

from .models import opened
from .scenario import blocks_of
from .test_every_step import (
    HOP_S,
    LOSSES,
    MAX_STALL_S,
    MOMENTS,
    NUM_TOKENS,
    SPANS,
    SPARES,
    generate,
    is_noticed,
    join_spares,
    model,
    reference,
    start,
)
from .test_kill_modes import KILLS, MODES, ROUNDING, assert_close, assert_equal, check_loss
from .tiny import call_of

__all__ = ["reference"]  # a fixture

DIRECT = ClientConfig(direct=True)
NUM_EDGES = len(SPANS) - 1
STEP_S = len(SPANS) * HOP_S

Fault = Callable[[SimulatedSwarm], None]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("hop", range(len(SPANS)))
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_at_any_moment_changes_no_token(reference: list[int], loss: str, hop: int, moment: str) -> None:
    spares = "same" if loss == "freeze" else "other_cuts"
    for step in (0, 1, 5, NUM_TOKENS - 1):
        outcome = run_virtual(generate(LOSSES[loss], SPARES[spares], hop, step, MOMENTS[moment], DIRECT))
        assert outcome.has_fired
        assert outcome.forwarded >= NUM_EDGES * max(step - 1, NUM_TOKENS - step - 5)
        assert outcome.failovers >= 1 or not is_noticed(loss, moment), f"the loss at step {step} went unnoticed"
        assert outcome.tokens == reference, f"tokens differ after the loss at step {step}"
        assert outcome.longest_step_s <= MAX_STALL_S, f"step {step} took {outcome.longest_step_s:.2f} virtual seconds"


class Run:
    """A generation in which something happens to the swarm.

    Attributes:
        took_s: by step.
        forwarded: outputs that went on directly, by step.
    """

    def __init__(self, swarm: SimulatedSwarm, client: Swarm) -> None:
        self.swarm = swarm
        self.client = client
        self.tokens: list[int] = []
        self.took_s: list[float] = []
        self.forwarded: list[int] = []

    async def go(self, fault: Fault, step: int, delay_s: float, pause_s: float = 0.0) -> None:
        """The fault happens ``delay_s`` after the step began; ``pause_s`` lies between steps."""
        session = SessionState(self.client, blocks_of(model()), lambda callback: callback())
        tokens = torch.tensor([[5, 9, 2, 33]])
        for number in range(NUM_TOKENS):
            if number == 1:
                await self.client.refresh()  # the spares are known once the route is chosen
            if number == step:
                asyncio.get_running_loop().call_later(delay_s, fault, self.swarm)
            began_s, before = self.swarm.clock(), self.client.stats.forwarded
            new = model().embed(tokens)
            outputs = await session.step({"hidden_states": new}, call_of(new))
            tokens = model().logits(outputs["hidden_states"][:, -1:]).argmax(-1)
            self.tokens.append(int(tokens))
            self.took_s.append(self.swarm.clock() - began_s)
            self.forwarded.append(self.client.stats.forwarded - before)
            await asyncio.sleep(pause_s)
        await session.close()


def run(
    fault: Fault,
    *,
    step: int = 3,
    delay_s: float = 0.0,
    pause_s: float = 0.0,
    spares: bool = False,
    config: ClientConfig = DIRECT,
) -> Run:
    async def whole() -> Run:
        swarm = await start(SPANS if spares else (), config)
        client = swarm.client()
        found = Run(swarm, client)
        if spares:
            await client.refresh()
            await join_spares(swarm)
        await found.go(fault, step, delay_s, pause_s)
        await client.aclose()
        await asyncio.sleep(10.0)
        assert [peer.host.num_connections for peer in swarm.peers] == [0] * len(swarm.peers), "links are left"
        assert [peer.kv_bytes for peer in swarm.peers] == [0] * len(swarm.peers)
        assert swarm.violations == []
        swarm.stop()
        return found

    return run_virtual(whole())


def cut(swarm: SimulatedSwarm) -> None:
    """The second peer and the third reach the client, but not each other, and nobody is told."""
    swarm.network.partition([swarm.peers[1].host.address], [swarm.peers[2].host.address])


def lose_what_is_on_its_way(swarm: SimulatedSwarm) -> None:
    """From the first peer to the second; neither notices."""
    ends = [end for end in swarm.peers[0].host._ends if end.other.host is swarm.peers[1].host]
    assert any(end._on_the_way for end in ends)
    for end in ends:
        end.vanish()


def test_undisturbed_steps_go_directly_once_the_peers_know_each_other(reference: list[int]) -> None:
    found = run(lambda swarm: None)
    assert found.tokens == reference
    assert found.forwarded == [0] + [NUM_EDGES] * (NUM_TOKENS - 1)
    assert found.client.stats.failovers == 0


def test_push_that_is_lost_is_made_up_for_by_the_client(reference: list[int]) -> None:
    found = run(lose_what_is_on_its_way, delay_s=MOMENTS["while_it_answers"])
    assert found.tokens == reference
    assert found.took_s[3] > STEP_S + 0.1, "nothing was lost"
    assert found.forwarded[3] == NUM_EDGES  # as far as the first peer knows
    assert found.client.stats.failovers == 0


def test_edge_that_swallows_everything_is_left_alone_soon(reference: list[int]) -> None:
    found = run(cut, step=2)
    assert found.tokens == reference
    source, target = (peer.identity.peer_id for peer in found.swarm.peers[1:3])
    assert not found.client.edges.is_open(source, target, now_s=found.client.clock())
    assert [seconds > STEP_S + 0.1 for seconds in found.took_s].count(True) >= MAX_LOST
    assert found.forwarded[-1] == NUM_EDGES - 1
    assert found.took_s[-1] == pytest.approx(STEP_S)  # by the client: no slower
    assert found.client.stats.failovers == 0


def test_peers_that_cannot_dial_each_other_go_by_the_client(reference: list[int]) -> None:
    found = run(cut, step=0, pause_s=DIAL_S / 2)
    assert found.tokens == reference
    assert found.forwarded == [0] + [NUM_EDGES - 1] * (NUM_TOKENS - 1)
    source, target = (peer.identity.peer_id for peer in found.swarm.peers[1:3])
    assert not found.client.edges.is_open(source, target, now_s=found.client.clock())
    assert found.took_s[1:] == pytest.approx([STEP_S] * (NUM_TOKENS - 1))
    assert found.client.stats.failovers == 0


def test_nonsense_that_was_sent_on_is_taken_back(reference: list[int]) -> None:
    def spoil(swarm: SimulatedSwarm) -> None:
        def to_nan(outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            swarm.peers[0].device.ailment = None  # once
            return {name: torch.full_like(tensor, torch.nan) for name, tensor in outputs.items()}

        swarm.peers[0].device.ailment = Ailment("nonsense", spoil=to_nan)

    found = run(spoil, spares=True)
    assert found.swarm.network.fired["nonsense"] == 1
    assert found.tokens == reference
    assert found.client.stats.failovers >= 1
    assert found.client.stats.replayed_tokens >= 3 * (4 + 2)  # of all hops: the later ones had computed with it
    assert found.forwarded[-1] == NUM_EDGES


def test_slow_hop_is_outrun_and_the_next_one_gets_its_input_from_the_client(reference: list[int]) -> None:
    def slow(swarm: SimulatedSwarm) -> None:
        swarm.peers[1].device.ailment = Ailment("slow device", slowness=200.0)

    found = run(slow, step=6, spares=True)
    assert found.client.stats.hedges_won == 1
    assert found.tokens == reference
    assert max(found.took_s) < 2.0


def test_peers_of_an_older_protocol_take_their_turns(reference: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    async def whole() -> Run:
        swarm = await start((), DIRECT)
        old = swarm.peers[1].identity.peer_id
        monkeypatch.setattr(ClientConnection, "knows_direct", property(lambda link: link.peer_id != old))
        found = Run(swarm, swarm.client())
        await found.go(lambda swarm: None, 0, 0.0)
        await found.client.aclose()
        swarm.stop()
        return found

    found = run_virtual(whole())
    assert found.tokens == reference
    assert found.forwarded == [0] * NUM_TOKENS  # each edge has one end that does not know it


# ------------------------------------------------------------------------------------------------- prompts in chunks

CHUNKED = ClientConfig(prefill_chunk_tokens=1)
NUM_CHUNKS = 4


def test_chunks_of_a_prompt_are_at_all_hops_at_once(reference: list[int]) -> None:
    found = run(lambda swarm: None, config=CHUNKED)
    assert found.tokens == reference
    dial_s, turn_s = 0.04, 0.02  # all at once; computing
    assert found.took_s[0] < dial_s + STEP_S + NUM_CHUNKS * turn_s < dial_s + 2 * STEP_S
    assert found.forwarded[0] < NUM_EDGES * NUM_CHUNKS  # peers dial each other meanwhile
    assert found.forwarded[1:] == [NUM_EDGES] * (NUM_TOKENS - 1)
    assert found.client.stats.failovers == 0


@pytest.mark.parametrize("moment_s", [0.07, 0.11])
@pytest.mark.parametrize("hop", range(len(SPANS)))
@pytest.mark.parametrize("loss", ["crash", "reset"])
def test_loss_while_chunks_are_under_way_changes_no_token(
    reference: list[int], loss: str, hop: int, moment_s: float
) -> None:
    config = ClientConfig(prefill_chunk_tokens=1, exact_replay=True)
    outcome = run_virtual(generate(LOSSES[loss], SPARES["same"], hop, 0, moment_s - hop * HOP_S, config))
    assert outcome.has_fired
    assert outcome.tokens == reference
    assert outcome.longest_step_s <= MAX_STALL_S


# ------------------------------------------------------------------------------------------ ways to use a model

WAYS = [
    ("beam", "llama"),  # rows move
    ("prompt-lookup", "gemma3_text"),  # tokens are taken back
    ("two-turns", "mamba2"),  # a state that cannot go back
    ("forked", "llama"),
    ("padded-beam", "gemma3n_text"),  # side inputs, masks
    ("greedy", "deepseek_v4"),  # states beside hidden states
    ("chunked-prefill", "llama"),
]


@pytest.mark.parametrize(("mode", "family"), WAYS, ids=lambda value: str(value))
def test_undisturbed_ways_are_the_local_ones(mode: str, family: str) -> None:
    with opened(family, direct=True, exact_replay=mode == "forked") as stage:
        run_mode = MODES[mode][0]
        assert_equal(run_mode(stage.model), run_mode(stage.family.local))
        assert stage.stats.failovers == 0
        assert stage.stats.forwarded > 0
        stage.check_end()


@pytest.mark.parametrize("kill", ["last-hop-computing", "first-hop-answering"])
@pytest.mark.parametrize(("mode", "family"), WAYS, ids=lambda value: str(value))
def test_loss_of_a_peer_changes_nothing(mode: str, family: str, kill: str) -> None:
    with opened(family, direct=True) as stage:
        run_mode = MODES[mode][0]
        with stage.killing(KILLS[kill]):
            found = run_mode(stage.model)
        check_loss(stage, KILLS[kill])
        assert stage.stats.forwarded > 0
        assert_close(found, run_mode(stage.family.local), ROUNDING.get(family, 1e-4))
        del found
        stage.check_end()


@pytest.mark.parametrize(
    ("mode", "family"),
    [("beam", "llama"), ("padded-beam", "gemma3n_text"), ("forked", "llama"), ("two-turns", "llama")],
)
def test_prompts_in_chunks_are_the_local_ones_but_for_rounding(mode: str, family: str) -> None:
    with opened(family, direct=True, prefill_chunk_tokens=2) as stage:
        run_mode = MODES[mode][0]
        assert_close(run_mode(stage.model), run_mode(stage.family.local), ROUNDING.get(family, 1e-4))
        assert stage.stats.failovers == 0
        assert stage.stats.replayed_tokens == 0 or mode == "forked"
        stage.check_end()
