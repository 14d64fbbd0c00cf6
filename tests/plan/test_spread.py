from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remote_modules.errors import NoRouteError
from remote_modules.peers import PeerId
from remote_modules.plan.candidates import Candidate, Demand
from remote_modules.plan.spread import SpreadRoute, spread
from remote_modules.spans import Span

NEAR = Demand(num_tokens=1000, kv_tokens=0, bytes_per_token=0, is_decode=False)


def peer(name: str, span: str, speed: float = 1000.0, **changes: Any) -> Candidate:
    known: dict[str, Any] = {"rtt_s": 0.0, "decode_tokens_per_s": 1.0, "free_kv_tokens": 0, "load": 0}
    return Candidate(peer_id=PeerId(name), span=Span.parse(span), prefill_tokens_per_s=speed, **(known | changes))


def shares(
    blocks: str, candidates: list[Candidate], *, routes: int = 2000, cuts: tuple[int, ...] = (), least: float = 0.0
) -> list[dict[str, float]]:
    """Of each block, the part of the passes that each peer runs; each client draws twenty routes."""
    rng = Random(5)
    counts: list[Counter[str]] = [Counter() for _ in range(40)]
    for _ in range(routes // 20):
        for found in spread(Span.parse(blocks), candidates, NEAR, rng=rng, cuts=cuts, least=least, count=20):
            assert [block for hop in found.hops for block in hop.span] == list(Span.parse(blocks))
            for hop in found.hops:
                for block in hop.span:
                    counts[block][hop.peer_id] += 1
    return [{name: count / routes for name, count in of_block.items()} for of_block in counts]


def test_replicas_share_in_proportion_to_speed() -> None:
    found = shares("0:4", [peer("a", "0:4", 1000.0), peer("b", "0:4", 3000.0), peer("c", "0:4", 4000.0)])
    assert found[0] == found[3] == pytest.approx({"a": 0.125, "b": 0.375, "c": 0.5}, abs=0.03)


def test_load_takes_from_the_share() -> None:
    found = shares("0:4", [peer("a", "0:4", 3000.0, load=2), peer("b", "0:4", 3000.0)])
    assert found[0] == pytest.approx({"a": 0.25, "b": 0.75}, abs=0.03)


def test_narrow_link_takes_from_the_share() -> None:
    demand = Demand(num_tokens=1000, kv_tokens=0, bytes_per_token=1000, is_decode=False)
    near, far = peer("a", "0:1", bandwidth_bytes_per_s=1e12), peer("b", "0:1", bandwidth_bytes_per_s=1e6)
    rng = Random(1)
    routes = spread(Span(0, 1), [near, far], demand, rng=rng, count=2000)
    assert sum(route.hops[0].peer_id == "b" for route in routes) / 2000 == pytest.approx(0.25, abs=0.03)  # 1 s, 3 s


def test_only_holder_of_a_block_runs_it_always() -> None:
    found = shares("0:6", [peer("a", "0:4"), peer("b", "2:6")])
    assert found[0] == found[1] == {"a": 1.0}
    assert found[4] == found[5] == {"b": 1.0}
    assert found[2] == found[3] == pytest.approx({"a": 0.5, "b": 0.5}, abs=0.03)


def test_route_changes_its_peer_only_where_shares_change() -> None:
    candidates = [peer("a", "0:8"), peer("b", "0:8"), peer("c", "4:8", 2000.0)]
    rng = Random(2)
    routes = [route.hops for route in spread(Span(0, 8), candidates, NEAR, rng=rng, count=2000)]
    assert {hop.span.start for hops in routes for hop in hops} == {0, 4}
    assert sum(len(hops) == 1 for hops in routes) / 2000 == pytest.approx(1 / 3, abs=0.03)  # c takes 4 of 6 of the end


def test_hops_meet_at_cuts_only() -> None:
    found = shares("0:9", [peer("a", "0:7"), peer("b", "2:9")], cuts=(0, 3, 6, 9))
    assert found[0] == found[2] == {"a": 1.0}
    assert found[6] == found[8] == {"b": 1.0}
    assert found[3] == found[5]
    assert found[3] == pytest.approx({"a": 0.5, "b": 0.5}, abs=0.03)


def test_several_routes_of_one_call_are_spread_more_evenly_than_by_chance() -> None:
    candidates = [peer("a", "0:4", 1000.0), peer("b", "0:4", 3000.0)]
    for seed in range(50):
        routes = spread(Span(0, 4), candidates, NEAR, rng=Random(seed), count=8)
        assert Counter(route.hops[0].peer_id for route in routes) == {"a": 2, "b": 6}


def test_route_tells_what_its_slowest_peer_has_free() -> None:
    (route,) = spread(Span(0, 4), [peer("a", "0:2", 1000.0, load=1), peer("b", "2:4", 3000.0)], NEAR, rng=Random(0))
    assert route == SpreadRoute(route.hops, route.tokens_per_s)
    assert route.tokens_per_s == pytest.approx(250.0)  # 1,000 tokens/s, two blocks, one request ahead


def test_far_slower_peers_get_nothing_of_a_lone_pass_where_others_do() -> None:
    candidates = [peer("a", "0:4", 1000.0), peer("b", "0:4", 499.0), peer("c", "0:4", 600.0), peer("d", "4:6", 1.0)]
    found = shares("0:6", candidates, least=0.5)
    assert found[0] == pytest.approx({"a": 0.625, "c": 0.375}, abs=0.03)
    assert found[5] == {"d": 1.0}


def test_all_routes_are_of_the_group_with_most_throughput() -> None:
    candidates = [peer("a", "0:4", 5000.0, group="x"), peer("b", "0:2", 9000.0, group="y"), peer("c", "2:4", group="y")]
    assert shares("0:4", candidates, routes=60)[0] == {"a": 1.0}
    assert shares("0:2", candidates, routes=60)[0] == {"b": 1.0}


def test_infinitely_fast_peer_gets_what_there_is() -> None:
    free = Demand(num_tokens=1, kv_tokens=0, bytes_per_token=0, is_decode=False)
    (route,) = spread(Span(0, 4), [peer("a", "0:4", float("inf")), peer("b", "0:4", 1.0)], free, rng=Random(0))
    assert route.hops[0].peer_id == "a"


@pytest.mark.parametrize(("candidates", "missing"), [([], "0:8"), ([peer("a", "0:4"), peer("b", "5:8")], "4:5")])
def test_blocks_held_by_nobody_are_named(candidates: list[Candidate], missing: str) -> None:
    with pytest.raises(NoRouteError) as caught:
        spread(Span(0, 8), candidates, NEAR, rng=Random(0))
    assert caught.value.missing == (Span.parse(missing),)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_every_block_is_shared_in_proportion_to_what_is_free(data: st.DataObject) -> None:
    """The slow twin: free throughput over its sum, block by block."""
    num_blocks = data.draw(st.integers(2, 6))
    candidates = [peer("all", f"0:{num_blocks}", 1000.0)]
    for index in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, num_blocks - 1))
        span = f"{start}:{data.draw(st.integers(start + 1, num_blocks))}"
        speed, load = data.draw(st.sampled_from([500.0, 1000.0, 4000.0])), data.draw(st.integers(0, 3))
        candidates.append(peer(f"p{index}", span, speed, load=load))
    found = shares(f"0:{num_blocks}", candidates, routes=1500)
    for block in range(num_blocks):
        free = {
            str(one.peer_id): one.prefill_tokens_per_s / (1 + one.load) / len(one.span)
            for one in candidates
            if block in one.span
        }
        for name, throughput in free.items():
            assert found[block].get(name, 0.0) == pytest.approx(throughput / sum(free.values()), abs=0.07)
