"""Steps of sessions at a peer: each is checked against what the session holds, has room reserved, and is done once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeAlias

import msgspec
import torch

from remote_modules.errors import PeerRefused, RefusalReason, UnsupportedCallError
from remote_modules.model.adapters import Adapter
from remote_modules.model.past import length_of
from remote_modules.plan.batching import Decoders
from remote_modules.server.arguments import owner_arguments, whole_mask
from remote_modules.server.batcher import StepWork
from remote_modules.server.checks import RequestTensors, check_ops, refuse
from remote_modules.server.engine import Engine
from remote_modules.server.head import logits_of
from remote_modules.server.jobs import Priority, Timed
from remote_modules.server.sessions import Session, SessionTable
from remote_modules.spans import Span
from remote_modules.wire.framing import Buffer
from remote_modules.wire.messages import Output, StepRequest

__all__ = ["Steps"]

Named: TypeAlias = dict[str, torch.Tensor]
Reply: TypeAlias = tuple[Output, list[Buffer]]


class Run(Protocol):
    """Has the device do work for a request."""

    def __call__(
        self, request: StepRequest, connection_id: int, priority: Priority, work: Callable[[], Named]
    ) -> Awaitable[Timed[Named]]: ...


class Steps:
    """All sessions' steps.

    Args:
        reply: what travels of a result.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        engine: Engine,
        sessions: SessionTable,
        *,
        run: Run,
        reply: Callable[[StepRequest, Timed[Named]], Reply],
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._sessions = sessions
        self._run = run
        self._reply = reply
        self._clock = clock
        self._decoders = Decoders()

    def answered(self, request: StepRequest, *, may_open: bool) -> Reply | None:
        """The answer of a step that was done before. One that cannot be done need not await its input.

        Raises:
            PeerRefused: it has no session, and can open none.
        """
        session = self._sessions.get(request.session_id)
        if session is None:
            _check_opening(request, may_open=may_open)
            return None
        return _repeated(request, session)

    async def do(
        self,
        request: StepRequest,
        blocks: Span,
        tensors: RequestTensors,
        adapter: Adapter | None,
        connection_id: int,
        *,
        may_open: bool,
    ) -> Reply:
        """One step of a session, which it may open.

        Raises:
            PeerRefused: it is not done.
        """
        session = self._session(request, blocks, may_open=may_open)
        async with session.lock:
            if session.is_closed:
                refuse("the session was closed meanwhile", RefusalReason.SESSION_LOST)
            session.used_s, session.connection_id = self._clock(), connection_id
            session.client_key = session.client_key or request.client_key
            if (reply := _repeated(request, session)) is not None:
                return reply
            try:
                return await self.new_step(request, session, blocks, tensors, adapter)
            except PeerRefused:
                if session.cache.length == 0 and session.last_reply is None:  # as if it had never been opened
                    self._sessions.close(session.session_id)
                raise

    def _session(self, request: StepRequest, blocks: Span, *, may_open: bool) -> Session:
        session = self._sessions.get(request.session_id)
        if session is None:
            _check_opening(request, may_open=may_open)
            try:
                cache = self._engine.new_cache()
            except UnsupportedCallError as exc:
                refuse(str(exc))
            session = Session(
                session_id=request.session_id,
                span=blocks,
                cache=cache,
                rows=request.call.rows,
                used_s=self._clock(),
            )
            self._sessions.open(session)
        elif session.span != blocks:
            refuse(f"the session was opened for blocks {session.span}, got {blocks}")
        return session

    async def new_step(
        self,
        request: StepRequest,
        session: Session,
        blocks: Span,
        tensors: RequestTensors,
        adapter: Adapter | None,
    ) -> Reply:
        """Apply a step that the session has not seen; its lock is held."""
        call, num_tokens = request.call, request.call.num_tokens
        if request.version not in (None, session.version):
            text = f"the session has seen {session.version} cache operations, the step expects {request.version}"
            refuse(text, RefusalReason.SESSION_LOST)
        position, rows, most_rows = check_ops(
            request,
            tensors.indices,
            position=session.cache.length,
            rows=session.rows,
            can_go_back=self._engine.model.stack.is_croppable,
        )
        if tensors.past:
            if position:
                refuse(f"keys and values can only begin a session, this one holds {position} tokens")
            position, rows = length_of(tensors.past), call.rows
        if position != request.position:
            text = f"the session holds {position} tokens, the step expects {request.position}"
            refuse(text, RefusalReason.SESSION_LOST)
        if position == 0:
            rows = call.rows
        if rows != call.rows:
            refuse(f"the session has {rows} rows, got {call.rows}")
        mask = whole_mask(request, session.mask, tensors.attention_mask, position + num_tokens)
        rows_before = session.rows
        self._sessions.reserve(session, rows=max(rows, most_rows), tokens=position + num_tokens)
        work = StepWork(
            engine=self._engine,
            who=request.session_id,
            cache=session.cache,
            blocks=blocks,
            ops=request.ops,
            tensors=tensors,
            arguments=owner_arguments(call, tensors, mask, adapter),
            num_outputs=request.num_outputs,
            position=position,
        )
        try:
            timed = await self._done(request, session.connection_id or 0, work)
        except BaseException as exc:
            if isinstance(exc, PeerRefused) and exc.reason is RefusalReason.BUSY:  # it was not begun
                session.rows = rows_before
            else:
                self._sessions.close(session.session_id)  # its cache may be half written
            raise
        timed = await self._with_head(request, session, timed)
        if most_rows > rows and not session.is_closed:
            self._sessions.reserve(session, rows=rows, tokens=position + num_tokens)
        session.mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
        session.used_s = self._clock()
        session.version += len(request.ops)
        reply = self._reply(request, timed)
        session.last_step_id, session.last_reply = request.step_id, reply
        return reply

    async def _with_head(self, request: StepRequest, session: Session, timed: Timed[Named]) -> Timed[Named]:
        """Also the greatest logits, where they were asked for and can be had."""
        work = logits_of(self._engine, request, timed.value)
        if work is None:
            return timed
        try:
            more = await self._run(request, session.connection_id or 0, Priority.DECODE, work)
        except BaseException as exc:
            if isinstance(exc, PeerRefused) and exc.reason is RefusalReason.BUSY:
                return timed  # the step itself is done
            self._sessions.close(session.session_id)  # its cache has seen a step that was not answered
            raise
        return Timed(timed.value | more.value, timed.queue_s + more.queue_s, timed.compute_s + more.compute_s)

    async def _done(self, request: StepRequest, connection_id: int, work: StepWork) -> Timed[Named]:
        """Have the device do it; a long one in chunks, while others decode."""
        began_s, whole, parts = self._clock(), work, list[Timed[Named]]()
        if work.arguments.num_tokens == 1:
            self._decoders.came(work.who, now_s=began_s)
            return await self._run(request, connection_id, Priority.DECODE, work)
        while (chunk := self._chunk_of(work)) is not None:
            first, work = work.cut(chunk)
            parts.append(await self._run_part(request, connection_id, first, began_s, is_first=not parts))
        parts.append(await self._run_part(request, connection_id, work, began_s, is_first=not parts))
        if len(parts) == 1:
            return parts[0]
        value = whole.join([part.value for part in parts])
        return Timed(value, sum(part.queue_s for part in parts), sum(part.compute_s for part in parts))

    def _chunk_of(self, work: StepWork) -> int | None:
        """How many tokens run now; None: all."""
        num_tokens = max(1, self._engine.chunk_tokens // work.rows)
        if not self._engine.chunk_tokens or work.arguments.num_tokens <= num_tokens or not work.may_cut:
            return None
        is_open = lambda who: self._sessions.get(who) is not None  # noqa: E731
        return num_tokens if self._decoders.others(work.who, now_s=self._clock(), is_open=is_open) else None

    async def _run_part(
        self, request: StepRequest, connection_id: int, work: StepWork, began_s: float, *, is_first: bool
    ) -> Timed[Named]:
        left_s = max(0.0, request.timeout_s - (self._clock() - began_s))
        limited = msgspec.structs.replace(request, timeout_s=left_s)
        try:
            return await self._run(limited, connection_id, Priority.PREFILL, work)
        except PeerRefused as exc:
            if exc.reason is not RefusalReason.BUSY or is_first:
                raise
            text = "the device is busy, after a part of this step was done"
            raise PeerRefused(text, peer_id="", reason=RefusalReason.SESSION_LOST) from exc


def _check_opening(request: StepRequest, *, may_open: bool) -> None:
    if not request.create:
        refuse("unknown session", RefusalReason.SESSION_LOST)
    if not may_open:
        refuse("this peer is leaving", RefusalReason.DRAINING)


def _repeated(request: StepRequest, session: Session) -> Reply | None:
    if session.last_step_id != request.step_id or session.last_reply is None:
        return None
    output, body = session.last_reply
    return msgspec.structs.replace(output, request_id=request.request_id), body
