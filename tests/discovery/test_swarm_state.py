from __future__ import annotations

import msgspec
import pytest
from records import make_identity, make_record

from remote_modules.discovery.swarm_state import MAX_MODELS, MAX_PEERS, summarize
from remote_modules.peers import PeerRecord, PeerState
from remote_modules.plan.leases import Lease, lease_of

IDENTITY = make_identity(1)


def lease(record: PeerRecord, announced_at_s: float = 0.0) -> Lease:
    signed = IDENTITY.sign_record(record)
    return lease_of(signed, record, announced_at_s, 90.0)


def record(span: str = "0:4", state: PeerState = PeerState.ONLINE, **changes: object) -> PeerRecord:
    start, end = map(int, span.split(":"))
    return make_record(IDENTITY, start=start, end=end, state=state, **changes)


@pytest.mark.parametrize(
    ("spans", "coverage", "weakest"),
    [
        (["0:8"], [1] * 8, 0),
        (["0:4", "4:8", "2:6"], [1, 1, 2, 2, 2, 2, 1, 1], 0),
        (["0:4"], [1, 1, 1, 1, 0, 0, 0, 0], 4),
        (["0:8", "0:3", "5:8"], [2, 2, 2, 1, 1, 2, 2, 2], 3),
    ],
    ids=["whole", "overlap", "gap", "weak-middle"],
)
def test_coverage_counts_online_peers_for_each_block(spans: list[str], coverage: list[int], weakest: int) -> None:
    (model,) = summarize([lease(record(span)) for span in spans], 1.0).models
    assert model.coverage == coverage
    assert model.weakest_block == weakest


@pytest.mark.parametrize("state", [PeerState.JOINING, PeerState.DRAINING])
def test_peers_that_take_no_sessions_are_listed_but_cover_nothing(state: PeerState) -> None:
    (model,) = summarize([lease(record("0:8", state))], 0.0).models
    assert model.coverage == [0] * 8
    assert [peer.state for peer in model.peers] == [state.value]


def test_peer_that_claims_another_size_is_outvoted() -> None:
    liar = record("0:4096", num_blocks=4096, model="evil")
    (model,) = summarize([lease(liar), lease(record("0:4")), lease(record("4:8"))], 0.0).models
    assert (model.model, model.num_blocks) == ("tiny", 8)
    assert model.coverage == [1] * 8
    assert model.num_peers == 3


def test_age_counts_from_the_announcement() -> None:
    (model,) = summarize([lease(record(), announced_at_s=5.0)], 17.26).models
    assert model.peers[0].age_s == 12.3


def test_summary_names_no_address() -> None:
    text = msgspec.json.encode(summarize([lease(record(addresses=("198.51.100.7:4000",)))], 0.0))
    assert b"198.51.100.7" not in text
    assert IDENTITY.peer_id.encode() not in text


def test_flooded_tracker_shows_the_largest_models_and_a_part_of_the_peers() -> None:
    big = [lease(record())] * (MAX_PEERS + 5)
    state = summarize([lease(record(model_key=f"k{n}")) for n in range(MAX_MODELS + 5)] + big, 0.0)
    assert state.num_models == MAX_MODELS + 6
    assert len(state.models) == MAX_MODELS
    assert state.models[0].model_key == "tiny-key"
    assert state.models[0].num_peers == MAX_PEERS + 5
    assert len(state.models[0].peers) == MAX_PEERS


def test_empty_tracker_has_no_models() -> None:
    state = summarize([], 0.0)
    assert (state.num_peers, state.num_models, state.models) == (0, 0, [])
