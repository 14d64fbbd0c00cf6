from __future__ import annotations

import math
from random import Random
from typing import Any

import pytest

from remote_modules.peers import PeerId
from remote_modules.plan.candidates import Candidate, Demand, Hop, seconds_of
from remote_modules.plan.moves import CLEARLY, find_better, is_clearly_better, move_seconds, route_seconds
from remote_modules.spans import Span

DECODE = Demand(num_tokens=1, kv_tokens=1000, bytes_per_token=1000, is_decode=True, rows=2)


def peer(name: str, span: str, **changes: Any) -> Candidate:
    known: dict[str, Any] = {
        "rtt_s": 0.01,
        "decode_tokens_per_s": 10_000.0,
        "prefill_tokens_per_s": 100_000.0,
        "free_kv_tokens": 10_000,
        "load": 0,
    }
    return Candidate(peer_id=PeerId(name), span=Span.parse(span), **(known | changes))


def hops(text: str) -> tuple[Hop, ...]:
    pairs = [part.split("=") for part in text.split()]
    return tuple(Hop(PeerId(name), Span.parse(span)) for name, span in pairs)


def better(route: str, *candidates: Candidate, position: int = 100, **kwargs: Any) -> tuple[Hop, ...] | None:
    return find_better(hops(route), candidates, DECODE, position, rng=Random(0), **kwargs)


@pytest.mark.parametrize(
    ("old_s", "new_s", "move_s", "is_better"),
    [
        (1.0, 0.75, 0.0, True),
        (1.0, 0.76, 0.0, False),
        (1.0, 0.5, 64.0, True),
        (1.0, 0.5, 64.1, False),
        (math.inf, 1.0, 1e6, True),
        (1.0, 1.0, 0.0, False),
    ],
)
def test_gain_must_be_clear_and_pay_back_the_move(
    old_s: float, new_s: float, move_s: float, *, is_better: bool
) -> None:
    assert is_clearly_better(old_s, new_s, move_s, steps=128) is is_better


def test_route_takes_the_sum_of_its_hops() -> None:
    known = {one.peer_id: one for one in (peer("a", "0:4"), peer("b", "2:8", rtt_s=0.3))}
    route = hops("a=0:3 b=3:8")
    assert route_seconds(route, known, DECODE) == pytest.approx(
        sum(seconds_of(hop, known[hop.peer_id], DECODE) for hop in route)
    )
    assert route_seconds(hops("a=0:5 b=5:8"), known, DECODE) == math.inf
    assert route_seconds(hops("a=0:3 c=3:8"), known, DECODE) == math.inf


def test_move_costs_a_prefill_of_each_new_hop() -> None:
    known = {one.peer_id: one for one in (peer("a", "0:8"), peer("b", "0:8"))}
    old = hops("a=0:4 b=4:8")
    assert move_seconds(old, old, known, 500, DECODE) == 0.0
    replay_s = 0.01 + 2 * 1000 * 1000 / 12.5e6 + 1000 * 4 / 100_000
    assert move_seconds(old, hops("b=0:4 b=4:8"), known, 500, DECODE) == pytest.approx(replay_s)
    assert move_seconds(old, hops("a=0:5 b=5:8"), known, 500, DECODE) == pytest.approx(
        2 * (0.01 + 0.16) + 1000 * 8 / 100_000
    )
    assert move_seconds(old, hops("b=0:4 a=4:8"), known, 0, DECODE) == 0.0


def test_move_by_copy_is_taken_where_it_is_cheaper() -> None:
    known = {PeerId("b"): peer("b", "0:4", bandwidth_bytes_per_s=1e8)}
    moved = hops("b=0:4")
    assert move_seconds((), moved, known, 500, DECODE, kv_bytes_per_token=1000.0) == pytest.approx(
        0.01 + 1000 * 1000 * 4 / 1e8
    )
    replay_s = move_seconds((), moved, known, 500, DECODE)
    assert move_seconds((), moved, known, 500, DECODE, kv_bytes_per_token=1e6) == replay_s


def test_session_stays_where_nothing_is_better() -> None:
    assert better("a=0:8", peer("a", "0:8"), peer("b", "0:8")) is None
    assert better("a=0:8", peer("a", "0:8", rtt_s=0.012), peer("b", "0:8")) is None


def test_session_leaves_a_peer_that_became_slow() -> None:
    assert better("a=0:8", peer("a", "0:8", rtt_s=0.2), peer("b", "0:8")) == hops("b=0:8")
    assert better("a=0:8", peer("a", "0:8", decode_tokens_per_s=10.0), peer("b", "0:8")) == hops("b=0:8")
    assert better("a=0:8", peer("a", "0:8", load=1000), peer("b", "0:8")) == hops("b=0:8")


def test_only_the_slow_hop_moves() -> None:
    candidates = [peer(name, span) for name, span in (("a", "0:4"), ("c", "4:8"), ("d", "4:8"), ("e", "0:4"))]
    assert better("a=0:4 b=4:8", *candidates, peer("b", "4:8", rtt_s=0.5)) in (hops("a=0:4 c=4:8"), hops("a=0:4 d=4:8"))


def test_gain_that_does_not_pay_back_a_long_replay_is_left() -> None:
    slow, fast = peer("a", "0:8", rtt_s=0.02), peer("b", "0:8", prefill_tokens_per_s=100.0)
    assert better("a=0:8", slow, fast, position=5) == hops("b=0:8")
    assert better("a=0:8", slow, fast, position=5000) is None
    assert better("a=0:8", slow, fast, position=5000, kv_bytes_per_token=10.0) == hops("b=0:8")
    assert better("a=0:8", slow, fast, position=5000, steps=10**6) == hops("b=0:8")


def test_numbers_of_another_group_are_not_mixed_in() -> None:
    assert better("a=0:8", peer("a", "0:8", rtt_s=0.2, group="f32"), peer("b", "0:8", group="bf16")) is None


def test_session_whose_peers_are_unknown_or_of_two_groups_is_left_alone() -> None:
    assert better("a=0:8", peer("b", "0:8")) is None
    assert better("a=0:4 b=4:8", peer("a", "0:4", group="x"), peer("b", "4:8", group="y"), peer("c", "0:8")) is None


def test_hop_whose_peer_is_gone_moves() -> None:
    assert better("a=0:4 b=4:8", peer("a", "0:4"), peer("c", "4:8")) == hops("a=0:4 c=4:8")


def test_nobody_covers_the_blocks_session_stays() -> None:
    assert better("a=0:4 b=4:8", peer("a", "0:4")) is None


def test_room_for_the_session_counts_elsewhere_only() -> None:
    full = peer("a", "0:8", rtt_s=0.2, free_kv_tokens=0)
    assert better("a=0:8", full, peer("b", "0:8", free_kv_tokens=1999)) is None
    assert better("a=0:8", full, peer("b", "0:8", free_kv_tokens=2000)) == hops("b=0:8")


def test_hops_meet_at_cuts() -> None:
    slow = peer("a", "0:8", rtt_s=2.0)
    others = [peer("b", "0:5"), peer("c", "3:8")]
    assert better("a=0:8", slow, *others, cuts=(0, 4, 8)) == hops("b=0:4 c=4:8")


def test_equal_peers_never_exchange_a_session_for_ever() -> None:
    """Whatever the blur, a session does not move back and forth between peers that differ by less than the bar."""
    for seed in range(200):
        rng = Random(seed)
        one, other = (peer(name, "0:8", rtt_s=0.1 * rng.uniform(CLEARLY * 1.02, 1.0)) for name in "ab")
        assert find_better(hops("a=0:8"), [one, other], DECODE, 0, rng=rng) is None
        assert find_better(hops("b=0:8"), [one, other], DECODE, 0, rng=rng) is None
