"""Batches that peers have no room for: cut finer, sent elsewhere, or refused in one line."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from remote_modules.client.adapters import CallAdapter
from remote_modules.client.call import CallArguments
from remote_modules.client.passes import backward, forward
from remote_modules.config import ClientConfig
from remote_modules.errors import PeerRefused, RefusalReason
from remote_modules.model.adapter_entries import Prompt
from remote_modules.model.adapters import AdapterSet
from remote_modules.server.engine import Engine
from remote_modules.testing.simulated_device import out_of_memory
from remote_modules.testing.simulation import SimulatedSwarm
from remote_modules.testing.virtual_time import run_virtual

from .scenario import blocks_of
from .test_microbatches import CONFIG, NUM_TOKENS, ROWS, SPANS, assert_same, batch, model, train, trained_call

ONE_ROW = ClientConfig(microbatch_tokens=NUM_TOKENS, retain_activations_s=0.0)
WHOLE = ClientConfig(microbatch_tokens=ROWS * NUM_TOKENS, retain_activations_s=0.0)


def limit_memory(monkeypatch: pytest.MonkeyPatch, kind: str, most_tokens: int) -> Counter[int]:
    """Devices without memory for larger ones; how often each size was refused."""
    refused: Counter[int] = Counter()
    run = getattr(Engine, kind)

    def limited(engine: Engine, blocks: Any, tensors: Any, arguments: Any, *rest: Any) -> Any:
        num_tokens = arguments.rows * arguments.num_tokens
        if num_tokens > most_tokens:
            refused[num_tokens] += 1
            raise out_of_memory()
        return run(engine, blocks, tensors, arguments, *rest)

    monkeypatch.setattr(Engine, kind, limited)
    return refused


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("spans", [SPANS, SPANS * 2])
def test_batch_is_cut_finer_until_peers_have_room(
    kind: str, spans: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = trained_call(dropout=0.3)
    expected = run_virtual(train(spans, call, config=CONFIG))
    refused = limit_memory(monkeypatch, kind, 2 * NUM_TOKENS)
    found = run_virtual(train(spans, call, config=WHOLE))
    assert sorted(refused) == [4 * NUM_TOKENS, 8 * NUM_TOKENS, 16 * NUM_TOKENS]
    assert_same(found, expected)
    assert found.client.most_tokens == 2 * NUM_TOKENS  # the next batch begins there


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_row_without_room_anywhere_is_refused_in_one_line(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = limit_memory(monkeypatch, kind, 1)
    with pytest.raises(
        PeerRefused, match="1 x 4 tokens, .* of blocks 0:4: .* no memory .*; send shorter rows"
    ) as caught:
        run_virtual(train(SPANS, trained_call(), config=ONE_ROW))
    assert caught.value.reason is RefusalReason.OUT_OF_MEMORY
    assert refused[NUM_TOKENS] > 10  # it might have been for the moment


async def train_beside_limits(
    spans: Sequence[str], limits: Sequence[int], call: CallArguments, config: ClientConfig
) -> tuple[torch.Tensor, list[int]]:
    """Gradient of the inputs of a pass at peers that take so many tokens in a request; how many requests each got."""
    swarm = SimulatedSwarm(5, [model().holdings[span] for span in spans], config=config)
    await swarm.start()
    for peer, limit in zip(swarm.peers, limits, strict=True):
        assert peer.handler is not None
        peer.handler._limits = replace(peer.handler._limits, max_batch_tokens=limit)
    client, inputs = swarm.client(), batch()
    try:
        _, _, trace = await forward(client, blocks_of(model()), {"hidden_states": inputs}, call)
        grads, _ = await backward(client, trace, {"hidden_states": torch.ones_like(inputs)})
        return grads["hidden_states"], [sum(peer.handler.num_requests.values()) for peer in swarm.peers]  # type: ignore[union-attr]
    finally:
        await client.aclose()
        swarm.stop()


def test_microbatches_are_of_the_size_that_peers_take() -> None:
    call = trained_call()
    expected = run_virtual(train(SPANS, call, config=CONFIG))
    found, num_requests = run_virtual(train_beside_limits(SPANS, [4096, 2 * NUM_TOKENS], call, WHOLE))
    assert torch.equal(found, expected.grad)
    assert num_requests[1] == 2 * ROWS // 2  # none was in vain


def test_long_rows_go_to_the_peer_that_takes_them() -> None:
    call = trained_call()
    expected = run_virtual(train(SPANS, call, config=ONE_ROW))
    spans, limits = (*SPANS, SPANS[1], SPANS[1]), [4096, 2, 3, 4096]
    found, num_requests = run_virtual(train_beside_limits(spans, limits, call, ONE_ROW))
    assert torch.equal(found, expected.grad)
    assert num_requests == [2 * ROWS, 0, 0, 2 * ROWS]


def test_rows_that_nobody_takes_are_refused_before_they_are_sent() -> None:
    with pytest.raises(PeerRefused, match="takes 3 tokens in a request, got 4: send shorter rows, or raise") as caught:
        run_virtual(train_beside_limits(SPANS, [4096, 3], trained_call(), WHOLE))
    assert caught.value.reason is RefusalReason.BAD_REQUEST


def prompted_call() -> CallArguments:
    """With a method that peers do not know before protocol 1.3."""
    adapter = CallAdapter(AdapterSet((Prompt(2),), (torch.randn(2, batch().shape[-1]),)))
    return dataclasses.replace(trained_call(), adapter=adapter)


@pytest.mark.parametrize("spans", [SPANS, SPANS * 2])
def test_methods_that_a_peer_does_not_know_go_to_others(spans: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    call, limits = prompted_call(), [4096] * len(spans)
    expected, _ = run_virtual(train_beside_limits(SPANS, [4096, 4096], call, CONFIG))
    old: list[Any] = []

    def minor(connection: Any) -> int:
        if connection.peer_id not in old and not old:
            old.append(connection.peer_id)
        return 2 if connection.peer_id in old else 3

    monkeypatch.setattr("remote_modules.net.client_connection.ClientConnection.their_minor", property(minor))
    if len(spans) == len(SPANS):
        with pytest.raises(PeerRefused, match=r"speaks protocol 1.2, this adapter needs 1.3: update the peer"):
            run_virtual(train_beside_limits(spans, limits, call, CONFIG))
    else:
        found, num_requests = run_virtual(train_beside_limits(spans, limits, call, CONFIG))
        assert torch.equal(found, expected)
        assert 0 in num_requests
    assert old
