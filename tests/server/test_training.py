"""Kept graphs over a peer's connections: who gets which, and what happens when one is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch
from net.memory import turns, until

from remote_modules.errors import RefusalReason
from remote_modules.model.replay import SpanModel
from remote_modules.net.client_connection import ClientConnection
from remote_modules.server.engine import Engine
from remote_modules.spans import Span
from remote_modules.wire.messages import BackwardRequest, CallMeta, ForwardRequest, Output
from remote_modules.wire.protocol import MessageReceived
from remote_modules.wire.tensors import encode_tensors

from .peer_support import Peer, running_peer
from .test_graphs import Full, no_room
from .test_handler import refusal_of
from .tiny import given, hidden, owner_call

SPAN = Span(1, 3)
LEASE_S = 60.0
Named = dict[str, torch.Tensor]


def run(main: Callable[[Peer], Coroutine[Any, Any, None]], engine: Engine, **limits: Any) -> None:
    async def whole() -> None:
        async with running_peer(engine, **limits) as peer:
            await main(peer)
        await turns()
        assert (len(peer.handler.activations), peer.handler.activations.used_bytes) == (0, 0)

    asyncio.run(whole())


async def forward(
    client: ClientConnection, inputs: torch.Tensor, *, keep_s: float = LEASE_S, with_grad: bool = True
) -> Output:
    metas, body = encode_tensors({"hidden_states": inputs})
    call = CallMeta(inputs.shape[0], inputs.shape[1], with_grad=with_grad)
    message = ForwardRequest(client.new_request_id(), SPAN.start, SPAN.end, metas, 2.0, call, keep_s)
    return (await client.request(message, body, timeout_s=2.0))[0]


async def backward(client: ClientConnection, kept: int | None, tensors: Named, *, end: int = SPAN.end) -> torch.Tensor:
    metas, body = encode_tensors(tensors)
    call = CallMeta(2, 3, with_grad=True)
    message = BackwardRequest(client.new_request_id(), SPAN.start, end, metas, 2.0, call, kept)
    return (await client.request(message, body, timeout_s=2.0))[1]["grad.hidden_states"]


def grads(seed: int = 9) -> Named:
    return {"grad.hidden_states": hidden(2, 3, seed=seed)}


def expected(engine: Engine, inputs: torch.Tensor) -> torch.Tensor:
    request = given(inputs, grads={"hidden_states": grads()["grad.hidden_states"]})
    return engine.backward(SPAN, request, owner_call(inputs))["grad.hidden_states"]


async def check_gone(peer: Peer, client: ClientConnection, answer: Output, inputs: torch.Tensor) -> None:
    """Refused, and the same with inputs is answered."""
    reason, text = await refusal_of(backward(client, answer.request_id, grads()))
    assert (reason, text) == (RefusalReason.SESSION_LOST, "the graph of this forward is not kept any more")
    found = await backward(client, None, {"hidden_states": inputs, **grads()})
    assert torch.equal(found, expected(peer.handler.engine, inputs))


def test_kept_forwards_are_used_in_any_order_and_once(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        client = await peer.connect()
        batches = [hidden(2, 3, seed=seed) for seed in range(3)]
        answers = [await forward(client, inputs) for inputs in batches]
        assert [answer.is_kept for answer in answers] == [True] * 3
        assert len(peer.handler.activations) == 3
        assert peer.handler.activations.used_bytes > 0
        for number in (1, 2, 0):
            found = await backward(client, answers[number].request_id, grads())
            assert torch.equal(found, expected(engine, batches[number]))
        await check_gone(peer, client, answers[0], batches[0])
        activations = peer.handler.activations
        assert (activations.num_used, activations.num_lost, activations.num_recomputed) == (3, 1, 1)

    run(main, engine)


@pytest.mark.parametrize(
    ("limits", "options"),
    [({"activation_bytes": 0}, {}), ({"activation_bytes": 100}, {}), ({}, {"keep_s": 0.0}), ({}, {"with_grad": False})],
    ids=["no-budget", "too-large", "not-asked", "no-gradient"],
)
def test_forward_is_not_kept(engine: Engine, limits: dict[str, int], options: dict[str, Any]) -> None:
    async def main(peer: Peer) -> None:
        client = await peer.connect()
        answer = await forward(client, hidden(2, 3), **options)
        assert not answer.is_kept
        await check_gone(peer, client, answer, hidden(2, 3))

    run(main, engine, **limits)


def test_client_lets_go_of_its_own_graphs_alone(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        owner, other = await peer.connect(), await peer.connect()
        answer, kept = await forward(owner, hidden(2, 3)), await forward(owner, hidden(2, 3))
        other.release_graph(answer.request_id)
        await other.ping()
        assert len(peer.handler.activations) == 2
        owner.release_graph(answer.request_id)
        owner.release_graph(99)
        await owner.ping()
        assert len(peer.handler.activations) == 1
        await check_gone(peer, owner, answer, hidden(2, 3))
        assert torch.equal(await backward(owner, kept.request_id, grads()), expected(engine, hidden(2, 3)))

    run(main, engine)


def test_graph_of_an_answer_that_nobody_awaits_is_released(engine: Engine) -> None:
    """The answer was on its way when the client gave the request up."""

    async def main(peer: Peer) -> None:
        client = await peer.connect()
        answer = await forward(client, hidden(2, 3))
        assert len(peer.handler.activations) == 1
        client._receive(MessageReceived(answer, bytearray()))
        await client.ping()
        assert len(peer.handler.activations) == 0

    run(main, engine)


def test_other_clients_cannot_use_it(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        owner, other = await peer.connect(), await peer.connect()
        answer = await forward(owner, hidden(2, 3))
        await check_gone(peer, other, answer, hidden(2, 3))
        assert torch.equal(await backward(owner, answer.request_id, grads()), expected(engine, hidden(2, 3)))

    run(main, engine)


def test_lease_connection_and_drain_end_it(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        client, leaving = await peer.connect(), await peer.connect()
        answer = await forward(client, hidden(2, 3))
        assert (await forward(leaving, hidden(2, 3))).is_kept
        leaving.close()
        await until(lambda: len(peer.handler.activations) == 1)
        peer.expire(after_s=LEASE_S)
        await check_gone(peer, client, answer, hidden(2, 3))
        answer = await forward(client, hidden(2, 3))
        assert answer.is_kept
        peer.handler.start_draining()
        await check_gone(peer, client, answer, hidden(2, 3))
        assert not (await forward(client, hidden(2, 3))).is_kept

    run(main, engine)


@pytest.mark.parametrize(
    ("tensors", "end", "text"),
    [
        ({"hidden_states": hidden(2, 3), **grads()}, 3, "takes gradients alone, got ['hidden_states']"),
        ({"grad.state.0": hidden(2, 3)}, 3, "a backward needs a tensor 'grad.hidden_states'"),
        ({"grad.hidden_states": hidden(2, 3).long()}, 3, "must be floating point, got torch.int64"),
        (
            {"grad.hidden_states": hidden(2, 4)},
            3,
            "gradient 'hidden_states' is [2, 4, 32], but the output is [2, 3, 32]",
        ),
        ({**grads(), "grad.other": hidden(2, 3)}, 3, "gradient 'other' is [2, 3, 32], but there is no such output"),
        (grads(), 2, "the forward that is kept ran blocks 1:3, got 1:2"),
    ],
    ids=["inputs", "no-gradient", "integers", "shape", "name", "blocks"],
)
def test_bad_backward_of_a_kept_forward_is_refused(engine: Engine, tensors: Named, end: int, text: str) -> None:
    async def main(peer: Peer) -> None:
        client = await peer.connect()
        answer = await forward(client, hidden(2, 3))
        reason, found = await refusal_of(backward(client, answer.request_id, tensors, end=end))
        assert reason is RefusalReason.BAD_REQUEST
        assert text in found

    run(main, engine)


def test_kept_graphs_go_before_a_request_is_refused_for_memory(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(peer: Peer) -> None:
        client = await peer.connect()
        assert (await forward(client, hidden(2, 3))).is_kept
        full = Full(monkeypatch, no_room, times=2)  # keeping, and not keeping
        assert (await forward(client, hidden(2, 3, seed=1))).is_kept
        assert (full.num_failed, len(peer.handler.activations)) == (2, 1)
        full = Full(monkeypatch, no_room, times=99)
        peer.handler.activations.clear()
        reason, _ = await refusal_of(forward(client, hidden(2, 3)))
        assert (reason, full.num_failed) == (RefusalReason.OUT_OF_MEMORY, 2)

    run(main, engine)


def test_kept_graph_without_room_for_its_backward_is_lost(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(peer: Peer) -> None:
        client = await peer.connect()
        answer = await forward(client, hidden(2, 3))
        other = await forward(client, hidden(2, 3))
        failed = []

        def full(*args: Any) -> Named:
            failed.append(args)
            raise no_room()

        monkeypatch.setattr(Engine, "backward_kept", full)
        reason, text = await refusal_of(backward(client, answer.request_id, grads()))
        assert (reason, len(failed)) == (RefusalReason.SESSION_LOST, 1)
        assert text == "the device has no memory for the backward of what was kept"
        await check_gone(peer, client, other, hidden(2, 3))

    run(main, engine)


def test_forward_cancelled_while_it_runs_is_not_kept(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client gives up while the device works: nobody will ever ask for the graph."""

    async def main(peer: Peer) -> None:
        client = await peer.connect()
        run_span, has_begun = SpanModel.run, asyncio.Event()
        loop = asyncio.get_running_loop()

        def slow(*args: Any) -> Any:
            loop.call_soon_threadsafe(has_begun.set)
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0.05), loop).result(5.0)
            return run_span(*args)

        monkeypatch.setattr(SpanModel, "run", slow)
        task = asyncio.create_task(forward(client, hidden(2, 3)))
        await asyncio.wait_for(has_begun.wait(), 5.0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        monkeypatch.setattr(SpanModel, "run", run_span)
        assert (await forward(client, hidden(2, 3))).is_kept
        assert len(peer.handler.activations) == 1

    run(main, engine)
