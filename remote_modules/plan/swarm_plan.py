"""A whole swarm planned at once, for its operators: who holds what, who is better left out, and what that gives.

The bottleneck comes first. Of placements that are equal in it, the one with fewer hops: spans are lengthened where the
bottleneck does not suffer. A server is *dropped* if the swarm is better off without it, measured by bottleneck over
time for one token (throughput over delay, Kleinrock's power): a slow server that must be on every route can cost each
token more than it adds to all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from remote_modules.plan.placement import bottlenecks_with
from remote_modules.plan.solver import THOROUGH, assign_spans, bottleneck_bound, bottleneck_of
from remote_modules.plan.throughput import Capacity, Layout
from remote_modules.spans import Span, missing_spans

if TYPE_CHECKING:
    from random import Random

__all__ = ["Dropped", "PlannedServer", "SwarmPlan", "num_hops", "plan_swarm", "token_s"]

MIN_POWER_GAIN = 0.01  # by dropping a server
MAX_TRIES = 3  # servers to drop, looked at for each that is dropped
EQUAL = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedServer:
    """One server of the plan.

    Attributes:
        rtt_s: round trip between it and clients.
    """

    name: str
    capacity: Capacity
    rtt_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Dropped:
    """A server that should not take part."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmPlan:
    """What to run.

    Attributes:
        spans: by name, of the servers that take part, in the order given.
        missing: blocks that nobody can hold; empty if all are covered.
        bottleneck_tokens_per_s: what the swarm keeps up for all clients together.
        bound_tokens_per_s: a bottleneck that no placement of all the servers exceeds.
        token_s: one token on the fastest route of an idle swarm; infinite with blocks missing.
        num_hops: of the route with the fewest; 0 with blocks missing.
    """

    spans: dict[str, Span]
    dropped: tuple[Dropped, ...]
    missing: tuple[Span, ...]
    bottleneck_tokens_per_s: float
    bound_tokens_per_s: float
    token_s: float
    num_hops: int


def plan_swarm(
    layout: Layout,
    servers: Sequence[PlannedServer],
    *,
    rng: Random,
    num_kicks: int = THOROUGH,
    may_drop: bool = True,
) -> SwarmPlan:
    """The plan for ``servers``, whose names must differ.

    Raises:
        ValueError: two servers have one name.
    """
    names = [server.name for server in servers]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"servers must have different names, got '{twice}' twice")
    kept = [server for server in servers if layout.longest(server.capacity)]
    dropped = [Dropped(server.name, "no span fits into it") for server in servers if server not in kept]
    best = _Draft.of(layout, kept, rng, num_kicks)
    while may_drop and (less := _drop_one(layout, best, rng, num_kicks)) is not None:
        best, gone = less
        dropped.append(gone)
    return SwarmPlan(
        spans={server.name: span for server, span in zip(best.servers, best.spans, strict=True)},
        dropped=tuple(dropped),
        missing=missing_spans(best.spans, Span(0, layout.num_blocks)),
        bottleneck_tokens_per_s=best.bottleneck,
        bound_tokens_per_s=bottleneck_bound(layout, [server.capacity for server in servers]),
        token_s=best.token_s,
        num_hops=num_hops(layout.num_blocks, best.spans),
    )


@dataclass(frozen=True, slots=True)
class _Draft:
    servers: list[PlannedServer]
    spans: list[Span]
    bottleneck: float
    token_s: float

    @classmethod
    def of(cls, layout: Layout, servers: list[PlannedServer], rng: Random, num_kicks: int) -> _Draft:
        capacities = [server.capacity for server in servers]
        found = assign_spans(layout, capacities, rng=rng, num_kicks=num_kicks)
        spans = [span or layout.first(capacity) for span, capacity in zip(found, capacities, strict=True)]
        spans = _lengthened(layout, capacities, spans)
        return cls(servers, spans, bottleneck_of(layout, capacities, spans), token_s(layout, servers, spans))

    @property
    def power(self) -> float:
        return self.bottleneck / self.token_s


def _drop_one(layout: Layout, draft: _Draft, rng: Random, num_kicks: int) -> tuple[_Draft, Dropped] | None:
    """The plan without the server that slows it most; None if none does."""
    if draft.bottleneck <= 0 or len(draft.servers) < 2:
        return None
    slowness = [
        server.rtt_s / len(span) + 1.0 / server.capacity.tokens_per_s
        for server, span in zip(draft.servers, draft.spans, strict=True)
    ]
    slowest = sorted(range(len(slowness)), key=lambda index: -slowness[index])[:MAX_TRIES]
    tries = []
    for index in slowest:
        rest = draft.servers[:index] + draft.servers[index + 1 :]
        tries.append((_Draft.of(layout, rest, rng, num_kicks), draft.servers[index]))
    less, gone = max(tries, key=lambda tried: tried[0].power)
    if less.power < draft.power * (1 + MIN_POWER_GAIN):
        return None
    reason = (
        f"a token takes {draft.token_s:.3g} s with it and {less.token_s:.3g} s without, all clients together get "
        f"{draft.bottleneck:.3g} and {less.bottleneck:.3g} tokens per second"
    )
    return less, Dropped(gone.name, reason)


def _lengthened(layout: Layout, capacities: Sequence[Capacity], spans: list[Span]) -> list[Span]:
    """Longer spans where the bottleneck stays and there are fewer hops for it."""
    fewest = num_hops(layout.num_blocks, spans)
    if not fewest:
        return spans
    totals = np.zeros(layout.num_blocks)
    for capacity, span in zip(capacities, spans, strict=True):
        totals[span.start : span.end] += capacity.throughput(len(span))
    bottleneck = float(totals.min())
    for index, capacity in enumerate(capacities):
        old = spans[index]
        rest = totals.copy()
        rest[old.start : old.end] -= capacity.throughput(len(old))
        after = bottlenecks_with(layout, rest, layout.heights(capacity))
        is_as_good = layout.legal(capacity) & (after >= bottleneck * (1 - EQUAL))
        start, end = np.unravel_index(int(np.where(is_as_good, layout.lengths, 0).argmax()), after.shape)
        longer = layout.span(int(start), int(end)) if is_as_good[start, end] else old
        changed = [*spans[:index], longer, *spans[index + 1 :]]
        if len(longer) > len(old) and (hops := num_hops(layout.num_blocks, changed)) < fewest:
            fewest, spans, totals = hops, changed, rest
            totals[longer.start : longer.end] += capacity.throughput(len(longer))
    return spans


def num_hops(num_blocks: int, spans: Sequence[Span]) -> int:
    """Hops of the route with the fewest; 0 if the spans do not cover the model."""
    furthest = [0] * num_blocks
    for span in spans:
        furthest[span.start] = max(furthest[span.start], span.end)
    hops = reached = reachable = 0
    for block in range(num_blocks):
        reachable = max(reachable, furthest[block])
        if block == reached:
            if reachable <= block:
                return 0
            hops, reached = hops + 1, reachable
    return hops


def token_s(layout: Layout, servers: Sequence[PlannedServer], spans: Sequence[Span]) -> float:
    """Seconds for one token on the fastest route, everybody idle: a round trip for each hop and the blocks' own time.

    Infinite if the spans do not cover the model. Takes O(blocks x servers).
    """
    cuts = set(map(int, layout.bounds))
    reached_s = 0.0
    running: dict[int, float] = {}
    for block in range(layout.num_blocks):
        advanced = {}
        for index, (server, span) in enumerate(zip(servers, spans, strict=True)):
            if block in span:
                begun_s = reached_s + server.rtt_s if block in cuts else math.inf
                advanced[index] = min(running.get(index, math.inf), begun_s) + 1.0 / server.capacity.tokens_per_s
        running = advanced
        reached_s = min(running.values(), default=math.inf)
    return reached_s
