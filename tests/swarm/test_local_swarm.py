"""What `LocalSwarm` promises: handles to real peers, in threads or processes, that die, hang, leave and come back."""

from __future__ import annotations

import os
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from remote_modules import ClientConfig, RemoteModulesError, RemoteSequential
from remote_modules.errors import CheckpointError
from remote_modules.identity import verify_record
from remote_modules.peers import PeerState, SignedRecord
from remote_modules.testing import FaultyLink, LocalSwarm
from remote_modules.testing.local_peer import LocalPeer

from .conftest import Connect, generate, noise, poll, prompt, run_locally, with_blocks

PATIENT = ClientConfig(refresh_interval_s=0.2)  # with processes, a busy machine alone can silence one for half a second
IMPATIENT = ClientConfig(silence_timeout_s=0.5, connect_timeout_s=1.0, ban_s=0.1, refresh_interval_s=0.2)
NUM_NEW = 12
OURS = ("remote-modules-peer", "remote-modules-device", "remote-modules-tracker", "remote-modules-drain")


class Events(LogitsProcessor):
    """Does something before the given steps of a generation."""

    def __init__(self, **actions: Callable[[], object]) -> None:
        self._actions = {int(name.removeprefix("at_")): action for name, action in actions.items()}
        self._step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._step += 1
        self._actions.get(self._step, lambda: None)()
        return scores


@pytest.fixture(autouse=True)
def no_thread_is_left() -> None:
    """Stands in for the fixture of all tests: here peers restart in new threads, which `harmed` watches as a whole."""


@pytest.fixture(scope="module")
def harmed(checkpoint: Path, swarm: LocalSwarm) -> Iterator[LocalSwarm]:
    """Not `swarm`, whose threads run on."""
    before = set(threading.enumerate())
    with LocalSwarm(checkpoint, spans=["0:4", "4:8", "0:8"], drain_s=10.0) as harmed:
        yield harmed
    poll(
        lambda: not [name for name in names_of(set(threading.enumerate()) - before) if name.startswith(OURS)],
        "all threads ended",
    )


def names_of(threads: set[threading.Thread]) -> list[str]:
    return [thread.name for thread in threads]


@pytest.fixture
def pair(harmed: LocalSwarm) -> LocalSwarm:
    """Two peers and a spare, to be harmed; whatever the last test did to them is mended first."""
    assert harmed.tracker is not None
    try:
        announced(harmed)
    except OSError:
        harmed.tracker.restart()
    for peer in harmed.peers:
        try:
            peer.thaw()
        except RemoteModulesError:
            peer.restart()
    everybody = {peer.peer_id for peer in harmed.peers}
    poll(lambda: announced(harmed, PeerState.ONLINE) == everybody, "all are announced")
    return harmed


@pytest.fixture
def client(pair: LocalSwarm, connect: Connect) -> RemoteSequential:
    return connect(trackers=pair.trackers, config=IMPATIENT)


def generate_with(model: PreTrainedModel, **actions: Callable[[], object]) -> torch.Tensor:
    return generate(model, prompt(rows=2), NUM_NEW, logits_processor=LogitsProcessorList([Events(**actions)]))


def expected(local: PreTrainedModel) -> torch.Tensor:
    return generate(local, prompt(rows=2), NUM_NEW)


def used(layers: RemoteSequential, swarm: LocalSwarm) -> list[int]:
    """Indices of the peers of the latest pass."""
    ids = [peer.peer_id for peer in swarm.peers]
    return [ids.index(hop.peer_id) for hop in layers.stats().route]


class Answer(msgspec.Struct):
    """What a tracker answers to a lookup."""

    peers: list[SignedRecord]


def announced(swarm: LocalSwarm, *states: PeerState) -> set[str]:
    """Ids of the peers that the tracker knows, in some or any state."""
    with urllib.request.urlopen(f"{swarm.trackers[0]}/api/v1/peers", timeout=10) as answer:
        signed = msgspec.json.decode(answer.read(), type=Answer).peers
    return {record.peer_id for record in map(verify_record, signed) if not states or record.state in states}


# ------------------------------------------------------------------------------------- handles


def test_peers_come_in_the_order_of_their_spans(pair: LocalSwarm) -> None:
    assert [str(peer.span) for peer in pair.peers] == ["0:4", "4:8", "0:8"]
    assert len({peer.peer_id for peer in pair.peers}) == 3
    assert [peer.pid for peer in pair.peers] == [os.getpid()] * 3
    assert pair.addresses == [peer.address for peer in pair.peers]
    for peer in pair.peers:
        with urllib.request.urlopen(f"http://{peer.address}/health", timeout=10) as answer:
            assert answer.read() == b"ok\n"
    (url,) = pair.trackers
    assert url.startswith("http://127.0.0.1:")


def test_swarm_without_a_tracker_is_found_by_address(
    checkpoint: Path, connect: Connect, local: PreTrainedModel
) -> None:
    with LocalSwarm(checkpoint, spans=["0:8"], tracker=False) as swarm:
        assert swarm.tracker is None
        assert swarm.trackers == []
        layers = connect(trackers=(), peers=swarm.addresses)
        assert torch.equal(layers(noise(1, 4)), run_locally(local, noise(1, 4)))


def test_links_stand_in_front_of_peers(checkpoint: Path, connect: Connect, local: PreTrainedModel) -> None:
    with LocalSwarm(checkpoint, spans=["0:8"], links=True) as swarm:
        (peer,) = swarm.peers
        assert isinstance(peer.link, FaultyLink)
        assert peer.address == peer.link.address
        assert peer.link.target != peer.address
        layers = connect(trackers=swarm.trackers)
        assert torch.equal(layers(noise(1, 4)), run_locally(local, noise(1, 4)))


def test_options_go_to_every_peer_and_may_be_overridden(checkpoint: Path, connect: Connect) -> None:
    with LocalSwarm(checkpoint, spans=["0:1"], max_batch_tokens=4) as swarm:
        swarm.add("1:2", max_batch_tokens=8)
        layers = connect(trackers=swarm.trackers)
        layers[0:1](noise(1, 4))
        layers[1:2](noise(1, 8))
        with pytest.raises(RemoteModulesError, match="takes 4 tokens in a request"):
            layers[0:1](noise(1, 5))
        with pytest.raises(RemoteModulesError, match="takes 8 tokens in a request"):
            layers[1:2](noise(1, 9))


def test_bad_arguments_are_refused_before_anything_starts(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="mode must be 'thread' or 'process', got 'fork'"):
        LocalSwarm(checkpoint, spans=["0:1"], mode="fork")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="span must look like START:END"):
        LocalSwarm(checkpoint, spans=["0-1"])
    with pytest.raises(TypeError):
        LocalSwarm(checkpoint, ["0:1"])  # type: ignore[call-arg]


def test_swarm_that_does_not_start_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError), LocalSwarm(tmp_path / "nothing", spans=["0:1"]):
        pass
    with pytest.raises(TypeError, match="bogus"), LocalSwarm(checkpoint, spans=["0:1"], links=True, bogus=1):
        pass


def test_peer_that_cannot_be_added_is_not_listed(pair: LocalSwarm) -> None:
    with pytest.raises(ValueError, match="outside model"):
        pair.add("7:9")
    with pytest.raises(TypeError, match="bogus"):
        pair.add("7:8", bogus=1)
    assert len(pair.peers) == 3


def test_stopped_swarm_can_be_stopped_again(checkpoint: Path) -> None:
    swarm = LocalSwarm(checkpoint, spans=["0:1"])
    swarm.start()
    address = swarm.peers[0].address
    swarm.stop()
    swarm.stop()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=5)


def test_handle_of_a_dead_peer_says_so(pair: LocalSwarm) -> None:
    peer = pair.peers[2]
    peer.kill()
    peer.kill()
    for action in (peer.freeze, peer.thaw, peer.drain):
        with pytest.raises(RemoteModulesError, match="peer is not running; call restart"):
            action()


# ------------------------------------------------------------------------------------- death and return


def test_killed_peer_is_replaced_in_mid_sentence(
    pair: LocalSwarm, client: RemoteSequential, local: PreTrainedModel
) -> None:
    model = with_blocks(local, client)
    struck(pair, model, client, local, lambda peer: peer.kill())
    assert torch.equal(generate_with(model), expected(local))


def test_restarted_peer_keeps_its_identity_and_is_used_again(
    pair: LocalSwarm, client: RemoteSequential, local: PreTrainedModel
) -> None:
    first, second, spare = pair.peers
    spare.kill()
    client(noise(1, 2))
    peer_id = first.peer_id
    first.restart()
    assert first.peer_id == peer_id
    assert str(first.span) == "0:4"
    poll(lambda: peer_id in announced(pair), "the tracker knows it again")
    assert torch.equal(client(noise(1, 5)), run_locally(local, noise(1, 5)))
    assert used(client, pair) == [0, 1]
    spare.restart()
    second.kill()
    assert torch.equal(client(noise(1, 5)), run_locally(local, noise(1, 5)))


def test_frozen_peer_is_left_and_serves_after_its_thaw(
    pair: LocalSwarm, client: RemoteSequential, local: PreTrainedModel
) -> None:
    model = with_blocks(local, client)
    frozen: list[int] = []

    def freeze() -> None:
        frozen.append(used(client, pair)[0])
        pair.peers[frozen[0]].freeze()

    began_s = time.monotonic()
    assert torch.equal(generate_with(model, at_4=freeze), expected(local))
    assert time.monotonic() - began_s < 10
    assert client.stats().failovers >= 1
    assert frozen[0] not in used(client, pair)
    pair.peers[frozen[0]].thaw()
    for index, peer in enumerate(pair.peers):
        if index != frozen[0]:
            peer.kill()
    alone = pair.peers[frozen[0]].span
    output = client[alone.start : alone.end](noise(1, 4))
    assert torch.equal(output, run_locally(local, noise(1, 4), alone.start, alone.end))


def test_killing_a_frozen_peer_ends_it(pair: LocalSwarm, client: RemoteSequential) -> None:
    client(noise(1, 2))
    pair.peers[2].freeze()
    pair.peers[2].kill()
    client(noise(1, 2))


def test_added_peer_completes_the_swarm(checkpoint: Path, connect: Connect, local: PreTrainedModel) -> None:
    with LocalSwarm(checkpoint, spans=["0:4"]) as swarm:
        layers = connect(trackers=swarm.trackers, config=IMPATIENT)
        added = threading.Timer(0.3, lambda: swarm.add("4:8"))
        added.start()
        try:
            assert torch.equal(layers(noise(1, 4)), run_locally(local, noise(1, 4)))  # waits for it
        finally:
            added.join()
        assert [str(peer.span) for peer in swarm.peers] == ["0:4", "4:8"]


def test_drained_peer_hands_its_generation_over_and_ends(
    pair: LocalSwarm, client: RemoteSequential, local: PreTrainedModel
) -> None:
    model = with_blocks(local, client)
    left: list[int] = []

    def drain() -> None:
        left.append(used(client, pair)[0])
        pair.peers[left[0]].drain()

    def is_leaving() -> None:
        poll(
            lambda: pair.peers[left[0]].peer_id not in announced(pair, PeerState.ONLINE),
            "the tracker knows that it leaves",
        )
        poll(lambda: client.stats().handed_over_tokens > 0, "another peer has its cache")

    assert torch.equal(generate_with(model, at_3=drain, at_5=is_leaving), expected(local))
    assert (client.stats().failovers, client.stats().replayed_tokens) == (0, 0)
    assert left[0] not in used(client, pair)
    peer = pair.peers[left[0]]
    assert peer.wait(10.0) == 0
    poll(lambda: peer.peer_id not in announced(pair), "it took its record back")
    assert torch.equal(generate_with(model), expected(local))


# ------------------------------------------------------------------------------------- the tracker


def test_running_generation_needs_no_tracker(
    pair: LocalSwarm, client: RemoteSequential, local: PreTrainedModel
) -> None:
    assert pair.tracker is not None
    model = with_blocks(local, client)
    output = generate_with(
        model,
        at_2=pair.tracker.kill,
        at_6=lambda: time.sleep(0.3),  # the view of the swarm gets old
        at_9=pair.tracker.restart,
    )
    assert torch.equal(output, expected(local))
    assert client.stats().failovers == 0


def test_failover_needs_no_tracker(pair: LocalSwarm, client: RemoteSequential, local: PreTrainedModel) -> None:
    assert pair.tracker is not None
    model = with_blocks(local, client)
    client(noise(1, 2))
    pair.tracker.kill()
    output = generate_with(model, at_4=lambda: pair.peers[used(client, pair)[0]].kill())
    assert torch.equal(output, expected(local))
    assert client.stats().failovers >= 1


def test_restarted_tracker_is_full_within_an_announce_interval(pair: LocalSwarm, client: RemoteSequential) -> None:
    assert pair.tracker is not None
    everybody = {peer.peer_id for peer in pair.peers}
    assert announced(pair) == everybody
    url = pair.trackers[0]
    pair.tracker.kill()
    with pytest.raises(OSError, match="refused"):
        announced(pair)
    pair.tracker.restart()
    assert pair.trackers == [url]
    poll(lambda: announced(pair) == everybody, "all peers announced again", patience_s=2.0)  # the interval is 1 s
    client(noise(1, 2))


# ------------------------------------------------------------------------------------- processes


def test_processes_keep_the_same_contract(checkpoint: Path, connect: Connect, local: PreTrainedModel) -> None:
    with LocalSwarm(checkpoint, spans=["0:8", "0:8"], mode="process", num_threads=1, drain_s=10.0) as swarm:
        layers = connect(trackers=swarm.trackers, config=PATIENT)
        model = with_blocks(local, layers)
        pids = [peer.pid for peer in swarm.peers]
        assert len({*pids, os.getpid()}) == 3
        assert torch.equal(generate_with(model), expected(local))

        frozen = struck(swarm, model, layers, local, lambda peer: peer.freeze())
        frozen.thaw()
        victim = struck(swarm, model, layers, local, lambda peer: peer.kill())
        peer_id = victim.peer_id
        victim.restart()
        assert victim.peer_id == peer_id
        assert victim.pid not in pids
        pids = [peer.pid for peer in swarm.peers]
        layers = connect(trackers=swarm.trackers, config=PATIENT)  # knows the victim's new address
        leaving = struck(swarm, with_blocks(local, layers), layers, local, lambda peer: peer.drain(), may_stay=True)
        assert leaving.wait(10.0) == 0
        assert announced(swarm) == {peer.peer_id for peer in swarm.peers} - {leaving.peer_id}
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def struck(
    swarm: LocalSwarm,
    model: PreTrainedModel,
    layers: RemoteSequential,
    local: PreTrainedModel,
    strike: Callable[[LocalPeer], None],
    *,
    may_stay: bool = False,
) -> LocalPeer:
    """The peer that was struck in the middle of a generation, which went on elsewhere as if nothing had happened.

    Args:
        may_stay: a short generation may end where it is before its cache has moved.
    """
    hit: list[LocalPeer] = []

    def act() -> None:
        hit.append(swarm.peers[used(layers, swarm)[0]])
        strike(hit[0])

    failovers = layers.stats().failovers
    assert torch.equal(generate_with(model, at_4=act), expected(local))
    if not may_stay:
        assert layers.stats().failovers > failovers
        assert layers.stats().route[0].peer_id != hit[0].peer_id
    return hit[0]
