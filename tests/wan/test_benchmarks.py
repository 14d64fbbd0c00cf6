"""`benchmarks/churn.py`, `continents.py`, `path.py` on few hosts, and their arithmetic."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from benchmark_modules import load_benchmark
from transformers.utils import logging as transformers_logging

from remote_modules.peers import PeerId, PeerRecord, PeerState
from remote_modules.plan.routing import Candidate
from remote_modules.spans import Span, missing_spans


@pytest.fixture(scope="module")
def churn() -> Any:
    transformers_logging.disable_progress_bar()  # its monitor is a thread that stays
    return load_benchmark("churn")


@pytest.fixture(scope="module")
def continents() -> Any:
    return load_benchmark("continents")


@pytest.fixture(scope="module")
def path() -> Any:
    transformers_logging.disable_progress_bar()
    return load_benchmark("path")


def record(peer_id: str, start: int, end: int, state: PeerState = PeerState.ONLINE) -> PeerRecord:
    return PeerRecord(
        peer_id=peer_id,
        instance_id="1",
        sequence=1,
        model="m",
        model_key="k",
        num_blocks=6,
        start=start,
        end=end,
        addresses=("10.0.0.1:1",),
        state=state,
    )


def test_sole_holder_is_the_one_with_most_blocks_of_its_own(churn: Any) -> None:
    records = [record("a", 0, 3), record("b", 2, 6), record("c", 0, 1), record("d", 1, 2, PeerState.JOINING)]
    assert churn.sole_holder(records, 6) == ("b", [3, 4, 5])
    assert churn.sole_holder([record("a", 0, 6), record("b", 0, 6)], 6) is None


class Listing:
    """What the tracker lists, as `churn.View` tells it; peers list the same."""

    def __init__(self, *records: PeerRecord) -> None:
        self._records = list(records)

    def records(self) -> list[PeerRecord]:
        return self._records

    def is_listed(self, victim: str, live: list[PeerRecord]) -> bool:
        return victim in {record.peer_id for record in self._records}


def test_gap_is_covered_only_by_a_live_peer_that_is_online(churn: Any) -> None:
    before = [record("a", 0, 3), record("b", 3, 6), record("c", 0, 3)]
    follower = churn.Follower(before, "b", 6, churn.Recovery("b", "3:6"))
    assert not follower.see(Listing(*before), 1.0)  # the dead one is still listed
    assert follower.recovery.detection_s is None
    assert not follower.see(Listing(before[0], record("c", 3, 6, PeerState.JOINING)), 4.0)
    assert follower.see(Listing(before[0], record("c", 3, 6)), 6.5)
    recovery = follower.recovery
    assert (recovery.detection_s, recovery.load_s, recovery.covered_s, recovery.over_s) == (4.0, 2.5, 6.5, 0.0)
    assert recovery.movers == ["0:3 to 3:6"]


def test_killed_holder_is_noticed_by_its_client_and_counted_as_never_covered_in_time(
    churn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(churn, "SETTLED_S", 1.0)
    kinds = [churn.Kind(2, 2.0), churn.Kind(2, 2.0)]  # nobody is left to move: both are sole holders
    done, client = churn.run(kinds, 1, num_blocks=4, limit_s=3.0)
    (recovery,) = done.recoveries
    assert recovery.covered_s is None
    assert recovery.lost in ("0:2", "2:4")
    assert (client.errors, client.wrong) == ([], 0)  # it waited for the peer to come back
    assert client.longest_s >= 3.0


def test_paces_are_those_of_the_paper(continents: Any) -> None:
    block_s = continents.A100.pace(continents.INT8_GB).block_s
    assert 70 * block_s + 3 * continents.EQUAL_RTT_S == pytest.approx(1 / 1.71)
    assert sum(gpu.memory for gpu in continents.GPUS) == 90


@pytest.mark.parametrize("times", [1, 2])
def test_open_peers_cover_the_model(continents: Any, times: int) -> None:
    spans = continents.spans_of(continents.GPUS, times)
    is_open = [not gpu.is_closed for gpu in continents.GPUS]
    open_spans = [span for span, is_usable in zip(spans, is_open, strict=True) if is_usable]
    assert len(open_spans) == 10
    assert missing_spans(open_spans, Span(0, continents.NUM_BLOCKS)) == ()
    lengths = [len(span) for span in spans]
    assert lengths == [gpu.memory * times for gpu in continents.GPUS]


def test_random_route_covers_each_block_once(continents: Any) -> None:
    candidates = [
        Candidate(
            peer_id=PeerId(name),
            span=span,
            rtt_s=None,
            decode_tokens_per_s=1.0,
            prefill_tokens_per_s=1.0,
            free_kv_tokens=100,
            load=0,
        )
        for name, span in (("a", Span(0, 4)), ("b", Span(2, 6)), ("c", Span(0, 6)))
    ]
    routes = {continents.random_route(Span(0, 6), candidates, None, rng=Random(seed)) for seed in range(50)}
    assert len(routes) > 2
    for route in routes:
        assert [block for hop in route for block in hop.span] == list(range(6))


def test_limit_of_a_token_is_blocks_delays_and_transfers(path: Any) -> None:
    profile = path.Profile(100, 5)
    assert profile.transfer_s == pytest.approx(8192 * 2 * 8 / 100e6)  # of Llama-70B's hidden state
    assert path.limit_s(profile, 3, 0.0025) == pytest.approx(0.030 + 4 * (0.0025 + profile.transfer_s))
    assert path.limit_s(path.Profile(0, 100), 12, 0.050) == pytest.approx(0.030 + 13 * 0.050)


def test_direct_hops_take_less_than_those_that_answer_the_client(path: Any) -> None:
    (result,) = path.run(2, [path.Profile(0, 100)], tokens=4, rounds=1)  # counts that outputs went directly
    assert result["times_star"] > 1.0
    assert result["share_of_delays"] > 1.0
    assert [bar.is_met for bar in path.bars_of([{**result, "peers": 4, "times_star": 1.6}])] == [True]


@pytest.fixture(scope="module")
def networks() -> Any:
    transformers_logging.disable_progress_bar()
    return load_benchmark("networks")


def test_ratios_of_networks_are_compared_with_what_is_physical(networks: Any) -> None:
    names = [case.name for case in networks.CASES]
    seconds = dict(zip(names, ([0.6], [0.61], [0.8], [0.62], [0.58]), strict=True))
    found = networks.ratios(3, seconds)
    assert found["bandwidth"][:2] == (round(0.6 / 0.61, 4), 0.97)
    assert found["latency"][:2] == (round(0.61 / 0.8, 4), 0.80)
    assert found["length"] == (round(0.6 / 0.62, 4), 0.90, 1.0)
    assert found[f"one process, {names[2]}"][:2] == (0.725, 0.60)
    assert 0.75 < found["latency"][2] < 0.76  # four one-way delays of 47.5 ms more, on 0.59 s
    assert found["bandwidth"][2] > 0.98


def test_token_takes_longer_over_a_longer_way(networks: Any) -> None:
    cases = [case for case in networks.CASES if case.name in (networks.FAST.name, networks.FAR.name)]
    seconds = networks.run(3, tokens=2, rounds=1, cases=cases)
    fast_s, far_s = (seconds[case.name][0] for case in cases)
    assert networks.BLOCKS_S[3] < fast_s < far_s
    assert far_s >= networks.physical(3, networks.FAR)
