from __future__ import annotations

import math
from dataclasses import replace

import pytest

from remote_modules.peers import PeerId
from remote_modules.plan.candidates import Candidate, Demand, Hop, prices, seconds_of
from remote_modules.spans import Span

PEER = Candidate(
    peer_id=PeerId("alice"),
    span=Span(2, 8),
    rtt_s=0.01,
    decode_tokens_per_s=100.0,
    prefill_tokens_per_s=2000.0,
    free_kv_tokens=1000,
    load=0,
)
PREFILL = Demand(num_tokens=50, kv_tokens=400, bytes_per_token=1000, is_decode=False, rows=2)
COMPUTE_S = 100 / 2000.0  # of each block
TRANSFER_S = 2 * 100 * 1000 / 12.5e6


def seconds(span: str, demand: Demand = PREFILL, **changes: object) -> float:
    return seconds_of(Hop(PEER.peer_id, Span.parse(span)), replace(PEER, **changes), demand)  # type: ignore[arg-type]


@pytest.mark.parametrize("span", ["2:8", "3:4"])
def test_hop_costs_what_the_formula_says(span: str) -> None:
    assert seconds(span) == pytest.approx(0.01 + TRANSFER_S + len(Span.parse(span)) * COMPUTE_S)


def test_decode_has_its_own_speed() -> None:
    decode = replace(PREFILL, num_tokens=1, is_decode=True)
    assert seconds("2:8", decode) == pytest.approx(0.01 + TRANSFER_S / 50 + 6 * 2 / 100.0)


def test_load_is_paid_over_the_whole_span() -> None:
    assert seconds("2:3", load=3) - seconds("2:3") == pytest.approx(3 * 6 * COMPUTE_S)
    assert seconds("2:3", load=-3) == seconds("2:3")


def test_missing_room_for_the_cache_costs_minutes() -> None:
    assert seconds("2:3", free_kv_tokens=799) == pytest.approx(300.0 + seconds("2:3"))
    assert seconds("2:3", free_kv_tokens=800) == seconds("2:3")


def test_unknown_round_trip_counts_as_the_default() -> None:
    assert seconds("2:8", rtt_s=None) == seconds("2:8", rtt_s=0.05)


def test_measured_bandwidth_overrides_that_of_the_demand() -> None:
    assert seconds("2:3", bandwidth_bytes_per_s=1e6) == pytest.approx(0.01 + 0.2 + COMPUTE_S)
    assert seconds("2:3", bandwidth_bytes_per_s=-1.0) == seconds("2:3")


@pytest.mark.parametrize("speed", [0.0, -5.0, math.nan])
def test_impossible_speed_counts_as_the_default(speed: float) -> None:
    assert seconds("2:8", prefill_tokens_per_s=speed) == seconds("2:8", prefill_tokens_per_s=3000.0)


@pytest.mark.parametrize("span", ["1:3", "7:9", "0:1"])
def test_blocks_that_a_peer_does_not_hold_cost_for_ever(span: str) -> None:
    assert seconds(span) == math.inf


def test_prices_come_in_the_order_of_ids_with_their_groups() -> None:
    others = [replace(PEER, peer_id=PeerId(name), group=group) for name, group in (("c", "z"), ("a", "y"), ("b", "z"))]
    priced = prices(others, PREFILL)
    assert priced.peer_ids == ["a", "b", "c"]
    assert priced.groups.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("cuts", "expected"),
    [((), (2, 8)), ((0, 3, 6, 9), (3, 6)), ((2, 5, 8), (2, 8)), ((0, 2, 12), None), ((0, 1), None), ((9, 12), None)],
)
def test_spans_are_clipped_to_cuts(cuts: tuple[int, ...], expected: tuple[int, int] | None) -> None:
    priced = prices([PEER], PREFILL, cuts)
    assert list(zip(priced.starts.tolist(), priced.ends.tolist(), strict=True)) == ([expected] if expected else [])


def test_nobody_has_no_price() -> None:
    assert prices([], PREFILL).peer_ids == []
    assert prices([], PREFILL, (0, 4)).peer_ids == []
