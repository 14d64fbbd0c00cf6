"""Simulated swarms: what holds at every moment, determinism, and what single events do."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

import pytest

from remote_modules.peers import PeerState
from remote_modules.plan.election import Rule
from remote_modules.plan.routing import Hop
from remote_modules.plan.simulation import (
    BalanceAlways,
    BalanceAtJoin,
    Conditions,
    RandomSpans,
    Report,
    Strategy,
    SwarmSimulation,
)
from remote_modules.plan.simulation.coverage import Coverage
from remote_modules.plan.simulation.peer import PROOF_BYTES, Peer, Phase
from remote_modules.plan.simulation.strategies import View
from remote_modules.plan.throughput import Capacity, Holder
from remote_modules.spans import Span

SMALL = Conditions(
    num_blocks=12,
    num_peers=25,
    mean_life_s=600.0,
    min_span=2,
    max_span=6,
    ramp_s=60.0,
    warm_up_s=120.0,
    sample_interval_s=10.0,
    announce_interval_s=30.0,
    lease_s=90.0,
    route_interval_s=15.0,
    max_known=20,
)
# Nobody comes or goes by itself: tests let peers join, crash and move by name.
STILL = replace(
    SMALL, num_peers=1, mean_life_s=1e15, announce_jitter=0.0, ramp_s=0.0, route_interval_s=math.inf, min_span=6
)


RULE = Rule(check_interval_s=20.0, turn_s=40.0, servers_per_mover=5, num_groups=0)


class Ordered(RandomSpans):
    """The spans that a test names, one after the other; at each check a peer moves as ``moves`` says, by span."""

    def __init__(self, *spans: str, moves: dict[str, str] | None = None, check_interval_s: float = math.inf) -> None:
        self.spans = list(spans)
        self.moves = moves or {}
        self.check_interval_s = check_interval_s
        self.views: list[View] = []

    def choose(self, view: View, capacity: Capacity, rng: Random) -> Span:
        return Span.parse(self.spans.pop(0))

    def next_check_s(self, num_servers: int, rng: Random) -> float:
        return self.check_interval_s

    def reconsider(self, view: View, peer: Peer) -> Span | None:
        self.views.append(view)
        target = self.moves.get(str(peer.span))
        return None if target is None else Span.parse(target)


def simulate(strategy: Strategy, seed: int = 1, conditions: Conditions = SMALL) -> SwarmSimulation:
    return SwarmSimulation(conditions, strategy, world=Random(seed), decisions=Random(seed + 1))


def holder_of(record_span: Span, peer: Capacity) -> Holder:
    return Holder(record_span, peer.tokens_per_s, peer.network_tokens_per_s)


@pytest.mark.parametrize(
    "strategy", [RandomSpans(), BalanceAtJoin(), BalanceAlways(RULE, Random(0))], ids=["random", "join", "always"]
)
def test_tables_equal_what_is_there_at_every_moment(strategy: Strategy) -> None:
    swarm = simulate(strategy)
    everyone: dict[str, Peer] = {}
    most_ghosts = 0
    for tick in range(150):
        swarm.events.run_until(6.0 * tick)
        now_s = swarm.events.now_s
        everyone |= swarm.peers
        leases = swarm.leases.lookup(None, now_s)
        leased = {lease.record.peer_id for lease in leases}
        ghosts = leased - swarm.peers.keys()
        assert swarm.peers.keys() <= leased
        assert all(everyone[peer_id].expires_at_s <= now_s + SMALL.lease_s for peer_id in ghosts)
        assert all(now_s - lease.announced_at_s <= SMALL.lease_s for lease in leases)
        announced = [holder_of(lease.record.span, everyone[lease.record.peer_id].capacity) for lease in leases]
        assert swarm.announced == Coverage(SMALL.num_blocks, announced)
        spoken = {lease.record.peer_id: (lease.record.span, lease.record.state) for lease in leases}
        assert {peer_id: (member.span, member.state) for peer_id, member in swarm.members.items()} == spoken
        serving = [peer.holder for peer in swarm.peers.values() if peer.phase is Phase.SERVING]
        assert swarm.serving == Coverage(SMALL.num_blocks, serving)
        online = {lease.record.peer_id for lease in leases if lease.record.state is PeerState.ONLINE} - ghosts
        assert online == {peer_id for peer_id, peer in swarm.peers.items() if peer.phase is Phase.SERVING}
        most_ghosts = max(most_ghosts, len(ghosts))
    assert most_ghosts > 0
    assert swarm.report.num_crashes > 0
    assert swarm.report.num_withdrawals > 0


def run(seed: int) -> Report:
    return simulate(BalanceAlways(RULE, Random(0)), seed).run(300.0)


def test_same_seed_gives_the_same_report_and_another_seed_another() -> None:
    assert run(3) == run(3)
    assert run(3) != run(4)


def test_every_strategy_meets_the_same_peers() -> None:
    lives = []
    for strategy in (RandomSpans(), BalanceAtJoin()):
        report = simulate(strategy).run(900.0)
        lives.append(
            [(sample.at_s, sample.num_peers) for sample in report.samples]
            + [(report.num_joins, report.num_crashes), (report.num_withdrawals, report.num_lookups)]
        )
    assert lives[0] == lives[1]


def test_population_stays_at_its_mean() -> None:
    report = simulate(RandomSpans(), conditions=replace(SMALL, num_peers=100)).run(3600.0)
    assert report.samples[0].at_s == SMALL.warm_up_s
    assert len(report.samples) == 361
    assert sum(sample.num_peers for sample in report.samples) / 361 == pytest.approx(100, rel=0.1)
    assert report.num_joins == pytest.approx(3600 * 100 / 600, rel=0.1)
    assert report.per_s(report.num_announces) == pytest.approx(100 / 30 + 2 * 100 / 600, rel=0.1)


def test_running_on_continues() -> None:
    whole, parts = simulate(BalanceAtJoin()), simulate(BalanceAtJoin())
    whole.run(600.0)
    parts.run(200.0)
    parts.run(400.0)
    assert parts.report == whole.report
    assert parts.report.measured_s == 600.0


def test_peer_is_announced_at_once_and_serves_when_it_has_loaded() -> None:
    swarm = simulate(Ordered("0:12"), conditions=replace(STILL, warm_up_s=0.0))
    swarm.run(0.0)
    (peer,) = swarm.peers.values()
    assert (peer.phase, swarm.announced.num_missing(), swarm.serving.num_missing()) == (Phase.LOADING, 0, 12)
    assert swarm.report.loading_s == 12 * 5.5
    swarm.run(70.0)
    assert (peer.phase, swarm.serving == swarm.announced) == (Phase.SERVING, True)
    assert [(gap.began_s, gap.ended_s, gap.is_move) for gap in swarm.report.gaps] == [(0.0, 66.0, False)]
    assert swarm.report.gap_s == 66.0
    (lease,) = swarm.leases.lookup(None, swarm.events.now_s)
    assert len(lease.signed.payload) + PROOF_BYTES == peer.record_bytes
    assert swarm.report.record_bytes > swarm.report.num_announces * 96
    assert swarm.report.num_announces == 1 + 2 + 1  # joining, two renewals, online


def test_crashed_sole_holder_is_announced_until_its_lease_ends() -> None:
    swarm = simulate(Ordered("0:12"), conditions=STILL)
    swarm.run(0.0)
    (peer,) = swarm.peers.values()
    swarm.crash(peer)
    swarm.withdraw(peer)  # nothing happens any more
    swarm.crash(peer)
    assert (swarm.serving.num_missing(), swarm.announced.num_missing()) == (12, 0)
    assert not swarm.can_run(Hop(peer.peer_id, Span(0, 12)))
    last_s = peer.expires_at_s
    swarm.events.run_until(last_s - 0.001)
    assert swarm.announced.num_missing() == 0
    assert len(swarm.leases.lookup(None, swarm.events.now_s)) == 1
    swarm.events.run_until(last_s)
    assert swarm.announced.num_missing() == 12
    assert swarm.leases.lookup(None, swarm.events.now_s) == []
    assert (swarm.report.num_crashes, swarm.report.num_withdrawals) == (1, 0)


def test_withdrawn_peer_is_forgotten_at_once() -> None:
    swarm = simulate(Ordered("0:12", "3:9"), conditions=STILL)
    swarm.run(0.0)
    (peer,) = swarm.peers.values()
    other = swarm.join()
    swarm.withdraw(peer)
    assert [lease.record.peer_id for lease in swarm.leases.lookup(None, swarm.events.now_s)] == [other.peer_id]
    assert swarm.announced == Coverage(12, [other.holder])
    assert (swarm.report.num_crashes, swarm.report.num_withdrawals) == (0, 1)


def test_peer_that_is_gone_does_not_come_back_when_its_load_ends() -> None:
    swarm = simulate(Ordered("0:12", "0:12"), conditions=STILL)
    swarm.run(0.0)
    loading = swarm.join()
    swarm.crash(loading)
    swarm.run(300.0)
    assert loading.phase is Phase.GONE
    assert swarm.serving.num_holders.tolist() == [1] * 12


def test_mover_serves_nobody_until_it_has_loaded_what_it_did_not_have() -> None:
    swarm = simulate(Ordered("6:12", "0:6", "0:6"), conditions=STILL)
    swarm.join()
    third = swarm.join()
    swarm.run(0.0)
    before_s = swarm.report.loading_s
    swarm.move(third, Span(4, 10))
    assert swarm.report.loading_s - before_s == 4 * 5.0 + 6 * 0.5
    assert swarm.announced.num_holders.tolist() == [1] * 4 + [2] * 6 + [1] * 2
    assert swarm.serving.num_holders.tolist() == [1] * 12
    assert not swarm.can_run(Hop(third.peer_id, Span(4, 10)))
    swarm.run(23.0)
    assert swarm.serving == swarm.announced
    assert swarm.can_run(Hop(third.peer_id, Span(5, 10)))
    assert not swarm.can_run(Hop(third.peer_id, Span(3, 10)))
    assert swarm.report.moved_blocks == 4
    assert swarm.report.gaps == []


def test_gap_that_a_move_opens_is_told_apart() -> None:
    swarm = simulate(Ordered("0:12"), conditions=STILL)
    swarm.run(0.0)
    (peer,) = swarm.peers.values()
    swarm.move(peer, Span(0, 6))
    swarm.run(100.0)
    assert [(gap.is_move, gap.ended_s) for gap in swarm.report.gaps] == [(True, math.inf)]
    assert swarm.report.gap_s == 100.0


def test_mover_serves_while_it_fetches_and_then_decides_anew() -> None:
    strategy = Ordered("0:12", "0:6", moves={"0:6": "4:10"}, check_interval_s=50.0)
    swarm = simulate(strategy, conditions=STILL)
    swarm.run(0.0)
    peer = swarm.join()  # at 120 s; serves from 153 s
    swarm.run(50.1)
    assert (peer.phase, peer.is_fetching, peer.span) == (Phase.SERVING, True, Span(0, 6))
    strategy.moves = {"0:6": "3:9"}
    swarm.run(19.8)
    assert peer.span == Span(0, 6)
    swarm.run(0.2)  # fetched 6..10; 3..9 needs no more
    assert (peer.phase, peer.span) == (Phase.LOADING, Span(3, 9))
    swarm.run(2.8)
    assert swarm.serving.num_holders.tolist() == [1] * 12
    swarm.run(0.2)
    assert swarm.serving.num_holders.tolist() == [1] * 3 + [2] * 6 + [1] * 3
    assert swarm.report.num_moves == 1
    assert swarm.report.loading_s == 6 * 5.5 + 6 * 0.5


def test_mover_that_has_fetched_may_stay() -> None:
    strategy = Ordered("0:12", "0:6", moves={"0:6": "4:10"}, check_interval_s=50.0)
    swarm = simulate(strategy, conditions=STILL)
    swarm.run(0.0)
    peer = swarm.join()
    swarm.run(60.0)
    assert peer.is_fetching
    strategy.moves = {}
    swarm.run(100.0)
    assert (peer.is_fetching, peer.span, swarm.report.num_moves) == (False, Span(0, 6), 0)
    assert peer.fetch_s(Span(0, 10), STILL) == 0.0


def test_mover_that_crashes_while_it_fetches_is_gone() -> None:
    swarm = simulate(Ordered("0:12", "0:6", moves={"0:6": "4:10"}, check_interval_s=50.0), conditions=STILL)
    swarm.run(0.0)
    peer = swarm.join()
    swarm.run(60.0)
    assert peer.is_fetching
    swarm.crash(peer)
    swarm.run(100.0)
    assert (peer.phase, peer.span, swarm.report.num_moves) == (Phase.GONE, Span(0, 6), 0)


def test_mover_that_does_not_fetch_ahead_stops_first() -> None:
    conditions = replace(STILL, fetches_ahead=False)
    swarm = simulate(Ordered("0:12", "0:6", moves={"0:6": "4:10"}, check_interval_s=50.0), conditions=conditions)
    swarm.run(0.0)
    peer = swarm.join()
    swarm.run(50.1)
    assert (peer.phase, peer.span) == (Phase.LOADING, Span(4, 10))


def test_checks_see_the_announced_swarm_and_count_as_lookups() -> None:
    strategy = Ordered("0:12", check_interval_s=10.0)
    swarm = simulate(strategy, conditions=STILL)
    swarm.run(600.0)
    assert swarm.report.num_checks == swarm.report.num_lookups == 61
    assert len(strategy.views) == (720 - 66) // 10 + 1
    view = strategy.views[-1]
    assert (view.announced, view.now_s, view.version) == (swarm.announced, 720.0, 2)
    assert {peer_id: member.span for peer_id, member in view.members.items()} == {
        peer.peer_id: Span(0, 12) for peer in swarm.peers.values()
    }


def test_loading_and_crashed_peers_do_not_check() -> None:
    strategy = Ordered("0:12", check_interval_s=5.0)
    swarm = simulate(strategy, conditions=replace(STILL, warm_up_s=0.0))
    swarm.run(65.9)
    assert strategy.views == []
    swarm.run(60.0)
    assert len(strategy.views) == 12
    (peer,) = swarm.peers.values()
    swarm.crash(peer)
    swarm.run(60.0)
    assert len(strategy.views) == 12


def test_full_balancing_moves_and_beats_balancing_at_the_join() -> None:
    at_join = simulate(BalanceAtJoin()).run(1800.0)
    always = simulate(BalanceAlways(RULE, Random(0))).run(1800.0)
    assert at_join.num_moves == 0
    assert always.num_moves > 10
    assert always.mean_share > at_join.mean_share + 0.03


def test_client_that_sees_a_dead_peer_gets_a_stale_route_and_one_without_peers_none() -> None:
    swarm = simulate(Ordered("0:12"), conditions=replace(STILL, route_interval_s=10.0))
    swarm.run(15.0)
    (peer,) = swarm.peers.values()
    assert (swarm.report.route_ok, swarm.report.route_stale, swarm.report.route_none) == (1, 0, 0)
    swarm.crash(peer)
    swarm.events.run_until(peer.expires_at_s - 0.001)
    stale = swarm.report.route_stale
    assert stale >= 6
    swarm.run(200.0)
    report = swarm.report
    assert (report.route_ok, report.route_stale) == (1, stale)
    assert report.route_none == pytest.approx((report.measured_s - 10.0) / 10.0 - stale, abs=1)
    assert report.route_hops == 1 + stale


def test_client_knows_no_more_peers_than_it_asks_for() -> None:
    swarm = simulate(Ordered("0:12", *["0:6"] * 30), conditions=STILL)
    for _ in range(30):
        swarm.join()
    swarm.run(60.0)
    assert len(swarm.peers) == 31
    assert len(swarm.known_to_client()) == 20
