from __future__ import annotations

from remote_modules.peers import PeerId
from remote_modules.plan import edges as module
from remote_modules.plan.edges import DIAL_S, MAX_LOST, SHUT_S, Edges

A, B, C = map(PeerId, "abc")


def test_edges_are_open_but_from_a_peer_to_itself() -> None:
    edges = Edges()
    assert edges.is_open(A, B, now_s=0.0)
    assert not edges.is_open(A, A, now_s=0.0)


def test_edge_that_is_not_dialled_in_time_is_shut_for_a_while() -> None:
    edges = Edges()
    edges.miss(A, B, now_s=10.0)
    edges.miss(A, B, now_s=10.0 + DIAL_S - 0.1)
    assert edges.is_open(A, B, now_s=20.0)
    edges.miss(A, B, now_s=10.0 + DIAL_S)
    assert not edges.is_open(A, B, now_s=10.0 + DIAL_S)
    assert edges.is_open(B, A, now_s=10.0 + DIAL_S)  # the other way is another edge
    assert edges.is_open(A, B, now_s=10.0 + DIAL_S + SHUT_S)
    edges.miss(A, B, now_s=100.0)  # it begins anew
    assert edges.is_open(A, B, now_s=100.0)


def test_edge_that_loses_what_is_sent_is_shut_soon() -> None:
    edges = Edges()
    for _ in range(MAX_LOST - 1):
        edges.lose(A, B, now_s=1.0)
    edges.work(A, B)  # what came in between clears it
    for _ in range(MAX_LOST - 1):
        edges.lose(A, B, now_s=1.0)
    assert edges.is_open(A, B, now_s=1.0)
    edges.lose(A, B, now_s=1.0)
    assert not edges.is_open(A, B, now_s=1.0)
    edges.work(A, C)  # an edge without trouble


def test_tables_are_bounded() -> None:
    edges = Edges()
    peers = [PeerId(str(number)) for number in range(module.MAX_EDGES + 5)]
    for peer in peers:
        edges.miss(A, peer, now_s=0.0)
    assert len(edges._trouble) == module.MAX_EDGES
    for peer in peers:
        for _ in range(MAX_LOST):
            edges.lose(B, peer, now_s=0.0)
    assert len(edges._shut_until_s) == module.MAX_EDGES
    assert edges.is_open(B, peers[0], now_s=0.0)  # forgotten first
    assert not edges.is_open(B, peers[-1], now_s=0.0)
