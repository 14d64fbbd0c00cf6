"""The arms of `benchmarks/failures.py`, and the injector that kills streams: one transport, three policies.

* *ours*: `InferenceSession`, which keeps what went into each hop and replays it after a failure.
* *plain*: the same requests over the same connections, but nothing is kept: a failure ends the generation. Started
  again by the caller, it is the paper's "caching with restarts"; without failures it is plain caching.
* *cacheless*: a forward of the whole prefix for each token, through `RemoteSequential`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

import torch

from remote_modules.client.sequential import RemoteSequential
from remote_modules.errors import PeerUnreachable
from remote_modules.net.client_connection import ClientConnection, Reply
from remote_modules.net.http import Dialer
from remote_modules.peers import PeerRecord
from remote_modules.plan.routing import Demand, Hop
from remote_modules.spans import Span
from remote_modules.wire.framing import Buffer
from remote_modules.wire.messages import AdapterRequest, AnyRequest, CallMeta, CloseSession, StepRequest
from remote_modules.wire.tensors import encode_tensors

__all__ = ["Client", "Injector", "Loss", "PlainSession"]

REQUEST_TIMEOUT_S = 60.0


@dataclass(slots=True)
class Loss:
    """One injected failure, and the requests that the step went on with.

    Attributes:
        token: of the step that it hit.
        is_reply: whether the last peer's answer was lost, not a request.
        dial_s, replay_s, replay_compute_s: of what followed, until the step was done.
    """

    token: int
    is_reply: bool
    dial_s: float = 0.0
    replay_s: float = 0.0
    replay_compute_s: float = 0.0
    replayed_tokens: int = 0


@dataclass(slots=True)
class Injector:
    """Fails sends: 5 for each token through 4 stages, client -> 1 -> 2 -> 3 -> 4 -> client.

    A draw depends on seed, token, stage and how often that was tried before, so that all arms meet the same failures.
    Requests of a replay are sends too. A failure ends the connection and the session behind it, with its KV cache; the
    peer lives on.

    Attributes:
        p: of each send.
        forced: the stages (numbered by first block) that fail once, whatever ``p`` is.
    """

    num_blocks: int
    p: float = 0.0
    seed: int = 0
    token: int = 0
    sends: int = 0
    losses: list[Loss] = field(default_factory=list)
    forced: set[int] = field(default_factory=set)
    _tries: Counter[tuple[int, int, bool]] = field(default_factory=Counter)

    def begin(self, p: float, seed: int) -> None:
        """A new sequence."""
        self.p, self.seed, self.token, self.sends = p, seed, 0, 0
        self.losses = []
        self._tries.clear()

    async def request(
        self, connection: ClientConnection, message: AnyRequest, body: list[Buffer], timeout_s: float
    ) -> Reply:
        if isinstance(message, AdapterRequest):
            return await ClientConnection.request(connection, message, body, timeout_s=timeout_s)
        if self._fails(message.start, is_reply=False):
            await self._cut(connection, message, is_reply=False)
        began_s = time.perf_counter()
        reply = await ClientConnection.request(connection, message, body, timeout_s=timeout_s)
        self._note(message, reply, time.perf_counter() - began_s)
        if message.end == self.num_blocks and self._fails(message.start, is_reply=True):
            await self._cut(connection, message, is_reply=True)
        return reply

    def note_dial(self, took_s: float) -> None:
        if self.losses and self.losses[-1].token == self.token:
            self.losses[-1].dial_s += took_s

    def _fails(self, stage: int, *, is_reply: bool) -> bool:
        self.sends += 1
        if stage in self.forced and not is_reply:
            self.forced.discard(stage)
            return True
        key = (self.token, stage, is_reply)
        self._tries[key] += 1
        return self.p > 0 and Random(f"{self.seed}/{key}/{self._tries[key]}").random() < self.p

    async def _cut(self, connection: ClientConnection, message: AnyRequest, *, is_reply: bool) -> None:
        self.losses.append(Loss(self.token, is_reply))
        if isinstance(message, StepRequest):
            connection.send(CloseSession(message.session_id))
            await asyncio.sleep(0)  # let it leave before the connection ends
            await asyncio.sleep(0)
        connection.abort()
        await connection.closed.wait()
        raise PeerUnreachable("injected: the stream is gone", peer_id=connection.peer_id)

    def _note(self, message: AnyRequest, reply: Reply, took_s: float) -> None:
        if isinstance(message, StepRequest) and message.position < self.token and self.losses:
            loss = self.losses[-1]
            loss.replay_s += took_s
            loss.replay_compute_s += reply[0].compute_s
            loss.replayed_tokens += message.call.num_tokens


class FaultyDialer:
    """A `Dialer` whose connections send through an injector."""

    def __init__(self, inner: Dialer, injector: Injector) -> None:
        self._inner = inner
        self._injector = injector

    async def dial(self, record: PeerRecord) -> ClientConnection:
        began_s = time.perf_counter()
        connection = await self._inner.dial(record)
        self._injector.note_dial(time.perf_counter() - began_s)

        async def request(message: AnyRequest, body: list[Buffer], *, timeout_s: float) -> Reply:
            return await self._injector.request(connection, message, body, timeout_s)

        connection.request = request  # type: ignore[method-assign]
        return connection

    async def aclose(self) -> None:
        await self._inner.aclose()


class Stepper(Protocol):
    """What the arms with a cache have in common."""

    def step(self, hidden_states: torch.Tensor) -> torch.Tensor: ...


class PlainSession:
    """A cached session that keeps nothing at the client; any failure is the caller's."""

    def __init__(self, layers: RemoteSequential) -> None:
        self._handle = layers._handle
        self._hops: tuple[Hop, ...] = ()
        self._session_id = secrets.token_hex(16)
        self._position = 0

    def step(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """As `InferenceSession.step`; raises `PeerError` on any failure."""
        return self._handle.io.run(self._step(hidden_states))

    def close(self) -> None:
        self._handle.io.call_soon(self._close)

    async def _step(self, hidden_states: torch.Tensor) -> torch.Tensor:
        swarm = self._handle.swarm
        rows, num_tokens, width = hidden_states.shape
        if not self._hops:
            demand = Demand(num_tokens=num_tokens, kv_tokens=1024, bytes_per_token=4 * width, is_decode=True)
            self._hops = await swarm.route(Span(0, self._handle.num_blocks), demand)
        for hop in self._hops:
            connection = await swarm.connect(hop.peer_id, "step")
            metas, body = encode_tensors({"hidden_states": hidden_states})
            message = StepRequest(
                request_id=connection.new_request_id(),
                session_id=self._session_id,
                step_id=self._position,
                start=hop.span.start,
                end=hop.span.end,
                position=self._position,
                ops=(),
                tensors=metas,
                timeout_s=REQUEST_TIMEOUT_S,
                call=CallMeta(rows=rows, num_tokens=num_tokens),
                create=self._position == 0,
            )
            _, replies = await connection.request(message, body, timeout_s=REQUEST_TIMEOUT_S)
            hidden_states = replies["hidden_states"]
        self._position += num_tokens
        return hidden_states

    def _close(self) -> None:
        for hop in self._hops:
            connection = self._handle.swarm.open_connection(hop.peer_id, "step")
            if connection is not None:
                connection.send(CloseSession(self._session_id))


class Client:
    """A bloom with remote blocks, and greedy decoding from one token by any of the arms.

    Args:
        model: from `remote_modules.load`.
    """

    def __init__(self, model: Any) -> None:
        self.layers: RemoteSequential = model.transformer.h
        self.injector = Injector(self.layers._handle.num_blocks)
        self._model = model
        swarm = self.layers._handle.swarm
        swarm._dialer = FaultyDialer(swarm._dialer, self.injector)

    def embed(self, tokens: list[int]) -> torch.Tensor:
        owner = self._model.transformer
        hidden: torch.Tensor = owner.word_embeddings_layernorm(owner.word_embeddings(torch.tensor([tokens])))
        return hidden

    def pick(self, hidden_states: torch.Tensor) -> int:
        logits = self._model.lm_head(self._model.transformer.ln_f(hidden_states[:, -1]))
        return int(logits.argmax(-1))

    def decode(self, session: Stepper, num_tokens: int, first: int) -> tuple[list[int], list[float]]:
        """``num_tokens`` steps of one token each; the tokens, and the seconds of each step.

        Raises:
            PeerError: of a session that does not survive.
        """
        tokens, seconds = [first], []
        with torch.inference_mode():
            for number in range(num_tokens):
                began_s = time.perf_counter()
                self.injector.token = number
                tokens.append(self.pick(session.step(self.embed(tokens[-1:]))))
                seconds.append(time.perf_counter() - began_s)
        return tokens, seconds

    def recompute(self, tokens: list[int]) -> tuple[int, float]:
        """The next token without any cache, and the seconds that it took."""
        began_s = time.perf_counter()
        self.injector.token = len(tokens) - 1
        with torch.no_grad():
            token = self.pick(self.layers(self.embed(tokens)))
        return token, time.perf_counter() - began_s

    @contextmanager
    def plain(self) -> Iterator[PlainSession]:
        session = PlainSession(self.layers)
        try:
            yield session
        finally:
            session.close()
