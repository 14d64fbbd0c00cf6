"""Copying sessions: between two peers in memory, within one, and everything that may be wrong about it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
from net.memory import client_connection, join

from remote_modules.errors import PeerRefused, PeerUnreachable, RefusalReason
from remote_modules.net.client_connection import ClientConnection
from remote_modules.peers import PeerRecord
from remote_modules.server.engine import Engine
from remote_modules.wire import messages
from remote_modules.wire.messages import CacheMeta, CopySource
from remote_modules.wire.tensors import encode_tensors

from .peer_support import ROW_BYTES, Peer, SessionDriver, crop, running_peer, select
from .tiny import HIDDEN_SIZE

NEW_ID = "session-that-is-new"
ELSEWHERE = CopySource("p" * 52, ("127.0.0.1:1",))


class Dialer:
    """Leads to one peer, or to nobody."""

    def __init__(self) -> None:
        self.target: Peer | None = None
        self.opened: list[ClientConnection] = []

    async def dial(self, record: PeerRecord) -> ClientConnection:
        accepted = None if self.target is None else self.target.handler.accept()
        if accepted is None:
            raise PeerUnreachable("nobody listens", peer_id=record.peer_id)
        connection = client_connection()
        join(connection, accepted)
        await connection.handshake(2.0)
        self.opened.append(connection)
        return connection

    async def aclose(self) -> None:
        """Nothing is held."""


class Pair:
    """Two peers of the same blocks; the second dials the first. A session of 2 x 5 tokens is at the first."""

    def __init__(self, first: Peer, second: Peer, dialer: Dialer) -> None:
        self.first, self.second, self.dialer = first, second, dialer
        self.clients: list[ClientConnection] = []
        self.source: SessionDriver

    async def open(self) -> None:
        self.clients = [await self.first.connect(), await self.second.connect()]
        self.source = SessionDriver(self.clients[0])
        await self.source.step(hidden(2, 5, 1))

    async def copy(self, *, at: int = 1, indices: dict[str, torch.Tensor] | None = None, **changes: Any) -> CacheMeta:
        metas, body = encode_tensors(indices or {})
        connection = self.clients[at]
        fields: dict[str, Any] = {
            "session_id": NEW_ID,
            "start": 1,
            "end": 3,
            "version": 0,
            "ops": (),
            "timeout_s": 2.0,
            "source_session_id": self.source.session_id,
            "source": ELSEWHERE if at else None,
            "create": True,
        }
        request = messages.CopyRequest(request_id=connection.new_request_id(), tensors=metas, **(fields | changes))
        output, _ = await connection.request(request, body, timeout_s=2.0)
        assert output.cache is not None
        return output.cache

    def driver(self, at: int, position: int) -> SessionDriver:
        """Goes on with the copy."""
        driver = SessionDriver(self.clients[at])
        driver.session_id, driver.position, driver.step_id = NEW_ID, position, 1
        return driver


def hidden(rows: int, tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, tokens, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))


@asynccontextmanager
async def pair_of(engine: Engine, **options: Any) -> AsyncIterator[Pair]:
    dialer = Dialer()
    async with running_peer(engine) as first, running_peer(engine, dialer=dialer, **options) as second:
        pair = Pair(first, second, dialer)
        dialer.target = first
        await pair.open()
        yield pair
        assert all(not connection.is_open for connection in dialer.opened)


async def refused(pair: Pair, reason: RefusalReason, text: str, **changes: Any) -> None:
    """The copy is refused, and leaves nothing behind."""
    before = pair.second.used_bytes, pair.second.num_sessions
    with pytest.raises(PeerRefused, match=text) as caught:
        await pair.copy(**changes)
    assert caught.value.reason is reason
    assert (pair.second.used_bytes, pair.second.num_sessions) == before


def test_copy_goes_on_as_the_original(engine: Engine) -> None:
    async def main() -> None:
        async with pair_of(engine) as pair:
            meta = await pair.copy()
            assert (meta.position, meta.rows, meta.version) == (5, 2, 0)
            assert meta.num_bytes > 0
            copy = pair.driver(1, 5)
            new = hidden(2, 1, 2)
            assert torch.equal(await copy.step(new), await pair.source.step(new))
            assert pair.second.used_bytes == pair.first.used_bytes

    asyncio.run(main())


def test_copy_within_a_peer_ends_where_it_is_told(engine: Engine) -> None:
    async def main() -> None:
        async with pair_of(engine) as pair:
            await pair.source.step(hidden(2, 3, 2))
            assert (await pair.copy(at=0, position=5)).position == 5
            fresh = SessionDriver(pair.clients[0])
            await fresh.step(hidden(2, 5, 1))
            new = hidden(2, 1, 3)
            assert torch.equal(await pair.driver(0, 5).step(new), await fresh.step(new))

    asyncio.run(main())


def test_operations_that_the_source_has_seen_are_done_to_an_older_copy(engine: Engine) -> None:
    async def main() -> None:
        async with pair_of(engine) as pair:
            await pair.copy()
            order = {"indices.rows": torch.tensor([1, 0, 1])}
            ops = (crop(4), select("indices.rows"))
            await pair.source.step(hidden(3, 2, 2), ops=ops, tensors=order, position=4)
            meta = await pair.copy(ops=(*ops, crop(1)), indices=order, create=False)  # the last one is still to come
            assert (meta.position, meta.rows, meta.version) == (6, 3, 2)
            new = hidden(3, 1, 3)
            assert torch.equal(await pair.driver(1, 6).step(new), await pair.source.step(new))
            assert pair.second.used_bytes == pair.first.used_bytes == 3 * ROW_BYTES

    asyncio.run(main())


def test_step_that_expects_other_operations_is_refused(engine: Engine) -> None:
    async def main() -> None:
        async with pair_of(engine) as pair:
            await pair.copy()
            with pytest.raises(PeerRefused, match="has seen 0 cache operations, the step expects 1") as caught:
                await pair.driver(1, 5).step(hidden(2, 1, 2), version=1)
            assert caught.value.reason is RefusalReason.SESSION_LOST

    asyncio.run(main())


def test_what_is_wrong_is_refused(engine: Engine) -> None:
    async def main() -> None:
        async with pair_of(engine) as pair:
            lost, bad = RefusalReason.SESSION_LOST, RefusalReason.BAD_REQUEST
            await refused(pair, lost, "unknown session", source_session_id="no-session-of-ours")
            await refused(pair, lost, "unknown session", create=False)
            await refused(pair, lost, "expected 1 to 1", version=1)
            await refused(pair, lost, "holds 5 tokens of version 0", position=6)
            await refused(pair, bad, "no peer's address", source=CopySource("p", ("not an address",)))
            await refused(pair, bad, "copied to itself", source=None, source_session_id=NEW_ID)
            await refused(pair, RefusalReason.NOT_SERVED, "not served here", start=0)
            pair.second.handler.start_draining()
            await refused(pair, RefusalReason.DRAINING, "is leaving")
            pair.dialer.target = None
            pair.second.handler.is_draining = False
            await refused(pair, lost, "cannot be reached")

    asyncio.run(main())


def test_copy_beyond_the_budget_is_refused_before_it_is_fetched(engine: Engine) -> None:
    async def main() -> None:
        async with pair_of(engine, budget_bytes=ROW_BYTES) as pair:
            await refused(pair, RefusalReason.OUT_OF_MEMORY, "KV cache needs")

    asyncio.run(main())


def test_source_that_was_closed_is_refused(engine: Engine) -> None:
    async def main() -> None:
        async with pair_of(engine) as pair:
            pair.first.handler.sessions.close(pair.source.session_id)
            await refused(pair, RefusalReason.SESSION_LOST, "unknown session")

    asyncio.run(main())


def test_tensors_of_another_shape_are_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    form = engine.cache_form(engine.model.span)
    read = type(form).read

    def lie(self: Any, cache: Any, blocks: Any, first: int, last: int) -> dict[str, torch.Tensor]:
        return {name: tensor[..., :-1].contiguous() for name, tensor in read(self, cache, blocks, first, last).items()}

    monkeypatch.setattr(type(form), "read", lie)

    async def main() -> None:
        async with pair_of(engine) as pair:
            await refused(pair, RefusalReason.SESSION_LOST, "must be torch.float32")

    asyncio.run(main())
