from __future__ import annotations

import json
import signal
import socket
import time
from pathlib import Path

import pytest

from remote_modules.cli import serve as serving
from remote_modules.config import ServerConfig
from remote_modules.spans import Span
from remote_modules.testing import LocalSwarm

from .program import NAMES, first_line, invoke, running, stop

NOWHERE = ("--tracker", "http://127.0.0.1:9", "--no-mdns")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--blocks", "4:2"], "blocks: span must satisfy"),
        (["--blocks", "0:4", "--num-blocks", "2"], "give blocks or num_blocks, not both"),
        (["--blocks", "7:9"], "span 7:9 is outside model 'pydoc-2m' of 8 blocks"),
        (["--dtype", "int3"], "dtype must be one of"),
        (["--quantization", "int1"], "quantization must be one of"),
        (["--adapter", "./nowhere"], "adapter folder ./nowhere does not exist"),
        (
            ["--adapter", "a b=./x"],
            "adapter must be a folder, a hub id or NAME=SOURCE with a plain name, got 'a b=./x'",
        ),
        (["--adapter", "a=./x", "--adapter", "a=./y"], "adapter folder ./x does not exist"),
        (["--device", "abacus"], "device must look like cpu, cuda or cuda:1, got 'abacus'"),
        (["--tracker", "tracker.example"], "tracker must be an http:// or https:// URL"),
        (["--announce", "here"], "announce_addresses: address must look like HOST:PORT"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_option_is_one_line(options: list[str], text: str) -> None:
    assert text in invoke("serve", NAMES.model, *NOWHERE, *options).error


def test_missing_folder_is_one_line() -> None:
    assert invoke("serve", "./nowhere", *NOWHERE).error == "checkpoint folder ./nowhere does not exist"


def test_pickled_weights_are_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    error = invoke("serve", str(tmp_path), *NOWHERE).error
    assert "has only pickled weights (pytorch_model.bin), which are never loaded" in error
    assert "save_pretrained" in error


def test_port_in_use_is_one_line(swarm: LocalSwarm) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        where = ("--tracker", swarm.trackers[0], "--no-mdns", "--blocks", "0:1", "--port", str(port))
        error = invoke("serve", NAMES.model, *where).error
    assert f"127.0.0.1:{port}" in error
    assert "--port" in error


def test_peer_serves_until_a_signal_and_keeps_its_identity(tmp_path: Path, swarm: LocalSwarm) -> None:
    options = ("--blocks", "0:2", "--threads", "1", "--identity", str(tmp_path / "key.pem"), "--json")
    peer_ids = set()
    for number, code in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
        where = ("--tracker", swarm.trackers[0], "--no-mdns")
        with running("serve", NAMES.model, *where, *options) as process:
            online = first_line(process)
            assert online.keys() == {"event", "peer_id", "address", "span", "pid"}
            assert (online["event"], online["span"], online["pid"]) == ("online", "0:2", process.pid)
            peer_ids.add(online["peer_id"])
            models = invoke("status", *where, "--json").json["models"]
            assert online["peer_id"] in {peer["peer_id"] for peer in models[0]["peers"]}
            outcome = stop(process, number)
        assert (outcome.code, outcome.out) == (code, "")
        assert outcome.err.splitlines()[-1] == "stopped"
        models = invoke("status", *where, "--json").json["models"]
        assert online["peer_id"] not in {peer["peer_id"] for peer in models[0]["peers"]}, "it must have withdrawn"
    assert len(peer_ids) == 1


def test_interrupt_while_starting_ends_it_quickly() -> None:
    with running("serve", NAMES.model, *NOWHERE, "--blocks", str(Span(0, 1))) as process:
        time.sleep(1.0)  # it imports torch now
        began_s = time.monotonic()
        outcome = stop(process, signal.SIGINT)
    assert outcome.code == 130
    assert time.monotonic() - began_s < 3.0
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("options", "kv_bytes", "activation_bytes"),
    [
        ((), None, None),
        (("--kv-gib", "0.5", "--activation-gib", "0.25"), 1 << 29, 1 << 28),
        (("--activation-budget", "0"), None, 0),
    ],
)
def test_budgets_are_given_in_gib(
    monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], kv_bytes: int | None, activation_bytes: int | None
) -> None:
    found: list[ServerConfig] = []
    monkeypatch.setattr(serving, "_run", lambda config, *_, **__: found.append(config))
    invoke("serve", NAMES.model, *NOWHERE, *options)
    assert (found[0].kv_budget_bytes, found[0].activation_budget_bytes) == (kv_bytes, activation_bytes)
