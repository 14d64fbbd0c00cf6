from __future__ import annotations

import itertools
from typing import Any

import pytest

from remote_modules.errors import NoRouteError
from remote_modules.peers import PeerRecord, PeerState
from remote_modules.plan.compatibility import group_of, is_allowed, matching


def record(peer: str, start: int, digests: str, **changes: Any) -> PeerRecord:
    """A record whose block digests are the letters of ``digests``; "" announces none."""
    fields: dict[str, Any] = {
        "peer_id": peer,
        "instance_id": "first",
        "sequence": 1,
        "model": "tiny",
        "model_key": "tiny-key",
        "num_blocks": 8,
        "start": start,
        "end": start + (len(digests) or 2),
        "addresses": ("127.0.0.1:4000",),
        "state": PeerState.ONLINE,
        "block_digests": tuple(digests),
    }
    return PeerRecord(**(fields | changes))


def peers_of(records: list[PeerRecord]) -> list[str]:
    return [record.peer_id for record in records]


def test_no_records_match_none() -> None:
    assert matching([], {}) == []


def test_equal_digests_match_whatever_is_known() -> None:
    records = [record("alice", 0, "abcd"), record("bob", 2, "cdef")]
    assert peers_of(matching(records, {})) == ["alice", "bob"]
    assert peers_of(matching(records, dict(enumerate("abcdefgh")))) == ["alice", "bob"]


def test_result_does_not_depend_on_the_order_of_records() -> None:
    records = [record("bob", 2, "cdef"), record("carol", 0, ""), record("alice", 0, "abcd"), record("dave", 2, "xd")]
    known = {2: "c"}
    for permutation in itertools.permutations(records):
        assert peers_of(matching(permutation, known)) == ["alice", "bob", "carol"]


def test_wrong_digest_of_a_known_block_excludes_the_peer() -> None:
    records = [record("alice", 0, "abcd"), record("mallory", 0, "abXd")]
    assert peers_of(matching(records, {2: "c"})) == ["alice"]


def test_excluded_peer_does_not_make_others_doubtful() -> None:
    records = [record("alice", 0, "Xbcd"), record("bob", 1, "Ycd")]
    assert peers_of(matching(records, {0: "a"})) == ["bob"]


def test_peer_without_digests_is_believed() -> None:
    records = [record("alice", 0, "ab"), record("bob", 0, "")]
    assert peers_of(matching(records, {0: "a"})) == ["alice", "bob"]


@pytest.mark.parametrize("known", [{}, {0: "a", 1: "b"}], ids=["nothing-known", "other-blocks-known"])
def test_unknown_block_with_different_digests_is_refused(known: dict[int, str]) -> None:
    records = [record("alice", 0, "abcd"), record("bob", 2, "cXef")]
    with pytest.raises(NoRouteError) as caught:
        matching(records, known)
    assert str(caught.value) == (
        "peers hold different weights for block 3 of 'tiny'; "
        "name the model by its checkpoint folder so that the right ones can be told apart"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "float32/none"),
        ({"dtype": "bfloat16"}, "bfloat16/none"),
        ({"dtype": "bfloat16", "quantization": "int8"}, "bfloat16/int8"),
    ],
    ids=["plain", "dtype", "quantized"],
)
def test_peers_of_one_dtype_and_quantization_share_a_group(changes: dict[str, str], expected: str) -> None:
    assert group_of(record("alice", 0, "", **changes), allow_mixed_dtypes=False) == expected
    assert group_of(record("alice", 0, "", **changes), allow_mixed_dtypes=True) == ""


@pytest.mark.parametrize(
    ("allowed", "blocked", "expected"),
    [
        ((), (), "abc abd xyz"),
        (("abc",), (), "abc"),
        (("ab", "xyz"), (), "abc abd xyz"),
        ((), ("ab",), "xyz"),
        (("ab",), ("abd",), "abc"),
        (("abc",), ("abc",), ""),
        (("q",), (), ""),
    ],
)
def test_allowed_and_blocked_peers_go_by_the_beginning_of_their_ids(
    allowed: tuple[str, ...], blocked: tuple[str, ...], expected: str
) -> None:
    peers = ["abc", "abd", "xyz"]
    found = [peer for peer in peers if is_allowed(peer, allowed=allowed, blocked=blocked)]
    assert found == expected.split()
