"""The strategies: what a newcomer chooses, and when a server moves."""

from __future__ import annotations

from random import Random

from remote_modules.plan.placement import choose_span
from remote_modules.plan.simulation.conditions import Conditions
from remote_modules.plan.simulation.coverage import Coverage
from remote_modules.plan.simulation.peer import Peer
from remote_modules.plan.simulation.strategies import BalanceAtJoin, RandomSpans, View
from remote_modules.plan.throughput import Capacity, Holder, Layout
from remote_modules.spans import Span

CONDITIONS = Conditions(num_blocks=10, max_span=4)
CAPACITY = Capacity(tokens_per_s=100.0, max_blocks=4)
HOLDERS = [Holder(Span(0, 4), 100.0), Holder(Span(2, 6), 50.0), Holder(Span(5, 10), 90.0)]


def view_of(holders: list[Holder]) -> View:
    return View(CONDITIONS, Layout(10), Coverage(10, holders), 0.0)


def test_random_spans_are_all_of_the_legal_ones() -> None:
    rng = Random(0)
    chosen = {RandomSpans().choose(view_of([]), CAPACITY, rng) for _ in range(300)}
    assert chosen == {Span(start, start + 4) for start in range(7)}
    assert RandomSpans().choose(view_of([]), Capacity(tokens_per_s=1.0, max_blocks=99), rng) == Span(0, 10)


def test_newcomer_chooses_what_placement_chooses_from_all_holders() -> None:
    assert BalanceAtJoin().choose(view_of(HOLDERS), CAPACITY, Random(0)) == choose_span(Layout(10), CAPACITY, HOLDERS)


def test_strategies_of_the_join_alone_never_move() -> None:
    peer = Peer(1, CAPACITY, Span(0, 4), CONDITIONS)
    for strategy in (RandomSpans(), BalanceAtJoin()):
        assert not strategy.has_checks
        assert strategy.reconsider(view_of(HOLDERS), peer, Random(0)) is None
