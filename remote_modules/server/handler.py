"""A peer's side of its connections: checks each request, admits it, runs it, answers.

Independent of the transport and of the device: a real peer gives it sockets and a device thread, a simulation gives it
memory links and virtual time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import torch

from remote_modules.errors import PeerRefused, ProtocolError, RefusalReason, RemoteModulesError, RemoteProtocolError
from remote_modules.identity import Identity
from remote_modules.model.replay import OwnerArguments
from remote_modules.net.connection import Connection
from remote_modules.server.checks import check_blocks, check_ops, check_tensors, refuse
from remote_modules.server.engine import Engine
from remote_modules.server.executor import Executor, Priority, Timed
from remote_modules.server.sessions import Session, SessionTable
from remote_modules.spans import Span
from remote_modules.wire import messages
from remote_modules.wire.framing import Buffer
from remote_modules.wire.messages import BackwardRequest, ForwardRequest, Output, Refused, Request, StepRequest
from remote_modules.wire.protocol import MessageReceived, Protocol, Role, check_version
from remote_modules.wire.tensors import DTYPES, decode_tensors, encode_tensors

__all__ = ["Handler", "HandlerLimits"]

logger = logging.getLogger(__name__)

MAX_REQUESTS_PER_CONNECTION = 64
HELLO_TIMEOUT_S = 10.0  # a connection that says nothing holds no slot for longer

Reply = tuple[Output, list[Buffer]]


@dataclass(frozen=True, slots=True, kw_only=True)
class HandlerLimits:
    """What one peer takes on; see `ServerConfig`."""

    max_batch_tokens: int
    max_body_bytes: int
    max_connections: int


class Handler:
    """All connections of one peer.

    Args:
        identity, instance_id: what the hello says.
        certificate_sha256: of the TLS certificate in use, or "".
        clock: monotonic seconds.
    """

    def __init__(
        self,
        engine: Engine,
        executor: Executor,
        sessions: SessionTable,
        *,
        identity: Identity,
        instance_id: str,
        num_blocks: int,
        limits: HandlerLimits,
        clock: Callable[[], float],
        certificate_sha256: str = "",
        software: str = "",
    ) -> None:
        self.engine = engine
        self.executor = executor
        self.sessions = sessions
        self.is_draining = False
        self.num_requests: dict[str, int] = {}
        self._identity = identity
        self._instance_id = instance_id
        self._num_blocks = num_blocks
        self._limits = limits
        self._clock = clock
        self._certificate_sha256 = certificate_sha256
        self._software = software
        self._served: dict[int, _Served] = {}
        self._next_connection = 0

    @property
    def num_connections(self) -> int:
        return len(self._served)

    def accept(self) -> Connection | None:
        """The server's side of a new connection; None when there are too many."""
        if len(self._served) >= self._limits.max_connections:
            return None
        self._next_connection += 1
        served = _Served(self, self._next_connection)
        self._served[served.connection_id] = served
        return served.connection

    def start_draining(self) -> None:
        """Refuse new sessions from now on and tell all clients."""
        self.is_draining = True
        for served in self._served.values():
            served.say_draining()

    def abort(self) -> None:
        """Drop every connection and session."""
        for served in list(self._served.values()):
            served.connection.abort()
        self.sessions.close_all()

    def expire_sessions(self) -> None:
        for session_id in self.sessions.expire(self._clock()):
            logger.info("session expired session=%s", session_id[:6])

    def hello(self, hello: messages.ClientHello) -> messages.ServerHello | messages.Reject:
        """The answer to a client's hello."""
        text = check_version(hello.major, hello.minor)
        if text is not None:
            return messages.Reject(text)
        return messages.ServerHello(
            messages.VERSION_MAJOR,
            messages.VERSION_MINOR,
            self._identity.public_key,
            self._identity.sign_hello(nonce=hello.nonce, certificate_sha256=self._certificate_sha256),
            self._instance_id,
            self._limits.max_body_bytes,
            self._software,
        )

    def new_protocol(self) -> Protocol:
        return Protocol(Role.SERVER, max_body_bytes=self._limits.max_body_bytes)

    def forget(self, connection_id: int) -> None:
        self._served.pop(connection_id, None)
        self.sessions.disown(connection_id)

    async def answer(self, request: Request, body: bytearray, connection_id: int) -> Reply:
        """Do what is asked.

        Raises:
            PeerRefused: the request is not done; its text and reason go to the client.
            RemoteProtocolError: the tensors do not decode.
        """
        tensors = decode_tensors(request.tensors, body)
        blocks = check_blocks(request, self.engine.model.span, self._num_blocks)
        kind = messages.kind_of(request)
        self.num_requests[kind] = self.num_requests.get(kind, 0) + 1
        hidden_states = check_tensors(
            tensors,
            hidden_size=self.engine.hidden_size,
            max_batch_tokens=self._limits.max_batch_tokens,
            autocast=request.autocast,
            kind=kind,
        )
        if isinstance(request, StepRequest):
            return await self._step(request, blocks, tensors, connection_id)
        return await self._pass(request, blocks, hidden_states, tensors)

    async def _pass(
        self,
        request: ForwardRequest | BackwardRequest,
        blocks: Span,
        hidden_states: torch.Tensor,
        tensors: dict[str, torch.Tensor],
    ) -> Reply:
        arguments = OwnerArguments(
            position_ids=tensors.get("position_ids"),
            attention_mask=tensors.get("attention_mask"),
            use_cache=request.use_cache,
            autocast=DTYPES.get(request.autocast),
        )
        mask = arguments.attention_mask
        if mask is not None and mask.shape[1] != hidden_states.shape[1]:
            refuse(f"attention_mask must have {hidden_states.shape[1]} columns, got {mask.shape[1]}")
        engine = self.engine
        if isinstance(request, ForwardRequest):
            timed = await self._run(Priority.TRAINING, lambda: engine.forward(blocks, hidden_states, arguments))
            return self._reply(request, "hidden_states", timed)
        grad_output = tensors["grad_output"]
        timed = await self._run(
            Priority.TRAINING, lambda: engine.backward(blocks, hidden_states, grad_output, arguments)
        )
        return self._reply(request, "grad_input", timed)

    async def _step(
        self, request: StepRequest, blocks: Span, tensors: dict[str, torch.Tensor], connection_id: int
    ) -> Reply:
        session = self._session(request, blocks, tensors["hidden_states"])
        async with session.lock:
            if session.is_closed:
                refuse("the session was closed meanwhile", RefusalReason.SESSION_LOST)
            session.used_s, session.connection_id = self._clock(), connection_id
            if session.last_step_id == request.step_id and session.last_reply is not None:
                output, body = session.last_reply
                return msgspec.structs.replace(output, request_id=request.request_id), body
            try:
                return await self._new_step(request, session, blocks, tensors)
            except PeerRefused:
                if session.last_reply is None:  # it did no step yet: as if it had never been opened
                    self.sessions.close(session.session_id)
                raise

    def _session(self, request: StepRequest, blocks: Span, hidden_states: torch.Tensor) -> Session:
        session = self.sessions.get(request.session_id)
        if session is None:
            if not request.create:
                refuse("unknown session", RefusalReason.SESSION_LOST)
            if self.is_draining:
                refuse("this peer is leaving", RefusalReason.DRAINING)
            session = Session(
                session_id=request.session_id,
                span=blocks,
                cache=self.engine.new_cache(),
                rows=hidden_states.shape[0],
                used_s=self._clock(),
            )
            self.sessions.open(session)
        elif session.span != blocks:
            refuse(f"the session was opened for blocks {session.span}, got {blocks}")
        return session

    async def _new_step(
        self, request: StepRequest, session: Session, blocks: Span, tensors: dict[str, torch.Tensor]
    ) -> Reply:
        hidden_states = tensors["hidden_states"]
        position, rows, most_rows = check_ops(request, tensors, position=session.cache.length, rows=session.rows)
        if position != request.position:
            text = f"the session holds {position} tokens, the step expects {request.position}"
            refuse(text, RefusalReason.SESSION_LOST)
        if position == 0:
            rows = hidden_states.shape[0]
        if rows != hidden_states.shape[0]:
            refuse(f"the session has {rows} rows, got {hidden_states.shape[0]}")
        num_tokens = hidden_states.shape[1]
        mask = _whole_mask(request, session, tensors, position + num_tokens)
        self.sessions.reserve(session, rows=max(rows, most_rows), tokens=position + num_tokens)
        arguments = OwnerArguments(
            position_ids=tensors.get("position_ids"),
            attention_mask=mask,
            autocast=DTYPES.get(request.autocast),
        )
        cache, ops, wanted = session.cache, request.ops, request.num_outputs
        priority = Priority.DECODE if num_tokens == 1 else Priority.PREFILL
        try:
            timed = await self._run(
                priority, lambda: last_tokens(self.engine.step(cache, blocks, ops, tensors, arguments), wanted)
            )
        except BaseException:
            self.sessions.close(session.session_id)  # its cache may be half written
            raise
        if most_rows > rows and not session.is_closed:
            self.sessions.reserve(session, rows=rows, tokens=position + num_tokens)
        session.mask, session.used_s = mask, self._clock()
        reply = self._reply(request, "hidden_states", timed)
        session.last_step_id, session.last_reply = request.step_id, reply
        return reply

    async def _run(self, priority: Priority, work: Callable[[], torch.Tensor]) -> Timed[torch.Tensor]:
        try:
            return await self.executor.run(priority, work)
        except PeerRefused:
            raise
        except (RuntimeError, IndexError, ValueError, TypeError, RemoteModulesError) as exc:
            if isinstance(exc, torch.OutOfMemoryError) or "not enough memory" in str(exc):  # the CPU's has no class
                text = "the device has no memory for this request"
                raise PeerRefused(text, peer_id="", reason=RefusalReason.OUT_OF_MEMORY) from exc
            logger.exception("request failed on the device")
            raise PeerRefused("the computation failed", peer_id="", reason=RefusalReason.INTERNAL) from exc

    def _reply(self, request: Request, name: str, timed: Timed[torch.Tensor]) -> Reply:
        metas, body = encode_tensors({name: timed.value})
        output = Output(
            request.request_id,
            metas,
            timed.queue_s,
            timed.compute_s,
            self.executor.load,
            self.sessions.budget.free_tokens,
        )
        return output, body


def last_tokens(output: torch.Tensor, num_tokens: int | None) -> torch.Tensor:
    """The last tokens of ``[B, T, D]``, as many as wanted; all for None."""
    if num_tokens is None:
        return output
    return output[:, max(0, output.shape[1] - num_tokens) :].clone()  # the reply is kept: do not keep the rest with it


def _whole_mask(
    request: StepRequest, session: Session, tensors: dict[str, torch.Tensor], num_columns: int
) -> torch.Tensor | None:
    """The attention mask of all tokens, from the columns that came and those that the session kept."""
    columns = tensors.get("attention_mask")
    if columns is None:
        return None
    mask = columns
    if not request.mask_is_whole:
        if request.ops:  # the mask that the session kept does not follow them
            refuse("a step with cache operations must bring the whole attention mask")
        kept = session.mask
        if kept is None or kept.shape[0] != columns.shape[0]:
            refuse("the session has no attention mask to append to; send the whole one")
        mask = torch.cat([kept, columns.to(kept.dtype)], dim=1)
    if mask.shape[1] != num_columns:
        refuse(f"attention_mask must have {num_columns} columns, got {mask.shape[1]}")
    return mask


class _Served:
    """One connection as the handler sees it."""

    def __init__(self, handler: Handler, connection_id: int) -> None:
        self.connection_id = connection_id
        self._handler = handler
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._is_open = False
        self.connection = Connection(handler.new_protocol(), on_message=self._receive, on_lost=self._lose)
        self._hello_timer = asyncio.get_running_loop().call_later(HELLO_TIMEOUT_S, self.connection.abort)

    def say_draining(self) -> None:
        if self._is_open and self.connection.is_open:
            self.connection.send(messages.Draining())

    def _receive(self, event: MessageReceived) -> None:
        match event.message:
            case messages.ClientHello() as hello:
                self._greet(hello)
            case StepRequest() | ForwardRequest() | BackwardRequest() as request:
                self._begin(request, event.body)
            case messages.Cancel(request_id):
                if (task := self._tasks.get(request_id)) is not None:
                    task.cancel()
            case messages.CloseSession(session_id):
                self._handler.sessions.close(session_id)
            case messages.Ping(nonce):
                self.connection.send(messages.Pong(nonce, self._handler.executor.load))

    def _greet(self, hello: messages.ClientHello) -> None:
        self._hello_timer.cancel()
        answer = self._handler.hello(hello)
        self.connection.send(answer)
        if isinstance(answer, messages.Reject):
            logger.info("connection rejected software=%r: %s", hello.software, answer.text)
            self.connection.close()
            return
        self._is_open = True
        if self._handler.is_draining:
            self.say_draining()

    def _begin(self, request: Request, body: bytearray) -> None:
        if request.request_id in self._tasks:
            raise RemoteProtocolError(f"request id {request.request_id} is in use")
        if len(self._tasks) >= MAX_REQUESTS_PER_CONNECTION:
            text = f"{len(self._tasks)} requests are under way on this connection"
            self.connection.send(Refused(request.request_id, RefusalReason.BUSY, text, 1.0))
            return
        task = asyncio.get_running_loop().create_task(self._answer(request, body))
        self._tasks[request.request_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(request.request_id, None))

    async def _answer(self, request: Request, body: bytearray) -> None:
        try:
            output, buffers = await self._handler.answer(request, body, self.connection_id)
            self.connection.send(output, buffers)
        except PeerRefused as exc:
            self._refuse(request, exc.reason, str(exc), exc.retry_after_s or 0.0)
        except ProtocolError as exc:
            self.connection.abort(exc)
        except Exception:  # the task's boundary: a bug of ours must not leave a client waiting
            logger.exception("request failed")
            self._refuse(request, RefusalReason.INTERNAL, "internal error", 0.0)

    def _refuse(self, request: Request, reason: RefusalReason, text: str, retry_after_s: float) -> None:
        if self.connection.is_open:
            self.connection.send(Refused(request.request_id, reason, text[:1000], retry_after_s))

    def _lose(self, reason: Exception | None) -> None:
        self._hello_timer.cancel()
        logger.debug("x connection=%d reason=%s", self.connection_id, reason)
        for task in list(self._tasks.values()):
            task.cancel()
        self._handler.forget(self.connection_id)
