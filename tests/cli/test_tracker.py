from __future__ import annotations

import signal
import socket
import time
import urllib.request

import pytest

from .program import first_line, invoke, running, stop


def test_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} on 127.0.0.1 is in use" in invoke("tracker", "--port", str(port)).error


def test_unknown_storage_is_one_line() -> None:
    assert "storage must be 'memory' or a redis://" in invoke("tracker", "--port", "0", "--storage", "disk").error


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_tracker_runs_until_a_signal(number: signal.Signals, code: int) -> None:
    with running("tracker", "--port", "0", "--json") as process:
        online = first_line(process)
        assert online["event"] == "online"
        assert online["pid"] == process.pid
        with urllib.request.urlopen(f"{online['url']}/health", timeout=5.0) as answer:
            assert answer.status == 200
        began_s = time.monotonic()
        outcome = stop(process, number)
        assert time.monotonic() - began_s < 2.0
    assert (outcome.code, outcome.out, outcome.err.strip()) == (code, "", "")


def test_tracker_tells_people_where_it_is() -> None:
    with running("tracker", "--port", "0") as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(4)]
        url = lines[0].split()[1]
        assert lines[1].split() == ["page", f"{url}/"]
        assert lines[3] == f"  remote-modules serve MODEL --tracker {url}\n"
