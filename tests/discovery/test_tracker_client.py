from __future__ import annotations

import asyncio
import gzip
import logging
from collections.abc import Awaitable, Callable

import msgspec
import pytest
from aiohttp import web
from discovery_support import forge, http_server, make_signed
from records import make_identity, make_record

from remote_modules.discovery.base import OverloadedError
from remote_modules.discovery.known_peers import KnownPeers
from remote_modules.discovery.tracker_client import MAX_REANNOUNCE_S, TrackerClient
from remote_modules.errors import DiscoveryError
from remote_modules.peers import SignedRecord
from remote_modules.plan.leases import DuplicateIdentityError, StaleRecordError

ALICE, BOB = make_identity(1), make_identity(2)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class FakeTracker:
    """Answers every request with ``respond()`` and remembers which paths were asked for."""

    def __init__(self, respond: Handler) -> None:
        self.respond = respond
        self.asked: list[str] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path_qs)
        return await self.respond(request)


def run(respond: Handler, scenario: Callable[[TrackerClient, FakeTracker], Awaitable[None]]) -> None:
    async def main() -> None:
        tracker = FakeTracker(respond)
        async with http_server({"/{path:.*}": tracker.answer}) as address:
            client = TrackerClient(f"http://{address}/", timeout_s=2.0)
            try:
                await scenario(client, tracker)
            finally:
                await client.aclose()

    asyncio.run(main())


def text(body: str | bytes, *, status: int = 200, content_type: str = "application/json") -> Handler:
    async def respond(request: web.Request) -> web.StreamResponse:
        data = body if isinstance(body, bytes) else body.encode()
        return web.Response(status=status, body=data, content_type=content_type)

    return respond


def peers(*signed: SignedRecord | object) -> Handler:
    return text(msgspec.json.encode({"peers": signed}))


def fails(match: str) -> Callable[[TrackerClient, FakeTracker], Awaitable[None]]:
    async def scenario(client: TrackerClient, tracker: FakeTracker) -> None:
        with pytest.raises(DiscoveryError, match=match) as caught:
            await client.lookup("key")
        assert str(caught.value).isprintable()
        assert str(caught.value).startswith("tracker http://127.0.0.1:")
        with pytest.raises(DiscoveryError):
            await client.announce(make_signed(ALICE))

    return scenario


def test_html_answer_is_recognised_as_no_tracker() -> None:
    run(
        text("<html>hello", content_type="text/html"),
        fails(r"answered text/html instead of JSON \(status 200\); is this a remote-modules tracker\?"),
    )


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\x00\xff", b"[]", b'"peers"', b'{"peers":{}}', b'{"records":[]}', b"[" * 5000],
    ids=["empty", "cut", "binary", "list", "string", "object", "other-field", "nested"],
)
def test_json_of_another_shape_is_recognised_as_no_tracker(body: bytes) -> None:
    run(text(body), fails(r"answered JSON of another shape .*is this a remote-modules tracker\?"))


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirect_is_not_followed(status: int) -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, headers={"Location": "/internal"})

    async def scenario(client: TrackerClient, tracker: FakeTracker) -> None:
        await fails("answered with a redirect")(client, tracker)
        assert tracker.asked == ["/api/v1/peers?model_key=key", "/api/v1/announce"]

    run(respond, scenario)


def test_body_that_claims_a_gibibyte_is_not_read() -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.content_length = 2**30
        await response.prepare(request)
        return response

    run(respond, fails("answered with more than 1048576 bytes"))


def test_body_without_end_is_cut_off() -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        try:
            while True:
                await response.write(b" " * 65536)
        except ConnectionError:
            return response

    run(respond, fails("answered with more than 1048576 bytes"))


def test_gzip_bomb_is_not_unpacked() -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        bomb = gzip.compress(b" " * 50_000_000)
        return web.Response(body=bomb, headers={"Content-Encoding": "gzip", "Content-Type": "application/json"})

    run(respond, fails("answered JSON of another shape"))


def test_silent_tracker_times_out() -> None:
    async def main() -> None:
        release = asyncio.Event()

        async def respond(request: web.Request) -> web.StreamResponse:
            await release.wait()
            return web.Response()

        async with http_server({"/{path:.*}": respond}) as address:
            client = TrackerClient(f"http://{address}", timeout_s=0.2)
            with pytest.raises(DiscoveryError, match=r"did not answer within 0\.2 s"):
                await client.lookup(None)
            release.set()
            await client.aclose()

    asyncio.run(main())


def test_unreachable_tracker_is_named() -> None:
    async def main() -> None:
        client = TrackerClient("http://127.0.0.1:1")
        with pytest.raises(DiscoveryError, match=r"tracker http://127\.0\.0\.1:1 is unreachable"):
            await client.lookup(None)
        await client.aclose()

    asyncio.run(main())


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999", "http://", "http://a b", "http://" + "x" * 300])
def test_impossible_url_is_a_discovery_error(url: str) -> None:
    async def main() -> None:
        client = TrackerClient(url)
        with pytest.raises(DiscoveryError):
            await client.lookup(None)
        await client.aclose()

    asyncio.run(main())


def test_url_of_another_scheme_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="http:// or https://"):
        TrackerClient("ftp://tracker")


def test_tracker_that_is_gone_for_good_is_never_asked_again() -> None:
    async def scenario(client: TrackerClient, tracker: FakeTracker) -> None:
        for _ in range(2):
            with pytest.raises(DiscoveryError, match="gone for good"):
                await client.lookup(None)
        assert len(tracker.asked) == 1

    run(text("bye", status=410, content_type="text/html"), scenario)


def test_reason_of_a_refusal_is_passed_on_without_control_characters() -> None:
    run(
        text(msgspec.json.encode({"error": "no\nroom\x1b[2J"}), status=503),
        fails(r"refused: no\?room\?\[2J \(status 503\)"),
    )


def test_refusal_without_a_reason_is_an_error_too() -> None:
    run(text("{}", status=500), fails(r"refused: no reason given \(status 500\)"))


def test_invalid_records_are_dropped_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    good = make_signed(ALICE)
    forged = forge(make_signed(BOB), make_record(BOB, end=8))

    async def scenario(client: TrackerClient, tracker: FakeTracker) -> None:
        for _ in range(2):
            assert await client.lookup(None) == [make_record(ALICE)]

    with caplog.at_level(logging.WARNING):
        run(peers(forged, {"payload": "?"}, 7, good), scenario)
    assert [entry.message.split(" from ")[0] for entry in caplog.records] == ["invalid record dropped"]


def test_records_of_other_models_and_older_ones_are_left_out() -> None:
    async def scenario(client: TrackerClient, tracker: FakeTracker) -> None:
        assert await client.lookup("tiny-key") == [make_record(ALICE, sequence=3)]

    records = [make_signed(ALICE, sequence=number) for number in (2, 3, 1)]
    run(peers(*records, make_signed(BOB, model_key="other")), scenario)


def test_addresses_that_nobody_should_dial_are_dropped() -> None:
    async def scenario(client: TrackerClient, tracker: FakeTracker) -> None:
        assert [record.addresses for record in await client.lookup(None)] == [("10.0.0.1:4000",)]

    alice = make_signed(ALICE, addresses=("0.0.0.0:4000", "10.0.0.1:4000"))
    run(peers(alice, make_signed(BOB, addresses=("224.0.0.1:4000",))), scenario)


@pytest.mark.parametrize(
    ("url", "expected"),
    [("http://localhost:1", "127.0.0.1"), ("http://[::1]:1", "127.0.0.1"), ("https://9.9.9.9", "9.9.9.9")],
)
def test_source_of_records_is_the_address_of_the_tracker(url: str, expected: str) -> None:
    async def main() -> None:
        assert await TrackerClient(url)._find_source() == expected

    asyncio.run(main())


def test_model_key_is_quoted_in_the_request() -> None:
    async def scenario(client: TrackerClient, tracker: FakeTracker) -> None:
        assert await client.lookup("a&b=c d") == []
        assert tracker.asked == ["/api/v1/peers?model_key=a%26b%3Dc+d"]

    run(peers(), scenario)


@pytest.mark.parametrize(
    ("answer", "bounds"),
    [
        ({"lease_s": 90.0, "reannounce_after_s": 4.0}, (4.0, 30.0)),
        ({"lease_s": 900.0, "reannounce_after_s": 300.0}, (300.0, 300.0)),
        ({"lease_s": 90.0, "reannounce_after_s": 1e12}, (MAX_REANNOUNCE_S, MAX_REANNOUNCE_S)),
        ({"lease_s": 9.0}, (0.0, 3.0)),
        ({"lease_s": 90.0, "reannounce_after_s": -1.0}, None),
        ({"lease_s": 0.0}, None),
    ],
)
def test_interval_that_the_tracker_asks_for_is_returned(
    answer: dict[str, float], bounds: tuple[float, float] | None
) -> None:
    async def scenario(client: TrackerClient, tracker: FakeTracker) -> None:
        pace = await client.announce(make_signed(ALICE))
        assert (None if pace is None else (pace.shortest_s, pace.longest_s)) == bounds

    run(text(msgspec.json.encode(answer)), scenario)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("header", "seconds"), [("7", 7.0), ("soon", None), ("-1", None), (None, None), ("9" * 400, None)]
)
@pytest.mark.parametrize("content_type", ["application/json", "text/html"])
def test_overloaded_tracker_says_when_to_come_back(
    status: int, header: str | None, seconds: float | None, content_type: str
) -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        headers = {} if header is None else {"Retry-After": header}
        return web.Response(status=status, body=b'{"error":"busy"}', content_type=content_type, headers=headers)

    async def scenario(client: TrackerClient, tracker: FakeTracker) -> None:
        for call in (client.announce(make_signed(ALICE)), client.lookup(None)):
            with pytest.raises(OverloadedError, match=rf"refused: .* \(status {status}\)") as caught:
                await call
            assert caught.value.retry_after_s == seconds

    run(respond, scenario)


def refusal(newest: SignedRecord, *, is_duplicate: bool) -> Handler:
    return text(msgspec.json.encode({"error": "no", "is_duplicate": is_duplicate, "newest": newest}), status=409)


@pytest.mark.parametrize(("is_duplicate", "kind"), [(False, StaleRecordError), (True, DuplicateIdentityError)])
def test_refusal_with_proof_is_typed(is_duplicate: bool, kind: type[StaleRecordError]) -> None:
    newest = make_signed(ALICE, instance_id="second", sequence=9)

    async def scenario(client: TrackerClient, tracker: FakeTracker) -> None:
        with pytest.raises(kind, match=r"refused: no \(status 409\)") as caught:
            await client.announce(make_signed(ALICE))
        assert type(caught.value) is kind
        assert caught.value.newest == newest

    run(refusal(newest, is_duplicate=is_duplicate), scenario)


@pytest.mark.parametrize(
    "newest",
    [make_signed(BOB, sequence=9), forge(make_signed(ALICE), make_record(ALICE, sequence=9))],
    ids=["another-key", "forged"],
)
def test_tracker_cannot_stop_a_peer_without_proof(newest: SignedRecord) -> None:
    async def scenario(client: TrackerClient, tracker: FakeTracker) -> None:
        with pytest.raises(DiscoveryError, match="refused: no") as caught:
            await client.announce(make_signed(ALICE))
        assert not isinstance(caught.value, StaleRecordError)

    run(refusal(newest, is_duplicate=True), scenario)


def test_what_is_found_is_known_from_when_its_peer_was_known_to_live() -> None:
    known = KnownPeers(clock=lambda: 100.0)
    body = msgspec.json.encode({"peers": [make_signed(ALICE), make_signed(BOB)], "ages_s": [30.0, 95.0]})

    async def scenario(client: TrackerClient, tracker: FakeTracker) -> None:
        client._known = known
        assert len(await client.lookup(None)) == 2
        (lease,), now_s = known.leases(None)
        assert (lease.signed, now_s - lease.announced_at_s, lease.via) == (make_signed(ALICE), 30.0, "127.0.0.1")

    run(text(body), scenario)
