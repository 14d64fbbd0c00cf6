"""Batches cut by rows, under virtual time: many microbatches in flight, peers lost in the middle, all families."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from msgspec import structs

from remote_modules.client.adapters import CallAdapter
from remote_modules.client.call import CallArguments, Named
from remote_modules.client.passes import backward, forward
from remote_modules.client.swarm import Swarm
from remote_modules.client.traces import Wanted
from remote_modules.config import ClientConfig
from remote_modules.model.adapter_entries import Lora
from remote_modules.model.adapters import AdapterSet
from remote_modules.spans import Span
from remote_modules.testing.simulation import SimulatedPeer, SimulatedSwarm
from remote_modules.testing.virtual_time import run_virtual

from .models import opened
from .oracle import adapter_of
from .scenario import blocks_of
from .test_kill_modes import TRAINING, tokens_of, trained
from .tiny import TinyModel, call_of, tiny_model

SPANS = ("0:2", "2:4")
ROWS, NUM_TOKENS, NUM_MICROBATCHES = 16, 4, 8
CONFIG = ClientConfig(microbatch_tokens=8)  # two rows


def model() -> TinyModel:
    return tiny_model(4, SPANS)


def batch() -> torch.Tensor:
    tokens = torch.randint(3, 60, (ROWS, NUM_TOKENS), generator=torch.Generator().manual_seed(3))
    return model().embed(tokens)


@dataclass(frozen=True)
class Result:
    outputs: torch.Tensor
    grad: torch.Tensor
    of_adapter: dict[int, torch.Tensor]
    took_s: float
    client: Swarm


def assert_same(found: Result, expected: Result) -> None:
    assert torch.equal(found.outputs, expected.outputs)
    assert torch.equal(found.grad, expected.grad)
    assert found.of_adapter.keys() == expected.of_adapter.keys()
    assert all(torch.equal(grad, expected.of_adapter[number]) for number, grad in found.of_adapter.items())


async def crash_in_the_middle(swarm: SimulatedSwarm, client: Swarm, span: str, after: int) -> tuple[SimulatedPeer, int]:
    """A peer of ``span``, lost while it computes and more requests wait there; and how many these were."""
    while True:
        for peer in swarm.peers:
            busy = str(peer.span) == span and peer.device.load > 1 and len(client.stats.waterfall) >= after
            if busy and sum(peer.handler.num_requests.values()) > 2:  # type: ignore[union-attr]
                load = peer.device.load
                peer.crash()
                return peer, load
        await asyncio.sleep(0.001)


async def train(
    spans: Sequence[str], call: CallArguments, *, when: str = "", lose: str = "", config: ClientConfig = CONFIG
) -> Result:
    """A forward and a backward; ``lose`` names the span of the peer that is lost ``when``."""
    inputs = batch()
    swarm = SimulatedSwarm(5, [model().holdings[span] for span in spans], config=config)
    await swarm.start()
    client, named = swarm.client(), {"hidden_states": inputs}
    losing: list[asyncio.Task[tuple[SimulatedPeer, int]]] = []
    began_s = swarm.clock()
    if when == "forward":
        losing.append(asyncio.ensure_future(crash_in_the_middle(swarm, client, lose, 0)))
    outputs, _, trace = await forward(client, blocks_of(model()), named, call)
    if when == "backward":
        losing.append(asyncio.ensure_future(crash_in_the_middle(swarm, client, lose, 1)))
    grads, of_adapter = await backward(client, trace, {"hidden_states": torch.ones_like(inputs)})
    took_s = swarm.clock() - began_s
    for task in losing:
        peer, load = await task
        assert not peer.is_up
        assert load > 1
    await client.aclose()
    swarm.stop()
    return Result(outputs["hidden_states"], grads["hidden_states"], of_adapter, took_s, client)


def trained_call(dropout: float = 0.0) -> CallArguments:
    adapter = adapter_of(model())
    if dropout:
        lora = [entry for entry in adapter.adapters.entries if isinstance(entry, Lora)]
        entries = tuple(structs.replace(entry, dropout=dropout) for entry in lora)
        adapter = CallAdapter(AdapterSet(entries, adapter.adapters.parameters), seed=17)
    return replace(call_of(batch(), adapter=adapter), with_grad=True)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("lose", SPANS)
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_peer_lost_with_many_microbatches_in_flight_changes_no_number(when: str, lose: str, dropout: float) -> None:
    call = trained_call(dropout)
    expected = run_virtual(train(SPANS * 2, call))
    assert expected.client.stats.failovers == 0
    assert expected.client.stats.steps == 2
    found = run_virtual(train(SPANS * 2, call, when=when, lose=lose))
    assert_same(found, expected)
    assert found.client.stats.failovers == found.client.stats.reroutes == 1  # one peer was lost, whoever noticed it
    assert found.client.stats.steps == 2
    assert 0.0 < found.client.stats.stall_s <= found.took_s


def test_numbers_do_not_depend_on_routes() -> None:
    call = trained_call()
    one = run_virtual(train(SPANS, call))
    for spans in (("0:2", "0:2", "0:2", "2:4"), SPANS * 3):
        assert_same(run_virtual(train(spans, call)), one)


def test_microbatches_follow_each_other_through_the_hops() -> None:
    def requests(result: Result) -> list[int]:
        return [len(timings) for timings in result.client.stats.waterfall]

    one_by_one = ClientConfig(microbatch_tokens=8, max_microbatches_in_flight=1)
    call = trained_call()
    slow, fast = run_virtual(train(SPANS, call, config=one_by_one)), run_virtual(train(SPANS, call))
    assert requests(slow) == requests(fast) == [NUM_MICROBATCHES * len(SPANS)] * 2
    assert_same(fast, slow)
    assert fast.took_s < 0.6 * slow.took_s


def test_waiting_for_our_own_requests_is_no_slowness() -> None:
    """Two replicas of each span and more microbatches than these can do at once: nobody is hedged or blamed."""
    config = ClientConfig(microbatch_tokens=NUM_TOKENS)

    async def main() -> tuple[int, int]:
        swarm = SimulatedSwarm(5, [model().holdings[span] for span in SPANS * 2], config=config)
        await swarm.start()
        client, call, named = swarm.client(), trained_call(), {"hidden_states": batch()}
        for peer in swarm.peers:
            peer.handler.executor.compute_s = 0.2  # type: ignore[union-attr]
        for _ in range(3):
            _, _, trace = await forward(client, blocks_of(model()), named, call)
            await backward(client, trace, {"hidden_states": torch.ones_like(batch())})
        await client.aclose()
        swarm.stop()
        return client.stats.hedges, client.stats.failovers

    assert run_virtual(main()) == (0, 0)


def test_dropout_differs_between_microbatches() -> None:
    row = batch()[:1]
    call = replace(trained_call(0.5), rows=ROWS)

    async def main() -> Named:
        swarm = SimulatedSwarm(5, [model().holdings[span] for span in SPANS], config=CONFIG)
        await swarm.start()
        client = swarm.client()
        outputs, _, _ = await forward(client, blocks_of(model()), {"hidden_states": row.expand(ROWS, -1, -1)}, call)
        await client.aclose()
        swarm.stop()
        return outputs

    outputs = run_virtual(main())["hidden_states"]
    first_rows = outputs[:: ROWS // NUM_MICROBATCHES]
    assert len(torch.unique(first_rows, dim=0)) == NUM_MICROBATCHES


@pytest.mark.parametrize("case", TRAINING)
def test_cut_batch_of_a_family_has_the_local_numbers(case: str) -> None:
    family, kwargs = TRAINING[case]
    tokens = tokens_of(5, 7)
    with opened(family, microbatch_tokens=14) as stage:
        found = trained(stage.model, tokens, lambda: None, **kwargs)
        expected = trained(stage.family.local, tokens, lambda: None, **kwargs)
        num_microbatches = len(stage.stats.waterfall[-1]) // len(stage.stats.route)
        assert num_microbatches == (1 if family in UNCUT else 3)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
        stage.check_end()


UNCUT = {"glm_moe_dsa"}  # sets of chosen tokens cross from block to block


def test_hops_below_all_that_is_trained_have_no_backward() -> None:
    call = trained_call()
    assert call.adapter is not None
    in_last_hop = frozenset(call.adapter.part(Span(2, 4)).positions)  # type: ignore[union-attr]

    async def main() -> tuple[Named, dict[int, torch.Tensor], int]:
        swarm = SimulatedSwarm(5, [model().holdings[span] for span in SPANS], config=CONFIG)
        await swarm.start()
        client = swarm.client()
        _, _, trace = await forward(client, blocks_of(model()), {"hidden_states": batch()}, call)
        ones = {"hidden_states": torch.ones_like(batch())}
        grads, of_adapter = await backward(client, trace, ones, Wanted(frozenset(), in_last_hop))
        await client.aclose()
        swarm.stop()
        return grads, of_adapter, len(client.stats.waterfall[-1])

    grads, of_adapter, num_requests = run_virtual(main())
    expected = run_virtual(train(SPANS, call))
    assert num_requests == NUM_MICROBATCHES
    assert not grads
    assert of_adapter.keys() == in_last_hop
    assert all(torch.equal(grad, expected.of_adapter[number]) for number, grad in of_adapter.items())
