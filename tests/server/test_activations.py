from __future__ import annotations

import pytest

from remote_modules.server.activations import MAX_GRAPHS, MAX_LEASE_S, Activations
from remote_modules.server.graphs import Graph
from remote_modules.spans import Span

SPAN = Span(1, 3)


def graph(num_bytes: int = 10, num_tokens: int = 5) -> Graph:
    return Graph(SPAN, num_tokens, {}, {}, {}, num_bytes)


def keep(table: Activations, client: int, request: int, num_bytes: int = 10, *, lease_s: float = 60.0) -> bool:
    return table.keep(client, request, graph(num_bytes), lease_s=lease_s, now_s=100.0)


def kept(table: Activations, client: int, *requests: int) -> list[int]:
    """Those of ``requests`` that are kept."""
    return [request for request in requests if request in table._kept.get(client, {})]


def test_graph_is_given_once_and_counts_until_its_backward_is_over() -> None:
    table, one = Activations(max_bytes=25), graph()
    assert table.keep(1, 7, one, lease_s=60.0, now_s=100.0)
    assert (len(table), table.used_bytes) == (1, 10)
    assert table.take(1, 7) is one
    assert (len(table), table.used_bytes) == (0, 10)
    assert table.take(1, 7) is None
    assert not keep(table, 2, 1, 20)
    table.release(one)
    assert table.used_bytes == 0
    assert keep(table, 2, 1, 20)


def test_clients_do_not_see_each_other() -> None:
    table = Activations(max_bytes=100)
    assert keep(table, 1, 7)
    assert table.take(2, 7) is None
    assert table.take(1, 8) is None
    assert kept(table, 1, 7) == [7]


def test_nothing_is_kept_without_a_budget_or_beyond_it() -> None:
    assert not Activations(max_bytes=0).has_room(SPAN, 1)
    assert not keep(Activations(max_bytes=0), 1, 1)
    table = Activations(max_bytes=100)
    assert keep(table, 1, 1)
    assert not keep(table, 1, 2, 101)
    assert kept(table, 1, 1, 2) == [1]


def test_room_is_judged_by_the_latest_graph() -> None:
    table = Activations(max_bytes=100)
    assert table.has_room(SPAN, 10**9)
    assert keep(table, 1, 1, 50)  # 5 bytes for each token of a block
    assert table.has_room(SPAN, 10)
    assert table.has_room(Span(0, 1), 20)
    assert not table.has_room(SPAN, 11)


def test_small_graph_of_much_fixed_cost_does_not_keep_larger_ones_out_for_ever() -> None:
    table = Activations(max_bytes=100)
    assert keep(table, 1, 1, 80)  # 8 bytes for each token of a block, as far as it shows
    answers = [table.has_room(SPAN, 50) for _ in range(5)]
    assert answers == [False, False, False, True, True]


def test_oldest_of_a_client_goes_first() -> None:
    table = Activations(max_bytes=30)
    assert [keep(table, 1, number) for number in range(5)] == [True] * 5
    assert kept(table, 1, *range(5)) == [2, 3, 4]
    assert table.used_bytes == 30


def test_client_gets_its_share_of_one_that_holds_more() -> None:
    table = Activations(max_bytes=40)
    for number in range(4):
        assert keep(table, 1, number)
    assert [keep(table, 2, number) for number in range(2)] == [True, True]
    assert (kept(table, 1, *range(4)), kept(table, 2, 0, 1)) == ([2, 3], [0, 1])


def test_client_beyond_its_share_cannot_drive_out_others() -> None:
    table = Activations(max_bytes=40)
    for client in (1, 2):
        for number in range(2):
            assert keep(table, client, number)
    for number in range(2, 20):
        assert keep(table, 2, number)
    assert (kept(table, 1, 0, 1), kept(table, 2, *range(20))) == ([0, 1], [18, 19])
    assert not keep(table, 3, 0, 30)  # more than a third, and none of its own to give
    assert (kept(table, 1, 0, 1), kept(table, 2, 18, 19)) == ([0, 1], [18, 19])


def test_what_is_in_use_is_not_given_away() -> None:
    table = Activations(max_bytes=20)
    assert keep(table, 1, 1, 20)
    assert table.take(1, 1) is not None
    assert not keep(table, 2, 1)
    assert not keep(table, 1, 2)


def test_number_of_graphs_of_a_client_is_bounded() -> None:
    table = Activations(max_bytes=10**6)
    for number in range(MAX_GRAPHS + 3):
        assert keep(table, 1, number, 0)
    assert kept(table, 1, *range(MAX_GRAPHS + 3)) == list(range(3, MAX_GRAPHS + 3))


def test_repeated_request_replaces_what_was_kept() -> None:
    table = Activations(max_bytes=20)
    assert keep(table, 1, 1, 15)
    assert keep(table, 1, 1, 20)
    assert (len(table), table.used_bytes) == (1, 20)


@pytest.mark.parametrize(("lease_s", "ends_s"), [(5.0, 105.0), (1e4, 100.0 + MAX_LEASE_S)])
def test_lease_ends(lease_s: float, ends_s: float) -> None:
    table = Activations(max_bytes=100)
    assert keep(table, 1, 1, lease_s=lease_s)
    assert keep(table, 2, 1, lease_s=2e4)
    table.expire(ends_s - 0.1)
    assert kept(table, 1, 1) == [1]
    table.expire(ends_s)
    assert kept(table, 1, 1) == []
    assert kept(table, 2, 1) == ([1] if lease_s == 5.0 else [])


def test_lost_connection_and_drain_drop_graphs() -> None:
    table = Activations(max_bytes=100)
    for client in (1, 2):
        assert keep(table, client, 1)
        assert keep(table, client, 2)
    table.forget(1)
    table.forget(3)
    assert (len(table), table.used_bytes) == (2, 20)
    assert table.clear() == 2
    assert (len(table), table.used_bytes, table.clear()) == (0, 0, 0)
    table.close()
    assert not table.has_room(SPAN, 1)
    assert not keep(table, 1, 1)
