"""Which peers get work: what one client knows of them, put before `plan`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from random import Random
from typing import TypeVar

from remote_modules.config import ClientConfig
from remote_modules.errors import NoRouteError
from remote_modules.model.stack import StackSpec
from remote_modules.peers import PeerId, PeerRecord, PeerState
from remote_modules.plan.breakers import Breakers, RetryBudget
from remote_modules.plan.candidates import DEFAULT_BANDWIDTH_BYTES_PER_S
from remote_modules.plan.compatibility import group_of
from remote_modules.plan.deadlines import WorkEstimator
from remote_modules.plan.measurements import Measurements, Sample
from remote_modules.plan.microbatches import depth, interleaved
from remote_modules.plan.moves import find_better, move_seconds
from remote_modules.plan.own_requests import OwnRequests, Sent
from remote_modules.plan.routing import Candidate, Demand, Hop, find_route
from remote_modules.plan.spread import spread
from remote_modules.plan.wire_choice import choose_wire
from remote_modules.spans import Span, missing_spans
from remote_modules.wire.messages import Output

__all__ = ["Router"]

WORTHWHILE = 0.5  # a lone pass uses peers that have at least so much free of what the best has
PASSES = ("forward", "backward", "kept_backward")

T = TypeVar("T")


class Router:
    """Breakers, measurements and the peers' records of one client.

    Args:
        clock: monotonic seconds.
        rng: for routes and jitter.
        rtt_of: the round trip of the connection to a peer; None where there is none.
    """

    def __init__(
        self,
        stack: StackSpec,
        config: ClientConfig,
        *,
        clock: Callable[[], float],
        rng: Random,
        rtt_of: Callable[[PeerId], float | None],
    ) -> None:
        self._records: Mapping[PeerId, PeerRecord] = {}
        self._num_holders = [0] * stack.num_blocks  # by block: peers that are online
        self.breakers = Breakers(base_s=config.ban_s, max_s=config.max_ban_s, rng=rng)
        self.budget = RetryBudget(ratio=config.retry_ratio)
        self.estimator = WorkEstimator(
            min_timeout_s=config.min_request_timeout_s, max_timeout_s=config.max_request_timeout_s
        )
        self.measurements = Measurements()
        self.requests = OwnRequests()  # of passes: they wait for each other; steps do not
        self._stack = stack
        self._config = config
        self._clock = clock
        self._rng = rng
        self._rtt_of = rtt_of

    @property
    def records(self) -> Mapping[PeerId, PeerRecord]:
        """The latest record of each peer that may be used."""
        return self._records

    @records.setter
    def records(self, records: Mapping[PeerId, PeerRecord]) -> None:
        self._records = records
        self._num_holders = _count_holders(records.values(), len(self._num_holders))

    def instance_of(self, peer_id: PeerId) -> str:
        record = self.records.get(peer_id)
        return record.instance_id if record is not None else ""

    def find(self, blocks: Span, demand: Demand, *, avoid: Collection[PeerId] = ()) -> tuple[Hop, ...]:
        """The cheapest route now. Peers whose breakers are not closed are used only where nobody can stand in.

        Raises:
            NoRouteError: nobody covers some of the blocks.
        """

        def cheapest(candidates: Sequence[Candidate]) -> tuple[Hop, ...]:
            return find_route(blocks, candidates, demand, rng=self._rng, cuts=self._stack.cuts)

        return self._claimed(self._found(cheapest, avoid, demand))

    def find_shares(
        self, blocks: Span, demand: Demand, count: int, *, avoid: Collection[PeerId] = ()
    ) -> list[tuple[Hop, ...]]:
        """Routes for work that is not in a hurry: peers get it in proportion to what they have free.

        Args:
            count: microbatches, each of ``demand``; one route for each.

        Raises:
            NoRouteError: nobody covers some of the blocks.
        """
        least = min(WORTHWHILE, 1.0 / max(1, count - 1))  # a slower peer would still be at it when all else is done

        def shared(candidates: Sequence[Candidate]) -> list[tuple[Hop, ...]]:
            cuts = self._stack.cuts
            routes = spread(blocks, candidates, demand, rng=self._rng, count=count, least=least, cuts=cuts)
            return interleaved([route.hops for route in routes])

        routes = self._found(shared, avoid, demand)
        self.claim({hop.peer_id: hop for route in routes for hop in route}.values())
        return routes

    def depth(self, hop: Hop, demand: Demand) -> int:
        """Microbatches of ``demand`` to have under way at a hop; see `plan.microbatches.depth`."""
        record = self.records.get(hop.peer_id)
        if record is None:
            return 1
        peer, num_tokens = self._candidate(record), demand.rows * demand.num_tokens
        bandwidth = peer.bandwidth_bytes_per_s or DEFAULT_BANDWIDTH_BYTES_PER_S
        rate = peer.prefill_tokens_per_s
        return depth(
            compute_s=num_tokens * len(hop.span) / rate if rate > 0 else 0.0,
            transfer_s=num_tokens * demand.bytes_per_token / bandwidth,
            rtt_s=peer.rtt_s or 0.0,
        )

    def find_rival(self, hop: Hop, demand: Demand) -> tuple[Hop, ...] | None:
        """Hops that could do the work of ``hop`` beside it; None if nobody else can."""
        try:
            candidates = self._candidates({hop.peer_id}, demand)
            return find_route(hop.span, candidates, demand, rng=self._rng, cuts=self._stack.cuts)
        except NoRouteError:
            return None

    def find_better(
        self, hops: Sequence[Hop], demand: Demand, position: int, *, kv_bytes_per_token: float | None = None
    ) -> tuple[Hop, ...] | None:
        """See `plan.moves.find_better`."""
        used = {hop.peer_id for hop in hops}
        candidates = self._candidates((), demand)
        candidates += [
            self._candidate(record)
            for peer_id in used - {candidate.peer_id for candidate in candidates}
            if (record := self.records.get(peer_id)) is not None
        ]
        cuts = self._stack.cuts
        return find_better(
            hops, candidates, demand, position, rng=self._rng, cuts=cuts, kv_bytes_per_token=kv_bytes_per_token
        )

    def replay_seconds(self, hops: Sequence[Hop], demand: Demand, num_tokens: int) -> float:
        """What it takes to fill KV caches of ``hops`` with so many tokens of each row."""
        known = {hop.peer_id: self._candidate(self.records[hop.peer_id]) for hop in hops}
        return move_seconds((), hops, known, num_tokens, demand)

    def choose_wire(
        self, hops: Sequence[Hop], demand: Demand, coded_bytes: Mapping[str, int], *, is_pipelined: bool
    ) -> str:
        """See `plan.wire_choice.choose_wire`."""
        known = {h.peer_id: self._candidate(self.records[h.peer_id]) for h in hops if h.peer_id in self.records}
        return choose_wire(hops, known, demand, coded_bytes, is_pipelined=is_pipelined)

    def has_route(self, blocks: Span, demand: Demand, *, avoid: Collection[PeerId]) -> bool:
        """Whether others than ``avoid`` cover ``blocks``, by what is known now."""
        try:
            find_route(blocks, self._candidates(avoid, demand), demand, rng=self._rng, cuts=self._stack.cuts)
        except NoRouteError:
            return False
        return True

    def is_held(self, blocks: Span, adapter: str, *, avoid: Collection[PeerId]) -> bool:
        """Whether others than ``avoid`` hold ``blocks``, even if they cannot be used now."""
        held = (
            record.span
            for peer_id, record in self.records.items()
            if peer_id not in avoid and record.state is PeerState.ONLINE and (not adapter or adapter in record.adapters)
        )
        return not missing_spans(held, blocks)

    def may_overflow(self, hop: Hop, autocast: str | None, adapter: str) -> bool:
        """Whether a pass at the hop may give what is not finite, with nobody who could confirm it: in float16 alone.

        Args:
            autocast: of the pass; None for what is no pass.
        """
        record = self.records.get(hop.peer_id)
        is_half = autocast == "float16" or (record is not None and record.dtype == "float16")
        return is_half and autocast is not None and not self.is_replicated(hop.span, adapter)

    def is_replicated(self, blocks: Span, adapter: str = "") -> bool:
        """Whether each block has two peers that are online and offer ``adapter``: a quick look before a long one."""
        num_holders = self._num_holders
        if adapter:
            num_holders = _count_holders([r for r in self.records.values() if adapter in r.adapters], len(num_holders))
        return min(num_holders[blocks.start : blocks.end]) > 1

    def timeout_s(self, hop: Hop, kind: str, work: float, num_bytes: int, *, adapter: str = "") -> float:
        """Time to give a request; see `plan.deadlines.WorkEstimator.timeout_s`.

        Args:
            adapter: that whoever stands in must offer; "" for none.
        """
        record = self.records.get(hop.peer_id)
        rate = 0.0
        if record is not None:
            rate = record.decode_tokens_per_s if kind == "decode" else record.prefill_tokens_per_s
        bandwidth = self.measurements.bandwidth_bytes_per_s(hop.peer_id, now_s=self._clock())
        transfer_s = num_bytes / (bandwidth or DEFAULT_BANDWIDTH_BYTES_PER_S)
        timeout_s = self.estimator.timeout_s(hop.peer_id, kind, work=work, announced_rate=rate, transfer_s=transfer_s)
        # Whoever nobody can stand in for is waited for: giving up would only make it begin anew.
        return (
            timeout_s if self.is_replicated(hop.span, adapter) else max(timeout_s, self._config.max_request_timeout_s)
        )

    def patience_s(self, hop: Hop, kind: str, work: float) -> float:
        """Time after which a request is slower than expected; infinite while nothing is expected."""
        return max(self._config.min_hedge_s, self.estimator.patience_s(hop.peer_id, kind, work=work))

    def send(self, hop: Hop, kind: str, work: float, timeout_s: float) -> Sent:
        """A request goes out now; `OwnRequests.end` it in any case.

        Args:
            timeout_s: what it would get by itself.
        """
        now_s = self._clock()
        if kind not in PASSES:
            return Sent(hop.peer_id, now_s, 0.0)
        expected_s = self.estimator.expected_s(hop.peer_id, kind, work=work)
        return self.requests.begin(hop.peer_id, expected_s=timeout_s if expected_s is None else expected_s, now_s=now_s)

    def observe(
        self,
        hop: Hop,
        kind: str,
        work: float,
        output: Output,
        *,
        num_bytes: int,
        took_s: float,
        rtt_s: float | None,
        sent: Sent | None = None,
    ) -> None:
        """Learn from an answer.

        Args:
            work: tokens of all rows, times blocks.
            num_bytes: of request and answer.
            rtt_s: of the connection.
            sent: what `send` said, not ended yet.
        """
        own_queue_s, num_own = 0.0, 0
        if sent is not None:
            own_queue_s = self.requests.own_queue_s(sent, output.queue_s) if kind in PASSES else 0.0
            num_own = self.requests.num_others(sent)
        self.estimator.observe(hop.peer_id, kind, work=work, took_s=took_s - own_queue_s)
        sample = Sample(
            kind=kind,
            work=work,
            num_bytes=num_bytes,
            total_s=took_s,
            queue_s=output.queue_s,
            compute_s=output.compute_s,
            load=max(0, output.load - num_own),
            free_kv_tokens=output.free_kv_tokens,
            is_alone=sent is None or sent.num_ahead == 0,
        )
        self.measurements.observe(hop.peer_id, sample, rtt_s=rtt_s, now_s=self._clock())

    def observe_direct(self, hop: Hop, kind: str, work: float, output: Output, *, took_s: float) -> None:
        """Learn from an answer whose input another peer brought: how long it took says nothing of round trips."""
        self.estimator.observe(hop.peer_id, kind, work=work, took_s=took_s)
        sample = Sample(
            kind=kind,
            work=work,
            num_bytes=0,
            total_s=max(took_s, output.queue_s + output.compute_s),
            queue_s=output.queue_s,
            compute_s=output.compute_s,
            load=output.load,
            free_kv_tokens=output.free_kv_tokens,
            is_alone=False,
        )
        self.measurements.observe(hop.peer_id, sample, rtt_s=None, now_s=self._clock())

    def claim(self, hops: Iterable[Hop]) -> None:
        """The hops get work now; see `plan.breakers.Breakers.claim`."""
        for hop in hops:
            self.breakers.claim(hop.peer_id, self.instance_of(hop.peer_id), now_s=self._clock())

    def is_backing_off(self, peer_id: PeerId) -> bool:
        """Whether a peer failed moments ago."""
        return self.breakers.is_backing_off(peer_id, self.instance_of(peer_id), now_s=self._clock())

    def num_shut(self) -> int:
        """Peers that are known but get no work now."""
        return sum(not self._is_usable(record) for record in self.records.values())

    def _claimed(self, hops: tuple[Hop, ...]) -> tuple[Hop, ...]:
        self.claim(hops)
        return hops

    def _found(self, find: Callable[[Sequence[Candidate]], T], avoid: Collection[PeerId], demand: Demand) -> T:
        candidates = self._candidates(avoid, demand)
        try:
            return find(candidates)
        except NoRouteError as exc:
            needed, adapter = self._candidates(avoid, demand, is_needed=True), demand.adapter
            if len(needed) == len(candidates):
                if not adapter:
                    raise
                raise NoRouteError(f"{exc} with adapter '{adapter.partition('@')[0]}'", missing=exc.missing) from exc
        return find(needed)

    def find_adapter(self, name: str) -> str | None:
        """``name@digest`` of an adapter that peers offer; None if nobody does.

        Raises:
            NoRouteError: different ones have that name.
        """
        offered = {one for record in self.records.values() for one in record.adapters}
        found = sorted(one for one in offered if name in (one, one.rpartition("@")[0]))
        if len(found) > 1:
            text = f"peers offer different adapters under the name '{name}'; choose one of {', '.join(found)}"
            raise NoRouteError(text, missing=())
        return found[0] if found else None

    def _candidates(self, avoid: Collection[PeerId], demand: Demand, *, is_needed: bool = False) -> list[Candidate]:
        return [
            self._candidate(record)
            for peer_id, record in self.records.items()
            if record.state is PeerState.ONLINE
            and peer_id not in avoid
            and (not demand.adapter or demand.adapter in record.adapters)
            and self._is_usable(record, is_needed=is_needed)
        ]

    def _is_usable(self, record: PeerRecord, *, is_needed: bool = False) -> bool:
        peer_id = PeerId(record.peer_id)
        return self.breakers.is_usable(peer_id, record.instance_id, now_s=self._clock(), is_needed=is_needed)

    def _candidate(self, record: PeerRecord) -> Candidate:
        return self.measurements.candidate(
            record,
            rtt_s=self._rtt_of(PeerId(record.peer_id)),
            group=group_of(record, allow_mixed_dtypes=self._config.allow_mixed_dtypes),
            now_s=self._clock(),
        )


def _count_holders(records: Iterable[PeerRecord], num_blocks: int) -> list[int]:
    """By block: peers that are online."""
    counts = [0] * num_blocks
    for record in records:
        if record.state is PeerState.ONLINE:
            for block in record.span:
                counts[block] += 1
    return counts
