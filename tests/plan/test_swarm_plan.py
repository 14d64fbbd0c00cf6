from __future__ import annotations

import math
from random import Random

import pytest

from remote_modules.plan.solver import bottleneck_of
from remote_modules.plan.swarm_plan import PlannedServer, SwarmPlan, lengthened, num_hops, plan_swarm, token_s
from remote_modules.plan.throughput import Capacity, Layout
from remote_modules.spans import Span


def server(name: str, tokens_per_s: float, max_blocks: int, rtt_s: float = 0.0) -> PlannedServer:
    return PlannedServer(name=name, capacity=Capacity(tokens_per_s=tokens_per_s, max_blocks=max_blocks), rtt_s=rtt_s)


def planned(num_blocks: int, *servers: PlannedServer, may_drop: bool = True) -> SwarmPlan:
    return plan_swarm(Layout(num_blocks), servers, rng=Random(0), num_kicks=20, may_drop=may_drop)


def test_unequal_servers_get_blocks_in_proportion() -> None:
    plan = planned(12, server("fast", 80.0, 9), server("slow", 40.0, 9))
    assert (len(plan.spans["fast"]), len(plan.spans["slow"])) == (8, 4)
    assert plan.bottleneck_tokens_per_s == plan.bound_tokens_per_s == 10.0
    assert (plan.missing, plan.dropped, plan.num_hops) == ((), (), 2)
    assert plan.token_s == pytest.approx(8 / 80 + 4 / 40)


def test_slow_server_that_is_on_every_route_is_dropped() -> None:
    pair = (server("fast", 900.0, 8, 0.02), server("slow", 120.0, 3, 0.05))
    plan = planned(8, *pair)
    assert [dropped.name for dropped in plan.dropped] == ["slow"]
    assert plan.dropped[0].reason == (
        "a token takes 0.0861 s with it and 0.0289 s without, all clients together get 120 and 112 tokens per second"
    )
    assert plan.spans == {"fast": Span(0, 8)}
    kept = planned(8, *pair, may_drop=False)
    assert sorted(map(len, kept.spans.values())) == [1, 7]
    assert kept.dropped == ()


def test_slow_server_that_is_needed_stays() -> None:
    plan = planned(16, server("fast", 1000.0, 12), server("slow", 10.0, 4, 0.5))
    assert plan.dropped == ()
    assert plan.spans == {"fast": plan.spans["fast"], "slow": plan.spans["slow"]}
    assert plan.missing == ()


def test_server_without_room_is_dropped_with_the_reason() -> None:
    layout = Layout(4, (0, 2, 4))
    plan = plan_swarm(layout, [server("tiny", 9.0, 1), server("big", 8.0, 4)], rng=Random(0), num_kicks=2)
    assert [(dropped.name, dropped.reason) for dropped in plan.dropped] == [("tiny", "no span fits into it")]
    assert plan.spans == {"big": Span(0, 4)}


def test_blocks_that_fit_nowhere_are_named() -> None:
    plan = planned(10, server("a", 5.0, 3), server("b", 5.0, 4))
    assert sum(map(len, plan.missing)) == 3
    assert (plan.bottleneck_tokens_per_s, plan.bound_tokens_per_s) == (0.0, 0.0)
    assert (plan.token_s, plan.num_hops) == (math.inf, 0)


def test_nobody_fits_all_blocks_are_missing() -> None:
    plan = plan_swarm(Layout(4, (0, 4)), [server("a", 5.0, 3)], rng=Random(0))
    assert (plan.spans, plan.missing) == ({}, (Span(0, 4),))


def test_two_servers_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^servers must have different names, got 'a' twice$"):
        planned(4, server("a", 1.0, 4), server("b", 1.0, 4), server("a", 2.0, 4))


def test_spans_grow_where_that_saves_hops_and_costs_nothing() -> None:
    """Of links that carry 5 tokens per second, eight blocks cost as little as four; a server that is full stays."""
    link = Capacity(tokens_per_s=40.0, max_blocks=8, network_tokens_per_s=5.0)
    full = Capacity(tokens_per_s=20.0, max_blocks=4)
    layout, capacities = Layout(8), [link, link, full, full]
    spans = [Span(0, 4), Span(4, 8), Span(0, 4), Span(4, 8)]
    longer = lengthened(layout, capacities, spans)
    assert longer == [Span(0, 8), *spans[1:]]
    assert bottleneck_of(layout, capacities, longer) == bottleneck_of(layout, capacities, spans) == 10.0


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([Span(0, 6)], 1),
        ([Span(0, 3), Span(3, 6)], 2),
        ([Span(0, 2), Span(1, 5), Span(2, 4), Span(4, 6)], 3),
        ([Span(0, 2), Span(0, 4), Span(3, 6)], 2),
        ([Span(0, 2), Span(3, 6)], 0),
        ([Span(1, 6)], 0),
        ([Span(0, 5)], 0),
        ([], 0),
    ],
    ids=str,
)
def test_hops_are_those_of_the_shortest_route(spans: list[Span], expected: int) -> None:
    assert num_hops(6, spans) == expected


def brute_force_token_s(layout: Layout, servers: list[PlannedServer], spans: list[Span]) -> float:
    cuts = [int(cut) for cut in layout.bounds]
    best = {0: 0.0}
    for end in cuts[1:]:
        best[end] = min(
            (
                best[start] + server.rtt_s + (end - start) / server.capacity.tokens_per_s
                for start in cuts
                if start < end
                for server, span in zip(servers, spans, strict=True)
                if span.covers(Span(start, end))
            ),
            default=math.inf,
        )
    return best[layout.num_blocks]


@pytest.mark.parametrize("seed", range(60))
def test_token_time_is_that_of_the_fastest_route(seed: int) -> None:
    rng = Random(seed)
    layout = Layout(6, (0, 1, 3, 4, 6)) if seed % 2 else Layout(6)
    servers, spans = [], []
    for number in range(rng.randint(1, 6)):
        servers.append(server(str(number), rng.uniform(1.0, 50.0), 6, rng.choice([0.0, 0.05, 0.5])))
        start = rng.randrange(6)
        spans.append(Span(start, rng.randint(start + 1, 6)))
    assert token_s(layout, servers, spans) == pytest.approx(brute_force_token_s(layout, servers, spans))
