"""Simulated swarms: what holds at every moment, determinism, and what single events do."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

import pytest

from remote_modules.peers import PeerState
from remote_modules.plan.routing import Hop
from remote_modules.plan.simulation import BalanceAtJoin, Conditions, RandomSpans, Report, Strategy, SwarmSimulation
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
    route_interval_s=15.0,
    max_known=20,
)
# Nobody comes or goes by itself: tests let peers join, crash and move by name.
STILL = replace(
    SMALL, num_peers=1, mean_life_s=1e15, announce_jitter=0.0, ramp_s=0.0, route_interval_s=math.inf, min_span=6
)


class Ordered(RandomSpans):
    """The spans that a test names, one after the other; at a check the peers move as ``moves`` says, by span."""

    def __init__(self, *spans: str, moves: dict[str, str] | None = None) -> None:
        self.spans = list(spans)
        self.moves = moves or {}
        self.has_checks = moves is not None
        self.views: list[View] = []

    def choose(self, view: View, capacity: Capacity, rng: Random) -> Span:
        return Span.parse(self.spans.pop(0))

    def reconsider(self, view: View, peer: Peer, rng: Random) -> Span | None:
        self.views.append(view)
        target = self.moves.pop(str(peer.span), None)
        return None if target is None else Span.parse(target)


def simulate(strategy: Strategy, seed: int = 1, conditions: Conditions = SMALL) -> SwarmSimulation:
    return SwarmSimulation(conditions, strategy, world=Random(seed), decisions=Random(seed + 1))


def holder_of(record_span: Span, peer: Capacity) -> Holder:
    return Holder(record_span, peer.tokens_per_s, peer.network_tokens_per_s)


@pytest.mark.parametrize("strategy", [RandomSpans(), BalanceAtJoin()], ids=["random", "join"])
def test_tables_equal_what_is_there_at_every_moment(strategy: Strategy) -> None:
    swarm = simulate(strategy)
    everyone: dict[str, Peer] = {}
    most_ghosts = 0
    for tick in range(400):
        swarm.events.run_until(3.0 * tick)
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
        serving = [peer.holder for peer in swarm.peers.values() if peer.phase is Phase.SERVING]
        assert swarm.serving == Coverage(SMALL.num_blocks, serving)
        online = {lease.record.peer_id for lease in leases if lease.record.state is PeerState.ONLINE} - ghosts
        assert online == {peer_id for peer_id, peer in swarm.peers.items() if peer.phase is Phase.SERVING}
        most_ghosts = max(most_ghosts, len(ghosts))
    assert most_ghosts > 0
    assert swarm.report.num_crashes > 0
    assert swarm.report.num_withdrawals > 0


def run(seed: int) -> Report:
    return simulate(BalanceAtJoin(), seed).run(900.0)


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
    assert swarm.report.loading_s == 12 * 5.0
    swarm.run(60.0)
    assert (peer.phase, swarm.serving == swarm.announced) == (Phase.SERVING, True)
    assert [(gap.began_s, gap.ended_s, gap.is_move) for gap in swarm.report.gaps] == [(0.0, 60.0, False)]
    assert swarm.report.gap_s == 60.0
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
    assert not loading.has_served
    assert swarm.serving.num_holders.tolist() == [1] * 12


def test_mover_serves_nobody_until_it_has_loaded_what_it_did_not_have() -> None:
    swarm = simulate(Ordered("6:12", "0:6", "0:6"), conditions=STILL)
    swarm.join()
    third = swarm.join()
    swarm.run(0.0)
    before_s = swarm.report.loading_s
    swarm.move(third, Span(4, 10))
    assert swarm.report.loading_s - before_s == 4 * 5.0 + 2 * 0.5
    assert swarm.announced.num_holders.tolist() == [1] * 4 + [2] * 6 + [1] * 2
    assert swarm.serving.num_holders.tolist() == [1] * 12
    assert not swarm.can_run(Hop(third.peer_id, Span(4, 10)))
    swarm.run(21.0)
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


def test_serving_peers_check_and_move_where_the_strategy_says() -> None:
    strategy = Ordered("0:12", moves={"0:12": "0:11"})
    swarm = simulate(strategy, conditions=replace(STILL, check_interval_s=10.0))
    swarm.run(600.0)
    assert len(strategy.views) > swarm.report.num_checks > 30
    assert swarm.report.num_checks == swarm.report.num_lookups
    assert [peer.span for peer in swarm.peers.values()] == [Span(0, 11)]
    assert strategy.views[-1].announced is swarm.announced


def test_loading_peer_does_not_check() -> None:
    strategy = Ordered("0:12", moves={})
    swarm = simulate(strategy, conditions=replace(STILL, check_interval_s=5.0, warm_up_s=0.0))
    swarm.run(59.9)
    assert strategy.views == []
    swarm.run(60.0)
    num_checks = swarm.report.num_checks
    assert len(strategy.views) == num_checks > 3
    (peer,) = swarm.peers.values()
    swarm.crash(peer)
    swarm.run(60.0)
    assert swarm.report.num_checks == num_checks


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
