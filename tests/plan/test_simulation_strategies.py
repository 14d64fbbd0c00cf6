"""The strategies: what a newcomer chooses, and when a server moves."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

import pytest

from remote_modules.peers import PeerState
from remote_modules.plan.election import Rule, elect, view_seed
from remote_modules.plan.placement import choose_span
from remote_modules.plan.rebalance import Move, decide_move
from remote_modules.plan.simulation.conditions import Conditions
from remote_modules.plan.simulation.coverage import Coverage
from remote_modules.plan.simulation.peer import Peer, Phase
from remote_modules.plan.simulation.strategies import BalanceAlways, BalanceAtJoin, RandomSpans, View
from remote_modules.plan.throughput import Capacity, Holder, Layout
from remote_modules.spans import Span

CONDITIONS = Conditions(num_blocks=10, max_span=4)
LAYOUT = Layout(10)
CAPACITY = Capacity(tokens_per_s=100.0, max_blocks=4)
HOLDERS = [Holder(Span(0, 4), 100.0), Holder(Span(2, 6), 50.0), Holder(Span(5, 10), 90.0)]
RULE = Rule(servers_per_mover=1)


def view_of(
    holders: list[Holder], peers: list[Peer] | None = None, *, version: int = 1, now_s: float = 0.0, age_s: float = 0.0
) -> View:
    conditions = replace(CONDITIONS, view_age_s=age_s)
    members = {peer.peer_id: peer.member for peer in peers or ()}
    return View(conditions, LAYOUT, Coverage(10, holders), members, version, now_s)


def serving_peers(*spans: str, tokens_per_s: float = 100.0) -> list[Peer]:
    peers = []
    for number, text in enumerate(spans):
        span = Span.parse(text)
        capacity = Capacity(tokens_per_s=tokens_per_s + number, max_blocks=4, network_tokens_per_s=1e6)
        peers.append(Peer(number, capacity, span, CONDITIONS))
        peers[-1].start_load(span, CONDITIONS)
        peers[-1].phase = Phase.SERVING
        peers[-1].describe()
        assert peers[-1].record.state is PeerState.ONLINE
    return peers


def test_random_spans_are_all_of_the_legal_ones() -> None:
    rng = Random(0)
    chosen = {RandomSpans().choose(view_of([]), CAPACITY, rng) for _ in range(300)}
    assert chosen == {Span(start, start + 4) for start in range(7)}
    assert RandomSpans().choose(view_of([]), Capacity(tokens_per_s=1.0, max_blocks=99), rng) == Span(0, 10)


def test_newcomer_chooses_what_placement_chooses_from_all_holders() -> None:
    assert BalanceAtJoin().choose(view_of(HOLDERS), CAPACITY, Random(0)) == choose_span(LAYOUT, CAPACITY, HOLDERS)


def test_strategies_of_the_join_alone_never_move() -> None:
    (peer,) = serving_peers("0:4")
    for strategy in (RandomSpans(), BalanceAtJoin()):
        assert strategy.next_check_s(8, Random(0)) == math.inf
        assert strategy.reconsider(view_of(HOLDERS), peer) is None


def test_checks_come_as_the_rule_says() -> None:
    rng, twin = Random(4), Random(4)
    assert BalanceAlways(RULE, Random(0)).next_check_s(8, rng) == RULE.next_check_s(8, twin)


@pytest.mark.parametrize("seed", range(8))
def test_servers_move_as_rebalancing_decides_on_all_records(seed: int) -> None:
    rng = Random(seed)
    starts = [rng.randint(0, 6) for _ in range(9)]
    peers = serving_peers(*(f"{start}:{start + 4}" for start in starts))
    members = [peer.member for peer in peers]
    proposals = elect(LAYOUT, members, rule=RULE, rng=Random(view_seed(members)))
    strategy = BalanceAlways(RULE, Random(0))
    view = view_of([], peers)
    moved = []
    for peer in peers:
        cost = peer.cost(CONDITIONS, is_fetched=True)
        expected = decide_move(members, peer.peer_id, proposals, rule=RULE, cost=cost)
        span = strategy.reconsider(view, peer)
        assert span == (expected.span if isinstance(expected, Move) else None)
        moved += [peer] * (span is not None)
    assert len(moved) == (1 if proposals else 0)


def test_one_of_two_heals_what_nobody_holds_and_the_other_after_its_turn() -> None:
    peers = serving_peers("0:4", "0:4", "0:4", "4:7")
    strategy = BalanceAlways(RULE, Random(0))
    spans = [strategy.reconsider(view_of([], peers), peer) for peer in peers]
    (first,) = [number for number, span in enumerate(spans) if span is not None]
    late = view_of([], peers, now_s=RULE.heal_turn_s)
    seconds = [strategy.reconsider(late, peer) for number, peer in enumerate(peers) if number != first]
    healing = [span for span in seconds if span is not None]
    assert len(healing) == 1
    assert healing[0].end == 10


def test_young_election_is_kept_and_a_mover_is_not_asked_by_it_again() -> None:
    peers = serving_peers("0:4", "0:4", "4:8")
    strategy = BalanceAlways(RULE, Random(0))
    spans = {peer.peer_id: strategy.reconsider(view_of([], peers, age_s=60.0), peer) for peer in peers}
    (mover,) = [peer for peer in peers if spans[peer.peer_id] is not None]
    target = spans[mover.peer_id]
    assert target is not None
    assert target.end == 10
    kept = view_of([], peers[:1], version=2, now_s=59.0, age_s=60.0)
    assert strategy.reconsider(kept, mover) == target
    mover.start_load(target, CONDITIONS)
    assert strategy.reconsider(kept, mover) is None
    mover.describe()
    anew = view_of([], peers, version=2, now_s=60.0, age_s=60.0)
    assert strategy.reconsider(anew, mover) is None
