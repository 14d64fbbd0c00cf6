"""A peer as its operator sees it: it listens, chooses, announces and leaves."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tiny_models import WORKING
from transformers import AutoConfig, AutoModelForCausalLM

from remote_modules import Server, ServerConfig, Tracker
from remote_modules.discovery.tracker_client import TrackerClient
from remote_modules.errors import CheckpointError, RemoteModulesError, UnsupportedCallError
from remote_modules.model.checkpoint import BUILT_IN
from remote_modules.peers import PeerRecord, PeerState


def records(url: str) -> list[PeerRecord]:
    async def look() -> list[PeerRecord]:
        client = TrackerClient(url)
        try:
            return await client.lookup(None)
        finally:
            await client.aclose()

    return asyncio.run(look())


def config(tracker: Tracker, **options: object) -> ServerConfig:
    return ServerConfig(model=BUILT_IN, trackers=(tracker.url,), mdns=False, **options)  # type: ignore[arg-type]


def test_peers_that_choose_for_themselves_cover_the_model() -> None:
    with (
        Tracker() as tracker,
        Server(config(tracker, num_blocks=3)) as first,
        Server(config(tracker, num_blocks=3)) as second,
        Server(config(tracker, num_blocks=3)) as third,
    ):
        held = {block for server in (first, second, third) for block in server.span}
        assert held == set(range(8))
        assert {record.span for record in records(tracker.url)} == {first.span, second.span, third.span}


def test_peer_that_is_told_nothing_holds_all_that_fits() -> None:
    with Tracker() as tracker, Server(config(tracker)) as server:
        assert str(server.span) == "0:8"


def test_peer_announces_that_it_is_joining_and_then_its_measured_speed() -> None:
    seen: list[tuple[PeerState, float]] = []
    with Tracker() as tracker:

        def look(stage: str, fraction: float) -> None:
            if stage in ("loading", "online"):
                seen.extend((record.state, record.decode_tokens_per_s) for record in asked(tracker.url))

        with Server(config(tracker, blocks="2:5"), on_progress=look) as server:
            (record,) = records(tracker.url)
            assert record.peer_id == server.peer_id
            assert record.addresses == (server.address,)
            assert len(record.block_digests) == 3
            assert record.prefill_tokens_per_s > 0
    assert [state for state, _ in seen] == [PeerState.JOINING, PeerState.ONLINE]
    assert seen[0][1] == 0.0
    assert seen[1][1] > 0.0


def asked(url: str) -> list[PeerRecord]:
    """`records` from a thread whose loop is running."""
    found: list[PeerRecord] = []
    thread = threading.Thread(target=lambda: found.extend(records(url)))
    thread.start()
    thread.join(10.0)
    return found


def test_stopped_peer_is_withdrawn() -> None:
    with Tracker() as tracker:
        with Server(config(tracker, blocks="0:1")):
            assert len(records(tracker.url)) == 1
        assert records(tracker.url) == []


def test_port_in_use_is_said_before_anything_is_loaded() -> None:
    stages: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as taken, Tracker() as tracker:
        port = taken.getsockname()[1]
        server = Server(config(tracker, blocks="0:8", port=port), on_progress=lambda stage, _: stages.append(stage))
        with pytest.raises(RemoteModulesError, match=rf"cannot listen on 127.0.0.1:{port}: .*; choose another --port"):
            server.start()
    assert stages == []


def test_span_outside_the_model_is_refused() -> None:
    with (
        Tracker() as tracker,
        pytest.raises(ValueError, match=r"span 4:9 is outside model 'pydoc-2m' of 8 blocks \(0:8\)"),
    ):
        Server(config(tracker, blocks="4:9")).start()


@pytest.fixture(scope="module")
def sharing_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose blocks 4 and 5 read the keys and values of earlier ones."""
    known = WORKING["gemma3n_text"] | {
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "activation_sparsity_pattern": [0.0] * 6,
        "intermediate_size": [48] * 6,
    }
    folder = tmp_path_factory.mktemp("sharing")
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3n_text", **known)).save_pretrained(folder)
    return folder


ILLEGAL = (
    "blocks 0:4 cannot be served apart: the model shares keys and values across block 4; "
    "spans may begin and end at 0..2, 6"
)


def test_blocks_that_cannot_be_served_apart_are_refused_naming_the_legal_cuts(sharing_folder: Path) -> None:
    with Tracker() as tracker, pytest.raises(UnsupportedCallError) as caught:
        Server(ServerConfig(model=str(sharing_folder), blocks="0:4", trackers=(tracker.url,), mdns=False)).start()
    assert str(caught.value) == ILLEGAL


def test_serve_says_the_legal_cuts_in_one_line(sharing_folder: Path) -> None:
    arguments = ["serve", str(sharing_folder), "--blocks", "0:4", "--no-mdns"]
    done = subprocess.run(
        [sys.executable, "-m", "remote_modules", *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if "cannot be served apart" in line] == [f"error: {ILLEGAL}"]
    assert "Traceback" not in done.stderr


def test_peer_that_chooses_takes_blocks_that_share_keys_whole(sharing_folder: Path) -> None:
    with Tracker() as tracker:
        spans = []
        options: dict[str, object] = {"trackers": (tracker.url,), "mdns": False, "num_blocks": 4}
        with (
            Server(ServerConfig(model=str(sharing_folder), **options)) as first,  # type: ignore[arg-type]
            Server(ServerConfig(model=str(sharing_folder), **options)) as second,  # type: ignore[arg-type]
        ):
            spans = [str(first.span), str(second.span)]
        assert sorted(spans) == ["0:2", "2:6"]


def test_unknown_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        Server(ServerConfig(model=str(tmp_path / "nothing"), blocks="0:1", mdns=False)).start()


def test_questions_before_start_are_answered_by_what_to_do() -> None:
    server = Server(ServerConfig(model=BUILT_IN, blocks="0:1", mdns=False))
    for attribute in ("span", "address", "listening_address"):
        with pytest.raises(RemoteModulesError, match=r"not running; call start\(\) first"):
            getattr(server, attribute)
