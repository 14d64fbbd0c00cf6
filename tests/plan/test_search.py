from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest

from remote_modules.plan.search import FINEST, SHARPENING, Search
from remote_modules.plan.throughput import Capacity, Layout
from remote_modules.spans import Span

from .swarms import small_swarm

LAYOUT = Layout(6)
PAIR = [Capacity(tokens_per_s=12.0, max_blocks=4), Capacity(tokens_per_s=6.0, max_blocks=3)]


def search_of(*spans: Span, base: list[float] | None = None) -> Search:
    search = Search(LAYOUT, PAIR, scale=3.0, base=None if base is None else np.array(base))
    for index, span in enumerate(spans):
        search.put(index, search.place(span))
    return search


def test_servers_add_up_and_can_be_taken_out() -> None:
    search = search_of(Span(0, 4), Span(3, 6), base=[1.0, 0, 0, 0, 0, 0])
    assert search.totals.tolist() == [4.0, 3.0, 3.0, 5.0, 2.0, 2.0]
    assert search.bottleneck == 2.0
    before = search.saved()
    search.take(0)
    search.take(0)
    assert search.totals.tolist() == [1.0, 0.0, 0.0, 2.0, 2.0, 2.0]
    search.restore(before)
    assert search.totals.tolist() == [4.0, 3.0, 3.0, 5.0, 2.0, 2.0]
    assert [search.span(place) for place in search.places if place] == [Span(0, 4), Span(3, 6)]


def test_best_place_is_at_the_weakest_blocks() -> None:
    search = search_of(base=[9.0, 9.0, 9.0, 0.0, 0.0, 9.0])
    assert search.span(search.best_place(0, 64.0)) == Span(3, 5)


@pytest.mark.parametrize("seed", range(40))
def test_best_place_is_that_of_brute_force(seed: int) -> None:
    layout, capacities = small_swarm(seed)
    rng = Random(seed)
    base = np.array([rng.choice([0.0, 50.0, 200.0, 400.0]) for _ in range(layout.num_blocks)])
    for start, end in zip(layout.bounds[:-1], layout.bounds[1:], strict=True):
        base[start:end] = base[start]
    search = Search(layout, capacities, scale=100.0, base=base)
    for index in search.movable:
        capacity = capacities[index]
        cuts = [int(cut) for cut in layout.bounds]
        legal = [Span(s, e) for s in cuts for e in cuts if s < e and layout.allows(Span(s, e), capacity)]

        def pain(span: Span, capacity: Capacity = capacity) -> float:
            after = base.copy()
            after[span.start : span.end] += capacity.throughput(len(span))
            return float(np.exp(-16.0 / 100.0 * after).sum())

        chosen = search.span(search.best_place(index, 16.0))
        assert chosen in legal
        assert pain(chosen) == pytest.approx(min(map(pain, legal)))


def test_level_lies_between_the_bottleneck_and_a_little_more() -> None:
    search = search_of(Span(0, 4), Span(3, 6))
    assert search.bottleneck < search.level < search.bottleneck + 3.0 * math.log(6) / FINEST
    even = search_of(base=[2.0] * 6)
    assert even.level == pytest.approx(2.0)


def test_turn_tells_whether_anybody_moved() -> None:
    search = search_of(Span(0, 4), Span(0, 3))
    assert search.turn([1], 64.0)
    assert not search.turn([1], 64.0)
    assert search.span(search.places[1] or (0, 0)) == Span(4, 6)


def test_resettled_servers_do_not_lower_the_level() -> None:
    search = search_of(Span(0, 2), Span(0, 3))
    search.resettle([0, 1])  # 0:4 and 4:6, the only even division
    assert search.bottleneck == 3.0


def test_crowd_is_a_part_of_the_movable_servers() -> None:
    layout = Layout(40)
    servers = [Capacity(tokens_per_s=10.0, max_blocks=4)] * 10
    search = Search(layout, servers, scale=2.0)
    for index in range(10):
        search.put(index, search.place(Span(4 * index, 4 * index + 4)))
    crowds = [search.crowd(Random(seed), 3) for seed in range(200)]
    assert all(len(set(crowd)) == len(crowd) and 1 <= len(crowd) <= 4 for crowd in crowds)
    assert {index for crowd in crowds for index in crowd} == set(range(10))
    neighbours = [crowd for crowd in crowds if max(crowd) - min(crowd) <= 2]
    assert len(neighbours) > 50


def test_crowd_where_nobody_is_near_is_anybody() -> None:
    search = Search(LAYOUT, PAIR, scale=3.0)
    assert set(search.crowd(Random(0), 2)) == {0, 1}


def test_server_of_no_speed_is_placed_last() -> None:
    search = Search(LAYOUT, [Capacity(tokens_per_s=0.0, max_blocks=6), PAIR[0]], scale=3.0)
    assert search.movable == [1, 0]


@pytest.mark.parametrize("tokens_per_s", [1e-9, 0.0], ids=["hardly any speed", "none"])
def test_server_that_relieves_next_to_nothing_stays_within_its_capacity(tokens_per_s: float) -> None:
    """The only span that it may hold is on blocks so fast that no sum shows the difference."""
    layout = Layout(6, (0, 3, 4, 6))
    base = np.array([1.0, 1.0, 1.0, 1e4, 1.0, 1.0])
    search = Search(layout, [Capacity(tokens_per_s=tokens_per_s, max_blocks=1)], scale=1.0, base=base)
    for sharpness in SHARPENING:
        assert search.span(search.best_place(0, sharpness)) == Span(3, 4)
