"""A swarm in virtual time: peers join, load, announce, move, leave and crash, and the real decisions are asked.

Placement, rebalancing, routing and the lease table are those that servers, clients and trackers run. What is not real
are the network, which is instant and loses nothing, the proofs of records, and the way in which a server learns what
the others hold: the sums over all records are kept up to date here, not made anew for each question.

What the swarm is and what the tracker knows differ, as in life: ``serving`` has the peers that answer, ``announced``
has every live lease, so that a crashed peer counts there until its lease ends and a loading one counts already.
Decisions see only ``announced``.

Two sources of chance: ``world`` decides who comes, when and how long, ``decisions`` all the rest. With the same
``world`` every strategy meets the same peers.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from remote_modules.errors import NoRouteError
from remote_modules.peers import PeerId, PeerRecord, PeerState
from remote_modules.plan.election import Member
from remote_modules.plan.leases import LeaseTable
from remote_modules.plan.routing import Candidate, Demand, Hop, find_route
from remote_modules.plan.simulation.bounds import relaxation_bound
from remote_modules.plan.simulation.conditions import Conditions, draw_capacity
from remote_modules.plan.simulation.coverage import Coverage
from remote_modules.plan.simulation.events import EventQueue
from remote_modules.plan.simulation.peer import MODEL_KEY, Peer, Phase
from remote_modules.plan.simulation.report import Gap, Report, Sample
from remote_modules.plan.simulation.strategies import Strategy, View
from remote_modules.plan.throughput import Capacity, Layout
from remote_modules.spans import Span

if TYPE_CHECKING:
    from random import Random

__all__ = ["SwarmSimulation"]

MAX_RECORDS = 2_000_000
DECODE = Demand(num_tokens=1, kv_tokens=2048, bytes_per_token=16384, is_decode=True)


class SwarmSimulation:
    """One swarm and its tracker.

    Attributes:
        peers: that run, by id, in the order in which they came.
        members: what the tracker knows of those whose lease has not ended.
        serving: throughput of the peers that serve.
        announced: throughput of ``members``.
        report: counts from ``conditions.warm_up_s`` on.
    """

    def __init__(self, conditions: Conditions, strategy: Strategy, *, world: Random, decisions: Random) -> None:
        self.conditions = conditions
        self.events = EventQueue()
        self.leases = LeaseTable(max_records=MAX_RECORDS)
        self.peers: dict[str, Peer] = {}
        self.members: dict[PeerId, Member] = {}
        self.serving = Coverage(conditions.num_blocks)
        self.announced = Coverage(conditions.num_blocks)
        self.report = Report()
        self._strategy = strategy
        self._layout = Layout(conditions.num_blocks)
        self._world = world
        self._decisions = decisions
        self._num_joined = 0
        self._num_changes = 0  # of the members
        self._announced_bytes = 0  # of the records in the table
        self._capacities: dict[str, Capacity] = {}  # of the peers that have served
        self._is_gap = False
        self._is_measured = False
        self.events.add(conditions.warm_up_s, self._begin_measuring)
        for _ in range(conditions.num_peers):
            self.events.add(conditions.ramp_s * world.random(), self.join)
        self.events.add(self._next_arrival_s(), self._arrive)

    def run(self, measured_s: float) -> Report:
        """Go on for ``measured_s`` beyond the warm-up, or beyond what was measured before."""
        end_s = max(self.events.now_s, self.conditions.warm_up_s) + measured_s
        self.events.run_until(end_s)
        self.report.measured_s = end_s - self.conditions.warm_up_s
        return self.report

    # Coming, loading, going

    def _next_arrival_s(self) -> float:
        rate = self.conditions.num_peers / self.conditions.mean_life_s
        return self.events.now_s + self._world.expovariate(rate)

    def _arrive(self) -> None:
        self.events.add(self._next_arrival_s(), self._arrive)
        self.join()

    def join(self) -> Peer:
        """A new peer of random hardware and life finds its span and begins to load it."""
        conditions, now_s = self.conditions, self.events.now_s
        capacity = draw_capacity(conditions, self._world)
        leaves_at_s = now_s + self._world.expovariate(1 / conditions.mean_life_s)
        is_crash = self._world.random() < conditions.crash_share
        self._count_lookup()
        span = self._strategy.choose(self._view(), capacity, self._decisions)
        peer = Peer(self._num_joined, capacity, span, conditions)
        self._num_joined += 1
        self.peers[peer.peer_id] = peer
        if self._is_measured:
            self.report.num_joins += 1
        self._load(peer, span)
        self.events.add(leaves_at_s, self.crash if is_crash else self.withdraw, peer)
        self._renew_later(peer)
        self._check_later(peer)
        return peer

    def _load(self, peer: Peer, span: Span) -> None:
        """Announce the span at once, serve it later."""
        load_s = peer.start_load(span, self.conditions)
        if self._is_measured:
            self.report.loading_s += load_s
        self.announced.add(peer.holder)
        self._announce_change(peer)
        self.events.add(self.events.now_s + load_s, self._loaded, peer)

    def _loaded(self, peer: Peer) -> None:
        if peer.phase is Phase.GONE:
            return
        peer.phase = Phase.SERVING
        self._capacities[peer.peer_id] = peer.capacity
        self.serving.add(peer.holder)
        self._watch_gap(is_move=False)
        self._announce_change(peer)

    def crash(self, peer: Peer) -> None:
        """The peer is gone at once; its lease runs out. Nothing happens to one that is gone."""
        if self._stop(peer):
            if self._is_measured:
                self.report.num_crashes += 1
            self.events.add(peer.expires_at_s, self._forget, peer)

    def withdraw(self, peer: Peer) -> None:
        """The peer takes its record back and is gone. Nothing happens to one that is gone."""
        if self._stop(peer):
            if self._is_measured:
                self.report.num_withdrawals += 1
            self._forget(peer)
            peer.sign()
            self.leases.withdraw(peer.record, self.events.now_s)

    def _stop(self, peer: Peer) -> bool:
        if peer.phase is Phase.GONE:
            return False
        was_serving = peer.phase is Phase.SERVING
        peer.phase = Phase.GONE
        del self.peers[peer.peer_id]
        self._capacities.pop(peer.peer_id, None)
        if was_serving:
            self.serving.remove(peer.holder)
            self._watch_gap(is_move=False)
        return True

    def _forget(self, peer: Peer) -> None:
        """The tracker has no lease of the peer any more."""
        self.announced.remove(peer.holder)
        del self.members[peer.peer_id]
        self._num_changes += 1
        self._announced_bytes -= peer.record_bytes

    # Announcing

    def _renew_later(self, peer: Peer) -> None:
        jitter = self.conditions.announce_jitter * (2 * self._decisions.random() - 1)
        self.events.add(self.events.now_s + self.conditions.announce_interval_s * (1 + jitter), self._renew, peer)

    def _renew(self, peer: Peer) -> None:
        if peer.phase is not Phase.GONE:
            self._announce(peer)
            self._renew_later(peer)

    def _announce_change(self, peer: Peer) -> None:
        peer.describe()
        self._announce(peer)
        self.members[peer.peer_id] = peer.member
        self._num_changes += 1

    def _announce(self, peer: Peer) -> None:
        now_s, lease_s = self.events.now_s, self.conditions.lease_s
        self._announced_bytes -= peer.record_bytes
        signed = peer.sign()
        self._announced_bytes += peer.record_bytes
        self.leases.announce(signed, peer.record, now_s, lease_s)
        peer.expires_at_s = now_s + lease_s
        if self._is_measured:
            self.report.num_announces += 1
            self.report.record_bytes += peer.record_bytes

    # Moving

    def _view(self) -> View:
        return View(self.conditions, self._layout, self.announced, self.members, self._num_changes, self.events.now_s)

    def _check_later(self, peer: Peer) -> None:
        wait_s = self._strategy.next_check_s(len(self.members), self._decisions)
        self.events.add(self.events.now_s + wait_s, self._check, peer)

    def _check(self, peer: Peer) -> None:
        if peer.phase is Phase.GONE:
            return
        self._check_later(peer)
        if peer.phase is Phase.SERVING and not peer.is_fetching:
            self._reconsider(peer)

    def _reconsider(self, peer: Peer) -> None:
        self._count_lookup()
        if self._is_measured:
            self.report.num_checks += 1
        span = self._strategy.reconsider(self._view(), peer)
        if span is None:
            return
        fetch_s = peer.fetch_s(span, self.conditions)
        if self.conditions.fetches_ahead and fetch_s > 0:
            peer.is_fetching = True
            self.events.add(self.events.now_s + fetch_s, self._fetched, peer, span)
        else:
            self.move(peer, span)

    def _fetched(self, peer: Peer, span: Span) -> None:
        """The swarm may have changed: the peer decides anew."""
        if peer.phase is not Phase.GONE:
            peer.is_fetching = False
            peer.keep(span)
            self._reconsider(peer)

    def move(self, peer: Peer, span: Span) -> None:
        """A serving peer lets go of its span and loads another."""
        if self._is_measured:
            self.report.num_moves += 1
            self.report.moved_blocks += len(span) - max(
                0, min(span.end, peer.span.end) - max(span.start, peer.span.start)
            )
        self.announced.remove(peer.holder)
        self.serving.remove(peer.holder)
        self._watch_gap(is_move=True)
        self._load(peer, span)

    # Looking

    def _begin_measuring(self) -> None:
        self._is_measured = True
        self._watch_gap(is_move=False)
        self._sample()
        self.events.add(self.events.now_s + self.conditions.route_interval_s, self._route)

    def _watch_gap(self, *, is_move: bool) -> None:
        """Note where full coverage is lost, and where it is back."""
        if not self._is_measured:
            return
        is_gap = self.serving.num_missing() > 0
        gaps, now_s = self.report.gaps, self.events.now_s
        if is_gap and not self._is_gap:
            gaps.append(Gap(now_s, math.inf, is_move))
        elif self._is_gap and not is_gap:
            gaps[-1] = replace(gaps[-1], ended_s=now_s)
        self._is_gap = is_gap

    def _sample(self) -> None:
        self.events.add(self.events.now_s + self.conditions.sample_interval_s, self._sample)
        self.report.samples.append(
            Sample(
                at_s=self.events.now_s,
                num_peers=len(self.peers),
                num_leases=len(self.leases.lookup(MODEL_KEY, self.events.now_s)),
                throughput=self.serving.minimum(),
                announced=self.announced.minimum(),
                bound=relaxation_bound(self.conditions.num_blocks, self._capacities.values()),
                num_missing=self.serving.num_missing(),
            )
        )

    def _count_lookup(self) -> None:
        if self._is_measured:
            self.report.num_lookups += 1
            self.report.lookup_bytes += self._announced_bytes
            self.report.largest_lookup_bytes = max(self.report.largest_lookup_bytes, self._announced_bytes)

    def _route(self) -> None:
        """A client that just came looks for a route, and finds out whether its peers are there."""
        self.events.add(self.events.now_s + self.conditions.route_interval_s, self._route)
        self._count_lookup()
        try:
            hops = find_route(Span(0, self.conditions.num_blocks), self.known_to_client(), DECODE, rng=self._decisions)
        except NoRouteError:
            self.report.route_none += 1
            return
        self.report.route_hops += len(hops)
        if all(map(self.can_run, hops)):
            self.report.route_ok += 1
        else:
            self.report.route_stale += 1

    def known_to_client(self) -> list[Candidate]:
        """Peers that a client would find now, at most ``max_known`` of them, drawn at random."""
        leases = self.leases.lookup(MODEL_KEY, self.events.now_s)
        if len(leases) > self.conditions.max_known:
            leases = self._decisions.sample(leases, self.conditions.max_known)
        records = [lease.record for lease in leases]
        return [_candidate(record) for record in records if record.state is PeerState.ONLINE]

    def can_run(self, hop: Hop) -> bool:
        """Whether the peer of ``hop`` serves its blocks now."""
        peer = self.peers.get(hop.peer_id)
        return peer is not None and peer.phase is Phase.SERVING and peer.span.covers(hop.span)


def _candidate(record: PeerRecord) -> Candidate:
    """As a client sees a peer that it has not talked to."""
    return Candidate(
        peer_id=PeerId(record.peer_id),
        span=record.span,
        rtt_s=None,
        decode_tokens_per_s=record.decode_tokens_per_s,
        prefill_tokens_per_s=record.prefill_tokens_per_s,
        free_kv_tokens=record.free_kv_tokens,
        load=record.load,
    )
