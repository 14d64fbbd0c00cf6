"""Each peer is lost at each step, in each moment of it: same tokens, same gradients, and a bounded stall."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from remote_modules.client.passes import backward, forward
from remote_modules.client.session import SessionState
from remote_modules.client.swarm import Swarm
from remote_modules.config import ClientConfig
from remote_modules.testing.simulation import SimulatedPeer, SimulatedSwarm
from remote_modules.testing.virtual_time import run_virtual

from .oracle import local_blocks
from .scenario import blocks_of
from .tiny import TinyModel, call_of, tiny_model

SPANS = ("0:3", "3:6", "6:8")
SPARES = {"same": SPANS, "longer": ("0:8",), "other_cuts": ("0:4", "2:7", "5:8")}
NUM_TOKENS = 12
MAX_STALL_S = 5.0
HOP_S = 0.04  # two delays of 10 ms and 20 ms of computing
MOMENTS = {"before": 0.0, "while_it_computes": 0.02, "while_it_answers": 0.035}

Loss = Callable[[SimulatedPeer], None]
LOSSES: dict[str, Loss] = {
    "crash": SimulatedPeer.crash,
    "freeze": SimulatedPeer.freeze,
    "reset": lambda peer: peer.host.reset(),
}


@dataclass
class Outcome:
    """What came of one run."""

    tokens: list[int]
    longest_step_s: float
    failovers: int
    has_fired: bool
    forwarded: int


def model() -> TinyModel:
    return tiny_model(8, tuple(sorted({*SPANS, *(span for spans in SPARES.values() for span in spans)})))


async def start(spares: tuple[str, ...], config: ClientConfig | None = None) -> SimulatedSwarm:
    """Only ``SPANS`` are up; the spares join when `join_spares` is called, so that routes begin on the first three."""
    holdings = [model().holdings[span] for span in (*SPANS, *spares)]
    swarm = SimulatedSwarm(5, holdings, config=config)
    for peer in swarm.peers[: len(SPANS)]:
        await peer.start()
    return swarm


async def join_spares(swarm: SimulatedSwarm) -> None:
    for peer in swarm.peers[len(SPANS) :]:
        await peer.start()


async def meet(client: Swarm, swarm: SimulatedSwarm, lane: str) -> None:
    """Connect to the first peers, so that each hop of the first pass takes `HOP_S` too."""
    await client.refresh()
    for peer in swarm.peers[: len(SPANS)]:
        await client.connect(peer.identity.peer_id, lane)


def schedule(loss: Loss, peer: SimulatedPeer, delay_s: float) -> list[bool]:
    """Lose ``peer`` after ``delay_s``; the list tells whether it happened."""
    fired: list[bool] = []

    def lose() -> None:
        fired.append(True)
        loss(peer)

    asyncio.get_running_loop().call_later(delay_s, lose)
    return fired


def is_noticed(loss: str, moment: str) -> bool:
    """A connection that breaks between two requests is dialled again; an answer may arrive before the loss does."""
    return moment == "while_it_computes" or (moment == "before" and loss != "reset")


async def generate(
    loss: Loss | None,
    spares: tuple[str, ...],
    hop: int,
    step: int,
    moment_s: float,
    config: ClientConfig | None = None,
) -> Outcome:
    swarm = await start(spares, config)
    client = swarm.client()
    session = SessionState(client, blocks_of(model()), lambda callback: callback())
    tokens = torch.tensor([[5, 9, 2, 33]])
    generated: list[int] = []
    longest_s = 0.0
    fired: list[bool] = []
    for number in range(NUM_TOKENS):
        if number == step and loss is not None:
            if number == 0:
                await meet(client, swarm, "step")
            await join_spares(swarm)
            fired = schedule(loss, swarm.peers[hop], hop * HOP_S + moment_s)
        began_s = swarm.clock()
        new = model().embed(tokens)
        outputs = await session.step({"hidden_states": new}, call_of(new))
        longest_s = max(longest_s, swarm.clock() - began_s)
        tokens = model().logits(outputs["hidden_states"][:, -1:]).argmax(-1)
        generated.append(int(tokens))
    await client.aclose()
    swarm.stop()
    return Outcome(generated, longest_s, client.stats.failovers, bool(fired), client.stats.forwarded)


@pytest.fixture(scope="module")
def reference() -> list[int]:
    output = model().local.generate(
        torch.tensor([[5, 9, 2, 33]]), max_new_tokens=NUM_TOKENS, do_sample=False, attention_mask=torch.ones(1, 4)
    )
    return [int(token) for token in output[0, 4:]]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("hop", range(len(SPANS)))
@pytest.mark.parametrize("spares", SPARES)
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_at_every_step_changes_no_token(
    reference: list[int], loss: str, spares: str, hop: int, moment: str
) -> None:
    for step in range(NUM_TOKENS):
        outcome = run_virtual(generate(LOSSES[loss], SPARES[spares], hop, step, MOMENTS[moment]))
        assert outcome.has_fired
        assert outcome.failovers >= 1 or not is_noticed(loss, moment), f"the loss at step {step} went unnoticed"
        assert outcome.tokens == reference, f"tokens differ after the loss at step {step}"
        assert outcome.longest_step_s <= MAX_STALL_S, f"step {step} took {outcome.longest_step_s:.2f} virtual seconds"


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("hop", range(len(SPANS)))
@pytest.mark.parametrize("spares", SPARES)
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_in_training_changes_no_gradient(loss: str, spares: str, hop: int, when: str) -> None:
    inputs = model().embed(torch.tensor([[4, 8, 15, 16], [23, 42, 7, 1]]))

    async def train(moment_s: float) -> tuple[torch.Tensor, torch.Tensor, int, bool, float]:
        swarm = await start(SPARES[spares])
        client = swarm.client()
        await meet(client, swarm, "bulk")
        await join_spares(swarm)
        order = hop if when == "forward" else len(SPANS) - 1 - hop
        delay_s = order * HOP_S + moment_s
        fired = schedule(LOSSES[loss], swarm.peers[hop], delay_s) if when == "forward" else []
        began_s = swarm.clock()
        call = call_of(inputs)
        outputs, _, segments = await forward(client, blocks_of(model()), {"hidden_states": inputs}, call)
        if when == "backward":
            fired = schedule(LOSSES[loss], swarm.peers[hop], delay_s)
        grads, _ = await backward(client, segments, {"hidden_states": torch.ones_like(inputs)})
        took_s = swarm.clock() - began_s
        await client.aclose()
        swarm.stop()
        return outputs["hidden_states"], grads["hidden_states"], client.stats.failovers, bool(fired), took_s

    leaf = inputs.clone().requires_grad_()
    expected_outputs = local_blocks(model(), leaf, call_of(inputs))
    (expected_grad,) = torch.autograd.grad(expected_outputs, leaf, torch.ones_like(inputs))
    for moment, moment_s in MOMENTS.items():
        outputs, grad, failovers, has_fired, took_s = run_virtual(train(moment_s))
        assert has_fired
        assert failovers >= 1 or not is_noticed(loss, moment)
        assert torch.equal(outputs, expected_outputs)
        assert torch.equal(grad, expected_grad)
        assert took_s <= MAX_STALL_S + 1.0
