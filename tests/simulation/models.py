"""Swarms of tiny models of any architecture, two peers for each span, with a stock client and the local oracle."""

from __future__ import annotations

import asyncio
import functools
import gc
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from remote_modules.client.sequential import RemoteSequential
from remote_modules.client.stats import ClientStats
from remote_modules.config import ClientConfig
from remote_modules.model.probe import probe_stack
from remote_modules.model.shrink import tiny_config, tiny_model
from remote_modules.model.stack import StackSpec
from remote_modules.spans import Span
from remote_modules.testing.inline_swarm import InlineSwarm
from remote_modules.testing.simulation import Holding, SimulatedPeer

__all__ = ["HOP_S", "Family", "Kill", "Stage", "family_of", "opened"]

HOP_S = 0.04  # of one request in virtual time: two delays of 10 ms, and 20 ms of computing
SPARES = 2  # peers for each span
SETTLE_S = 200.0  # longer than any timeout of a session
_folders: list[tempfile.TemporaryDirectory[str]] = []


@dataclass(frozen=True)
class Family:
    """A tiny model: the local one, its checkpoint, and how its blocks are divided.

    Attributes:
        local: the oracle; not to be changed.
        spans: of the two hops.
        loaded: what its swarms share.
    """

    local: Any
    folder: Path
    stack: StackSpec
    spans: tuple[Span, Span]
    loaded: dict[Span, Holding] = field(default_factory=dict)


@functools.cache
def family_of(model_type: str, seed: int = 0) -> Family:
    transformers_logging.disable_progress_bar()
    config = tiny_config(model_type)
    local: Any = tiny_model(config, seed=seed)
    local.generation_config.eos_token_id = None  # else a generation ends when it likes
    _folders.append(tempfile.TemporaryDirectory())
    local.save_pretrained(_folders[-1].name)
    stack = probe_stack(type(local), config)
    count = stack.num_blocks
    cuts = (stack.cuts or frozenset(range(count + 1))) - {0, count}
    cut = min(cuts, key=lambda cut: abs(cut - count / 2))
    gc.collect()
    gc.freeze()  # the modules of the family stay; `Stage.check_end` need not look at them each time
    return Family(local, Path(_folders[-1].name), stack, (Span(0, cut), Span(cut, count)))


@dataclass(frozen=True)
class Kill:
    """When a peer is lost.

    Attributes:
        hop: of the route in use.
        call: the number of the model's call that it disturbs, from 1: the peers are met in call 0.
        moment_s: after the hop's request left the client.
        lose: what happens to the peer.
        again_s: after this, the peer that took over is lost too, while the first is back.
    """

    hop: int
    call: int
    moment_s: float
    lose: Callable[[SimulatedPeer], None] = SimulatedPeer.crash
    again_s: float | None = None


@dataclass
class Stage:
    """A swarm, its client, and the peers lost so far."""

    family: Family
    swarm: InlineSwarm
    model: Any
    layers: RemoteSequential
    lost: list[SimulatedPeer] = field(default_factory=list)

    @property
    def stats(self) -> ClientStats:
        return self.layers.stats()

    def hop_peer(self, hop: int) -> SimulatedPeer:
        """The one that did the hop in the last pass."""
        return self.swarm.swarm.peer_of(self.stats.route[hop].peer_id)

    def lose(self, kill: Kill, delay_s: float) -> None:
        """Lose the hop's peer in ``delay_s`` of virtual time."""
        peer, loop = self.hop_peer(kill.hop), self.swarm.io.loop

        def lose() -> None:
            self.lost.append(peer)
            kill.lose(peer)
            if kill.again_s is not None:
                loop.call_later(kill.again_s, lambda: loop.create_task(lose_again()))

        async def lose_again() -> None:
            await peer.start()
            (other,) = (p for p in self.swarm.peers if p.span == peer.span and p is not peer)
            self.lost.append(other)
            kill.lose(other)

        loop.call_later(delay_s, lose)

    @contextmanager
    def killing(self, kill: Kill) -> Iterator[None]:
        """Lose a peer in the call ``kill.call`` of the model inside."""
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            if calls == kill.call:
                self.lose(kill, kill.hop * HOP_S + kill.moment_s)
            calls += 1

        handle = self.model.get_input_embeddings().register_forward_pre_hook(count)
        try:
            yield
        finally:
            handle.remove()
        assert self.lost, f"the model was called {calls} times only"

    def check_end(self) -> None:
        """Nothing is left on the peers once the client let go of its caches."""
        gc.collect()
        frozen = [peer for peer in self.swarm.peers if peer.is_frozen]
        self.swarm.kv_bytes()  # waits for what is under way
        assert [peer.kv_bytes for peer in self.swarm.peers if peer not in frozen] == [0] * (
            len(self.swarm.peers) - len(frozen)
        )
        for peer in frozen:  # it could not be told: its sessions end when nobody asks for them
            self.swarm.io.loop.call_soon(peer.thaw)
        if frozen:
            self.swarm.io.run(asyncio.sleep(SETTLE_S))
        assert self.swarm.kv_bytes() == 0
        assert not any(peer.handler.sessions for peer in self.swarm.peers if peer.handler is not None)


@contextmanager
def opened(model_type: str, **settings: Any) -> Iterator[Stage]:
    """A fresh swarm.

    Args:
        settings: of the client.
    """
    family = family_of(model_type)
    config = ClientConfig(**settings)
    with InlineSwarm(family.folder, family.spans * SPARES, config=config, loaded=family.loaded) as swarm:
        model: Any = swarm.load()
        model.generation_config.eos_token_id = None
        layers = next(module for module in model.modules() if isinstance(module, RemoteSequential))
        yield Stage(family, swarm, model, layers)
