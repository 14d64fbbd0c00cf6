from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remote_modules.errors import NoRouteError
from remote_modules.peers import PeerId
from remote_modules.plan.routing import Candidate, Demand, Hop, find_route, uncovered
from remote_modules.spans import Span

DECODE = Demand(num_tokens=1, kv_tokens=100, bytes_per_token=8192, is_decode=True)
FREE = Demand(num_tokens=1, kv_tokens=0, bytes_per_token=0, is_decode=True)
PREFILL = Demand(num_tokens=500, kv_tokens=1000, bytes_per_token=8192, is_decode=False)


def peer(name: str, span: str, **changes: Any) -> Candidate:
    known: dict[str, Any] = {
        "rtt_s": 0.01,
        "decode_tokens_per_s": 1000.0,
        "prefill_tokens_per_s": 10_000.0,
        "free_kv_tokens": 10_000,
        "load": 0,
    }
    return Candidate(peer_id=PeerId(name), span=Span.parse(span), **(known | changes))


def show(route: tuple[Hop, ...]) -> str:
    return " ".join(f"{hop.peer_id}={hop.span}" for hop in route)


def route_of(blocks: str, *candidates: Candidate, demand: Demand = DECODE, seed: int = 0) -> str:
    return show(find_route(Span.parse(blocks), candidates, demand, rng=Random(seed)))


# The slow twin: every sequence of hops, each priced by the formula in the docstring of the module.


def random_swarm(rng: Random) -> tuple[Span, list[Candidate], Demand]:
    num_blocks = rng.randint(1, 6)
    start = rng.randrange(num_blocks)
    blocks = Span(start, rng.randint(start + 1, num_blocks))
    candidates = []
    for index in range(rng.randint(0, 5)):
        first = rng.randrange(num_blocks)
        candidates.append(
            peer(
                f"p{index}",
                f"{first}:{rng.randint(first + 1, num_blocks)}",
                rtt_s=rng.choice([None, 0.0, 0.001, 0.02, 0.3]),
                decode_tokens_per_s=rng.choice([0.0, 5.0, 100.0, 3000.0]),
                prefill_tokens_per_s=rng.choice([0.0, 50.0, 1000.0, 30_000.0]),
                free_kv_tokens=rng.choice([0, 600, 5000]),
                load=rng.choice([0, 0, 1, 7]),
                group=rng.choice(["a", "a", "b"]),
                bandwidth_bytes_per_s=rng.choice([None, 1e5, 1e9]),
            )
        )
    rng.shuffle(candidates)
    demand = Demand(
        num_tokens=rng.choice([1, 64]),
        kv_tokens=rng.choice([0, 500]),
        bytes_per_token=rng.choice([256, 16384]),
        is_decode=rng.random() < 0.5,
        rows=rng.choice([1, 4]),
    )
    return blocks, candidates, demand


def all_routes(
    blocks: Span, candidates: list[Candidate], cuts: Collection[int] = range(100)
) -> Iterator[list[tuple[Candidate, Span]]]:
    for candidate in candidates:
        for end in range(blocks.start + 1, blocks.end + 1):
            hop = Span(blocks.start, end)
            if not candidate.span.covers(hop) or end not in cuts:
                continue
            if end == blocks.end:
                yield [(candidate, hop)]
            else:
                for rest in all_routes(Span(end, blocks.end), candidates, cuts):
                    if rest[0][0].group == candidate.group:
                        yield [(candidate, hop), *rest]


def clipped(candidate: Candidate, cuts: Collection[int]) -> Candidate | None:
    """What a peer can serve of its span."""
    legal = [cut for cut in cuts if candidate.span.start <= cut <= candidate.span.end]
    return replace(candidate, span=Span(min(legal), max(legal))) if len(legal) > 1 else None


def hop_cost_s(candidate: Candidate, hop: Span, demand: Demand) -> float:
    speed = candidate.decode_tokens_per_s if demand.is_decode else candidate.prefill_tokens_per_s
    speed = speed or (300.0 if demand.is_decode else 3000.0)
    tokens = demand.rows * demand.num_tokens
    rtt_s = 0.05 if candidate.rtt_s is None else candidate.rtt_s
    transfer_s = 2 * tokens * demand.bytes_per_token / (candidate.bandwidth_bytes_per_s or 12.5e6)
    queue_s = candidate.load * tokens * len(candidate.span) / speed
    kv_s = 300.0 if demand.rows * demand.kv_tokens > candidate.free_kv_tokens else 0.0
    return rtt_s + transfer_s + queue_s + kv_s + tokens * len(hop) / speed


@pytest.mark.parametrize("seed", range(400))
def test_random_small_swarm_agrees_with_brute_force(seed: int) -> None:
    blocks, candidates, demand = random_swarm(Random(seed))
    draws = Random(seed)
    factors = {name: 1 + 0.05 * draws.random() for name in sorted(c.peer_id for c in candidates)}

    def cost_s(hops: list[tuple[Candidate, Span]]) -> float:
        return sum(factors[one.peer_id] * hop_cost_s(one, span, demand) for one, span in hops)

    best_s = min(map(cost_s, all_routes(blocks, candidates)), default=None)
    if best_s is None:
        groups = {c.group for c in candidates} or {""}
        missing = [
            {block for block in blocks if not any(block in c.span for c in candidates if c.group == group)}
            for group in groups
        ]
        with pytest.raises(NoRouteError) as caught:
            find_route(blocks, candidates, demand, rng=Random(seed))
        assert caught.value.missing == uncovered(blocks, candidates)
        found = {block for span in caught.value.missing if isinstance(span, Span) for block in span}
        assert found in missing
        assert len(found) == min(map(len, missing))
        return

    assert uncovered(blocks, candidates) == ()
    route = find_route(blocks, candidates, demand, rng=Random(seed))
    by_id = {c.peer_id: c for c in candidates}
    hops = [(by_id[hop.peer_id], hop.span) for hop in route]
    assert [block for hop in route for block in hop.span] == list(blocks)
    assert all(candidate.span.covers(span) for candidate, span in hops)
    assert len({candidate.group for candidate, _ in hops}) == 1
    assert all(one.peer_id != following.peer_id for one, following in zip(route, route[1:], strict=False))
    assert math.isclose(cost_s(hops), best_s, rel_tol=1e-9)


@pytest.mark.parametrize("seed", range(300))
def test_random_small_swarm_with_cuts_agrees_with_brute_force(seed: int) -> None:
    rng = Random(seed)
    _, candidates, demand = random_swarm(rng)
    num_blocks = max([candidate.span.end for candidate in candidates], default=3)
    cuts = frozenset({0, num_blocks, *(cut for cut in range(1, num_blocks) if rng.random() < 0.4)})
    start = rng.choice(sorted(cuts)[:-1])
    blocks = Span(start, rng.choice([cut for cut in sorted(cuts) if cut > start]))
    draws = Random(seed)
    useful = [legal for candidate in candidates if (legal := clipped(candidate, cuts)) is not None]
    factors = {name: 1 + 0.05 * draws.random() for name in sorted(c.peer_id for c in useful)}

    def cost_s(hops: list[tuple[Candidate, Span]]) -> float:
        return sum(factors[one.peer_id] * hop_cost_s(one, span, demand) for one, span in hops)

    best_s = min(map(cost_s, all_routes(blocks, useful, cuts)), default=None)
    if best_s is None:
        with pytest.raises(NoRouteError) as caught:
            find_route(blocks, candidates, demand, rng=Random(seed), cuts=cuts)
        assert caught.value.missing == uncovered(blocks, useful)
        assert caught.value.missing
        missing = [span for span in caught.value.missing if isinstance(span, Span)]
        assert {edge for span in missing for edge in (span.start, span.end)} <= cuts
        return
    route = find_route(blocks, candidates, demand, rng=Random(seed), cuts=cuts)
    by_id = {c.peer_id: c for c in useful}
    hops = [(by_id[hop.peer_id], hop.span) for hop in route]
    assert [block for hop in route for block in hop.span] == list(blocks)
    assert all(hop.span.start in cuts and hop.span.end in cuts for hop in route)
    assert all(candidate.span.covers(span) for candidate, span in hops)
    assert math.isclose(cost_s(hops), best_s, rel_tol=1e-9)


# Hops meet at cuts.


def test_hops_meet_at_cuts_only() -> None:
    slow = peer("a", "0:6", decode_tokens_per_s=10.0)
    assert show(find_route(Span(0, 8), [slow, peer("b", "3:8")], DECODE, rng=Random(0))) == "a=0:3 b=3:8"
    cut = find_route(Span(0, 8), [slow, peer("b", "3:8")], DECODE, rng=Random(0), cuts={0, 2, 5, 8})
    assert show(cut) == "a=0:5 b=5:8"


def test_span_of_a_peer_is_clipped_to_cuts() -> None:
    with pytest.raises(NoRouteError) as caught:
        find_route(Span(0, 8), [peer("a", "0:6"), peer("b", "7:8")], DECODE, rng=Random(0), cuts={0, 4, 8})
    assert caught.value.missing == (Span(4, 8),)


def test_peer_within_a_group_that_cannot_be_cut_is_of_no_use() -> None:
    with pytest.raises(NoRouteError) as caught:
        find_route(Span(0, 8), [peer("a", "1:4"), peer("b", "5:7")], DECODE, rng=Random(0), cuts={0, 4, 8})
    assert caught.value.missing == (Span(0, 8),)
    assert str(caught.value) == "no route for blocks 0:8: 2 peers known, none holds them"


# Hops are cut from spans.


def test_one_peer_holds_more_than_asked_hop_is_clipped() -> None:
    assert route_of("3:6", peer("a", "0:12")) == "a=3:6"


def test_overlapping_spans_fast_peer_takes_all_it_holds() -> None:
    slow = peer("a", "0:6", decode_tokens_per_s=10.0)
    fast = peer("b", "3:8", decode_tokens_per_s=1000.0)
    assert route_of("0:8", slow, fast) == "a=0:3 b=3:8"


def test_longer_span_saves_a_round_trip() -> None:
    assert route_of("0:8", peer("a", "0:4"), peer("b", "4:8"), peer("c", "0:8")) == "c=0:8"


def test_fast_peer_in_the_middle_of_a_very_slow_one_is_worth_two_more_hops() -> None:
    slow = peer("a", "0:9", decode_tokens_per_s=1.0)
    assert route_of("0:9", slow, peer("b", "3:6")) == "a=0:3 b=3:6 a=6:9"


@pytest.mark.parametrize(
    "lie",
    [{"load": -1000}, {"decode_tokens_per_s": -1.0}, {"decode_tokens_per_s": math.nan}],
    ids=str,
)
def test_impossible_number_from_a_peer_gives_it_no_advantage(lie: dict[str, Any]) -> None:
    near = peer("a", "0:8", rtt_s=0.001)
    assert route_of("0:8", near, peer("b", "0:8", **lie)) == "a=0:8"


def test_costs_are_equal_longer_hop_is_kept() -> None:
    free = Demand(num_tokens=1, kv_tokens=0, bytes_per_token=0, is_decode=True)
    near = peer("a", "0:4", rtt_s=0.0)
    assert route_of("0:4", near, demand=free) == "a=0:4"


# What makes a peer dear.


@pytest.mark.parametrize(
    "worse",
    [
        {"decode_tokens_per_s": 100.0},
        {"rtt_s": 0.2},
        {"rtt_s": None},
        {"load": 5},
        {"free_kv_tokens": 99},
        {"decode_tokens_per_s": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(5))
def test_worse_replica_is_avoided(worse: dict[str, Any], seed: int) -> None:
    assert route_of("0:8", peer("a", "0:8", **worse), peer("b", "0:8"), seed=seed) == "b=0:8"


def test_no_peer_has_kv_room_route_is_still_found() -> None:
    assert route_of("0:8", peer("a", "0:8", free_kv_tokens=0)) == "a=0:8"


def test_stateless_pass_needs_no_kv_room() -> None:
    full = peer("a", "0:8", free_kv_tokens=0)
    slow = peer("b", "0:8", prefill_tokens_per_s=1000.0)
    stateless = Demand(num_tokens=500, kv_tokens=0, bytes_per_token=8192, is_decode=False)
    assert route_of("0:8", full, slow, demand=stateless) == "a=0:8"


def test_kv_room_is_counted_for_every_row() -> None:
    tight = peer("a", "0:8", free_kv_tokens=250)
    slow = peer("b", "0:8", decode_tokens_per_s=500.0)
    rows = [Demand(num_tokens=1, kv_tokens=100, bytes_per_token=1, is_decode=True, rows=n) for n in (2, 3)]
    assert [route_of("0:8", tight, slow, demand=demand) for demand in rows] == ["a=0:8", "b=0:8"]


def test_prefill_and_decode_use_their_own_speed() -> None:
    prefiller = peer("a", "0:8", decode_tokens_per_s=100.0)
    decoder = peer("b", "0:8", prefill_tokens_per_s=1000.0)
    assert route_of("0:8", prefiller, decoder, demand=PREFILL) == "a=0:8"
    assert route_of("0:8", prefiller, decoder, demand=DECODE) == "b=0:8"


def test_queue_counts_the_whole_span_of_the_peer() -> None:
    """The requests ahead of ours do not get shorter because our hop does."""
    long = peer("a", "0:80", load=1)
    short = peer("b", "0:8", load=1)
    assert route_of("0:8", long, short) == "b=0:8"


@pytest.mark.parametrize(
    ("bandwidth", "expected"), [(1e9, "a=0:4 b=4:8"), (1e6, "c=0:8")], ids=["fast link", "slow link"]
)
def test_payload_on_a_slow_link_fewer_hops_are_used(bandwidth: float, expected: str) -> None:
    demand = Demand(num_tokens=500, kv_tokens=0, bytes_per_token=8192, is_decode=False, bandwidth_bytes_per_s=bandwidth)
    slow = peer("c", "0:8", prefill_tokens_per_s=5000.0)
    assert route_of("0:8", peer("a", "0:4"), peer("b", "4:8"), slow, demand=demand) == expected


def test_every_hop_pays_its_transfer_both_ways() -> None:
    """A second hop costs 2 x 0.1 s more, which the round trips of the one-hop route straddle."""
    demand = Demand(num_tokens=1, kv_tokens=0, bytes_per_token=1000, is_decode=True, bandwidth_bytes_per_s=10_000.0)
    halves = [peer("a", "0:4", rtt_s=0.0), peer("b", "4:8", rtt_s=0.0)]
    assert route_of("0:8", *halves, peer("c", "0:8", rtt_s=0.15), demand=demand) == "c=0:8"
    assert route_of("0:8", *halves, peer("c", "0:8", rtt_s=0.25), demand=demand) == "a=0:4 b=4:8"


# Groups.


def test_two_groups_cover_each_half_no_route() -> None:
    halves = [peer("a", "0:4", group="bf16"), peer("b", "4:8", group="f32")]
    with pytest.raises(NoRouteError) as caught:
        route_of("0:8", *halves)
    assert caught.value.missing == (Span(4, 8),)
    assert str(caught.value) == (
        "no route for blocks 4:8: 2 peers known, but those that hold them differ in weights or dtype from the rest"
    )


def test_cheaper_peer_of_another_group_is_not_mixed_in() -> None:
    slow = [peer(name, span, group="f32", rtt_s=0.5) for name, span in (("a", "0:4"), ("b", "4:8"))]
    assert route_of("0:8", *slow, peer("c", "0:4", group="bf16")) == "a=0:4 b=4:8"


def test_two_groups_cover_all_cheapest_is_taken() -> None:
    dear = peer("a", "0:8", group="bf16", rtt_s=0.5)
    assert route_of("0:8", dear, peer("b", "0:8", group="f32")) == "b=0:8"


# No route.


@pytest.mark.parametrize(
    ("spans", "missing", "message"),
    [
        ([], "0:8", "no route for blocks 0:8: 0 peers known, none holds them"),
        (["0:4"], "4:8", "no route for blocks 4:8: 1 peers known, none holds them"),
        (["1:3", "5:7"], "0:1 3:5 7:8", "no route for blocks 0:1, 3:5, 7:8: 2 peers known, none holds them"),
        (["8:12"], "0:8", "no route for blocks 0:8: 1 peers known, none holds them"),
    ],
    ids=["no peer", "tail", "holes", "elsewhere"],
)
def test_blocks_held_by_nobody_are_named(spans: list[str], missing: str, message: str) -> None:
    candidates = [peer(f"p{index}", span) for index, span in enumerate(spans)]
    with pytest.raises(NoRouteError) as caught:
        route_of("0:8", *candidates)
    assert caught.value.missing == tuple(map(Span.parse, missing.split()))
    assert str(caught.value) == message


def test_uncovered_tells_what_the_best_group_lacks() -> None:
    candidates = [peer("a", "0:2", group="bf16"), peer("b", "0:5", group="f32")]
    assert uncovered(Span(0, 8), candidates) == (Span(5, 8),)
    assert uncovered(Span(1, 5), candidates) == ()
    assert uncovered(Span(0, 8), []) == (Span(0, 8),)


# Randomness.


def test_same_rng_and_shuffled_candidates_give_the_same_route() -> None:
    candidates = [peer(f"p{i}", f"{i % 3 * 4}:{i % 3 * 4 + 4}") for i in range(12)]
    first = route_of("0:12", *candidates, seed=7)
    Random(1).shuffle(candidates)
    assert route_of("0:12", *candidates, seed=7) == first


def test_costs_tie_exactly_order_of_candidates_does_not_matter() -> None:
    free = Demand(num_tokens=1, kv_tokens=0, bytes_per_token=0, is_decode=True)
    one, other = (peer(name, "0:8", rtt_s=0.0, decode_tokens_per_s=math.inf) for name in "ab")
    assert route_of("0:8", one, other, demand=free) == route_of("0:8", other, one, demand=free)


def test_equal_replicas_share_the_load() -> None:
    replicas = [peer(f"p{index}", "0:8") for index in range(4)]
    chosen = Counter(route_of("0:8", *replicas, seed=seed) for seed in range(400))
    assert len(chosen) == 4
    assert min(chosen.values()) >= 70


@pytest.mark.parametrize(("rtt_s", "is_shared"), [(0.102, True), (0.11, False)])
def test_replica_shares_the_load_only_when_nearly_equal(rtt_s: float, is_shared: bool) -> None:
    tiny = Demand(num_tokens=1, kv_tokens=0, bytes_per_token=0, is_decode=True)
    best, other = peer("a", "0:1", rtt_s=0.1), peer("b", "0:1", rtt_s=rtt_s)
    chosen = {route_of("0:1", best, other, demand=tiny, seed=seed) for seed in range(200)}
    assert chosen == ({"a=0:1", "b=0:1"} if is_shared else {"a=0:1"})


def test_large_swarm_is_routed() -> None:
    rng = Random(0)
    candidates = []
    for index in range(500):
        start = rng.randrange(120)
        span = f"{start}:{min(126, start + rng.randint(1, 40))}"
        candidates.append(peer(f"p{index:03}", span, rtt_s=rng.uniform(0.001, 0.2), load=rng.randrange(4)))
    candidates += [peer("first", "0:10"), peer("last", "110:126")]
    route = find_route(Span(0, 126), candidates, PREFILL, rng=rng)
    assert [block for hop in route for block in hop.span] == list(range(126))


# The route in use.


def test_route_in_use_is_left_only_for_one_that_is_a_good_deal_cheaper() -> None:
    for rtt_s, taken in ((0.085, "a=0:8"), (0.06, "b=0:8")):
        used, other = peer("a", "0:8", rtt_s=0.1), peer("b", "0:8", rtt_s=rtt_s)
        for seed in range(100):
            route = find_route(Span(0, 8), [used, other], FREE, rng=Random(seed), keep={PeerId("a")})
            assert show(route) == taken


def test_nothing_in_use_best_is_taken() -> None:
    used, other = peer("a", "0:8", rtt_s=0.1), peer("b", "0:8", rtt_s=0.085)
    assert show(find_route(Span(0, 8), [used, other], FREE, rng=Random(0), keep={PeerId("c")})) == "b=0:8"


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_small_swarm_agrees_with_brute_force(data: st.DataObject) -> None:
    """As above, with whatever hypothesis finds: ties, cuts, peers in use."""
    num_blocks = data.draw(st.integers(1, 6))
    cuts = data.draw(st.sets(st.integers(1, num_blocks)).map(lambda inner: frozenset({0, num_blocks, *inner})))
    spans = st.tuples(st.integers(0, num_blocks - 1), st.integers(1, num_blocks)).filter(lambda ends: ends[0] < ends[1])
    candidates = [
        peer(
            f"p{index}",
            f"{start}:{end}",
            rtt_s=data.draw(st.sampled_from([None, 0.0, 0.01, 0.5])),
            decode_tokens_per_s=data.draw(st.sampled_from([0.0, 10.0, 1000.0])),
            load=data.draw(st.integers(0, 2)),
            group=data.draw(st.sampled_from("ab")),
        )
        for index, (start, end) in enumerate(data.draw(st.lists(spans, max_size=5)))
    ]
    keep = data.draw(st.sets(st.sampled_from([one.peer_id for one in candidates]))) if candidates else set()
    blocks = Span(0, num_blocks)
    useful = [legal for candidate in candidates if (legal := clipped(candidate, cuts)) is not None]
    draws = Random(3)
    blur = {
        name: (0.8 if name in keep else 1.0) * (1 + 0.05 * draws.random()) for name in sorted(c.peer_id for c in useful)
    }

    def cost_s(hops: list[tuple[Candidate, Span]]) -> float:
        return sum(blur[one.peer_id] * hop_cost_s(one, span, DECODE) for one, span in hops)

    best_s = min(map(cost_s, all_routes(blocks, useful, cuts)), default=None)
    if best_s is None:
        with pytest.raises(NoRouteError):
            find_route(blocks, candidates, DECODE, rng=Random(3), cuts=cuts, keep=keep)
        return
    route = find_route(blocks, candidates, DECODE, rng=Random(3), cuts=cuts, keep=keep)
    by_id = {one.peer_id: one for one in useful}
    assert [block for hop in route for block in hop.span] == list(blocks)
    assert cost_s([(by_id[hop.peer_id], hop.span) for hop in route]) == pytest.approx(best_s, rel=1e-9)
