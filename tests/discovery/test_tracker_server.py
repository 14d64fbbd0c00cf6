from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import msgspec
import pytest
from discovery_support import eventually, forge, make_signed
from records import make_identity, make_record

from remote_modules.config import TrackerConfig
from remote_modules.discovery.peers_answer import MAX_LOOKUP_BYTES
from remote_modules.discovery.tracker_server import TrackerServer
from remote_modules.errors import DiscoveryError
from remote_modules.peers import PeerState, SignedRecord

ALICE, BOB = make_identity(1), make_identity(2)


class Bench:
    """A started tracker whose clock is ``now_s``, and a plain HTTP client."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.session = session
        self.now_s = 0.0
        self.server: TrackerServer

    async def announce(self, signed: SignedRecord, **headers: str) -> tuple[int, Any]:
        return await self.post("/api/v1/announce", msgspec.json.encode(signed), **headers)

    async def post(self, path: str, body: bytes, **headers: str) -> tuple[int, Any]:
        async with self.session.post(self.server.url + path, data=body, headers=headers) as response:
            return response.status, msgspec.json.decode(await response.read())

    async def get(self, path: str) -> tuple[int, str]:
        async with self.session.get(self.server.url + path, allow_redirects=False) as response:
            return response.status, await response.text()

    async def num_peers(self) -> int:
        return len(msgspec.json.decode((await self.get("/api/v1/peers"))[1])["peers"])


def run(scenario: Callable[[Bench], Awaitable[None]], **config: Any) -> None:
    async def main() -> None:
        async with aiohttp.ClientSession() as session:
            bench = Bench(session)
            bench.server = TrackerServer(TrackerConfig(**{"lease_s": 90.0, **config}), clock=lambda: bench.now_s)
            await bench.server.start()
            try:
                await scenario(bench)
            finally:
                await bench.server.aclose()

    asyncio.run(main())


def test_announced_record_is_returned_as_it_was_signed() -> None:
    async def scenario(bench: Bench) -> None:
        signed = make_signed(ALICE)
        assert await bench.announce(signed) == (200, {"lease_s": 90.0, "reannounce_after_s": 0.0})
        _, text = await bench.get("/api/v1/peers?model_key=tiny-key")
        assert msgspec.convert(msgspec.json.decode(text)["peers"], list[SignedRecord]) == [signed]
        assert (await bench.get("/api/v1/peers?model_key=other"))[1] == '{"peers":[],"ages_s":[]}'

    run(scenario)


def test_lease_runs_on_the_trackers_own_clock() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.announce(make_signed(ALICE))
        bench.now_s = 89.0
        assert await bench.num_peers() == 1
        bench.now_s = 90.0
        assert await bench.num_peers() == 0

    run(scenario)


VALID = make_signed(ALICE, sequence=5)
BAD_BODIES = {
    "empty": b"",
    "no-json": b"\xff\xfe{{",
    "html": b"<html>",
    "list": b"[]",
    "missing-field": b'{"payload":""}',
    "unknown-field": msgspec.json.encode({**msgspec.to_builtins(VALID), "extra": 1}),
    "number-for-bytes": b'{"payload":1,"public_key":"","signature":""}',
    "no-base64": b'{"payload":"%%%","public_key":"","signature":""}',
    "deeply-nested": b"[" * 20_000,
    "empty-key": msgspec.json.encode(SignedRecord(payload=b"", public_key=b"", signature=b"")),
    "bad-signature": msgspec.json.encode(msgspec.structs.replace(VALID, signature=bytes(64))),
    "payload-no-record": msgspec.json.encode(
        SignedRecord(payload=b"\x80", public_key=ALICE.public_key, signature=ALICE.key.sign(b"rm-record-v3\x80"))
    ),
    "for-another-peer": msgspec.json.encode(BOB.sign_record(make_record(ALICE, sequence=9))),
    "altered": msgspec.json.encode(forge(VALID, make_record(ALICE, sequence=9, end=8))),
}


@pytest.mark.parametrize("path", ["/api/v1/announce", "/api/v1/withdraw"])
@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_body_is_refused_in_one_line_and_changes_nothing(name: str, path: str) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.announce(VALID)
        status, answer = await bench.post(path, BAD_BODIES[name])
        assert status == 400
        assert list(answer) == ["error"]
        assert answer["error"].isprintable()
        assert await bench.num_peers() == 1

    run(scenario)


def test_oversized_body_is_refused() -> None:
    async def scenario(bench: Bench) -> None:
        status, answer = await bench.post("/api/v1/announce", b"x" * 9000)
        assert status == 413
        assert "too large" in answer["error"]
        assert await bench.num_peers() == 0

    run(scenario, max_body_bytes=8192)


def test_compressed_body_is_not_unpacked() -> None:
    async def scenario(bench: Bench) -> None:
        status, _ = await bench.announce(VALID, **{"Content-Encoding": "gzip"})
        assert status == 200  # the header is ignored: the body is what its bytes say

    run(scenario)


def test_stale_sequence_is_refused_with_409() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.announce(make_signed(ALICE, sequence=5))
        status, answer = await bench.announce(make_signed(ALICE, sequence=5))
        assert status == 409
        assert "stale record" in answer["error"]

    run(scenario)


def test_replaced_instance_is_told_of_duplicate_identity() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.announce(make_signed(ALICE, instance_id="first"))
        await bench.announce(make_signed(ALICE, instance_id="second"))
        status, answer = await bench.announce(make_signed(ALICE, instance_id="first", sequence=2))
        assert status == 409
        assert "duplicate identity" in answer["error"]

    run(scenario)


def test_full_tracker_refuses_with_503() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.announce(make_signed(ALICE))
        status, answer = await bench.announce(make_signed(BOB))
        assert status == 503
        assert "tracker is full" in answer["error"]

    run(scenario, max_records=1)


def test_withdraw_needs_more_than_the_public_record() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.announce(make_signed(ALICE, sequence=5))
        status, _ = await bench.post("/api/v1/withdraw", msgspec.json.encode(make_signed(ALICE, sequence=5)))
        assert (status, await bench.num_peers()) == (409, 1)
        status, _ = await bench.post("/api/v1/withdraw", msgspec.json.encode(make_signed(ALICE, sequence=6)))
        assert (status, await bench.num_peers()) == (200, 0)
        status, _ = await bench.post("/api/v1/withdraw", msgspec.json.encode(make_signed(ALICE, sequence=7)))
        assert status == 200

    run(scenario)


@pytest.mark.parametrize("address", ["0.0.0.0:4000", "224.0.0.1:4000"])
def test_undialable_address_is_refused_with_its_reason(address: str) -> None:
    async def scenario(bench: Bench) -> None:
        status, answer = await bench.announce(make_signed(ALICE, addresses=(address,)))
        assert status == 400
        assert address in answer["error"]
        assert await bench.num_peers() == 0

    run(scenario)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/api/v1/announce", 405),
        ("POST", "/", 405),
        ("GET", "//evil.example", 404),
    ],
)
def test_unknown_request_is_answered_with_json_and_no_redirect(method: str, path: str, status: int) -> None:
    async def scenario(bench: Bench) -> None:
        async with bench.session.request(method, bench.server.url + path, allow_redirects=False) as response:
            assert response.status == status
            assert list(msgspec.json.decode(await response.read())) == ["error"]

    run(scenario)


def test_state_shows_coverage_and_peers_without_addresses() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.announce(make_signed(ALICE, end=8))
        await bench.announce(make_signed(BOB, end=2, state=PeerState.DRAINING, load=3))
        bench.now_s = 4.0
        _, text = await bench.get("/api/v1/state")
        (model,) = msgspec.json.decode(text)["models"]
        assert model["coverage"] == [1] * 8
        assert [(peer["span"], peer["load"], peer["age_s"]) for peer in model["peers"]] == [
            ("0:2", 3, 4.0),
            ("0:8", 0, 4.0),
        ]
        assert "127.0.0.1" not in text

    run(scenario)


def test_page_shows_coverage_and_escapes_names() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.announce(make_signed(ALICE, model="<img src=x onerror=alert(1)>"))
        async with bench.session.get(bench.server.url) as response:
            page = await response.text()
            assert response.content_type == "text/html"
            assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        assert "<img" not in page
        assert page.count('<i class="c1" title=') == 4
        assert page.count('<i class="c0" title=') == 4
        assert "no peer for blocks 4:8" in page

    run(scenario)


def test_health_and_metrics_with_bounded_labels() -> None:
    async def scenario(bench: Bench) -> None:
        assert await bench.get("/health") == (200, '{"status":"ok"}')
        await bench.announce(make_signed(ALICE))
        for number in range(20):
            await bench.get(f"/made-up-{number}")
        _, text = await bench.get("/metrics")
        assert "remote_modules_tracker_records 1.0" in text
        assert 'requests_total{route="/api/v1/announce",status="200"} 1.0' in text
        assert 'requests_total{route="other",status="404"} 20.0' in text
        assert "made-up" not in text

    run(scenario)


def test_lookup_in_a_huge_swarm_is_a_sample_that_clients_read() -> None:
    async def scenario(bench: Bench) -> None:
        digests = ("d" * 200,) * 60
        for number in range(90):
            signed = make_signed(make_identity(number), num_blocks=60, end=60, block_digests=digests)
            assert (await bench.announce(signed))[0] == 200
        _, text = await bench.get("/api/v1/peers")
        assert len(text) <= MAX_LOOKUP_BYTES + 64
        assert 40 < len(msgspec.json.decode(text)["peers"]) < 90

    run(scenario)


def test_refusal_of_a_stale_record_proves_it() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.announce(make_signed(ALICE, sequence=5))
        _, answer = await bench.announce(make_signed(ALICE, sequence=5))
        assert "is_duplicate" not in answer
        assert msgspec.convert(answer["newest"], SignedRecord) == make_signed(ALICE, sequence=5)
        await bench.announce(make_signed(ALICE, instance_id="second"))
        _, answer = await bench.announce(make_signed(ALICE, sequence=6))
        assert answer["is_duplicate"] is True
        assert msgspec.convert(answer["newest"], SignedRecord) == make_signed(ALICE, instance_id="second")

    run(scenario)


def test_lookup_tells_how_old_each_record_is() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.announce(make_signed(ALICE))
        bench.now_s = 12.5
        assert msgspec.json.decode((await bench.get("/api/v1/peers"))[1])["ages_s"] == [12.5]

    run(scenario)


def test_interval_and_lease_are_stretched_by_the_number_of_peers() -> None:
    async def scenario(bench: Bench) -> None:
        for number in range(1, 21):
            bench.now_s += 1.0
            status, answer = await bench.announce(make_signed(make_identity(number)))
            assert status == 200
        # 19 peers were there: at half of one announcement a second, they need 38 s for a round.
        assert answer == {"lease_s": 114.0, "reannounce_after_s": 38.0}
        bench.now_s += 113.0
        assert "tracker_records 1.0" in (await bench.get("/metrics"))[1]

    run(scenario, max_announces_per_s=1.0, lease_s=90.0)


def test_herd_is_told_to_come_back_and_all_are_taken_in_the_end() -> None:
    async def scenario(bench: Bench) -> None:
        waiting = {number: make_signed(make_identity(number)) for number in range(1, 31)}
        rounds = 0
        while waiting:
            statuses = {number: (await bench.announce(signed))[0] for number, signed in waiting.items()}
            assert set(statuses.values()) <= {200, 429}
            assert list(statuses.values()).count(200) == min(10, len(waiting))
            waiting = {number: signed for number, signed in waiting.items() if statuses[number] == 429}
            rounds += 1
            bench.now_s += 1.0
        assert rounds == 3
        assert await bench.num_peers() == 30

    run(scenario, max_announces_per_s=10.0)


def test_overload_says_when_to_come_back_in_header_and_text() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.announce(make_signed(ALICE))
        async with bench.session.post(
            f"{bench.server.url}/api/v1/announce", data=msgspec.json.encode(make_signed(BOB))
        ) as response:
            assert response.status == 429
            seconds = response.headers["Retry-After"]
            assert seconds in ("1", "2")
            assert msgspec.json.decode(await response.read()) == {
                "error": f"too many announcements at once; try again in {seconds} s"
            }

    run(scenario, max_announces_per_s=1.0)


def test_peer_that_announces_too_often_is_slowed_down_and_others_are_not() -> None:
    async def scenario(bench: Bench) -> None:
        statuses = [(await bench.announce(make_signed(ALICE, sequence=number)))[0] for number in range(1, 8)]
        assert statuses == [200] * 5 + [429] * 2
        assert (await bench.announce(make_signed(BOB)))[0] == 200
        bench.now_s += 1.0
        assert (await bench.announce(make_signed(ALICE, sequence=8)))[0] == 200

    run(scenario, identity_per_s=1.0)


def test_stranger_who_repeats_a_record_uses_up_nothing_of_its_peer() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.announce(make_signed(ALICE, sequence=1))
        for _ in range(20):
            assert (await bench.announce(make_signed(ALICE, sequence=1)))[0] == 409
        assert (await bench.announce(make_signed(ALICE, sequence=2)))[0] == 200

    run(scenario, identity_per_s=1.0)


def test_one_address_has_a_limit_and_this_machine_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(bench: Bench) -> None:
        for _ in range(20):
            assert (await bench.get("/health"))[0] == 200
        monkeypatch.setattr("remote_modules.discovery.tracker_server.source_key", lambda host: "203.0.113.7")
        statuses = [(await bench.get("/api/v1/peers"))[0] for _ in range(12)]
        assert statuses == [200] * 10 + [429] * 2
        bench.now_s += 0.5
        assert (await bench.get("/api/v1/peers"))[0] == 200

    run(scenario, source_per_s=2.0)


def test_port_in_use_is_one_line_with_the_fix() -> None:
    async def scenario(bench: Bench) -> None:
        second = TrackerServer(TrackerConfig(port=bench.server.port))
        with pytest.raises(DiscoveryError) as caught:
            await second.start()
        assert str(caught.value) == (f"port {bench.server.port} on 127.0.0.1 is in use; pass --port 0 for any free one")
        await second.aclose()

    run(scenario)


def test_foreign_host_is_named() -> None:
    async def main() -> None:
        with pytest.raises(DiscoveryError, match=r"cannot listen on port 0 on 192\.0\.2\.1"):
            await TrackerServer(TrackerConfig(host="192.0.2.1")).start()

    asyncio.run(main())


def test_restart_on_the_same_port_starts_empty() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.announce(make_signed(ALICE))
        await bench.server.aclose()
        await bench.server.aclose()
        bench.server = TrackerServer(TrackerConfig(port=bench.server.port), clock=lambda: bench.now_s)
        await bench.server.start()
        assert await bench.num_peers() == 0
        assert (await bench.announce(make_signed(ALICE)))[0] == 200

    run(scenario)


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"POST /api/v1/announce HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nslow", b"408"),
        (b"POST /api/v1/announce HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 20_000 + b"\r\n\r\n", b"400"),
        (b"\x00\x01\x02\r\n\r\n", b"400"),
    ],
    ids=["slow-body", "bad-chunk", "huge-header", "no-http"],
)
def test_broken_client_is_answered_and_leaves_no_traceback(
    request_bytes: bytes, status: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("remote_modules.discovery.tracker_replies.BODY_TIMEOUT_S", 0.1)

    async def scenario(bench: Bench) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", bench.server.port)
        writer.write(request_bytes)
        assert (await asyncio.wait_for(reader.readline(), 3.0)).split()[1] == status
        writer.close()
        await writer.wait_closed()
        assert (await bench.get("/health"))[0] == 200

    run(scenario)
    assert not [entry for entry in caplog.records if entry.exc_info]


def test_client_that_hangs_up_in_its_body_leaves_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(bench: Bench) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", bench.server.port)
        writer.write(b"POST /api/v1/announce HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf")
        await writer.drain()
        await bench.get("/health")
        writer.transport.abort()

        async def is_counted() -> bool:
            return 'route="/api/v1/announce",status="400"} 1.0' in (await bench.get("/metrics"))[1]

        await eventually(is_counted)

    run(scenario)
    assert not [entry for entry in caplog.records if entry.exc_info]
