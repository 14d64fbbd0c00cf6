"""One simulated server: load times, cache, records."""

from __future__ import annotations

import msgspec
from records import make_identity

from remote_modules.identity import Identity
from remote_modules.peers import PeerRecord, PeerState
from remote_modules.plan.election import Member, members_of
from remote_modules.plan.simulation.conditions import Conditions
from remote_modules.plan.simulation.peer import ID_CHARACTERS, PROOF_BYTES, TOKEN_BYTES, Peer, Phase
from remote_modules.plan.throughput import Capacity, Holder
from remote_modules.spans import Span

CONDITIONS = Conditions(num_blocks=20, max_span=10, fetch_s_per_block=4.0, read_s_per_block=0.25)


def make_peer() -> Peer:
    return Peer(7, Capacity(tokens_per_s=900.0, max_blocks=4, network_tokens_per_s=100.0), Span(2, 6), CONDITIONS)


def test_blocks_are_fetched_once_and_read_from_disk_later() -> None:
    peer = make_peer()
    assert peer.start_load(Span(2, 6), CONDITIONS) == 4 * 4.25
    assert peer.start_load(Span(4, 8), CONDITIONS) == 2 * 4.0 + 4 * 0.25
    assert peer.start_load(Span(2, 6), CONDITIONS) == 4 * 0.25
    assert (peer.span, peer.phase) == (Span(2, 6), Phase.LOADING)


def test_fetched_blocks_cost_no_more_than_reading() -> None:
    peer = make_peer()
    peer.start_load(Span(2, 6), CONDITIONS)
    assert peer.fetch_s(Span(4, 9), CONDITIONS) == 3 * 4.0
    assert peer.cost(CONDITIONS, is_fetched=False).seconds(Span(4, 9)) == 3 * 4.0 + 5 * 0.25
    assert peer.cost(CONDITIONS, is_fetched=True).seconds(Span(4, 9)) == 5 * 0.25
    peer.keep(Span(4, 9))
    assert peer.fetch_s(Span(2, 9), CONDITIONS) == 0.0
    assert peer.cost(CONDITIONS, is_fetched=False).seconds(Span(4, 9)) == 5 * 0.25


def test_member_is_what_the_record_says() -> None:
    peer = make_peer()
    assert peer.member == Member(peer_id=peer.peer_id, span=Span(2, 6), capacity=peer.capacity, state=PeerState.JOINING)
    (announced,) = members_of([peer.record], token_bytes=TOKEN_BYTES)
    assert announced == peer.member


def test_holder_is_what_the_peer_gives() -> None:
    peer = make_peer()
    assert peer.holder == Holder(Span(2, 6), 900.0, 100.0)
    assert peer.holder.throughput == 100.0


def test_announcement_is_a_whole_record_that_says_phase_and_span() -> None:
    peer = make_peer()
    signed = peer.sign()
    record = msgspec.msgpack.decode(signed.payload, type=PeerRecord)
    assert record == peer.record
    assert (record.sequence, record.span, record.state) == (1, Span(2, 6), PeerState.JOINING)
    assert len(record.block_digests) == 4
    assert peer.record_bytes == len(signed.payload) + PROOF_BYTES
    peer.start_load(Span(5, 8), CONDITIONS)
    peer.phase = Phase.SERVING
    peer.describe()
    peer.sign()
    assert (peer.record.sequence, peer.record.span, peer.record.state) == (2, Span(5, 8), PeerState.ONLINE)
    assert len(peer.record.block_digests) == 3


def test_record_is_as_long_as_a_real_one() -> None:
    identity: Identity = make_identity(1)
    peer = make_peer()
    peer.sign()
    real = identity.sign_record(msgspec.structs.replace(peer.record, peer_id=identity.peer_id))
    assert len(identity.peer_id) == ID_CHARACTERS
    assert len(real.payload) + len(real.public_key) + len(real.signature) == peer.record_bytes
