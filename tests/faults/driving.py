"""A client that generates and trains in a simulated swarm, while a test does things to it at chosen tokens."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from simulation.scenario import blocks_of
from simulation.tiny import TinyModel, call_of, tiny_model

from remote_modules.client.session import SessionState
from remote_modules.client.swarm import Swarm
from remote_modules.config import ClientConfig
from remote_modules.server.engine import Engine
from remote_modules.testing.simulation import Holding, SimulatedPeer, SimulatedSwarm

SPANS = ("0:3", "3:6", "6:8")
OTHER_CUTS = ("0:8", "0:4", "2:7", "5:8")
PROMPT = (5, 9, 2, 33)
Before = Callable[[int], Awaitable[None] | None]


def model() -> TinyModel:
    return tiny_model(8, (*SPANS, *OTHER_CUTS))


@dataclass
class Run:
    """What a generation gave, and the virtual seconds of each of its steps."""

    tokens: list[int] = field(default_factory=list)
    steps_s: list[float] = field(default_factory=list)

    @property
    def stall_s(self) -> float:
        """The longest step, less an ordinary one."""
        return max(self.steps_s) - sorted(self.steps_s)[len(self.steps_s) // 2]


async def swarm_of(spans: Sequence[str], *, seed: int = 5, config: ClientConfig | None = None) -> SimulatedSwarm:
    swarm = SimulatedSwarm(seed, [model().holdings[span] for span in spans], config=config)
    await swarm.start()
    return swarm


def new_session(client: Swarm) -> SessionState:
    return SessionState(client, blocks_of(model()), lambda callback: callback())


async def generate(
    swarm: SimulatedSwarm,
    client: Swarm,
    num_tokens: int = 12,
    *,
    before: Before = lambda number: None,
    prompt: Sequence[int] = PROMPT,
) -> Run:
    """Greedy tokens; ``before`` is called with the number of each step."""
    run, session, tokens = Run(), new_session(client), torch.tensor([list(prompt)])
    for number in range(num_tokens):
        waiting = before(number)
        if waiting is not None:
            await waiting
        began_s = swarm.clock()
        new = model().embed(tokens)
        outputs = await session.step({"hidden_states": new}, call_of(new))
        run.steps_s.append(swarm.clock() - began_s)
        tokens = model().logits(outputs["hidden_states"][:, -1:]).argmax(-1)
        run.tokens.append(int(tokens))
    await session.close()
    return run


@functools.cache
def reference(num_tokens: int = 12, prompt: tuple[int, ...] = PROMPT) -> list[int]:
    """The local model's tokens."""
    output: Any = model().local.generate(
        torch.tensor([list(prompt)]),
        max_new_tokens=num_tokens,
        do_sample=False,
        attention_mask=torch.ones(1, len(prompt)),
        pad_token_id=0,
    )
    return [int(token) for token in output[0, len(prompt) :]]


def in_use(swarm: SimulatedSwarm, client: Swarm, hop: int) -> SimulatedPeer:
    """The peer of a hop of the latest pass."""
    return swarm.peer_of(client.stats.route[hop].peer_id)


def others(swarm: SimulatedSwarm, peer: SimulatedPeer) -> list[SimulatedPeer]:
    return [other for other in swarm.peers if other is not peer and other.span == peer.span]


@contextmanager
def watching(model: Any, clock: Callable[[], float]) -> Iterator[list[float]]:
    """The times at which a model is called; `gap_s` tells what a person at the screen sees of a fault."""
    times: list[float] = []
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda *_: times.append(clock()))
    try:
        yield times
    finally:
        handle.remove()


def gap_s(times: list[float]) -> float:
    """The longest time between two calls, less an ordinary one."""
    gaps = sorted(later - earlier for earlier, later in zip(times, times[1:], strict=False))
    return gaps[-1] - gaps[len(gaps) // 2]


class SpoiledEngine(Engine):
    """Does what ``spoil`` makes of each result; counts how often that was another.

    Args:
        spoil: gets the number of the call and the outputs; returns what is answered, or raises.
    """

    def __init__(
        self, engine: Engine, spoil: Callable[[int, dict[str, torch.Tensor]], dict[str, torch.Tensor]]
    ) -> None:
        super().__init__(engine.model)
        self._spoil = spoil
        self.calls = 0
        self.fired = 0

    def step(self, *args: Any) -> dict[str, torch.Tensor]:
        return self._answer(super().step(*args))

    def forward(self, *args: Any) -> dict[str, torch.Tensor]:
        return self._answer(super().forward(*args))

    def backward(self, *args: Any) -> dict[str, torch.Tensor]:
        return self._answer(super().backward(*args))

    def _answer(self, outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.calls += 1
        try:
            spoiled = self._spoil(self.calls, outputs)
        except BaseException:
            self.fired += 1
            raise
        self.fired += spoiled is not outputs
        return spoiled


def spoiled(span: str, spoil: Callable[[int, dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Holding:
    holding = model().holdings[span]
    return Holding(SpoiledEngine(holding.engine, spoil), holding.kv_costs)
