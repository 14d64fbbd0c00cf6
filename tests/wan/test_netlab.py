"""Real processes on emulated hosts: a LAN that finds itself, and a WAN of 100 ms; run by ``make test-wan`` as root.

Each host is a network namespace; nothing leaves them. Certificates, pinning and mDNS are on as they are by default
outside loopback.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from remote_modules.model.checkpoint import BUILT_IN, built_in_path

NETLAB = Path(__file__).parents[3] / "shared" / "netlab"
sys.path.insert(0, str(NETLAB))

from netlab import Host, Link, Netlab  # noqa: E402

PROMPT = "The function returns a"
NUM_TOKENS = 16
STEPS_BYTES = 6000  # TLS, hello, prompt and a few tokens
RTT_S = 0.1
CLI = [sys.executable, "-m", "remote_modules"]


@pytest.fixture(scope="module")
def expected() -> str:
    tokenizer = AutoTokenizer.from_pretrained(built_in_path())
    model = AutoModelForCausalLM.from_pretrained(built_in_path())
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
    return str(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))


class Peers:
    """Processes of one lab."""

    def __init__(self, lab: Any) -> None:
        self.lab = lab
        self._processes: list[subprocess.Popen[str]] = []

    def close(self) -> None:
        """End them all, so that nobody is left to drain or to warn."""
        for process in self._processes:
            process.kill()
            process.communicate()

    def popen(self, host: str, command: list[str]) -> subprocess.Popen[str]:
        process: subprocess.Popen[str] = self.lab.popen(
            host, command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._processes.append(process)
        return process

    def serve(self, host: str, blocks: str, *options: str) -> dict[str, Any]:
        """Start a peer and wait until it is online."""
        command = [*CLI, "serve", BUILT_IN, "--blocks", blocks, "--host", self.lab.ip[host], "--threads", "1", "--json"]
        process = self.popen(host, [*command, *options])
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"peer on {host} said nothing"
        message: dict[str, Any] = json.loads(line)
        return message

    def generate(self, host: str, *options: str) -> dict[str, Any]:
        done = self.lab.run(
            host,
            [*CLI, "generate", BUILT_IN, "--prompt", PROMPT, "--max-new-tokens", str(NUM_TOKENS), "--json", *options],
            timeout=90,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        return result


@pytest.fixture
def lan() -> Iterator[Peers]:
    hosts = {"client": Host(lan="home"), "p1": Host(lan="home"), "p2": Host(lan="home")}
    with Netlab(hosts) as lab:
        peers = Peers(lab)
        yield peers
        peers.close()


@pytest.fixture
def wan() -> Iterator[Peers]:
    hosts = {"tracker": None, "client": Host(lan="a"), "p1": Host(lan="b"), "p2": Host(lan="c")}
    with Netlab(hosts, default=Link(delay_ms=1000 * RTT_S / 2, mbit=100)) as lab:
        peers = Peers(lab)
        yield peers
        peers.close()


def test_hosts_of_one_lan_find_each_other_by_mdns_alone(lan: Peers, expected: str) -> None:
    first = lan.serve("p1", "0:4")
    second = lan.serve("p2", "4:8")
    result = lan.generate("client")
    assert result["text"] == expected
    assert {first["peer_id"][:6], second["peer_id"][:6]} == {hop.split()[1] for hop in result["route"]}


def test_hosts_of_different_lans_meet_by_tracker_alone_over_100_ms(wan: Peers, expected: str) -> None:
    url = start_tracker(wan)
    wan.serve("p1", "0:4", "--tracker", url, "--no-mdns")
    wan.serve("p2", "4:8", "--tracker", url, "--no-mdns")
    result = wan.generate("client", "--tracker", url, "--no-mdns")
    assert result["text"] == expected
    hops = 2
    assert result["seconds"] >= NUM_TOKENS * hops * RTT_S  # every hop costs a round trip: the emulator was in the way
    assert result["failovers"] == 0


def test_peer_joins_by_mdns_within_3_seconds(lan: Peers) -> None:
    lan.serve("p1", "0:8")
    began_s = time.monotonic()
    done = lan.lab.run(
        "client", [sys.executable, "-c", LOOK], timeout=60, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 3.0, f"visible after {done.stdout} s, of {time.monotonic() - began_s:.1f} s in all"


LOOK = """
import asyncio, time
from remote_modules.discovery.merged import build_discovery
async def main():
    discovery = build_discovery(mdns=True)
    began_s = time.monotonic()
    while not await discovery.lookup(None):
        assert time.monotonic() - began_s < 30
    print(time.monotonic() - began_s)
    await discovery.aclose()
asyncio.run(main())
"""


def test_host_that_falls_silent_is_replaced_over_the_wan(wan: Peers, expected: str) -> None:
    url = start_tracker(wan)
    for host in ("p1", "p2"):
        wan.serve(host, "0:8", "--tracker", url, "--no-mdns")
    command = [*CLI, "generate", BUILT_IN, "--prompt", PROMPT, "--max-new-tokens", str(NUM_TOKENS), "--json"]
    client = wan.popen("client", [*command, "--tracker", url, "--no-mdns"])
    wan.lab.blackhole(busy_host(wan.lab, ("p1", "p2")))
    output, errors = client.communicate(timeout=90)
    assert client.returncode == 0, errors
    result = json.loads(output)
    assert result["text"] == expected
    assert result["failovers"] >= 1


def start_tracker(peers: Peers) -> str:
    url = f"http://{peers.lab.ip['tracker']}:8000"
    process = peers.popen("tracker", [*CLI, "tracker", "--host", peers.lab.ip["tracker"], "--port", "8000"])
    assert process.stdout is not None
    for line in process.stdout:
        if url in line:
            return url
    raise AssertionError("tracker ended before it said its URL")


def busy_host(lab: Any, hosts: tuple[str, ...]) -> str:
    """The host that the client has sent some steps to."""
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        counters = lab.counters()
        for host in hosts:
            if counters["client", host].tx_bytes >= STEPS_BYTES:
                return host
        time.sleep(0.02)
    raise AssertionError(f"the client sent none of {hosts} {STEPS_BYTES} bytes")
