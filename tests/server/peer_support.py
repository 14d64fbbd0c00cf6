"""A peer in memory: the real handler, device thread, sessions and engine, with a clock that tests move."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import torch
from net.memory import MAX_BODY_BYTES, SERVER, PlainEnd, client_connection, client_hello, join

from remote_modules.model.kv import MIN_CAPACITY_TOKENS
from remote_modules.net.client_connection import ClientConnection
from remote_modules.net.http import Dialer
from remote_modules.server.engine import Engine
from remote_modules.server.executor import DeviceThread
from remote_modules.server.handler import Handler
from remote_modules.server.limits import HandlerLimits
from remote_modules.server.sessions import KVBudget, KVCost, SessionTable
from remote_modules.wire import messages
from remote_modules.wire.messages import CacheOp, CallMeta, Output
from remote_modules.wire.protocol import Role
from remote_modules.wire.tensors import encode_tensors

from .tiny import TOKEN_BYTES

IDLE_S, ORPHAN_S = 600.0, 30.0
ROW_BYTES = MIN_CAPACITY_TOKENS * 2 * TOKEN_BYTES  # KV cache of one row of a short session over two blocks
MAX_BATCH_TOKENS = 256

_session_numbers = itertools.count()


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Peer:
    """The peer, and ways to reach it."""

    def __init__(self, handler: Handler, executor: DeviceThread, clock: Clock) -> None:
        self.handler = handler
        self.executor = executor
        self.clock = clock

    @property
    def used_bytes(self) -> int:
        return self.handler.sessions.budget.used_bytes

    @property
    def num_sessions(self) -> int:
        return len(self.handler.sessions)

    async def connect(self) -> ClientConnection:
        """A client's connection, hello done."""
        accepted = self.handler.accept()
        assert accepted is not None
        client = client_connection()
        join(client, accepted)
        await client.handshake(2.0)
        return client

    async def connect_plain(self) -> PlainEnd:
        """The same without a client behind it."""
        end = self.connect_silent()
        end.send(client_hello())
        await end.message(messages.ServerHello)
        return end

    def connect_silent(self) -> PlainEnd:
        """The same without a hello."""
        accepted = self.handler.accept()
        assert accepted is not None
        end = PlainEnd(Role.CLIENT)
        join(end, accepted)
        return end

    def expire(self, *, after_s: float) -> None:
        """Let time pass, then sweep."""
        self.clock.now_s += after_s
        self.handler.expire_sessions()


@asynccontextmanager
async def running_peer(
    engine: Engine,
    *,
    budget_bytes: int = 100 * ROW_BYTES,
    max_sessions: int = 100,
    max_queue: int = 100,
    max_connections: int = 100,
    activation_bytes: int = 1 << 24,
    dialer: Dialer | None = None,
) -> AsyncIterator[Peer]:
    clock = Clock()
    executor = DeviceThread(max_queue=max_queue)
    budget = KVBudget(budget_bytes, dict.fromkeys(engine.model.span, KVCost(0, TOKEN_BYTES)))
    handler = Handler(
        engine,
        executor,
        SessionTable(budget, max_sessions=max_sessions, idle_s=IDLE_S, orphan_s=ORPHAN_S),
        identity=SERVER,
        instance_id="first",
        limits=HandlerLimits(
            max_batch_tokens=MAX_BATCH_TOKENS,
            max_body_bytes=MAX_BODY_BYTES,
            max_connections=max_connections,
            activation_bytes=activation_bytes,
        ),
        clock=clock,
        software="test peer",
        dialer=dialer,
    )
    try:
        yield Peer(handler, executor, clock)
    finally:
        handler.abort()
        executor.stop()


class SessionDriver:
    """A client's session on one peer, step by step; what it does not say is as the client would say it.

    Attributes:
        last: the output message of the last step.
    """

    def __init__(self, connection: ClientConnection) -> None:
        self.session_id = f"session-{next(_session_numbers):012}"
        self.connection = connection
        self.position = 0
        self.step_id = 0
        self.last: Output

    async def step(self, inputs: torch.Tensor, **changes: Any) -> torch.Tensor:
        """The next step; ``changes`` are fields of the request, and ``tensors`` those beside the hidden states."""
        tensors = {"hidden_states": inputs, **changes.pop("tensors", {})}
        message, body = step_request(
            self.connection.new_request_id(),
            tensors,
            **{
                "session_id": self.session_id,
                "step_id": self.step_id,
                "position": self.position,
                "create": self.step_id == 0,
                **changes,
            },
        )
        self.last, replies = await self.connection.request(message, body, timeout_s=2.0)
        self.position = message.position + inputs.shape[1]
        self.step_id = message.step_id + 1
        return replies["hidden_states"]

    def close(self) -> None:
        self.connection.send(messages.CloseSession(self.session_id))


def step_request(
    request_id: int, tensors: dict[str, torch.Tensor], **changes: Any
) -> tuple[messages.StepRequest, list[Any]]:
    metas, body = encode_tensors(tensors)
    changes = with_call(tensors["hidden_states"], changes)
    fields: dict[str, Any] = {
        "request_id": request_id,
        "session_id": "session-of-a-test",
        "step_id": 0,
        "start": 1,
        "end": 3,
        "position": 0,
        "ops": (),
        "tensors": metas,
        "timeout_s": 2.0,
    }
    return messages.StepRequest(**(fields | changes)), body


CALL_FIELDS = CallMeta.__struct_fields__


def with_call(inputs: torch.Tensor, changes: dict[str, Any]) -> dict[str, Any]:
    """``changes`` of a request, with those that belong into its call put there."""
    sizes: dict[str, Any] = {"rows": inputs.shape[0], "num_tokens": inputs.shape[1]} if inputs.dim() > 1 else {}
    call = CallMeta(**sizes, **{name: value for name, value in changes.items() if name in CALL_FIELDS})
    return {"call": call, **{name: value for name, value in changes.items() if name not in CALL_FIELDS}}


async def forward(connection: ClientConnection, inputs: torch.Tensor, **changes: Any) -> torch.Tensor:
    metas, body = encode_tensors({"hidden_states": inputs, **changes.pop("tensors", {})})
    fields: dict[str, Any] = {"start": 1, "end": 3, "timeout_s": 2.0}
    changes = with_call(inputs, changes)
    message = messages.ForwardRequest(request_id=connection.new_request_id(), tensors=metas, **(fields | changes))
    return (await connection.request(message, body, timeout_s=2.0))[1]["hidden_states"]


async def backward(connection: ClientConnection, tensors: dict[str, torch.Tensor], **changes: Any) -> torch.Tensor:
    metas, body = encode_tensors(tensors)
    fields: dict[str, Any] = {"start": 1, "end": 3, "timeout_s": 2.0}
    changes = with_call(tensors["hidden_states"], changes)
    message = messages.BackwardRequest(request_id=connection.new_request_id(), tensors=metas, **(fields | changes))
    return (await connection.request(message, body, timeout_s=2.0))[1]["grad.hidden_states"]


def crop(length: int) -> CacheOp:
    return CacheOp("crop", length=length)


def select(tensor: str) -> CacheOp:
    return CacheOp("select", tensor=tensor)
