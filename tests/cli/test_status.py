from __future__ import annotations

import time

import pytest

from remote_modules.cli.status import _short
from remote_modules.server.tracker import Tracker
from remote_modules.testing import LocalSwarm

from .program import NAMES, invoke


@pytest.mark.parametrize("arguments", [[], [NAMES.model]], ids=["all models", "one model"])
def test_json_describes_the_swarm(swarm: LocalSwarm, arguments: list[str]) -> None:
    (model,) = invoke("status", *arguments, "--tracker", swarm.trackers[0], "--no-mdns", "--json").json["models"]
    assert (model["model"], model["num_blocks"], model["num_peers"]) == (NAMES.model, 8, 2)
    assert (model["coverage"], model["weakest_block"], model["missing"]) == ([1] * 8, 0, [])
    assert [(peer["peer_id"], peer["span"], peer["state"], peer["addresses"]) for peer in model["peers"]] == [
        (peer.peer_id, str(peer.span), "online", [peer.address]) for peer in swarm.peers
    ]
    assert all(peer["decode_tokens_per_s"] > 0 for peer in model["peers"])


def test_peer_is_found_by_its_address_alone_and_names_the_others(swarm: LocalSwarm) -> None:
    deadline_s = time.monotonic() + 20.0
    coverage: list[int] = []
    while coverage != [1] * 8:  # peers come to know each other with their first announcements
        assert time.monotonic() < deadline_s, f"the peer does not name the other: coverage {coverage}"
        (model,) = invoke("status", "--peer", swarm.peers[1].address, "--no-mdns", "--json").json["models"]
        coverage = model["coverage"]
        assert coverage[3:] == [1] * 5
    assert model["missing"] == []


def test_table_shows_peers_and_the_weakest_block(swarm: LocalSwarm) -> None:
    text = invoke("status", "--tracker", swarm.trackers[0], "--no-mdns").out
    assert "coverage  11111111" in text
    assert "weakest block 0: 1 peer, no spare" in text
    for peer in swarm.peers:
        assert peer.peer_id[:6] in text
        assert peer.address in text


def test_missing_blocks_are_shown() -> None:
    with LocalSwarm(NAMES.model, spans=["0:3"], tracker=False) as alone:
        text = invoke("status", "--peer", alone.peers[0].address, "--no-mdns").out
    assert "blocks 3:8 are missing" in text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999, "999"), (14_329.6, "14.3k"), (10_991_766, "11M"), (2.5e12, "2.5T")]
)
def test_numbers_are_shortened(number: float, text: str) -> None:
    assert _short(number) == text


def test_nobody_there_says_who_was_asked() -> None:
    with Tracker() as tracker:
        outcome = invoke("status", "--tracker", tracker.url, "--no-mdns")
        assert (outcome.code, outcome.out) == (0, f"no peers found (asked: {tracker.url})\n")
        assert invoke("status", "--tracker", tracker.url, "--no-mdns", "--json").json == {"models": []}
