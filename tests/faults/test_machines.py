"""Machines: memory, disks, devices, ports, addresses, processes. F18 to F23, F36, F43, F44, over real sockets."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from model import test_hub, test_partial, test_quantized_cache
from model.fake_hub import FakeHub
from server.peer_support import step_request
from swarm.conftest import generate as generate_with
from swarm.conftest import noise, poll, prompt, run_locally, with_blocks
from swarm.test_local_swarm import OURS, Events, announced
from transformers import LogitsProcessorList, PreTrainedModel

from remote_modules import ClientConfig, RemoteModulesError, RemoteSequential, Server, ServerConfig
from remote_modules.errors import PeerRefused, RefusalReason
from remote_modules.model.partial import PartialFiles
from remote_modules.model.ranges import RemoteFile
from remote_modules.model.shard_header import ShardHeader
from remote_modules.peers import PeerId, PeerState
from remote_modules.server import supervisor
from remote_modules.server.jobs import Priority
from remote_modules.testing import LocalSwarm

from .driving import gap_s, watching
from .recorder import FaultLog

NUM_NEW = 12
QUICK = ClientConfig(ban_s=0.1, refresh_interval_s=0.2)

# Fixtures of the tests that are run here again, to be counted.
hub = test_hub.hub
single_folder = test_hub.single_folder
cache = test_hub.cache


@pytest.fixture
def partial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, ...]]:
    """A hub, the folder of parts, and one file."""
    for source in test_partial.hub.__wrapped__(tmp_path, monkeypatch):  # type: ignore[attr-defined]
        remote: RemoteFile = test_partial.remote.__wrapped__(source)  # type: ignore[attr-defined]
        parts: PartialFiles = test_partial.parts.__wrapped__(tmp_path)  # type: ignore[attr-defined]
        header: ShardHeader = test_partial.header.__wrapped__(source, parts, remote)  # type: ignore[attr-defined]
        yield source, parts, remote, header


@pytest.fixture(autouse=True)
def no_thread_is_left() -> None:
    """Stands in for the fixture of all tests: device threads are replaced here, and `pair` watches them as a whole."""


@pytest.fixture(scope="module")
def pair(checkpoint: Path) -> Iterator[LocalSwarm]:
    """Two peers that hold all blocks."""
    before = set(threading.enumerate())
    with LocalSwarm(checkpoint, spans=["0:8", "0:8"]) as swarm:
        yield swarm
    poll(lambda: not [t for t in set(threading.enumerate()) - before if t.name.startswith(OURS)], "all threads ended")


@pytest.fixture
def remote(pair: LocalSwarm, checkpoint: Path) -> Iterator[RemoteSequential]:
    layers = RemoteSequential.from_swarm(checkpoint, trackers=pair.trackers, mdns=False, config=QUICK)
    yield layers
    layers.close()


def peer_in_use(swarm: LocalSwarm, layers: RemoteSequential) -> Any:
    peer_id = layers.stats().route[0].peer_id
    return next(peer for peer in swarm.peers if peer.peer_id == peer_id)


def generate_and(model: PreTrainedModel, action: Any, at: int = 4) -> torch.Tensor:
    events = LogitsProcessorList([Events(**{f"at_{at}": action})])
    return generate_with(model, prompt(rows=2), NUM_NEW, logits_processor=events)


# -------------------------------------------------------------------------------- device and memory


@pytest.mark.fault("F19")
@pytest.mark.parametrize("cause", [SystemExit("the thread ends"), torch.AcceleratorError("CUDA error: sticky")])
def test_dead_device_thread_is_replaced(
    cause: BaseException, pair: LocalSwarm, remote: RemoteSequential, local: PreTrainedModel, fault: FaultLog
) -> None:
    hit: list[Any] = []
    restarts: list[int] = []

    def die() -> None:
        raise cause

    def strike() -> None:
        hit.append(peer_in_use(pair, remote))
        server = hit[0]._server
        restarts.append(server._peer._supervisor.num_restarts)
        with pytest.raises((PeerRefused, RuntimeError)):
            server._io.run(server._peer._executor.run(Priority.DECODE, die))

    before_s = time.monotonic()
    model = with_blocks(local, remote)
    expected = generate_with(local, prompt(rows=2), NUM_NEW)
    assert torch.equal(generate_and(model, strike), expected)
    (peer,) = hit
    poll(lambda: peer._server._peer._supervisor.num_restarts > restarts[0], "the device is back")
    poll(lambda: peer.peer_id in announced(pair, PeerState.ONLINE), "it is back")
    back_s = time.monotonic() - before_s
    assert not peer._server._peer._executor.is_broken
    assert torch.equal(generate_with(model, prompt(rows=2), NUM_NEW), expected)
    fault.record(
        "F19",
        injected=f"{type(cause).__name__} in the device thread, in a generation",
        fired=len(hit),
        outcome="tokens identical; announced again",
        figure=back_s,
        unit="s",
        at_most=10.0,
    )


@pytest.mark.fault("F18")
def test_refusal_for_lack_of_memory_is_quick(checkpoint: Path, local: PreTrainedModel, fault: FaultLog) -> None:
    with LocalSwarm(checkpoint, spans=["0:8"], kv_budget_bytes=400_000) as swarm:
        layers = RemoteSequential.from_swarm(checkpoint, trackers=swarm.trackers, mdns=False)
        try:
            model = with_blocks(local, layers)
            tokens = prompt(6)
            expected = generate_with(local, tokens, 6)
            assert torch.equal(generate_with(model, tokens, 6), expected)
            with torch.no_grad():
                first = model(tokens, use_cache=True)
            handler = swarm.peers[0]._server._peer._handler  # type: ignore[attr-defined]
            held = handler.sessions.budget.used_bytes
            assert held > 0
            refused_s = layers._handle.io.run(time_of_refusal(layers, swarm.peers[0].peer_id))
            assert handler.sessions.budget.used_bytes == held
            assert torch.equal(generate_with(model, tokens, 6), expected)
            del first
        finally:
            layers.close()
    fault.record(
        "F18",
        injected="session of 8,000 tokens at a peer with a budget of 400 kB",
        fired=1,
        outcome="typed refusal before work; the other session keeps its bytes",
        figure=refused_s * 1000,
        unit="ms",
        at_most=100.0,
    )


async def time_of_refusal(layers: RemoteSequential, peer_id: PeerId) -> float:
    """Seconds until a peer says that it has no memory for a long prompt."""
    connection = await layers._handle.swarm.connect(peer_id, "step")
    message, body = step_request(
        connection.new_request_id(),
        {"hidden_states": noise(4, 2000)},
        start=0,
        end=8,
        create=True,
        session_id="too-long-for-this-peer",
    )
    began_s = time.perf_counter()
    with pytest.raises(PeerRefused, match="KV cache needs") as caught:
        await connection.request(message, body, timeout_s=10.0)
    assert caught.value.reason is RefusalReason.OUT_OF_MEMORY
    return time.perf_counter() - began_s


@pytest.mark.fault("F36")
def test_blocked_loop_of_a_peer_loses_nothing(
    pair: LocalSwarm, remote: RemoteSequential, local: PreTrainedModel, fault: FaultLog
) -> None:
    model = with_blocks(local, remote)
    blocked: list[Any] = []

    def block() -> None:
        peer = peer_in_use(pair, remote)
        peer.freeze()
        blocked.append(peer)
        threading.Timer(1.5, peer.thaw).start()

    generate_with(model, prompt(), 2)
    before = remote.stats()
    output = generate_and(model, block)
    after = remote.stats()
    assert torch.equal(output, generate_with(local, prompt(rows=2), NUM_NEW))
    fault.record(
        "F36",
        injected="event loop of the peer in use blocked for 1.5 s",
        fired=len(blocked),
        outcome="tokens identical",
        figure=(after.failovers - after.hedges_won) - (before.failovers - before.hedges_won),
        unit="failovers other than to a quicker peer",
        at_most=0,
    )


@pytest.mark.fault("F36")
def test_loop_of_a_computing_peer_is_not_blocked(
    pair: LocalSwarm, remote: RemoteSequential, local: PreTrainedModel, fault: FaultLog
) -> None:
    """A clock ticks on the peer's event loop while the device computes and large answers are sent."""
    late_s: list[float] = []

    async def tick() -> None:
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + 0.005
            await asyncio.sleep(0.005)
            late_s.append(loop.time() - due_s)

    remote(noise(1, 2))
    io = peer_in_use(pair, remote)._server._io
    ticking = asyncio.run_coroutine_threadsafe(tick(), io.loop)
    for _ in range(6):
        output = remote(noise(4, 1000))
    ticking.cancel()
    torch.testing.assert_close(output, run_locally(local, noise(4, 1000)))
    fault.record(
        "F36",
        injected="6 forwards of 4,000 tokens; lag of the peer's loop, 99th percentile",
        fired=6,
        outcome="computing and copying are off the loop",
        figure=1000 * sorted(late_s)[int(0.99 * len(late_s))],
        unit="ms",
        at_most=50.0,
    )


# -------------------------------------------------------------------------------- disks and the hub


@pytest.mark.fault("F20")
def test_disk_that_fills_up_in_a_download_costs_a_message(
    partial: tuple[Any, ...], tmp_path: Path, fault: FaultLog
) -> None:
    source, parts, remote, header = partial
    test_partial.test_disk_that_fills_up_on_the_way_leaves_nothing_usable_and_goes_on_later(
        source, parts, remote, header, tmp_path
    )
    fault.record(
        "F20",
        injected="file size limit in the middle of a download",
        fired=1,
        outcome="no half file used; the next attempt asks for the rest only",
        figure=0,
        unit="half files",
        at_most=0,
    )


@pytest.mark.fault("F20")
def test_full_disk_harms_neither_log_nor_cache(
    pair: LocalSwarm,
    remote: RemoteSequential,
    local: PreTrainedModel,
    fault: FaultLog,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    test_quantized_cache.test_full_disk_is_logged_and_leaves_nothing_behind(tmp_path, monkeypatch, caplog)

    class FullDisk:
        fired = 0

        def write(self, text: str) -> int:
            FullDisk.fired += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def flush(self) -> None:
            """Nothing was written."""

    handler = logging.StreamHandler(FullDisk())
    logger = logging.getLogger("remote_modules")
    monkeypatch.setattr(logging, "raiseExceptions", False)  # as an operator of a service does
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.DEBUG)
    try:
        output = generate_with(with_blocks(local, remote), prompt(), 6)
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
    assert torch.equal(output, generate_with(local, prompt(), 6))
    fault.record(
        "F20",
        injected="ENOSPC from every write of the log, and from the cache of quantized blocks",
        fired=FullDisk.fired + 1,
        outcome="tokens identical, nothing left behind",
        figure=0,
        unit="failed requests",
        at_most=0,
    )


@pytest.mark.fault("F21")
def test_damaged_cache_files_are_never_used(
    partial: tuple[Any, ...], llama_folder: Path, tmp_path: Path, fault: FaultLog
) -> None:
    _, parts, remote, header = partial
    test_partial.test_damaged_part_is_removed_and_not_found(parts, remote, header, tmp_path)
    test_quantized_cache.test_damaged_block_is_quantized_again(
        test_quantized_cache.flip_one_bit, llama_folder, tmp_path / "quantized-cache"
    )
    fault.record(
        "F21",
        injected="one bit flipped in a downloaded part, and in a quantized block",
        fired=2,
        outcome="fetched again; quantized again",
        figure=0,
        unit="used",
        at_most=0,
    )


@pytest.mark.fault("F22")
def test_hub_that_is_gone_is_not_needed(
    hub: FakeHub, single_folder: Path, cache: Path, fault: FaultLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        test_hub.test_offline_parts_load_without_a_socket(hub, single_folder, cache, patch)
    fault.record(
        "F22",
        injected="HF_HUB_OFFLINE; every socket would fail",
        fired=1,
        outcome="loads from the cache; what is not there is named in one line",
        figure=0,
        unit="sockets",
        at_most=0,
    )


# -------------------------------------------------------------------------------- ports and addresses


@pytest.mark.fault("F23")
def test_port_in_use_is_told_in_one_line(checkpoint: Path, fault: FaultLog) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        server = Server(ServerConfig(model=str(checkpoint), blocks="0:1", port=port, mdns=False))
        with pytest.raises(RemoteModulesError, match="choose another --port") as caught:
            server.start()
    fault.record(
        "F23",
        injected="another program listens on the port",
        fired=1,
        outcome="error with the fix in its text",
        figure=len(str(caught.value).splitlines()),
        unit="lines",
        at_most=2,
    )


@pytest.mark.fault("F23")
def test_stranger_on_a_known_port_gets_no_request(checkpoint: Path, local: PreTrainedModel, fault: FaultLog) -> None:
    with LocalSwarm(checkpoint, spans=["0:8", "0:8"], links=True) as swarm:
        layers = RemoteSequential.from_swarm(checkpoint, trackers=swarm.trackers, mdns=False, config=QUICK)
        try:
            first, second = swarm.peers
            assert first.link is not None
            assert second.link is not None
            first.link.target, stranger = second.link.target, first  # another peer answers at the first one's address
            output = generate_with(with_blocks(local, layers), prompt(), 6)
            assert torch.equal(output, generate_with(local, prompt(), 6))
            used = {hop.peer_id for hop in layers.stats().route}
            handler = second._server._peer._handler  # type: ignore[attr-defined]
            assert used == {second.peer_id}
            assert stranger.peer_id not in used
            assert sum(handler.num_requests.values()) == layers.stats().steps
        finally:
            layers.close()
    fault.record(
        "F23",
        injected="another peer listens at an announced address",
        fired=1,
        outcome="its key is not the announced one: refused; tokens identical",
        figure=0,
        unit="requests sent to it",
        at_most=0,
    )


def connect_s(checkpoint: Path, local: PreTrainedModel, swarm: LocalSwarm, trackers: list[str]) -> float:
    """Seconds from nothing to the first token."""
    began_s = time.monotonic()
    layers = RemoteSequential.from_swarm(checkpoint, trackers=trackers, mdns=False)
    try:
        tokens = generate_with(with_blocks(local, layers), prompt(), 1)
        took_s = time.monotonic() - began_s
        assert torch.equal(tokens, generate_with(local, prompt(), 1))
    finally:
        layers.close()
    return took_s


@pytest.mark.fault("F44")
def test_broken_addresses_are_passed_over(checkpoint: Path, local: PreTrainedModel, fault: FaultLog) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    cases: list[tuple[str, dict[str, Any], list[str]]] = [
        ("IPv6 only", {"host": "::1"}, []),
        ("a tracker whose name does not resolve, and a good one", {}, ["http://tracker.invalid:8000"]),
    ]
    for name, options, more in cases:
        with LocalSwarm(checkpoint, spans=["0:8"], **options) as swarm:
            took_s = connect_s(checkpoint, local, swarm, [*more, *swarm.trackers])
            fault.record(
                "F44",
                injected=name,
                fired=1,
                outcome="first token identical",
                figure=took_s,
                unit="s",
                at_most=3.0,
            )
    with LocalSwarm(checkpoint, spans=[]) as swarm:
        with socket.create_server(("127.0.0.1", 0)) as free:
            good = free.getsockname()[1]
        swarm.add("0:8", port=good, announce_addresses=(f"[::1]:{port}", f"127.0.0.1:{port}", f"127.0.0.1:{good}"))
        took_s = connect_s(checkpoint, local, swarm, swarm.trackers)
    fault.record(
        "F44",
        injected="two dead addresses before the good one",
        fired=2,
        outcome="first token identical",
        figure=took_s,
        unit="s",
        at_most=3.0,
    )


# -------------------------------------------------------------------------------- processes

PROGRAM = """
import asyncio, atexit, os, sys, threading, time
ends_s = []
atexit.register(lambda: print(time.monotonic() - ends_s[0], flush=True))  # the first to be registered runs last
import torch
from transformers.utils import logging
logging.disable_progress_bar()
from remote_modules import load

torch.set_num_threads(1)
checkpoint, tracker = sys.argv[1:]
tokens = torch.tensor([[5, 9, 2, 33]])
options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(tokens))
model = load(checkpoint, trackers=[tracker], mdns=False)
first = model.generate(tokens, **options).tolist()

async def within_a_loop():  # as in a notebook
    return model.generate(tokens, **options).tolist()

for _ in range(2):
    assert asyncio.run(within_a_loop()) == first
found = []
threads = [threading.Thread(target=lambda: found.append(model.generate(tokens, **options).tolist())) for _ in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert found == [first, first]
child = os.fork()
if child == 0:
    again = load(checkpoint, trackers=[tracker], mdns=False)
    os._exit(0 if again.generate(tokens, **options).tolist() == first else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert model.generate(tokens, **options).tolist() == first
print(first, flush=True)
ends_s.append(time.monotonic())
# the interpreter ends with open connections and a cache that nobody closed
"""


@pytest.mark.fault("F43")
def test_forks_loops_threads_and_the_end_of_the_interpreter(
    pair: LocalSwarm, checkpoint: Path, local: PreTrainedModel, fault: FaultLog
) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error::ResourceWarning", "-c", PROGRAM, str(checkpoint), *pair.trackers],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )
    assert done.returncode == 0, done.stderr
    tokens, exit_s = done.stdout.splitlines()
    expected = generate_with(local, torch.tensor([[5, 9, 2, 33]]), 4)
    assert tokens == str(expected.tolist())
    assert "ResourceWarning" not in done.stderr
    fault.record(
        "F43",
        injected="two event loops, two threads, a fork, exit without closing",
        fired=5,
        outcome="tokens identical in each; no warning under -X dev; exit",
        figure=float(exit_s),
        unit="s",
        at_most=2.0,
    )


@pytest.mark.fault("F01", "F30", "F09")
def test_real_processes_are_killed_frozen_and_upgraded(
    checkpoint: Path, local: PreTrainedModel, fault: FaultLog
) -> None:
    expected = generate_with(local, prompt(rows=2), NUM_NEW)
    with LocalSwarm(checkpoint, spans=["0:8", "0:8"], mode="process", num_threads=1, drain_s=10.0) as swarm:
        layers = RemoteSequential.from_swarm(checkpoint, trackers=swarm.trackers, mdns=False, config=QUICK)
        model = with_blocks(local, layers)
        try:
            assert torch.equal(generate_with(model, prompt(rows=2), NUM_NEW), expected)
            for row, name, limit_s in (("F09", "SIGSTOP", 3.5), ("F01", "SIGKILL", 1.0), ("F30", "SIGTERM", 1.0)):
                hit: list[Any] = []

                def strike(name: str = name, hit: list[Any] = hit) -> None:
                    hit.append(peer_in_use(swarm, layers))
                    {"SIGKILL": hit[0].kill, "SIGSTOP": hit[0].freeze, "SIGTERM": hit[0].drain}[name]()

                before = layers.stats()
                with watching(model, time.monotonic) as times:
                    assert torch.equal(generate_and(model, strike), expected)
                after = layers.stats()
                assert after.failovers > before.failovers or name == "SIGTERM"  # it ends what it has begun
                (peer,) = hit
                if name == "SIGTERM":
                    assert peer.wait(20.0) == 0
                elif name == "SIGSTOP":
                    peer.thaw()
                else:
                    peer.restart()
                    poll(lambda: len(announced(swarm, PeerState.ONLINE)) == 2, "both are back")
                fault.record(
                    row,
                    injected=f"{name} of the process in use",
                    fired=len(hit),
                    outcome="tokens identical" + (", exit status 0" if name == "SIGTERM" else ""),
                    figure=gap_s(times),
                    unit="s",
                    at_most=limit_s,
                )
        finally:
            layers.close()


def test_back_off_of_the_supervisor_is_the_bar_of_the_matrix() -> None:
    assert (supervisor.MIN_BACKOFF_S, supervisor.MAX_BACKOFF_S) == (1.0, 60.0)
