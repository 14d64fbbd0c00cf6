from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from records import make_identity, make_record

from remote_modules.client.router import Router
from remote_modules.config import ClientConfig
from remote_modules.errors import NoRouteError
from remote_modules.model.stack import StackSpec
from remote_modules.peers import PeerId, PeerRecord, PeerState
from remote_modules.plan.routing import Demand, Hop
from remote_modules.spans import Span
from remote_modules.wire.messages import Output

DECODE = Demand(num_tokens=1, kv_tokens=0, bytes_per_token=100, is_decode=True)
ALL = Span(0, 8)


def record(number: int, span: str = "0:8", **changes: Any) -> PeerRecord:
    start, end = map(int, span.split(":"))
    known = {"decode_tokens_per_s": 1000.0, "prefill_tokens_per_s": 10_000.0, "free_kv_tokens": 10_000}
    return make_record(make_identity(number), start=start, end=end, **(known | changes))


def peer_of(number: int) -> PeerId:
    return make_identity(number).peer_id


class Client:
    """A router with a clock and round trips of its own."""

    def __init__(self, *records: PeerRecord, cuts: Sequence[int] = (), **config: Any) -> None:
        self.now_s = 100.0
        self.rtts: dict[PeerId, float] = {}
        self.router = Router(
            StackSpec("model.layers", 8, cuts=frozenset(cuts)),
            ClientConfig(**config),
            clock=lambda: self.now_s,
            rng=Random(3),
            rtt_of=self.rtts.get,
        )
        self.router.records = {PeerId(one.peer_id): one for one in records}

    def fail(self, number: int, *, instance_id: str = "first") -> None:
        self.router.breakers.fail(peer_of(number), instance_id, is_hard=True, now_s=self.now_s)

    def routes(self, count: int = 20) -> set[PeerId]:
        return {hop.peer_id for _ in range(count) for hop in self.router.find(ALL, DECODE)}

    def answer(self, number: int, *, took_s: float, kind: str = "decode", load: int = 0, work: float = 8.0) -> None:
        output = Output(1, (), queue_s=0.0, compute_s=0.001, load=load, free_kv_tokens=10_000)
        self.router.observe(
            Hop(peer_of(number), ALL),
            kind,
            work,
            output,
            num_bytes=100,
            took_s=took_s,
            rtt_s=self.rtts.get(peer_of(number)),
        )


def test_connections_tell_the_round_trip() -> None:
    client = Client(record(1), record(2))
    client.rtts.update({peer_of(1): 0.2, peer_of(2): 0.01})
    assert client.routes() == {peer_of(2)}


def test_answers_override_what_was_announced() -> None:
    client = Client(record(1, decode_tokens_per_s=9000.0), record(2))
    assert client.routes() == {peer_of(1)}
    for _ in range(4):
        client.answer(1, took_s=0.5)
        client.answer(2, took_s=0.01)
    assert client.routes() == {peer_of(2)}
    client.now_s += 200.0  # its answers are forgotten, but for the best, which is no better
    assert client.routes() == {peer_of(2)}


def test_load_of_the_latest_answer_counts() -> None:
    client = Client(record(1, load=500), record(2))
    assert client.routes() == {peer_of(2)}
    client.answer(1, took_s=0.05)
    client.answer(2, took_s=0.05, load=500)
    assert client.routes() == {peer_of(1)}


@pytest.mark.parametrize("state", [PeerState.JOINING, PeerState.DRAINING])
def test_only_peers_that_are_online_get_work(state: PeerState) -> None:
    client = Client(record(1, state=state), record(2, decode_tokens_per_s=1.0))
    assert client.routes() == {peer_of(2)}
    assert not client.router.is_replicated(ALL)
    assert client.router.find_rival(Hop(peer_of(2), ALL), DECODE) is None


def test_failed_peer_gets_no_work_until_it_is_proved_and_then_one_probe() -> None:
    client = Client(record(1), record(2, decode_tokens_per_s=1.0))
    client.fail(1)
    assert client.router.is_backing_off(peer_of(1))
    assert client.router.num_shut() == 1
    client.now_s += 1.0
    assert not client.router.is_backing_off(peer_of(1))
    assert client.routes() == {peer_of(2)}
    assert client.router.breakers.take_due(now_s=client.now_s) == [(peer_of(1), "first")]
    client.router.breakers.prove(peer_of(1), "first")
    assert client.router.has_route(ALL, DECODE, avoid={peer_of(2)})  # asking takes no probe away
    assert client.routes(1) == {peer_of(1)}
    assert client.routes() == {peer_of(2)}
    client.router.breakers.succeed(peer_of(1), "first")
    assert client.routes() == {peer_of(1)}


def test_failed_peer_that_nobody_can_stand_in_for_is_tried_again_soon() -> None:
    client = Client(record(1, "0:4"), record(2, "4:8"))
    for _ in range(10):
        client.fail(2)
        client.now_s += 100.0
    client.fail(2)
    with pytest.raises(NoRouteError) as caught:
        client.routes()
    assert caught.value.missing == (Span(4, 8),)
    client.now_s += 1.0
    assert client.routes(1) == {peer_of(1), peer_of(2)}
    with pytest.raises(NoRouteError):
        client.routes(1)  # the probe is under way


def test_restarted_peer_is_used_at_once() -> None:
    client = Client(record(1))
    client.fail(1)
    client.router.records = {peer_of(1): record(1, instance_id="second")}
    assert client.routes() == {peer_of(1)}
    assert client.router.instance_of(peer_of(1)) == "second"
    assert client.router.instance_of(peer_of(2)) == ""


def test_only_peers_that_offer_an_adapter_get_work_with_it() -> None:
    one, other = f"pirate@{'1' * 32}", f"pirate@{'2' * 32}"
    offers = [record(1), record(2, adapters=(one,)), record(3, adapters=(other,)), record(4, "0:4", adapters=(other,))]
    router = Client(*offers).router
    assert (router.find_adapter("poet"), router.find_adapter(one)) == (None, one)
    with pytest.raises(
        NoRouteError, match=f"peers offer different adapters under the name 'pirate'; choose one of {one}"
    ):
        router.find_adapter("pirate")
    demand = replace(DECODE, adapter=one)
    routes = [router.find(ALL, demand), *router.find_shares(ALL, demand, 2)]
    assert {hop.peer_id for route in routes for hop in route} == {peer_of(2)}
    hop = Hop(peer_of(2), ALL)
    assert router.find_rival(hop, demand) is None
    assert router.find_rival(hop, DECODE) is not None
    assert not router.has_route(ALL, demand, avoid={peer_of(2)})
    assert router.find_better([hop], demand, 8) is None
    with pytest.raises(NoRouteError, match="no route for blocks 0:8: .* with adapter 'poet'"):
        router.find(ALL, replace(DECODE, adapter=f"poet@{'3' * 32}"))


def test_shares_go_to_all_that_are_worthwhile() -> None:
    client = Client(record(1), record(2, prefill_tokens_per_s=8000.0), record(3, prefill_tokens_per_s=1000.0))
    bulk = Demand(num_tokens=1000, kv_tokens=0, bytes_per_token=0, is_decode=False)
    used = {hop.peer_id for _ in range(40) for hop in client.router.find_shares(ALL, bulk, 1)[0]}
    assert used == {peer_of(1), peer_of(2)}


def test_rival_is_somebody_else_that_works() -> None:
    client = Client(record(1), record(2, "0:4"), record(3, "4:8"), record(4), cuts=(0, 4, 8))
    client.fail(4)
    hop = Hop(peer_of(1), ALL)
    assert client.router.find_rival(hop, DECODE) == (Hop(peer_of(2), Span(0, 4)), Hop(peer_of(3), Span(4, 8)))
    client.fail(3)
    assert client.router.find_rival(hop, DECODE) is None
    client.now_s += 5.0
    assert client.router.find_rival(hop, DECODE) is None  # unproved peers are no rivals


def test_replay_is_timed_by_the_prefill_speed() -> None:
    client = Client(record(1))
    client.rtts[peer_of(1)] = 0.01
    took_s = client.router.replay_seconds([Hop(peer_of(1), ALL)], DECODE, 1000)
    assert took_s == pytest.approx(0.01 + 2 * 1000 * 100 / 12.5e6 + 1000 * 8 / 10_000)
    assert client.router.replay_seconds([Hop(peer_of(1), ALL)], DECODE, 0) == 0.0


def test_better_route_counts_the_peers_in_use_even_if_they_failed() -> None:
    client = Client(record(1), record(2), record(3, dtype="float16"))
    hops = [Hop(peer_of(1), ALL)]
    assert client.router.find_better(hops, DECODE, 100) is None
    client.fail(1)
    assert client.router.find_better(hops, DECODE, 100) is None
    for _ in range(4):
        client.answer(1, took_s=2.0)
    assert client.router.find_better(hops, DECODE, 100) == (Hop(peer_of(2), ALL),)
    assert client.router.find_better([Hop(peer_of(9), ALL)], DECODE, 100) is None


def test_peers_of_other_dtypes_are_mixed_only_if_that_is_allowed() -> None:
    halves = record(1, "0:4"), record(2, "4:8", dtype="float16")
    with pytest.raises(NoRouteError):
        Client(*halves).routes()
    assert Client(*halves, allow_mixed_dtypes=True).routes() == {peer_of(1), peer_of(2)}


def test_blocks_are_replicated_where_two_hold_each() -> None:
    client = Client(record(1), record(2, "0:4"), record(3, "3:6"))
    assert client.router.is_replicated(Span(0, 6))
    assert not client.router.is_replicated(Span(5, 7))
    client.router.records = {peer_of(1): record(1)}
    assert not client.router.is_replicated(Span(0, 1))


def test_blocks_are_replicated_only_by_peers_that_offer_the_adapter() -> None:
    tuned = f"tuned@{'12' * 16}"
    client = Client(record(1, adapters=(tuned,)), record(2), record(3, "3:6", adapters=(tuned,)))
    assert client.router.is_replicated(Span(0, 3))
    assert not client.router.is_replicated(Span(0, 3), tuned)
    assert client.router.is_replicated(Span(3, 6), tuned)
    client.answer(1, took_s=0.1, kind="forward")
    hop, longest_s = Hop(peer_of(1), Span(0, 3)), 30.0
    assert client.router.timeout_s(hop, "forward", 1.0, 0) < longest_s
    assert client.router.timeout_s(hop, "forward", 1.0, 0, adapter=tuned) == longest_s


def test_timeout_follows_what_was_observed_where_others_can_stand_in() -> None:
    client, lone = Client(record(1), record(2)), Client(record(1))
    for one in (client, lone):
        for kind in ("decode", "forward"):
            for _ in range(10):
                one.answer(1, took_s=0.01, kind=kind)
    hop = Hop(peer_of(1), ALL)
    assert client.router.timeout_s(hop, "decode", 8.0, 0) == 2.0
    assert client.router.timeout_s(hop, "forward", 8.0, 125_000_000) == pytest.approx(12.0)
    assert client.router.timeout_s(hop, "backward", 8.0, 0) == 30.0
    assert client.router.timeout_s(Hop(peer_of(2), ALL), "backward", 1e6, 0) == pytest.approx(8 * 1e6 / 10_000)
    assert client.router.timeout_s(Hop(peer_of(9), ALL), "decode", 8.0, 0) == 30.0
    assert lone.router.timeout_s(hop, "decode", 8.0, 0) == 30.0  # giving up would only make it begin anew


def test_longest_timeout_and_retries_are_settings() -> None:
    client = Client(record(1), max_request_timeout_s=5.0, retry_ratio=0.5)
    assert client.router.timeout_s(Hop(peer_of(1), ALL), "decode", 8.0, 0) == 5.0
    assert sum(client.router.budget.take(now_s=0.0) for _ in range(100)) == 16
    for _ in range(10):
        client.router.budget.earn()
    assert sum(client.router.budget.take(now_s=0.0) for _ in range(100)) == 5


def test_patience_has_a_least_time() -> None:
    client = Client(record(1), min_hedge_s=0.2)
    for _ in range(50):
        client.answer(1, took_s=0.01)
        client.answer(1, took_s=1.0, kind="forward")
    hop = Hop(peer_of(1), ALL)
    assert client.router.patience_s(hop, "decode", 8.0) == 0.2
    assert client.router.patience_s(hop, "forward", 8.0) == pytest.approx(3.0, rel=1e-3)
    assert client.router.patience_s(hop, "backward", 8.0) == float("inf")
