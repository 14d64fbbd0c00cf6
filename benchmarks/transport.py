"""Messages through our connections against raw blocking sockets: two processes, and a slow link after a pause.

    python benchmarks/transport.py [--rounds 9] [--count 300] [--parts loopback lab]

On loopback each kind of connection (asyncio, uvloop, both with TLS) has a server process of its own, which accepts as
a peer does. A round runs a burst of each in random order; a figure is the median over rounds of the ratio to the raw
burst of the same round. The second part, over 100 ms of the network laboratory, needs root: a message after a second of
silence against one without a pause.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from _echo import KINDS, Client, ConnectionClient, RawClient, Where, make_client
from _report import Bar, print_report, say, table

SMALL_BYTES = 16 * 1024
LARGE_BYTES = 64 * 1024 * 1024
SMALL_BARS = {"uvloop": 1.5, "asyncio": 2.0, "uvloop+tls": 2.5}
LARGE_BAR = 1.2
PAUSE_BAR = 1.05
PAUSE_S = 1.0
KEEP_WARM_S = 60.0
RTT_S = 0.1
MIN_ROUNDS = 5
SERVER = Path(__file__).with_name("_echo.py")


@dataclass(frozen=True, slots=True)
class Figure:
    """One kind of connection: median seconds of a round trip, and the median of its ratios to raw sockets."""

    kind: str
    seconds: float
    ratio: float


def kinds_here() -> list[str]:
    has_uvloop = importlib.util.find_spec("uvloop") is not None
    return [kind for kind in KINDS if has_uvloop or not kind.startswith("uvloop")]


@contextmanager
def echo_server(kind: str, popen: Any = subprocess.Popen, host: str = "127.0.0.1") -> Iterator[Where]:
    """A process that echoes until the block ends."""
    command = [sys.executable, str(SERVER), kind, "--host", host]
    process = popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Where(**json.loads(process.stdout.readline() or "{}"))
    finally:
        process.communicate("", timeout=10.0)


Server = Callable[[str], AbstractContextManager[Where]]


def compare(clients: dict[str, Client], *, rounds: int, count: int, seed: int = 0) -> list[Figure]:
    """Bursts of ``count`` round trips of each client in random order, in each of ``rounds``."""
    rng = Random(seed)
    medians: dict[str, list[float]] = {kind: [] for kind in clients}
    for kind in clients:
        clients[kind].seconds(max(3, count // 10))  # warms up
    for _ in range(rounds):
        for kind in rng.sample(sorted(clients), len(clients)):
            medians[kind].append(statistics.median(clients[kind].seconds(count)))
    raw = medians["raw"]
    return [
        Figure(
            kind, statistics.median(found), statistics.median(one / base for one, base in zip(found, raw, strict=True))
        )
        for kind, found in medians.items()
    ]


def measure_loopback(
    kinds: Sequence[str], *, rounds: int, count: int, large_bytes: int, server: Server = echo_server
) -> dict[str, list[Figure]]:
    with ExitStack() as stack:
        places = {kind: stack.enter_context(server(kind)) for kind in kinds}
        found = {}
        for name, num_bytes, per_round in (("small", SMALL_BYTES, count), ("large", large_bytes, 3)):
            clients = {kind: make_client(where, num_bytes) for kind, where in places.items()}
            if name == "small":
                plain = next(kind for kind in ("uvloop", "asyncio") if kind in places)
                clients[f"{plain}, as a request"] = ConnectionClient(places[plain], num_bytes, is_request=True)
            try:
                say(f"{name} messages of {num_bytes} bytes")
                found[name] = compare(clients, rounds=rounds, count=per_round)
            finally:
                for client in clients.values():
                    client.close()
        return found


def report_loopback(found: dict[str, list[Figure]]) -> tuple[list[Bar], str]:
    bars = [
        Bar(f"16 KiB, {figure.kind} / raw", figure.ratio, "<=", SMALL_BARS[figure.kind])
        for figure in found["small"]
        if figure.kind in SMALL_BARS
    ]
    bars += [
        Bar(f"64 MiB, {figure.kind} / raw", figure.ratio, "<=", LARGE_BAR)
        for figure in found["large"]
        if figure.kind in ("uvloop", "asyncio")
    ]
    rows = []
    large = {figure.kind: figure for figure in found["large"]}
    for small in found["small"]:
        other = large.get(small.kind)
        cells = ("", "") if other is None else (f"{other.seconds * 1e3:.0f}", f"{other.ratio:.2f}")
        rows.append((small.kind, f"{small.seconds * 1e6:.0f}", f"{small.ratio:.2f}", *cells))
    return bars, table(["", "16 KiB, µs", "÷ raw", "64 MiB, ms", "÷ raw"], rows)


def measure_pause(lab: Any, *, rounds: int) -> dict[str, tuple[float, float, float]]:
    """Seconds of a message without and with a pause before it, and their ratio, medians; by arm."""
    plain = kinds_here()[1]
    with ExitStack() as stack:
        raw, ours = (
            stack.enter_context(echo_server(kind, partial(lab.popen, "server"), lab.ip["server"]))
            for kind in ("raw", plain)
        )
        stack.enter_context(lab.inside("client"))
        connect = partial(ConnectionClient, ours, SMALL_BYTES, is_request=True)
        arms: dict[str, Callable[[], Client]] = {
            "raw": partial(RawClient, raw, SMALL_BYTES),
            "not kept warm": connect,
            "kept warm": partial(connect, keep_warm_s=KEEP_WARM_S),
        }
        found = {}
        for name, arm in arms.items():
            say(f"pauses, {name}")
            client = arm()  # not before: its loop stands still until its turn, and the server cuts off who is silent
            pairs = [pause_pair(client) for _ in range(rounds)]
            ratio = statistics.median(after / before for before, after in pairs)
            before_s, after_s = (statistics.median(column) for column in zip(*pairs, strict=True))
            found[name] = (before_s, after_s, ratio)
            client.close()
        return found


def pause_pair(client: Client) -> tuple[float, float]:
    """A message that follows others at once, and one after a pause."""
    client.seconds(3)
    before_s = statistics.median(client.seconds(3))
    return before_s, client.seconds(1, PAUSE_S)[0]


def report_pause(found: dict[str, tuple[float, float, float]]) -> tuple[list[Bar], str]:
    bar = Bar("after 1 s of silence / without a pause, 100 ms", found["kept warm"][2], "<=", PAUSE_BAR)
    rows = [
        (name, f"{before * 1e3:.1f}", f"{after * 1e3:.1f}", f"{ratio:.3f}")
        for name, (before, after, ratio) in found.items()
    ]
    return [bar], table(["100 ms, 16 KiB", "no pause, ms", "after 1 s, ms", "ratio"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description="messages through our connections against raw blocking sockets")
    parser.add_argument("--rounds", type=int, default=9, help=f"at least {MIN_ROUNDS}")
    parser.add_argument("--count", type=int, default=300, help="round trips of a burst")
    parser.add_argument("--parts", nargs="+", choices=("loopback", "lab"), default=["loopback", "lab"])
    options = parser.parse_args()
    if options.rounds < MIN_ROUNDS:
        parser.error(f"--rounds must be at least {MIN_ROUNDS}, got {options.rounds}")
    bars: list[Bar] = []
    texts = []
    result: dict[str, Any] = {}
    if "loopback" in options.parts:
        found = measure_loopback(kinds_here(), rounds=options.rounds, count=options.count, large_bytes=LARGE_BYTES)
        result["loopback"] = {name: [asdict(figure) for figure in figures] for name, figures in found.items()}
        more, text = report_loopback(found)
        bars += more
        texts.append(text)
    if "lab" in options.parts:
        from _lab import Link, Netlab

        with Netlab({"client": None, "server": None}, default=Link(delay_ms=RTT_S * 500, mbit=100)) as lab:
            pauses = measure_pause(lab, rounds=options.rounds)
        result["pause"] = pauses
        more, text = report_pause(pauses)
        bars += more
        texts.append(text)
    return print_report(result, bars, "\n\n".join(texts))


if __name__ == "__main__":
    sys.exit(main())
