"""What a tracker takes: memory for each peer, announcements per second, and a herd of peers after a restart.

    python benchmarks/tracker.py [--quick] [--only memory throughput herd restart]

memory      many announcements of many peers into the table of a tracker, in a process of its own: growth of resident
            memory for each live peer, and what is left when all leases have ended
throughput  signed announcements over HTTP against a bare aiohttp echo of the same bodies, in turns; per second of the
            server's own processor time, as the clients need the machine's cores too. An echo that verifies the
            signature, and does nothing else, says how much of the difference is that
herd        all peers announce to a tracker that has just started: spread as back-off spreads them, and all at once
restart     a tracker is killed (SIGKILL) under load and comes back: nobody is lost

Peers sign real records of ten blocks each. Clients are processes with many connections; a refusal (429) is obeyed, its
Retry-After included. Latency is of one HTTP exchange; "listed" is the time until the tracker has taken a peer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from remote_modules.config import TrackerConfig
from remote_modules.discovery.storage import MemoryStorage
from remote_modules.identity import Identity, verify_record
from remote_modules.net.loop import LoopThread
from remote_modules.peers import PeerRecord, PeerState, SignedRecord
from remote_modules.server.tracker import Tracker

NUM_CLIENTS = 2  # processes
INTERVAL_S = 15.0  # of announcing: what the back-off of peers grows to
DIGESTS = tuple(f"{number:032x}" for number in range(10))


def record_of(identity: Identity, sequence: int) -> PeerRecord:
    return PeerRecord(
        peer_id=identity.peer_id,
        instance_id=identity.peer_id[:16],
        sequence=sequence,
        model="organization/model-of-70-billion",
        model_key="5" * 32,
        num_blocks=80,
        start=10,
        end=20,
        addresses=("203.0.113.7:31330",),
        state=PeerState.ONLINE,
        block_digests=DIGESTS,
        certificate_sha256="c" * 64,
        dtype="bfloat16",
        prefill_tokens_per_s=12345.6,
        decode_tokens_per_s=123.4,
        free_kv_tokens=100_000,
        version="0.1.0",
    )


def bodies_of(numbers: Sequence[int], sequence: int) -> list[bytes]:
    """What so many peers post to announce themselves."""
    identities = (Identity.from_seed(number.to_bytes(32, "big")) for number in numbers)
    return [msgspec.json.encode(one.sign_record(record_of(one, sequence))) for one in identities]


# -------------------------------------------------------------------------------------------------- memory


def measure_memory(num_peers: int, num_rounds: int) -> dict[str, object]:
    """In a fresh process: bytes of resident memory for each peer. Signatures are made up: the table never looks."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_fill_table, (num_peers, num_rounds))


def _fill_table(num_peers: int, num_rounds: int) -> dict[str, object]:
    now_s = [0.0]
    storage = MemoryStorage(max_records=2 * num_peers, clock=lambda: now_s[0])
    decoder = msgspec.json.Decoder(SignedRecord)
    payload_bytes = 0

    async def announce(number: int, sequence: int) -> None:
        nonlocal payload_bytes
        identity = _Named(number)
        record = record_of(identity, sequence)  # type: ignore[arg-type]
        payload = msgspec.msgpack.encode(record)
        payload_bytes = len(payload)
        key, signature = number.to_bytes(32, "big"), random.randbytes(64)
        body = msgspec.json.encode(SignedRecord(payload=payload, public_key=key, signature=signature))
        signed = decoder.decode(body)
        await storage.announce(signed, msgspec.msgpack.decode(signed.payload, type=PeerRecord), 3 * INTERVAL_S)

    async def fill() -> tuple[int, float]:
        began_s = time.perf_counter()
        for sequence in range(num_rounds):
            for number in range(num_peers):
                await announce(number, sequence)
            now_s[0] += INTERVAL_S
        now_s[0] -= INTERVAL_S
        return await storage.count(), time.perf_counter() - began_s

    asyncio.run(announce(0, 0))
    now_s[0] = 1000.0
    asyncio.run(storage.count())
    base_bytes = _rss_bytes()
    num_live, seconds = asyncio.run(fill())
    full_bytes = _rss_bytes()
    now_s[0] += 100.0
    assert asyncio.run(storage.count()) == 0
    left_bytes = _rss_bytes()
    return {
        "announces": num_peers * num_rounds,
        "live_peers": num_live,
        "payload_bytes": payload_bytes,
        "bytes_per_peer": round((full_bytes - base_bytes) / num_live),
        "base_mib": round(base_bytes / 2**20, 1),
        "full_mib": round(full_bytes / 2**20, 1),
        "expired_mib": round(left_bytes / 2**20, 1),
        "left_of_base": round(left_bytes / base_bytes, 3),
        "us_per_announce": round(seconds / (num_peers * num_rounds) * 1e6, 1),
    }


@dataclass
class _Named:
    number: int

    @property
    def peer_id(self) -> str:
        return f"{self.number:052d}"


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# -------------------------------------------------------------------------------------------------- servers


class ServerProcess:
    """A tracker, or an echo, in a process of its own; `restart` comes back empty on the same port."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.port = 0
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        command = [sys.executable, __file__, "--serve", self.kind, "--port", str(self.port)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = json.loads(self._process.stdout.readline())["port"]

    def cpu_s(self) -> float:
        """Processor time that the process has had."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("cpu\n")
        self._process.stdin.flush()
        return float(json.loads(self._process.stdout.readline())["cpu_s"])

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate(timeout=10.0)


def serve(kind: str, port: int) -> None:
    """The process behind `ServerProcess`; ends with its standard input."""
    if kind in ("echo", "verify"):
        io = LoopThread("echo")
        port = io.run(_start_echo(port, verifies=kind == "verify"))
    else:
        config = TrackerConfig(
            port=port, max_records=200_000, max_announces_per_s=20_000.0 if kind == "open" else 2000.0
        )
        tracker = Tracker(config)
        tracker.start()
        port = int(tracker.url.rpartition(":")[2])
    print(json.dumps({"port": port}), flush=True)
    while sys.stdin.readline():
        usage = resource.getrusage(resource.RUSAGE_SELF)
        print(json.dumps({"cpu_s": usage.ru_utime + usage.ru_stime}), flush=True)
    os._exit(0)


async def _start_echo(port: int, *, verifies: bool) -> int:
    async def echo(request: web.Request) -> web.Response:
        body = await request.read()
        if verifies:
            verify_record(msgspec.json.decode(body, type=SignedRecord))
        return web.Response(body=body, content_type="application/json")

    app = web.Application()
    app.router.add_post("/api/v1/announce", echo)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=4096).start()
    return int(runner.addresses[0][1])


# -------------------------------------------------------------------------------------------------- clients


@dataclass
class Tally:
    """What happened to the announcements of one client process."""

    latencies_s: list[float] = field(default_factory=list)
    listed_s: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    num_lost: int = 0  # connections that broke or were refused

    def add(self, other: Tally) -> None:
        self.latencies_s += other.latencies_s
        self.listed_s += other.listed_s
        self.num_lost += other.num_lost
        for status, count in other.statuses.items():
            self.statuses[status] = self.statuses.get(status, 0) + count

    def summary(self) -> dict[str, object]:
        latencies = sorted(self.latencies_s)
        return {
            "listed": len(self.listed_s),
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "lost_connections": self.num_lost,
            "latency_p50_ms": round(1000 * statistics.median(latencies), 1),
            "latency_p99_ms": round(1000 * latencies[int(0.99 * (len(latencies) - 1))], 1),
            "latency_max_ms": round(1000 * latencies[-1], 1),
            "all_listed_s": round(max(self.listed_s), 2),
        }


class Link:
    """One keep-alive connection that posts a body and reads the answer."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def post(self, body: bytes) -> tuple[int, float]:
        """Status, and seconds of Retry-After. Raises `OSError` or `EOFError` if the server is gone."""
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        assert self._reader is not None
        head = f"POST /api/v1/announce HTTP/1.1\r\nHost: t\r\nContent-Length: {len(body)}\r\n"
        try:
            self._writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            answer = await self._reader.readuntil(b"\r\n\r\n")
            fields = dict(line.split(": ", 1) for line in answer.decode().lower().split("\r\n")[1:] if line)
            await self._reader.readexactly(int(fields["content-length"]))
        except (OSError, EOFError):
            self.close()
            raise
        return int(answer[9:12]), float(fields.get("retry-after", 0))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.transport.abort()
        self._writer = None


@dataclass(frozen=True, kw_only=True)
class Crowd:
    """The peers of one client process.

    Attributes:
        num_links: connections that they share; 0: each peer has one of its own.
        spread_s: their first announcements are spread over so many seconds.
        begin_unix_s: when all processes begin.
    """

    port: int
    numbers: Sequence[int]
    sequence: int
    num_links: int
    spread_s: float
    begin_unix_s: float

    def run(self) -> Tally:
        """Announce each peer until it is taken."""
        bodies = bodies_of(self.numbers, self.sequence)
        return asyncio.run(self._run(bodies))

    async def _run(self, bodies: Sequence[bytes]) -> Tally:
        tally, rng = Tally(), random.Random(self.numbers[0])
        links: asyncio.Queue[Link] = asyncio.Queue()
        for _ in range(self.num_links):
            links.put_nowait(Link(self.port))
        await asyncio.sleep(max(0.0, self.begin_unix_s - time.time()))
        await asyncio.gather(*(self._announce(body, links, tally, rng) for body in bodies))
        while not links.empty():
            links.get_nowait().close()
        return tally

    async def _announce(self, body: bytes, links: asyncio.Queue[Link], tally: Tally, rng: random.Random) -> None:
        await asyncio.sleep(rng.uniform(0.0, self.spread_s))
        own = Link(self.port)
        began_s = time.perf_counter()
        pause_s = 1.0
        while True:
            link = await links.get() if self.num_links else own
            asked_s = time.perf_counter()
            try:
                status, retry_s = await link.post(body)
            except (OSError, EOFError):
                tally.num_lost += 1
                wait_s, pause_s = rng.uniform(0.0, pause_s), min(2 * pause_s, INTERVAL_S)
            else:
                now_s = time.perf_counter()
                tally.latencies_s.append(now_s - asked_s)
                tally.statuses[status] = tally.statuses.get(status, 0) + 1
                if status == 200:
                    tally.listed_s.append(now_s - began_s)
                    break
                wait_s = retry_s * rng.uniform(1.0, 2.0)
            finally:
                if self.num_links:
                    links.put_nowait(link)
            await asyncio.sleep(wait_s)
        own.close()


def allow_many_connections() -> None:
    """Each peer of a herd has one of its own."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def run_crowd(port: int, num_peers: int, *, sequence: int, spread_s: float, num_links: int, lead_s: float) -> Tally:
    """``num_peers`` announce from `NUM_CLIENTS` processes."""
    begin_unix_s = time.time() + lead_s
    crowds = [
        Crowd(
            port=port,
            numbers=range(1 + start, 1 + num_peers, NUM_CLIENTS),
            sequence=sequence,
            num_links=num_links // NUM_CLIENTS,
            spread_s=spread_s,
            begin_unix_s=begin_unix_s,
        )
        for start in range(NUM_CLIENTS)
    ]
    total = Tally()
    with multiprocessing.get_context("spawn").Pool(NUM_CLIENTS) as pool:
        for tally in pool.map(Crowd.run, crowds):
            total.add(tally)
    return total


# -------------------------------------------------------------------------------------------------- scenarios


def measure_throughput(num_announces: int, num_rounds: int) -> dict[str, object]:
    """Bursts at tracker and echo in turns, over 64 shared connections."""
    servers = {kind: ServerProcess(kind) for kind in ("open", "echo", "verify")}
    rates: dict[str, list[float]] = {kind: [] for kind in servers}
    try:
        for server in servers.values():
            server.start()
        for round_number in range(num_rounds):
            for kind, server in servers.items():
                before_s = server.cpu_s()
                tally = run_crowd(
                    server.port, num_announces, sequence=2**41 + round_number, spread_s=0.0, num_links=64, lead_s=0.0
                )
                assert tally.statuses == {200: num_announces}, tally.statuses
                rates[kind].append(num_announces / (server.cpu_s() - before_s))
    finally:
        for server in servers.values():
            server.kill()
    tracker, echo, verify = (round(statistics.median(rates[kind])) for kind in ("open", "echo", "verify"))
    return {
        "announces_per_cpu_s": tracker,
        "echoes_per_cpu_s": echo,
        "verified_echoes_per_cpu_s": verify,
        "of_echo": round(statistics.median(a / b for a, b in zip(rates["open"], rates["echo"], strict=True)), 3),
        "of_verified_echo": round(
            statistics.median(a / b for a, b in zip(rates["open"], rates["verify"], strict=True)), 3
        ),
        "rounds": num_rounds,
    }


def measure_herd(num_peers: int, lead_s: float) -> dict[str, object]:
    """A fresh tracker for each: with back-off's jitter, at once over shared connections, at once with one each."""
    cases: dict[str, dict[str, Any]] = {
        "jittered": {"spread_s": INTERVAL_S, "num_links": 0},
        "at_once_256_links": {"spread_s": 0.0, "num_links": 256},
        "at_once_own_links": {"spread_s": 0.0, "num_links": 0},
    }
    results: dict[str, object] = {"peers": num_peers}
    for name, case in cases.items():
        server = ServerProcess("tracker")
        server.start()
        try:
            tally = run_crowd(server.port, num_peers, sequence=2**41, lead_s=lead_s, **case)
        finally:
            server.kill()
        assert len(tally.listed_s) == num_peers, f"{num_peers - len(tally.listed_s)} peers were never taken"
        results[name] = tally.summary()
    return results


def measure_restart(num_peers: int, down_s: float, lead_s: float) -> dict[str, object]:
    """SIGKILL while peers announce; how long until all of them have been taken."""
    server = ServerProcess("tracker")
    server.start()
    crowd = partial(run_crowd, server.port, num_peers, sequence=2**41, spread_s=4.0, num_links=0, lead_s=lead_s)
    try:
        return asyncio.run(_kill_under_load(server, crowd, down_s, lead_s, num_peers))
    finally:
        server.kill()


async def _kill_under_load(
    server: ServerProcess, crowd: Callable[[], Tally], down_s: float, lead_s: float, num_peers: int
) -> dict[str, object]:
    running = asyncio.get_running_loop().run_in_executor(None, crowd)
    await asyncio.sleep(lead_s + 2.0)
    server.kill()
    await asyncio.sleep(down_s)
    server.start()
    tally: Tally = await running
    assert tally.num_lost > 0, "the tracker was not killed under load"
    assert len(tally.listed_s) == num_peers, f"{num_peers - len(tally.listed_s)} peers were never taken"
    return {"peers": num_peers, "down_s": down_s, **tally.summary()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of it")
    parser.add_argument("--only", nargs="+", choices=("memory", "throughput", "herd", "restart"))
    parser.add_argument("--serve", choices=("tracker", "open", "echo", "verify"), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    allow_many_connections()
    if args.serve:
        serve(args.serve, args.port)
    scale = 10 if args.quick else 1
    lead_s = 4.0 if args.quick else 10.0  # starting the client processes and signing for all their peers
    scenarios: dict[str, Callable[[], dict[str, object]]] = {
        "memory": lambda: measure_memory(100_000 // scale, 10),
        "throughput": lambda: measure_throughput(10_000 // scale, 5 if args.quick else 9),
        "herd": lambda: measure_herd(10_000 // scale, lead_s),
        "restart": lambda: measure_restart(10_000 // scale, 2.0, lead_s),
    }
    result: dict[str, object] = {"cores": os.cpu_count()}
    for name, scenario in scenarios.items():
        if args.only is None or name in args.only:
            print(f"{name} ...", file=sys.stderr)
            result[name] = scenario()
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
