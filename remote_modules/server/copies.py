"""Sessions copied from peer to peer, and within a peer: what is let in, and reading one.

Whatever fails, a copy is refused: the client then builds the KV cache by replay. See `server.copy_job`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import torch

from remote_modules.errors import PeerError, PeerRefused, RefusalReason, UnsupportedCallError
from remote_modules.net.http import Dialer
from remote_modules.peers import PeerId, PeerRecord, PeerState, short_id
from remote_modules.server.cache_device import CacheDevice
from remote_modules.server.checks import refuse
from remote_modules.server.copy_job import CopyJob, LocalSource, RemoteSource, Source
from remote_modules.server.sessions import Session, SessionTable
from remote_modules.spans import Span
from remote_modules.wire.messages import CacheMeta, CopyRequest, CopySource, ReadRequest

__all__ = ["Copies"]

Named = dict[str, torch.Tensor]

MAX_COPIES = 8  # under way at a time, each with one connection
MAX_READS = 16
MAX_COPY_S = 120.0
MIN_COPY_S = 0.1
MAX_LOCK_S = 10.0  # for a step of the session that is read


class Copies:
    """All copies of one peer.

    Args:
        device: where the caches are.
        dialer: reaches other peers; None: only copies within this peer are made.
        peer_id: our own.
        needs_certificate: whether to dial no peer whose source names no certificate.
        max_body_bytes: of a part.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        device: CacheDevice,
        sessions: SessionTable,
        *,
        dialer: Dialer | None,
        peer_id: PeerId,
        needs_certificate: bool,
        max_body_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        self._device = device
        self._sessions = sessions
        self._dialer = dialer
        self._peer_id = peer_id
        self._needs_certificate = needs_certificate
        self._max_body_bytes = max_body_bytes
        self._clock = clock
        self._num_copies = 0
        self._num_reads = 0

    async def read(self, request: ReadRequest) -> tuple[CacheMeta, Named]:
        """A part of a session.

        Raises:
            PeerRefused: it is not there, or not as asked for.
        """
        session = self._sessions.get(request.session_id)
        if session is None:
            refuse("unknown session", RefusalReason.SESSION_LOST)
        blocks = _blocks_of(request)
        if blocks is not None and not session.span.covers(blocks):
            refuse(f"the session holds blocks {session.span}, got {blocks}")
        if self._num_reads >= MAX_READS:
            refuse(f"{self._num_reads} sessions are being read", RefusalReason.BUSY)
        self._num_reads += 1
        try:
            async with _locked(session, request.timeout_s):
                return await self._read(session, request, blocks)
        finally:
            self._num_reads -= 1

    async def _read(self, session: Session, request: ReadRequest, blocks: Span | None) -> tuple[CacheMeta, Named]:
        cache = session.cache
        meta = CacheMeta(cache.length, session.rows, session.version)
        first, last = request.first, meta.position if request.last is None else request.last
        if session.is_closed or meta.position == 0:
            refuse("the session holds nothing", RefusalReason.SESSION_LOST)
        if last > meta.position or request.version not in (None, meta.version):
            text = f"the session holds {meta.position} tokens of version {meta.version}"
            refuse(text, RefusalReason.SESSION_LOST)
        if first > last:
            refuse(f"tokens {first}:{last} are none")
        if blocks is not None:
            num_bytes = self._sessions.budget.needed_bytes(blocks, rows=meta.rows, capacity=last - first)
            if num_bytes > self._max_body_bytes:
                refuse(f"a part of {num_bytes} bytes is too large; read less at a time", RefusalReason.OUT_OF_MEMORY)
        session.used_s = self._clock()
        form = await self._device.form(session.span)
        return meta, await self._device.run(lambda: form.read(cache, blocks, first, last))

    async def copy(self, request: CopyRequest, indices: Named, connection_id: int, *, may_open: bool) -> CacheMeta:
        """Make a session equal to another.

        Args:
            indices: of the request's cache operations.
            may_open: whether new sessions are taken.

        Raises:
            PeerRefused: it cannot be done; a session that is new is gone.
        """
        if self._num_copies >= MAX_COPIES:
            refuse(f"{self._num_copies} sessions are being copied", RefusalReason.BUSY)
        self._num_copies += 1
        limit_s = min(max(request.timeout_s, MIN_COPY_S), MAX_COPY_S)
        task = asyncio.get_running_loop().create_task(self._copy(request, indices, connection_id, may_open))
        try:
            await asyncio.wait({task}, timeout=limit_s)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})  # it holds a session and a connection
            failed = not task.cancelled() and task.exception()  # seen, even when nobody awaits it any more
            self._num_copies -= 1
        if task.cancelled() and not failed:
            refuse(f"the session was not copied within {limit_s:.1f} s", RefusalReason.BUSY)
        return task.result()

    async def _copy(self, request: CopyRequest, indices: Named, connection_id: int, may_open: bool) -> CacheMeta:
        session = self._sessions.get(request.session_id)
        blocks = Span(request.start, request.end)
        is_new = session is None
        if session is None:
            session = self._open(request, blocks, may_open or request.source is None)
        elif session.span != blocks:
            refuse(f"the session was opened for blocks {session.span}, got {blocks}")
        try:
            async with session.lock, self._source(request) as source:
                if session.is_closed:
                    refuse("the session was closed meanwhile", RefusalReason.SESSION_LOST)
                session.connection_id = connection_id
                job = CopyJob(self._device, self._sessions, session, source, request, indices, self._max_body_bytes)
                meta = await job.run()
                session.used_s = self._clock()
        except BaseException:
            if is_new:
                self._sessions.close(session.session_id)
            raise
        return meta

    def _open(self, request: CopyRequest, blocks: Span, may_open: bool) -> Session:
        if not request.create:
            refuse("unknown session", RefusalReason.SESSION_LOST)
        if not may_open:
            refuse("this peer is leaving", RefusalReason.DRAINING)
        try:
            cache = self._device.engine.new_cache()
        except UnsupportedCallError as exc:
            refuse(str(exc))
        cache.use(blocks)
        session = Session(session_id=request.session_id, span=blocks, cache=cache, rows=0, used_s=self._clock())
        self._sessions.open(session)
        return session

    @asynccontextmanager
    async def _source(self, request: CopyRequest) -> AsyncIterator[Source]:
        source = request.source
        if source is None or source.peer_id == self._peer_id:
            if request.source_session_id == request.session_id:
                refuse("a session cannot be copied to itself")
            yield LocalSource(self.read, request)
            return
        if self._dialer is None or (self._needs_certificate and source.certificate_sha256 is None):
            refuse("this peer reads only peers whose certificate is named")
        try:
            record = _record_of(source)
        except ValueError as exc:
            refuse(f"the source is no peer's address: {exc}")
        try:
            connection = await self._dialer.dial(record)
        except PeerError as exc:
            text = f"the source cannot be reached: {exc}"
            raise PeerRefused(text, peer_id="", reason=RefusalReason.SESSION_LOST) from exc
        try:
            if not connection.knows_copies:
                refuse(f"peer '{short_id(source.peer_id)}' is too old to be read", RefusalReason.SESSION_LOST)
            yield RemoteSource(connection, request)
        finally:
            connection.close()


def _blocks_of(request: ReadRequest) -> Span | None:
    if request.start > request.end:
        refuse(f"blocks {request.start}:{request.end} are none")
    return Span(request.start, request.end) if request.start < request.end else None


def _record_of(source: CopySource) -> PeerRecord:
    """What a dialer takes. Raises `ValueError` for anything that is no address."""
    return PeerRecord(
        peer_id=source.peer_id,
        instance_id="",
        sequence=0,
        model="",
        model_key="",
        num_blocks=1,
        start=0,
        end=1,
        addresses=source.addresses,
        state=PeerState.ONLINE,
        certificate_sha256=source.certificate_sha256,
    )


@asynccontextmanager
async def _locked(session: Session, timeout_s: float) -> AsyncIterator[None]:
    try:
        await asyncio.wait_for(session.lock.acquire(), min(max(timeout_s, MIN_COPY_S), MAX_LOCK_S))
    except asyncio.TimeoutError as exc:
        text = "the session is in use"
        raise PeerRefused(text, peer_id="", reason=RefusalReason.BUSY, retry_after_s=1.0) from exc
    try:
        yield
    finally:
        session.lock.release()
