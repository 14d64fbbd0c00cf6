"""Counters of a client, and the waterfall of its last steps."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from remote_modules.client.history_store import HistoryStore
from remote_modules.peers import short_id
from remote_modules.plan.routing import Hop
from remote_modules.spans import Span

__all__ = ["ClientStats", "HopTiming", "StatsRecorder"]

WATERFALL_STEPS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class HopTiming:
    """Where one request's time went, in seconds; ``wire_s`` is what neither queue nor compute explains.

    Attributes:
        total_s: until the answer; of a request that was sent ahead (`client.direct`), since its hop's turn, or queue
            and compute where it was at it before.
    """

    hop: Hop
    num_tokens: int
    total_s: float
    queue_s: float
    compute_s: float

    @property
    def wire_s(self) -> float:
        return max(0.0, self.total_s - self.queue_s - self.compute_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientStats:
    """A snapshot of the counters since the client was made.

    Attributes:
        steps: passes done (steps, forwards and backwards).
        failovers: times that a hop failed, or was outrun, and its work went on elsewhere or anew on the same peer.
        reroutes: times that hops of a route were replaced.
        replayed_tokens: tokens (per sequence) sent again to rebuild lost KV caches, summed over hops.
        hedges: times that a second peer was asked because the first was slow.
        hedges_won: times that the second one was first.
        waiting_for: blocks that nobody holds and that a pass waits for now, in order.
        handed_over_tokens: tokens (per sequence) of KV caches that went from peer to peer for a change of the route,
            summed over hops.
        copied_bytes: of KV caches that peers copied for us: for changes of the route, for buddies and for forks.
        promotions: times that a hop failed and its buddy took over.
        forks: KV caches that were copied for a fork.
        kept_backwards: backwards of hops that used what the peer had kept of the forward.
        recomputed_backwards: those whose forward the peer did again.
        forwarded: times that a hop sent its outputs on to the next one directly (`ClientConfig.direct`).
        stall_seconds: time between failures and the answer that ended them, summed.
        bytes_sent, bytes_received: on all connections.
        adapters_sent: requests that brought tensors of adapters.
        adapter_bytes: of these tensors, and of what describes them.
        history_bytes, history_disk_bytes: kept now to rebuild lost KV caches, in memory and on disk.
        wire: form in which the tensors of the latest session or pass go, where it is chosen (``wire="auto"``), else "".
        route: hops of the latest pass.
        waterfall: the last steps, each with the timing of its hops in order.
    """

    steps: int
    failovers: int
    reroutes: int
    replayed_tokens: int
    handed_over_tokens: int
    copied_bytes: int
    promotions: int
    forks: int
    kept_backwards: int
    recomputed_backwards: int
    forwarded: int
    stall_seconds: float
    hedges: int
    hedges_won: int
    waiting_for: tuple[Span, ...]
    bytes_sent: int
    bytes_received: int
    adapters_sent: int
    adapter_bytes: int
    history_bytes: int
    history_disk_bytes: int
    wire: str
    route: tuple[Hop, ...]
    waterfall: tuple[tuple[HopTiming, ...], ...]

    def __str__(self) -> str:
        route = " => ".join(f"{hop.span} {short_id(hop.peer_id)}" for hop in self.route) or "none"
        return f"steps={self.steps} failovers={self.failovers} replayed_tokens={self.replayed_tokens} route {route}"


@dataclass(slots=True)
class StatsRecorder:
    """The counters themselves; written on the event loop, read from anywhere."""

    steps: int = 0
    failovers: int = 0
    reroutes: int = 0
    replayed_tokens: int = 0
    handed_over_tokens: int = 0
    copied_bytes: int = 0
    promotions: int = 0
    forks: int = 0
    kept_backwards: int = 0
    recomputed_backwards: int = 0
    forwarded: int = 0
    stall_s: float = 0.0
    hedges: int = 0
    hedges_won: int = 0
    waiting_for: tuple[Span, ...] = ()
    bytes_sent: int = 0
    bytes_received: int = 0
    adapters_sent: int = 0
    adapter_bytes: int = 0
    histories: HistoryStore | None = None
    wire: str = ""
    route: tuple[Hop, ...] = ()
    waterfall: deque[tuple[HopTiming, ...]] = field(default_factory=lambda: deque(maxlen=WATERFALL_STEPS))

    def finish(self, route: tuple[Hop, ...], timings: list[HopTiming]) -> None:
        """Note a pass that is done."""
        self.steps += 1
        self.route = route
        self.waterfall.append(tuple(timings))

    def snapshot(self) -> ClientStats:
        return ClientStats(
            steps=self.steps,
            failovers=self.failovers,
            reroutes=self.reroutes,
            replayed_tokens=self.replayed_tokens,
            handed_over_tokens=self.handed_over_tokens,
            copied_bytes=self.copied_bytes,
            promotions=self.promotions,
            forks=self.forks,
            kept_backwards=self.kept_backwards,
            recomputed_backwards=self.recomputed_backwards,
            forwarded=self.forwarded,
            stall_seconds=self.stall_s,
            hedges=self.hedges,
            hedges_won=self.hedges_won,
            waiting_for=self.waiting_for,
            bytes_sent=self.bytes_sent,
            bytes_received=self.bytes_received,
            adapters_sent=self.adapters_sent,
            adapter_bytes=self.adapter_bytes,
            history_bytes=self.histories.bytes_in_memory if self.histories is not None else 0,
            history_disk_bytes=self.histories.bytes_on_disk if self.histories is not None else 0,
            wire=self.wire,
            route=self.route,
            waterfall=tuple(self.waterfall),
        )
