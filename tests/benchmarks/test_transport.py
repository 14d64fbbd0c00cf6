"""`benchmarks/transport.py` on few and small messages."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from benchmark_modules import load_benchmark

from remote_modules.net.loop import LoopThread


@pytest.fixture(scope="module")
def transport() -> Any:
    return load_benchmark("transport")


@contextmanager
def server_here(kind: str) -> Iterator[Any]:
    """The echo server in a thread of this process: another one would take seconds to start."""
    echo = sys.modules["_echo"]
    if kind == "raw":
        with echo.raw_server("127.0.0.1") as where:
            yield where
        return
    io = LoopThread("echo")
    site, digest = echo.new_site(kind, "127.0.0.1")
    yield echo.Where(kind, "127.0.0.1", io.run(site.start()), digest)
    io.run(site.aclose())
    io.stop()


def test_each_kind_of_connection_is_compared_with_raw_sockets(transport: Any) -> None:
    kinds = ["raw", "asyncio", "asyncio+tls"]
    found = transport.measure_loopback(kinds, rounds=1, count=3, large_bytes=300_000, server=server_here)
    assert {figure.kind for figure in found["small"]} == {*kinds, "asyncio, as a request"}
    assert {figure.kind for figure in found["large"]} == set(kinds)
    for figures in found.values():
        assert next(figure.ratio for figure in figures if figure.kind == "raw") == 1.0
        assert all(figure.ratio > 0 and figure.seconds > 0 for figure in figures)


@pytest.mark.parametrize(("ratio", "met"), [(1.19, 4), (1.51, 2)])
def test_slower_than_the_bars_is_seen(transport: Any, ratio: float, met: int) -> None:
    figures = [transport.Figure(kind, 1e-4, ratio) for kind in ("raw", "uvloop", "asyncio", "uvloop+tls")]
    bars, text = transport.report_loopback({"small": figures, "large": figures})
    assert len(bars) == 5
    assert sum(bar.is_met for bar in bars) == met + (ratio < 1.2)
    assert f"| uvloop | 100 | {ratio:.2f} | 0 | {ratio:.2f} |" in text


@pytest.mark.parametrize(("ratio", "is_met"), [(1.05, True), (1.06, False)])
def test_wait_after_a_pause_is_seen(transport: Any, ratio: float, is_met: bool) -> None:
    (bar,), text = transport.report_pause({"kept warm": (0.1, 0.1 * ratio, ratio)})
    assert bar.is_met is is_met
    assert f"| kept warm | 100.0 | {100 * ratio:.1f} | {ratio:.3f} |" in text
