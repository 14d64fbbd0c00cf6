"""What is left out of a request because a peer has it, or is being sent it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
import torch

from remote_modules.client import adapter_uploads
from remote_modules.client.adapter_uploads import MAX_PARTS_AT_ONCE, MAX_TRIES, AdapterUploads, Named
from remote_modules.client.adapters import CallAdapter, HopAdapter
from remote_modules.client.stats import StatsRecorder
from remote_modules.errors import LocalProtocolError, PeerRefused, PeerUnreachable, RefusalReason
from remote_modules.model.adapter_content import part_digest
from remote_modules.model.adapter_entries import Lora
from remote_modules.model.adapters import AdapterSet
from remote_modules.net.client_connection import ClientConnection
from remote_modules.peers import PeerId
from remote_modules.spans import Span
from remote_modules.testing.virtual_time import run_virtual
from remote_modules.wire.messages import ADAPTER_PARTS_SINCE_MINOR, CallMeta

PEER = PeerId("a" * 52)
MAX_WAIT_S = 2.0


def connection(minor: int = ADAPTER_PARTS_SINCE_MINOR) -> ClientConnection:
    found = ClientConnection(
        PEER, nonce=b"n" * 32, certificate_sha256="", silence_timeout_s=2.0, max_body_bytes=1 << 20, software="test"
    )
    found._protocol.their_minor = minor
    return found


def lora(down: float = 1.0, up: float = 1.0) -> HopAdapter:
    tensors = (torch.full((2, 8), down), torch.full((8, 2), up))
    found = CallAdapter(AdapterSet((Lora(0, "proj", 0.5),), tensors)).part(Span(0, 1))
    assert found is not None
    return found


class Asked:
    """Requests of one kind: what each brought, and how it ends."""

    def __init__(self, takes_s: float = 0.0, errors: tuple[Exception, ...] = ()) -> None:
        self.brought: list[list[str]] = []
        self.num_named: list[int] = []
        self.begun_s: list[float] = []
        self._takes_s = takes_s
        self._errors = list(errors)

    async def __call__(self, call: CallMeta, brought: Named, *, is_first: bool) -> Named:
        assert is_first == (not self.brought)
        self.brought.append(sorted(brought))
        self.num_named.append(len(call.adapter_parts))
        self.begun_s.append(asyncio.get_running_loop().time())
        await asyncio.sleep(self._takes_s)
        if self._errors:
            raise self._errors.pop(0)
        return {}


MISSING = PeerRefused("no", peer_id=PEER, reason=RefusalReason.ADAPTER_MISSING)
ALL = ["adapter.0", "adapter.1", "adapter.2"]
CALL = CallMeta(1, 1)


async def unused(parts: dict[bytes, torch.Tensor]) -> None:
    raise AssertionError("a request can bring these parts itself")


def run(work: Coroutine[Any, Any, None]) -> None:
    run_virtual(work)


def new_uploads(**options: Any) -> AdapterUploads:
    return AdapterUploads(StatsRecorder(), max_wait_s=MAX_WAIT_S, **options)


def test_part_is_sent_once_and_only_what_changed_follows() -> None:
    async def main() -> None:
        uploads, link, asked = new_uploads(), connection(), [Asked() for _ in range(3)]
        for request, adapter in zip(asked, (lora(), lora(), lora(up=2.0)), strict=True):
            await uploads.send(link, adapter, CALL, request, unused)
        assert [request.brought for request in asked] == [[ALL], [[]], [["adapter.2"]]]
        assert [request.num_named for request in asked] == [[3], [0], [3]]
        assert uploads._stats.adapters_sent == 2

    run(main())


def test_requests_that_follow_on_the_same_connection_do_not_wait() -> None:
    async def main() -> None:
        uploads, link, asked = new_uploads(), connection(), [Asked(1.0), Asked(1.0)]
        await asyncio.gather(*(uploads.send(link, lora(), CALL, request, unused) for request in asked))
        assert [request.brought for request in asked] == [[ALL], [[]]]
        assert asked[0].begun_s == asked[1].begun_s

    run(main())


def test_requests_on_another_connection_wait_until_it_arrived() -> None:
    async def main() -> None:
        uploads, asked = new_uploads(), [Asked(1.0), Asked()]
        work = [
            uploads.send(link, lora(), CALL, one, unused)
            for link, one in zip((connection(), connection()), asked, strict=True)
        ]
        await asyncio.gather(*work)
        assert [request.brought for request in asked] == [[ALL], [[]]]
        assert asked[1].begun_s[0] - asked[0].begun_s[0] == pytest.approx(1.0)

    run(main())


def test_what_takes_too_long_on_another_connection_is_sent_again() -> None:
    async def main() -> None:
        uploads, asked = new_uploads(), [Asked(100.0), Asked()]
        work = [
            uploads.send(link, lora(), CALL, one, unused)
            for link, one in zip((connection(), connection()), asked, strict=True)
        ]
        await asyncio.gather(*work)
        assert [request.brought for request in asked] == [[ALL], [ALL]]
        assert asked[1].begun_s[0] - asked[0].begun_s[0] == pytest.approx(MAX_WAIT_S)

    run(main())


@pytest.mark.parametrize(
    "error", [PeerUnreachable("gone", peer_id=PEER), asyncio.CancelledError()], ids=["lost", "cut"]
)
def test_part_of_a_request_that_failed_is_sent_again(error: Any) -> None:
    async def main() -> None:
        uploads, link, failed, again = new_uploads(), connection(), Asked(errors=(error,)), Asked()
        with pytest.raises(type(error)):
            await uploads.send(link, lora(), CALL, failed, unused)
        await uploads.send(link, lora(), CALL, again, unused)
        assert (failed.brought, again.brought) == ([ALL], [ALL])

    run(main())


def test_peer_that_lost_an_adapter_gets_all_of_it_once() -> None:
    """1. Two requests name an adapter. 2. The peer lacks it. 3. One of them brings it, and the other follows."""

    async def main() -> None:
        uploads, link = new_uploads(), connection()
        await uploads.send(link, lora(), CALL, Asked(), unused)
        asked = [Asked(1.0, errors=(MISSING,)), Asked(1.0, errors=(MISSING,))]
        await asyncio.gather(*(uploads.send(link, lora(), CALL, request, unused) for request in asked))
        assert [request.brought for request in asked] == [[[], ALL], [[], []]]

    run(main())


def test_peer_that_never_keeps_it_is_given_up() -> None:
    async def main() -> None:
        asked = Asked(errors=(MISSING,) * 9)
        with pytest.raises(PeerRefused):
            await new_uploads().send(connection(), lora(), CALL, asked, unused)
        assert asked.brought == [ALL] * MAX_TRIES

    run(main())


def test_peer_that_offers_adapters_is_asked_first() -> None:
    async def main() -> None:
        has, lacks = Asked(), Asked(errors=(MISSING,))
        await new_uploads(offers=lambda _: True).send(connection(), lora(), CALL, has, unused)
        await new_uploads(offers=lambda _: True).send(connection(), lora(), CALL, lacks, unused)
        assert (has.brought, has.num_named) == ([[]], [3])
        assert (lacks.brought, lacks.num_named) == ([[], ALL], [3, 3])
        trained = Asked()
        await new_uploads(offers=lambda _: True).send(connection(), lora(), CallMeta(1, 1, seed=7), trained, unused)
        assert trained.brought == [ALL]

    run(main())


def test_adapter_that_only_peers_have_is_named_and_not_asked_for_again() -> None:
    async def main() -> None:
        adapter = CallAdapter.named(f"pirate@{'0' * 32}").part(Span(0, 1))
        assert adapter is not None
        asked = Asked(errors=(MISSING,))
        with pytest.raises(PeerRefused):
            await new_uploads().send(connection(), adapter, CALL, asked, unused)
        assert (asked.brought, asked.num_named) == ([[]], [0])

    run(main())


def test_older_peer_gets_it_whole_once_for_each_connection() -> None:
    async def main() -> None:
        uploads, asked = new_uploads(), [Asked() for _ in range(4)]
        links = [connection(minor=2), connection(minor=2)]
        for link, adapter, request in (
            (links[0], lora(), asked[0]),
            (links[0], lora(), asked[1]),
            (links[1], lora(), asked[2]),
            (links[1], lora(up=2.0), asked[3]),
        ):
            await uploads.send(link, adapter, CALL, request, unused)
        whole = ["adapter", "adapter.0", "adapter.1"]
        assert [request.brought for request in asked] == [[whole], [[]], [whole], [whole]]
        assert not any(sum(request.num_named) for request in asked)

    run(main())


def test_versions_of_long_ago_are_forgotten() -> None:
    async def main() -> None:
        uploads, link, again = new_uploads(), connection(), Asked()
        for number in range(100):
            await uploads.send(link, lora(up=float(number)), CALL, Asked(), unused)
        peer = uploads._peers[PEER]
        assert (len(peer._held), len(peer._coming)) == (64, 0)
        assert len(peer._users) == 2 + 2 * 64  # names and changed parts; entries and frozen parts once
        await uploads.send(link, lora(up=0.0), CALL, again, unused)
        assert again.brought == [["adapter.2"]]

    run(main())


def many(count: int) -> HopAdapter:
    """So many LoRA in one block: two tensors each."""
    tensors = tuple(torch.full((1, 8), float(number)) for number in range(2 * count))
    found = CallAdapter(AdapterSet(tuple(Lora(0, f"proj{n}", 0.5) for n in range(count)), tensors)).part(Span(0, 1))
    assert found is not None
    return found


class Brought:
    """What came ahead of requests."""

    def __init__(self) -> None:
        self.pieces: list[dict[bytes, torch.Tensor]] = []

    async def __call__(self, parts: dict[bytes, torch.Tensor]) -> None:
        await asyncio.sleep(1.0)
        self.pieces.append(parts)


def test_more_parts_than_one_message_holds_come_ahead_while_followers_wait() -> None:
    async def main() -> None:
        uploads, link, asked, brought = new_uploads(), connection(), [Asked(), Asked()], Brought()
        adapter = many(MAX_PARTS_AT_ONCE)
        await asyncio.gather(*(uploads.send(link, adapter, CALL, request, brought) for request in asked))
        assert adapter.content is not None
        assert [len(piece) for piece in brought.pieces] == [MAX_PARTS_AT_ONCE, MAX_PARTS_AT_ONCE, 1]
        assert {part for piece in brought.pieces for part in piece} == set(adapter.content.parts)
        assert all(part_digest(tensor) == part for piece in brought.pieces for part, tensor in piece.items())
        assert [request.brought for request in asked] == [[[]], [[]]]
        assert [request.num_named for request in asked] == [[len(adapter.content.parts)], [0]]
        assert uploads._stats.adapter_bytes == sum(tensor.nbytes for tensor in adapter.content.tensors)

    run(main())


def test_more_bytes_than_one_message_holds_come_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(adapter_uploads, "MAX_BYTES_AT_ONCE", 100)
        brought, asked = Brought(), Asked()
        await new_uploads().send(connection(), lora(), CALL, asked, brought)
        assert [[tensor.nbytes for tensor in piece.values()][-2:] for piece in brought.pieces][-1] == [64]
        assert len(brought.pieces) == 3
        assert asked.brought == [[]]

    run(main())


def test_older_peer_is_not_sent_more_than_it_takes() -> None:
    async def main() -> None:
        with pytest.raises(LocalProtocolError, match="1025 tensors for one peer, which speaks a protocol before 1.3"):
            await new_uploads().send(connection(minor=2), many(512), CALL, Asked(), unused)

    run(main())
