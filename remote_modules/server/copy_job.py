"""Making one session equal to another.

How much there is is read first, and room for it is reserved; then it is fetched in parts of bounded size, all of one
version. What comes is checked against what this peer's own blocks keep (`model.kv_state`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial

import msgspec
import torch

from remote_modules.errors import LocalProtocolError, PeerError, PeerRefused, RefusalReason
from remote_modules.model.kv_state import CacheForm, CacheImport
from remote_modules.net.client_connection import ClientConnection
from remote_modules.server.cache_device import CacheDevice
from remote_modules.server.checks import check_ops, refuse
from remote_modules.server.engine import apply_op
from remote_modules.server.sessions import Session, SessionTable
from remote_modules.spans import Span
from remote_modules.wire.messages import CacheMeta, CopyRequest, ReadRequest
from remote_modules.wire.parts import CacheOps

__all__ = ["CopyJob", "LocalSource", "RemoteSource", "Source"]

Named = dict[str, torch.Tensor]

MAX_TRIES = 3  # when the source goes on meanwhile
PART_BYTES = 16 * 1024 * 1024


class Source(ABC):
    """A session that is copied."""

    def __init__(self, request: CopyRequest) -> None:
        self._request = request

    @abstractmethod
    async def read(
        self, blocks: Span | None, first: int, last: int | None, version: int | None
    ) -> tuple[CacheMeta, Named]:
        """A part of it, as `ReadRequest` says; None for what belongs to no block.

        Raises:
            PeerRefused: it is not there, or not any more.
        """

    def _message(
        self, number: int, blocks: Span | None, first: int, last: int | None, version: int | None
    ) -> ReadRequest:
        request = self._request
        start, end = (request.start, request.start) if blocks is None else (blocks.start, blocks.end)
        return ReadRequest(
            number, request.source_session_id, start, end, first, last, version, max(0.1, request.timeout_s)
        )


class LocalSource(Source):
    """A session of this peer."""

    def __init__(self, read: Callable[[ReadRequest], Awaitable[tuple[CacheMeta, Named]]], request: CopyRequest) -> None:
        super().__init__(request)
        self._read = read

    async def read(
        self, blocks: Span | None, first: int, last: int | None, version: int | None
    ) -> tuple[CacheMeta, Named]:
        return await self._read(self._message(0, blocks, first, last, version))


class RemoteSource(Source):
    """A session of the peer at the other end of ``connection``."""

    def __init__(self, connection: ClientConnection, request: CopyRequest) -> None:
        super().__init__(request)
        self._connection = connection

    async def read(
        self, blocks: Span | None, first: int, last: int | None, version: int | None
    ) -> tuple[CacheMeta, Named]:
        message = self._message(self._connection.new_request_id(), blocks, first, last, version)
        try:
            output, tensors = await self._connection.request(message, [], timeout_s=message.timeout_s)
        except PeerRefused:
            raise
        except (PeerError, LocalProtocolError) as exc:
            text = f"the source is gone: {exc}"
            raise PeerRefused(text, peer_id="", reason=RefusalReason.NOT_SERVED) from exc
        if output.cache is None:
            refuse("the source gave no answer to a read", RefusalReason.NOT_SERVED)
        return output.cache, tensors


class _Moved(Exception):
    """The source went on between two parts."""


@dataclass(slots=True)
class CopyJob:
    """One copy; its session is locked meanwhile.

    Args:
        indices: of the request's cache operations.
        max_body_bytes: of a part.
        num_bytes: fetched so far.
    """

    device: CacheDevice
    sessions: SessionTable
    session: Session
    source: Source
    request: CopyRequest
    indices: Named
    max_body_bytes: int
    num_bytes: int = 0

    async def run(self) -> CacheMeta:
        """What the session holds then.

        Raises:
            PeerRefused: it cannot be done; the session holds what it held, or is closed.
        """
        for number in range(1, MAX_TRIES + 1):
            meta, shared = await self.source.read(None, 0, self.request.position, None)
            try:
                await self._fetch(meta, shared, self._ops_until(meta.version))
                break
            except _Moved as exc:
                if number == MAX_TRIES:
                    refuse(f"the source goes on faster than it is copied: {exc}", RefusalReason.SESSION_LOST)
        session = self.session
        return CacheMeta(session.cache.length, session.rows, session.version, self.num_bytes)

    def _ops_until(self, version: int) -> CacheOps:
        """The cache operations that the source has seen, and the session has not."""
        session, request = self.session, self.request
        num_seen = version - request.version
        takes_any = session.cache.length == 0 and request.position is None  # what it reads has seen them
        if num_seen < 0 or (num_seen > len(request.ops) and not takes_any):
            known = f"{request.version} to {request.version + len(request.ops)}"
            refuse(f"the source has seen {version} cache operations, expected {known}", RefusalReason.SESSION_LOST)
        if session.cache.length == 0:
            return ()
        num_done = session.version - request.version
        if not 0 <= num_done <= num_seen:
            text = f"the session has seen {session.version} cache operations, its source {version}"
            refuse(text, RefusalReason.SESSION_LOST)
        return request.ops[num_done:num_seen]

    async def _fetch(self, meta: CacheMeta, shared: Named, ops: CacheOps) -> None:
        """Do ``ops``, and take what the session lacks then. One that holds something changes at the end, at once."""
        session, cache = self.session, self.session.cache
        first, rows, most_rows = check_ops(
            msgspec.structs.replace(self.request, ops=ops),
            self.indices,
            position=cache.length,
            rows=session.rows,
            can_go_back=self.device.engine.model.stack.is_croppable,
        )
        last = meta.position if self.request.position is None else self.request.position
        if first > last or meta.rows < 1 or (first and rows != meta.rows):
            text = f"the session holds {rows} x {first} tokens, its source {meta.rows} x {last}"
            refuse(text, RefusalReason.SESSION_LOST)
        self._reserve(max(meta.rows, most_rows, session.rows), last)
        form = await self.device.form(session.span)
        taken = CacheImport(form, cache, meta.rows, last)
        parts: list[tuple[Named, Span | None, int, int]] = [(shared, None, 0, last)] if first < last else []
        for blocks, start, end in self._parts(form, meta.rows, first, last):
            tensors = await self._read(blocks, start, end, meta.version)
            if cache.length:
                parts.append((tensors, blocks, start, end))
            else:
                await self.device.run(partial(taken.add, tensors, blocks, start, end))
        self._check_open()
        try:
            await self.device.run(lambda: self._finish(ops, parts, taken))
        except BaseException:
            self.sessions.close(session.session_id)  # its cache may be half changed
            raise
        session.version = meta.version
        if not session.is_closed:
            self._reserve(meta.rows, last)

    def _finish(self, ops: CacheOps, parts: list[tuple[Named, Span | None, int, int]], taken: CacheImport) -> None:
        for op in ops:
            apply_op(self.session.cache, op, self.indices)
        for tensors, blocks, start, end in parts:
            taken.add(tensors, blocks, start, end)
        if parts:
            taken.finish()

    async def _read(self, blocks: Span, start: int, end: int, version: int) -> Named:
        try:
            _, tensors = await self.source.read(blocks, start, end, version)
        except PeerRefused as exc:
            if exc.reason is RefusalReason.SESSION_LOST:
                raise _Moved(str(exc)) from exc
            raise
        if any(torch.isnan(tensor).any() for tensor in tensors.values() if tensor.is_floating_point()):
            refuse("the source's cache holds values that are no numbers", RefusalReason.NOT_SERVED)
        self.num_bytes += sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
        return tensors

    def _reserve(self, rows: int, num_tokens: int) -> None:
        self._check_open()
        self.sessions.reserve(self.session, rows=rows, tokens=num_tokens)

    def _check_open(self) -> None:
        """A closed session must reserve nothing."""
        if self.session.is_closed:
            refuse("the session was closed meanwhile", RefusalReason.SESSION_LOST)

    def _parts(self, form: CacheForm, rows: int, first: int, last: int) -> Iterator[tuple[Span, int, int]]:
        """Blocks and tokens of each part: as many blocks as fit; one alone in several pieces, if all of it grows."""
        most = min(PART_BYTES, self.max_body_bytes)

        def size_of(blocks: Span) -> int:
            return self.sessions.budget.needed_bytes(blocks, rows=rows, capacity=last - first)

        start = self.session.span.start
        if first == last:
            return
        for block in self.session.span:
            if block > start and size_of(Span(start, block + 1)) > most:
                yield Span(start, block), first, last
                start = block
            alone = Span(block, block + 1)
            if block == start and size_of(alone) > most and form.only_grows(alone):
                num_tokens = max(1, (last - first) * most // size_of(alone))
                for token in range(first, last, num_tokens):
                    yield alone, token, min(token + num_tokens, last)
                start = block + 1
        if start < self.session.span.end:
            yield Span(start, self.session.span.end), first, last
