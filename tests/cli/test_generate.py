from __future__ import annotations

import pytest

from remote_modules.testing import LocalSwarm

from .program import NAMES, invoke
from .reference import encode, generate_here, text_of

PROMPT = "The function returns a"


def test_json_equals_local_generation(swarm: LocalSwarm) -> None:
    where = ("--tracker", swarm.trackers[0], "--no-mdns")
    value = invoke("generate", NAMES.model, "--prompt", PROMPT, *where, "--max-new-tokens", "12", "--json").json
    assert value["token_ids"] == generate_here(encode(PROMPT), 12)
    assert value["num_tokens"] == 12
    assert value["text"].startswith(" ")
    assert value["route"] == [f"{peer.span} {peer.peer_id[:6]}" for peer in swarm.peers]
    assert (value["failovers"], value["replayed_tokens"]) == (0, 0)
    assert value["tokens_per_s"] > 0


def test_text_goes_to_stdout_and_all_else_to_stderr(swarm: LocalSwarm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMOTE_MODULES_TRACKERS", swarm.trackers[0])
    monkeypatch.setenv("REMOTE_MODULES_GENERATE_MAX_NEW_TOKENS", "6")
    outcome = invoke("generate", NAMES.model, "--prompt", PROMPT, "--no-mdns")
    assert outcome.code == 0
    assert outcome.out == text_of(generate_here(encode(PROMPT), 6)) + "\n"
    assert outcome.err.startswith(PROMPT)
    assert " => ".join(f"{peer.span} {peer.peer_id[:6]}" for peer in swarm.peers) in outcome.err
    assert "tokens/s (6 tokens in" in outcome.err


def test_sampling_is_repeated_by_its_seed(swarm: LocalSwarm) -> None:
    options = ("--tracker", swarm.trackers[0], "--no-mdns", "--max-new-tokens", "8", "--temperature", "1.5", "--json")
    ids = [invoke("generate", NAMES.model, "-p", PROMPT, *options, "--seed", seed).json["token_ids"] for seed in "112"]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["./nowhere", "-p", "x", "--tracker", "http://127.0.0.1:9"], "checkpoint folder ./nowhere does not exist"),
        ([NAMES.model, "-p", "", "--tracker", "http://127.0.0.1:9"], "the prompt is empty"),
        ([NAMES.model, "-p", "x"], "nowhere to look for peers"),
        ([NAMES.model, "-p", "x", "--tracker", "http://127.0.0.1:9"], "tracker http://127.0.0.1:9 is unreachable"),
        ([NAMES.model, "-p", "x", "--dtype", "int3", "--tracker", "http://127.0.0.1:9"], "dtype must be one of"),
        ([NAMES.model, "-p", "x", "--peer", "here"], "address must look like HOST:PORT, got 'here'"),
    ],
    ids=["folder", "prompt", "sources", "tracker", "dtype", "peer"],
)
def test_failure_is_one_line(arguments: list[str], text: str) -> None:
    assert text in invoke("generate", *arguments, "--no-mdns").error


def test_no_route_names_the_missing_blocks() -> None:
    with LocalSwarm(NAMES.model, spans=["0:3"], tracker=False) as alone:
        address = alone.peers[0].address
        error = invoke("generate", NAMES.model, "-p", "x", "--no-mdns", "--peer", address, "--wait-s", "0").error
    assert error.startswith("no route for blocks 3:8 of 'pydoc-2m': 1 peer known, none holds them")
    assert error.endswith(f"remote-modules serve pydoc-2m --blocks 3:8 --peer {address}")
