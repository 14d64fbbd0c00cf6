"""`benchmarks/offloading.py` on tiny blocks, with peers in this process: every arm computes the same."""

from __future__ import annotations

import importlib
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmark_modules import load_benchmark
from transformers.utils import logging as transformers_logging

from remote_modules.server import load_plan
from remote_modules.testing import LocalSwarm


@pytest.fixture(scope="module")
def bench() -> Any:
    transformers_logging.disable_progress_bar()  # its monitor is a thread that stays
    return load_benchmark("offloading")


def helper(name: str) -> Any:
    """A module that the benchmark imports by its bare name."""
    return importlib.import_module(name)


@contextmanager
def nearby(profile: str, folder: Path, spans: Sequence[str], pace: object) -> Iterator[Any]:
    with LocalSwarm(folder, spans=spans) as swarm:
        yield SimpleNamespace(sources={"trackers": swarm.trackers})


def test_blocks_on_disk_in_memory_and_at_peers_decode_the_same_tokens(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "place_of", nearby)
    options = bench.parse(["--quick"])
    result = bench.measure_disk(options, tmp_path)  # ends if tokens differ
    found = result["profiles"]["loopback"]
    base, *others = found["arms"].values()
    assert list(found["arms"]) == [
        "accelerate disk offload", "reading the disk alone", "accelerate CPU offload (blocks fit)", "3 peers"
    ]  # fmt: skip
    assert base["ratio"] == 1.0
    assert all(arm["ratio"] == pytest.approx(arm["steps_per_s"] / base["steps_per_s"], rel=0.01) for arm in others)
    assert result["block_bytes"] == 3 * 4 * (4 * 64 * 64 + 3 * 64 * 176 + 2 * 64)
    assert "| loopback | 3 peers |" in bench.markdown(options, result)


def test_streamed_blocks_give_what_peers_with_repeated_blocks_give(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = helper("_offload_device")
    monkeypatch.setattr(load_plan, "load_span", helper("_repeated_peer").repeated(2))

    def begin(options: Any, folder: Path, links: Any, stack: Any) -> list[Any]:
        swarm = LocalSwarm(folder, spans=[], device="cpu")
        stack.enter_context(swarm)
        spans = device.spans_of(options.layers, options.peers)
        assert spans == ["0:2", "2:4", "4:6"]
        peers = [
            swarm.add(span, announce_addresses=(address,)) for span, address in zip(spans, links.addresses, strict=True)
        ]
        listening = [peer._running().listening_address for peer in peers]  # type: ignore[attr-defined]
        return [SimpleNamespace(first_line=lambda one=one: {"listening": one}) for one in listening]

    monkeypatch.setattr(device, "begin_peers", begin)
    options = bench.parse(["--quick", "--streamed", "--profiles", "loopback", "1g5"])
    measured, block_bytes = device.measure_device(options, tmp_path)
    assert measured.difference == 0.0
    assert {name: len(found) for name, found in measured.seconds.items()} == {
        "streamed from pinned memory": 1, "loopback": 1, "1g5": 1
    }  # fmt: skip
    assert block_bytes == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64)
    text = bench.markdown(options, bench.device_result(measured, block_bytes))
    assert "| 3 peers, 1g5 |" in text
    assert "6 layers of 0.000 GB, 2 of them distinct" in text


def test_each_layer_of_the_streamed_model_has_a_copy_of_its_own(bench: Any, tmp_path: Path) -> None:
    device, span = helper("_offload_device"), helper("_device_span")
    owner = span.build(span.config_of("tiny", 2, 64), torch.device("cpu"), tmp_path)
    streamed = device.Streamed(tmp_path, span.config_of("tiny", 4, 64), 2, torch.device("cpu"))
    hidden = torch.randn(1, 3, 64).bfloat16()
    cache = device.DynamicCache(config=streamed.model.config)
    with torch.inference_mode():
        once = owner(inputs_embeds=hidden, use_cache=False).last_hidden_state
        twice = owner(inputs_embeds=once, use_cache=False).last_hidden_state
        assert torch.equal(streamed.step(hidden, cache), twice)
    assert streamed.num_copied == 2 + 4
    assert len(cache) == 4


def test_bars_are_those_of_the_networks_on_an_accelerator(bench: Any) -> None:
    result = {"arms": {"loopback": {"ratio": 60}, "1g5": {"ratio": 44}, "100m100": {"ratio": 9.5}}}
    found = bench.bars_of(bench.parse(["--device", "cuda"]), result)
    assert [(bar.bar, bar.is_met) for bar in found] == [(45.0, False), (9.0, True)]
    for arguments in (["--device", "cuda", "--quick"], ["--device", "cuda", "--shape", "8b"], []):
        assert bench.bars_of(bench.parse(arguments), result) == []


def test_bytes_wait_for_those_before_them_then_for_the_delay() -> None:
    way = helper("_delayed_links")._Direction()
    way.delay_s, way.bytes_per_s = 5.0, 1000.0
    first_s, second_s, third_s = (way.due_s(num_bytes) for num_bytes in (2000, 500, 0))
    assert second_s - first_s == pytest.approx(0.5)
    assert third_s == second_s


def test_bytes_pass_a_link_both_ways_until_an_end_closes(bench: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, helper("_delayed_links").DelayedLinks(1) as links:
        links.aim([f"127.0.0.1:{server.getsockname()[1]}"])
        links.become(1000.0, 2.0)
        host, _, port = links.addresses[0].partition(":")
        near, (far, _) = socket.create_connection((host, int(port)), 10.0), server.accept()
        with near, far:
            near.sendall(b"there" * 40_000)
            near.shutdown(socket.SHUT_WR)
            assert b"".join(iter(lambda: far.recv(1 << 16), b"")) == b"there" * 40_000
            far.sendall(b"and back")
            far.close()
            assert b"".join(iter(lambda: near.recv(1 << 16), b"")) == b"and back"


@pytest.mark.parametrize("arguments", [["--rounds", "4"], ["--profiles", "moon"]])
def test_wrong_arguments_are_refused(bench: Any, arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse(arguments)
