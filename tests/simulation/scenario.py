"""Random runs of a simulated swarm: what the client does, what happens to it, and what must hold afterwards."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from random import Random

import torch

from remote_modules.client.passes import backward, forward
from remote_modules.client.session import SessionState
from remote_modules.client.swarm import Swarm
from remote_modules.spans import Span
from remote_modules.testing.simulation import SimulatedPeer, SimulatedSwarm

from .tiny import PAD, VOCABULARY, TinyModel, call_of

SETTLE_S = 300.0  # longer than any lease, ban or session timeout of the simulation


@dataclass
class Report:
    """What a run did; equal for equal seeds."""

    seed: int
    faults: list[str] = field(default_factory=list)
    num_failovers: int = 0
    num_steps: int = 0
    longest_pass_s: float = 0.0
    ended_s: float = 0.0
    violations: list[str] = field(default_factory=list)


def blocks_of(model: TinyModel) -> Span:
    return Span(0, model.num_blocks)


async def random_run(model: TinyModel, spans: tuple[str, ...], seed: int, num_tokens: int = 8) -> Report:
    """One client generates and trains while a random schedule of faults runs; every fault ends within half a minute."""
    rng = Random(seed)
    report = Report(seed)
    swarm = SimulatedSwarm(seed, [model.holdings[span] for span in spans])
    await swarm.start()
    client = swarm.client()
    faults = asyncio.get_running_loop().create_task(_disturb(swarm, rng, report))
    try:
        await _generate(model, swarm, client, rng, report, num_tokens)
        await _train(model, swarm, client, rng, report)
    finally:
        await faults
    await asyncio.sleep(SETTLE_S)
    for peer in swarm.peers:
        if peer.kv_bytes or (peer.handler is not None and len(peer.handler.sessions)):
            report.violations.append(f"peer {peer.span} still holds {peer.kv_bytes} KV bytes")
    report.num_failovers = client.stats.failovers
    report.ended_s = round(swarm.clock(), 6)
    await client.aclose()
    swarm.stop()
    return report


async def _generate(
    model: TinyModel, swarm: SimulatedSwarm, client: Swarm, rng: Random, report: Report, num_tokens: int
) -> None:
    rows = rng.choice([1, 1, 2, 3])
    length = rng.randint(1, 6)
    tokens = torch.tensor([[rng.randrange(1, VOCABULARY) for _ in range(length)] for _ in range(rows)])
    mask = torch.ones_like(tokens) if rows > 1 else None
    if mask is not None and length > 1:
        tokens[0, 0], mask[0, 0] = PAD, 0  # the first row is left-padded
    session = SessionState(client, blocks_of(model), lambda callback: callback())
    start = 0
    for _ in range(num_tokens):
        new = model.embed(tokens[:, start:])
        call = call_of(new, positions(tokens, mask)[:, start:], mask)
        outputs = await timed(swarm, report, session.step({"hidden_states": new}, call))
        logits = model.logits(outputs["hidden_states"][:, -1:])
        expected = reference(model, tokens, mask)
        if not torch.equal(logits.argmax(-1), expected.argmax(-1)) or not torch.allclose(logits, expected, atol=1e-4):
            report.violations.append(f"step at position {session.position} differs from the local model")
        report.num_steps += 1
        start = tokens.shape[1]
        tokens = torch.cat([tokens, logits.argmax(-1)], dim=1)
        mask = None if mask is None else torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        tokens, mask, start = _change_cache(session, tokens, mask, start, rng)
        await asyncio.sleep(rng.choice([0.0, 0.0, 0.05, 1.0]))
    await session.close()


def _change_cache(
    session: SessionState, tokens: torch.Tensor, mask: torch.Tensor | None, start: int, rng: Random
) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """Sometimes what beam search and assisted decoding do: reorder rows, or take tokens back."""
    rows = tokens.shape[0]
    if rows > 1 and rng.random() < 0.3:
        order = torch.tensor([rng.randrange(rows) for _ in range(rows)])
        session.select(order)
        return tokens[order], None if mask is None else mask[order], start
    if start > 2 and rng.random() < 0.2:
        kept = rng.randint(1, start - 1)
        session.crop(kept)
        return tokens[:, : kept + 1], None if mask is None else mask[:, : kept + 1], kept
    return tokens, mask, start


async def _train(model: TinyModel, swarm: SimulatedSwarm, client: Swarm, rng: Random, report: Report) -> None:
    tokens = torch.tensor([[rng.randrange(1, VOCABULARY) for _ in range(5)] for _ in range(2)])
    inputs = model.embed(tokens)
    call = call_of(inputs)
    named = {"hidden_states": inputs}
    outputs, recorded, segments = await timed(swarm, report, forward(client, blocks_of(model), named, call))
    await asyncio.sleep(rng.choice([0.0, 0.5]))
    grad_output = torch.ones_like(inputs)
    grads = {"hidden_states": grad_output}
    found, adapter_grads = await timed(swarm, report, backward(client, segments, grads, call))
    expected_outputs, expected_grad = local_pass(model, inputs, grad_output)
    if (outputs.keys(), recorded, found.keys(), adapter_grads) != (grads.keys(), {}, grads.keys(), {}):
        report.violations.append("names of outputs or gradients are others")
    if not torch.equal(outputs["hidden_states"], expected_outputs):
        report.violations.append("forward differs from the local model")
    if not torch.equal(found["hidden_states"], expected_grad):
        report.violations.append("gradient differs from the local model")


async def timed(swarm: SimulatedSwarm, report: Report, work):  # type: ignore[no-untyped-def]
    """Await ``work`` and note how long it took; a pass must end by its deadline."""
    began_s = swarm.clock()
    result = await work
    took_s = swarm.clock() - began_s
    report.longest_pass_s = max(report.longest_pass_s, round(took_s, 6))
    if took_s > swarm.config.pass_deadline_s + 1.0:
        report.violations.append(f"a pass took {took_s:.1f} s")
    return result


async def _disturb(swarm: SimulatedSwarm, rng: Random, report: Report) -> None:
    for _ in range(rng.randint(1, 5)):
        await asyncio.sleep(rng.uniform(0.0, 0.8))
        peer = rng.choice(swarm.peers)
        kind = rng.choice(["crash", "crash", "freeze", "cut", "reset", "slow", "drain", "tracker"])
        report.faults.append(f"{swarm.clock():.3f} {kind} {peer.span}")
        await _FAULTS[kind](swarm, peer, rng.uniform(0.2, 15.0))
    for peer in swarm.peers:
        if not peer.is_up:
            await peer.start()


async def _crash(swarm: SimulatedSwarm, peer: SimulatedPeer, lasts_s: float) -> None:
    peer.crash()
    _later(lasts_s, lambda: _restart(peer))


async def _freeze(swarm: SimulatedSwarm, peer: SimulatedPeer, lasts_s: float) -> None:
    peer.freeze()
    _later(lasts_s, lambda: _thaw(peer))


async def _reset(swarm: SimulatedSwarm, peer: SimulatedPeer, lasts_s: float) -> None:
    """All connections break; the peer lives and listens on."""
    peer.host.reset()


async def _slow(swarm: SimulatedSwarm, peer: SimulatedPeer, lasts_s: float) -> None:
    peer.host.delay_s = 0.3

    async def heal() -> None:
        peer.host.delay_s = swarm.network.delay_s

    _later(lasts_s, heal)


async def _drain(swarm: SimulatedSwarm, peer: SimulatedPeer, lasts_s: float) -> None:
    if peer.handler is not None:
        peer.handler.start_draining()
        _later(min(lasts_s, 5.0), lambda: _replace(peer))


async def _tracker(swarm: SimulatedSwarm, peer: SimulatedPeer, lasts_s: float) -> None:
    swarm.tracker.kill()

    async def restart() -> None:
        swarm.tracker.restart()

    _later(lasts_s, restart)


async def _restart(peer: SimulatedPeer) -> None:
    if not peer.is_up:
        await peer.start()


async def _thaw(peer: SimulatedPeer) -> None:
    peer.thaw()


async def _replace(peer: SimulatedPeer) -> None:
    peer.crash()
    await peer.start()


_FAULTS = {
    "crash": _crash,
    "freeze": _freeze,
    "cut": _freeze,
    "reset": _reset,
    "slow": _slow,
    "drain": _drain,
    "tracker": _tracker,
}
_pending: set[asyncio.Task[None]] = set()


def _later(delay_s: float, action) -> None:  # type: ignore[no-untyped-def]
    async def run() -> None:
        await asyncio.sleep(delay_s)
        await action()

    task = asyncio.get_running_loop().create_task(run())
    _pending.add(task)
    task.add_done_callback(_pending.discard)


def positions(tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Position ids as `generate` derives them from a left-padded mask."""
    if mask is None:
        return torch.arange(tokens.shape[1]).unsqueeze(0)
    return (mask.cumsum(-1) - 1).clamp(min=0)


def reference(model: TinyModel, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Logits ``[B, 1, V]`` of the local model after all ``tokens``."""
    with torch.no_grad():
        output = model.local(tokens, attention_mask=mask, position_ids=positions(tokens, mask), use_cache=False)
    logits: torch.Tensor = output.logits[:, -1:]
    return logits


def local_pass(model: TinyModel, inputs: torch.Tensor, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output of the local blocks and the gradient of their input."""
    inputs = inputs.clone().requires_grad_()
    norm, model.local.model.norm = model.local.model.norm, torch.nn.Identity()
    try:
        output = model.local.model(inputs_embeds=inputs).last_hidden_state
    finally:
        model.local.model.norm = norm
    output.backward(grad_output)
    assert inputs.grad is not None
    return output.detach(), inputs.grad
