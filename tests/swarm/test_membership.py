"""A swarm without trackers keeps running, takes clients and peers that know anybody, and returns to its trackers."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from remote_modules import ClientConfig, Server, ServerConfig
from remote_modules.plan.leases import DuplicateIdentityError
from remote_modules.testing import LocalSwarm

from .conftest import Connect, generate, noise, poll, prompt, run_locally, with_blocks

DEAD = ["http://127.0.0.1:9"]


@pytest.fixture
def own(checkpoint: Path) -> Iterator[LocalSwarm]:
    """A swarm whose tracker may be killed."""
    with LocalSwarm(checkpoint, spans=["0:3", "3:6", "6:8"]) as own:
        yield own


def known_to(address: str) -> int:
    """How many peers the peer at an address tells of, itself included."""
    with urllib.request.urlopen(f"http://{address}/api/v1/peers", timeout=5.0) as response:
        return len(json.load(response)["peers"])


def listed_at(url: str) -> int:
    return known_to(url.removeprefix("http://"))


def kill_tracker(swarm: LocalSwarm) -> None:
    assert swarm.tracker is not None
    swarm.tracker.kill()
    with pytest.raises(OSError, match="refused"):
        listed_at(swarm.tracker.url)


def test_client_that_knows_one_peer_finds_the_swarm_though_all_trackers_are_dead(
    connect: Connect, local: PreTrainedModel, own: LocalSwarm
) -> None:
    poll(lambda: all(known_to(address) == 3 for address in own.addresses), "the peers know each other")
    kill_tracker(own)
    layers = connect(trackers=own.trackers, peers=own.addresses[1:2])
    assert torch.equal(generate(with_blocks(local, layers), prompt()), generate(local, prompt()))
    assert layers.stats().failovers == 0


def test_client_that_knew_the_swarm_finds_it_again_from_disk(
    connect: Connect, local: PreTrainedModel, own: LocalSwarm, tmp_path: Path
) -> None:
    config = ClientConfig(peer_cache=tmp_path)
    first = connect(trackers=own.trackers, config=config)
    assert torch.equal(first(noise(1, 4)), run_locally(local, noise(1, 4)))
    first.close()
    kill_tracker(own)
    own.peers[0].kill()  # and what is on disk is outdated
    own.add("0:3", peers=(own.addresses[1],))
    poll(lambda: known_to(own.addresses[1]) == 4, "the newcomer told somebody; the dead one has its lease yet")
    second = connect(trackers=own.trackers, config=config)
    assert torch.equal(generate(with_blocks(local, second), prompt()), generate(local, prompt()))


def test_peer_that_knows_one_other_joins_though_all_trackers_are_dead(
    connect: Connect, local: PreTrainedModel, checkpoint: Path
) -> None:
    with LocalSwarm(checkpoint, spans=["0:5"], tracker=False) as own:
        own.add("5:8", trackers=tuple(DEAD), peers=(own.addresses[0],))
        poll(lambda: known_to(own.addresses[0]) == 2, "the newcomer told the peer that it knew")
        layers = connect(trackers=DEAD, peers=own.addresses[:1])
        assert torch.equal(layers(noise(1, 4)), run_locally(local, noise(1, 4)))


def test_generation_goes_on_while_the_tracker_restarts_and_all_peers_are_listed_again(
    connect: Connect, local: PreTrainedModel, own: LocalSwarm
) -> None:
    layers = connect(trackers=own.trackers, config=ClientConfig(refresh_interval_s=0.1))
    model = with_blocks(local, layers)
    assert torch.equal(generate(model, prompt()), generate(local, prompt()))
    kill_tracker(own)
    assert torch.equal(generate(model, prompt(seed=1)), generate(local, prompt(seed=1)))
    assert own.tracker is not None
    own.tracker.restart()
    poll(lambda: own.tracker is not None and listed_at(own.tracker.url) == 3, "all peers are listed again")
    assert torch.equal(generate(model, prompt(seed=2)), generate(local, prompt(seed=2)))
    assert layers.stats().failovers == 0


def test_copied_identity_stops_the_older_server_with_a_typed_reason(
    connect: Connect, local: PreTrainedModel, own: LocalSwarm, checkpoint: Path, tmp_path: Path
) -> None:
    options = {"blocks": "0:8", "mdns": False, "trackers": tuple(own.trackers), "announce_interval_s": 0.2}
    config = ServerConfig(model=str(checkpoint), identity_path=tmp_path / "key.pem", **options)  # type: ignore[arg-type]
    with Server(config) as old:
        failures = [old.failure]
        with Server(config) as new:
            assert new.peer_id == old.peer_id
            poll(lambda: old.failure is not None, "the older one is told")
            failures.append(old.failure)
            assert failures[0] is None
            assert isinstance(failures[1], DuplicateIdentityError)
            assert "give each server its own identity file" in str(failures[1])
            assert new.failure is None
            for peer in own.peers:
                peer.kill()
            layers = connect(trackers=own.trackers)
            assert torch.equal(layers(noise(1, 4)), run_locally(local, noise(1, 4)))
