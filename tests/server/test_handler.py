from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import msgspec
import pytest
import torch
from net.memory import MAX_BODY_BYTES, SERVER, RawEnd, client_connection, client_hello, join, turns, until

from remote_modules.errors import PeerRefused, PeerUnreachable, RefusalReason
from remote_modules.server.engine import Engine
from remote_modules.server.served import MAX_REQUESTS_PER_CONNECTION
from remote_modules.spans import Span
from remote_modules.wire import messages
from remote_modules.wire.framing import encode_frame
from remote_modules.wire.messages import CacheOp, TensorMeta, encode_message

from .device import Gate, begun
from .peer_support import (
    IDLE_S,
    MAX_BATCH_TOKENS,
    ORPHAN_S,
    ROW_BYTES,
    Peer,
    SessionDriver,
    backward,
    crop,
    forward,
    running_peer,
    select,
    step_request,
)
from .tiny import HIDDEN_SIZE, given, hidden, owner_call

SPAN = Span(1, 3)
ROWS = "indices.0"


async def refusal_of(work: Awaitable[object]) -> tuple[RefusalReason, str]:
    """Reason and text of a refusal, without the name of the peer."""
    with pytest.raises(PeerRefused) as caught:
        await work
    return caught.value.reason, str(caught.value).partition(" refused: ")[2]


class Twin:
    """The same steps on the bare engine: what a peer must answer."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._cache = engine.new_cache()

    def step(
        self,
        inputs: torch.Tensor,
        *,
        ops: tuple[CacheOp, ...] = (),
        attention_mask: torch.Tensor | None = None,
        tensors: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        arguments = owner_call(inputs, attention_mask=attention_mask)
        request = given(inputs, indices=tensors or {})
        return self._engine.step(self._cache, SPAN, ops, request, arguments)["hidden_states"]


class BrokenEngine(Engine):
    """Fails with ``error`` while there is one."""

    error: BaseException | None = None

    def step(self, *args: Any) -> dict[str, torch.Tensor]:
        if self.error is not None:
            raise self.error
        return super().step(*args)

    def forward(self, *args: Any) -> dict[str, torch.Tensor]:
        if self.error is not None:
            raise self.error
        return super().forward(*args)


def run(main: Callable[[Peer], Coroutine[Any, Any, None]], engine: Engine, **limits: Any) -> None:
    """Run ``main`` with a peer; afterwards no task is left."""

    async def whole() -> None:
        async with running_peer(engine, **limits) as peer:
            await main(peer)
        await turns()
        assert len(asyncio.all_tasks()) == 1
        assert peer.handler.num_connections == 0
        assert peer.used_bytes == 0

    asyncio.run(whole())


# -------------------------------------------------------------------------------- what is asked is done


def test_steps_of_a_session_equal_the_engine(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        session, twin = SessionDriver(await peer.connect()), Twin(engine)
        for number, num_tokens in enumerate((4, 1, 1, 64, 1)):
            inputs = hidden(2, num_tokens, seed=number)
            assert torch.equal(await session.step(inputs), twin.step(inputs))
        assert peer.used_bytes == 2 * 2 * ROW_BYTES  # two rows, and a capacity that doubled once
        assert session.last.free_kv_tokens == peer.handler.sessions.budget.free_tokens
        assert peer.handler.num_requests == {"step": 5}

    run(main, engine)


def test_forward_and_backward_equal_the_engine_and_keep_nothing(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        client = await peer.connect()
        inputs, grad_output = hidden(2, 3), hidden(2, 3, seed=1)
        mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
        side: dict[str, Any] = {"attention_mask": mask, "position_ids": torch.tensor([[0, 0, 1], [0, 1, 2]])}
        for use_cache in (True, False):
            arguments = owner_call(inputs, use_cache=use_cache, **side)
            output = await forward(client, inputs, use_cache=use_cache, tensors=side)
            assert torch.equal(output, engine.forward(SPAN, given(inputs), arguments)["hidden_states"])
            tensors = {"hidden_states": inputs, "grad.hidden_states": grad_output, **side}
            gradient = await backward(client, tensors, use_cache=use_cache)
            grads = engine.backward(SPAN, given(inputs, grads={"hidden_states": grad_output}), arguments)
            assert torch.equal(gradient, grads["grad.hidden_states"])
        assert (peer.num_sessions, peer.used_bytes) == (0, 0)
        assert peer.handler.num_requests == {"forward": 2, "backward": 2}

    run(main, engine)


def test_part_of_the_span_and_autocast_equal_the_engine(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        client = await peer.connect()
        arguments = owner_call(hidden(1, 3), autocast=torch.bfloat16)
        output = await forward(client, hidden(1, 3), start=2, autocast="bfloat16")
        assert torch.equal(output, engine.forward(Span(2, 3), given(hidden(1, 3)), arguments)["hidden_states"])

    run(main, engine)


@pytest.mark.parametrize("wanted", [None, 0, 1, 3, 4, 99])
def test_only_the_last_tokens_wanted_are_answered(engine: Engine, wanted: int | None) -> None:
    async def main(peer: Peer) -> None:
        session = SessionDriver(await peer.connect())
        output = await session.step(hidden(2, 4), num_outputs=wanted)
        expected = Twin(engine).step(hidden(2, 4))
        assert torch.equal(output, expected if wanted is None else expected[:, max(0, 4 - wanted) :])
        assert output.shape[1] == min(4, 4 if wanted is None else wanted)

    run(main, engine)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_answer_has_the_dtype_of_the_request(engine: Engine, dtype: torch.dtype) -> None:
    async def main(peer: Peer) -> None:
        session = SessionDriver(await peer.connect())
        inputs = hidden(1, 3).to(dtype)
        assert torch.equal(await session.step(inputs), Twin(engine).step(inputs))

    run(main, engine)


def test_not_finite_states_are_passed_on(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        session = SessionDriver(await peer.connect())
        inputs = hidden(2, 3)
        inputs[0] = float("nan")
        output = await session.step(inputs)
        assert output[0].isnan().all()
        assert torch.equal(output[1], Twin(engine).step(hidden(2, 3))[1])

    run(main, engine)


def test_cache_operations_equal_the_engine(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        session, twin = SessionDriver(await peer.connect()), Twin(engine)
        assert torch.equal(await session.step(hidden(2, 6)), twin.step(hidden(2, 6)))
        scenes: list[tuple[int, int, tuple[CacheOp, ...], list[int]]] = [
            (4, 2, (crop(4),), []),
            (5, 2, (select(ROWS),), [1, 0]),
            (6, 3, (select(ROWS),), [1, 0, 0]),
            (3, 1, (crop(3), select(ROWS)), [2]),
            (0, 4, (CacheOp("reset"),), []),
            (0, 2, (crop(0),), []),
        ]
        for position, rows, ops, indices in scenes:
            new = hidden(rows, 1, seed=position)
            tensors = {ROWS: torch.tensor(indices)} if indices else {}
            output = await session.step(new, position=position, ops=ops, tensors=tensors)
            assert torch.equal(output, twin.step(new, ops=ops, tensors=tensors))
            assert peer.used_bytes == rows * ROW_BYTES

    run(main, engine)


def test_sessions_do_not_mix(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        connections = [await peer.connect(), await peer.connect()]
        sessions = [SessionDriver(connections[number % 2]) for number in range(6)]
        twins = [Twin(engine) for _ in sessions]
        for round_number in range(3):
            inputs = [hidden(1, 2, seed=10 * round_number + number) for number in range(6)]
            outputs = await asyncio.gather(
                *(session.step(entry) for session, entry in zip(sessions, inputs, strict=True))
            )
            for twin, entry, output in zip(twins, inputs, outputs, strict=True):
                assert torch.equal(output, twin.step(entry))
        for session in sessions[:5]:
            session.close()
        await turns()
        assert (peer.num_sessions, peer.used_bytes) == (1, ROW_BYTES)

    run(main, engine)


# -------------------------------------------------------------------------------- a step that comes twice


def test_repeated_step_gets_the_same_answer_and_runs_once(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        session, twin = SessionDriver(await peer.connect()), Twin(engine)
        await session.step(hidden(1, 4))
        twin.step(hidden(1, 4))
        first = await session.step(hidden(1, 1, seed=1))
        again = await session.step(hidden(1, 1, seed=1), step_id=1, position=4)
        assert torch.equal(first, again)
        assert torch.equal(first, twin.step(hidden(1, 1, seed=1)))
        new = hidden(1, 1, seed=2)
        assert torch.equal(await session.step(new), twin.step(new))  # position 5: the cache went on once

    run(main, engine)


def test_step_repeated_over_a_new_connection_gets_the_same_answer(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        session = SessionDriver(await peer.connect())
        first = await session.step(hidden(1, 4))
        session.connection.abort()
        session.connection = await peer.connect()
        again = await session.step(hidden(1, 4), step_id=0, position=0, create=True)
        assert torch.equal(first, again)
        assert session.last.request_id == 1  # under the id of the new request
        assert peer.handler.sessions.get(session.session_id) is not None
        assert peer.used_bytes == ROW_BYTES
        peer.expire(after_s=ORPHAN_S)
        assert peer.num_sessions == 1  # it has an owner again

    run(main, engine)


def test_step_repeated_while_it_runs_is_answered_when_it_is_done(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        gate = Gate()
        blocker = await begun(peer.executor, gate)
        session = SessionDriver(await peer.connect())
        tasks = [asyncio.create_task(session.step(hidden(1, 4), step_id=0, position=0, create=True)) for _ in range(3)]
        await turns()
        gate.open()
        first, *others = await asyncio.gather(*tasks)
        await blocker
        assert all(torch.equal(first, other) for other in others)
        cached = peer.handler.sessions.get(session.session_id)
        assert cached is not None
        assert cached.cache.length == 4

    run(main, engine)


def test_steps_of_one_session_run_in_the_order_in_which_they_came(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        session, twin = SessionDriver(await peer.connect()), Twin(engine)
        inputs = [hidden(1, 1, seed=number) for number in range(5)]
        tasks = [
            asyncio.create_task(session.step(entry, step_id=number, position=number, create=number == 0))
            for number, entry in enumerate(inputs)
        ]
        for entry, output in zip(inputs, await asyncio.gather(*tasks), strict=True):
            assert torch.equal(output, twin.step(entry))

    run(main, engine)


# -------------------------------------------------------------------------------- refusals of steps


async def check_unharmed(session: SessionDriver, twin: Twin) -> None:
    new = hidden(1, 1, seed=99)
    assert torch.equal(await session.step(new), twin.step(new))


@pytest.mark.parametrize("position", [0, 3, 5, 2**40 - 1])
def test_wrong_position_is_a_lost_session_that_stays_as_it_was(engine: Engine, position: int) -> None:
    async def main(peer: Peer) -> None:
        session, twin = SessionDriver(await peer.connect()), Twin(engine)
        await session.step(hidden(1, 4))
        twin.step(hidden(1, 4))
        refused = await refusal_of(session.step(hidden(1, 1), position=position))
        assert refused == (
            RefusalReason.SESSION_LOST,
            f"the session holds 4 tokens, the step expects {position}",
        )
        await check_unharmed(session, twin)

    run(main, engine)


def test_wrong_position_after_operations_leaves_the_cache_uncropped(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        session, twin = SessionDriver(await peer.connect()), Twin(engine)
        await session.step(hidden(1, 4))
        twin.step(hidden(1, 4))
        refused = await refusal_of(session.step(hidden(1, 1), position=3, ops=(crop(2),)))
        assert refused == (RefusalReason.SESSION_LOST, "the session holds 2 tokens, the step expects 3")
        await check_unharmed(session, twin)

    run(main, engine)


REFUSED_STEPS: dict[str, tuple[torch.Tensor, dict[str, Any], RefusalReason, str]] = {
    "other-blocks": (
        hidden(),
        {"end": 2},
        RefusalReason.BAD_REQUEST,
        "the session was opened for blocks 1:3, got 1:2",
    ),
    "blocks-of-others": (
        hidden(),
        {"start": 0},
        RefusalReason.NOT_SERVED,
        "blocks 0:3 are not served here, this peer holds 1:3",
    ),
    "outside-the-model": (
        hidden(),
        {"end": 5},
        RefusalReason.BAD_REQUEST,
        "span 1:5 is outside the model's blocks 0:4",
    ),
    "more-rows": (hidden(2), {}, RefusalReason.BAD_REQUEST, "the session has 1 rows, got 2"),
    "crop-too-long": (
        hidden(),
        {"ops": (crop(9),)},
        RefusalReason.BAD_REQUEST,
        "cannot crop to 9 tokens, the session has 4",
    ),
    "select-beyond": (
        hidden(),
        {"ops": (select(ROWS),), "tensors": {ROWS: torch.tensor([1])}},
        RefusalReason.BAD_REQUEST,
        "select names rows 1..1, the session has 1",
    ),
    "wrong-width": (
        hidden()[:, :, 1:],
        {},
        RefusalReason.BAD_REQUEST,
        f"hidden states must be [B, T, {HIDDEN_SIZE}] for 1 x 1 tokens, got [1, 1, {HIDDEN_SIZE - 1}]",
    ),
    "oversized-batch": (
        hidden(1, MAX_BATCH_TOKENS + 1),
        {},
        RefusalReason.BAD_REQUEST,
        f"a request may hold {MAX_BATCH_TOKENS} tokens, got 1 x {MAX_BATCH_TOKENS + 1}; send smaller ones",
    ),
    "autocast": (
        hidden(),
        {"autocast": "float8"},
        RefusalReason.BAD_REQUEST,
        "autocast must be bfloat16 or float16, got 'float8'",
    ),
    "mask-without-the-others": (
        hidden(),
        {"tensors": {"attention_mask": torch.ones(1, 1, dtype=torch.int64)}},
        RefusalReason.BAD_REQUEST,
        "the session has no attention mask to append to; send the whole one",
    ),
    "short-mask": (
        hidden(),
        {"mask_is_whole": True, "tensors": {"attention_mask": torch.ones(1, 4, dtype=torch.int64)}},
        RefusalReason.BAD_REQUEST,
        "attention_mask must have 5 columns, got 4",
    ),
}


@pytest.mark.parametrize(("inputs", "changes", "reason", "text"), REFUSED_STEPS.values(), ids=REFUSED_STEPS.keys())
def test_refused_step_leaves_the_session_as_it_was(
    engine: Engine, inputs: torch.Tensor, changes: dict[str, Any], reason: RefusalReason, text: str
) -> None:
    async def main(peer: Peer) -> None:
        session, twin = SessionDriver(await peer.connect()), Twin(engine)
        await session.step(hidden(1, 4))
        twin.step(hidden(1, 4))
        assert await refusal_of(session.step(inputs, **dict(changes))) == (reason, text)
        assert peer.used_bytes == ROW_BYTES
        await check_unharmed(session, twin)

    run(main, engine)


def test_unknown_session_without_create_is_lost(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        session = SessionDriver(await peer.connect())
        refused = await refusal_of(session.step(hidden(), create=False))
        assert refused == (RefusalReason.SESSION_LOST, "unknown session")
        assert peer.num_sessions == 0

    run(main, engine)


FIRST_STEPS: dict[str, dict[str, Any]] = {
    "position": {"position": 5},
    "crop": {"ops": (crop(1),)},
    "mask": {"tensors": {"attention_mask": torch.ones(1, 1, dtype=torch.int64)}},
}


@pytest.mark.parametrize("changes", FIRST_STEPS.values(), ids=FIRST_STEPS.keys())
def test_refused_first_step_opens_no_session(engine: Engine, changes: dict[str, Any]) -> None:
    async def main(peer: Peer) -> None:
        session = SessionDriver(await peer.connect())
        await refusal_of(session.step(hidden(), **dict(changes)))
        assert (peer.num_sessions, peer.used_bytes) == (0, 0)
        assert await refusal_of(session.step(hidden(), create=False)) == (RefusalReason.SESSION_LOST, "unknown session")
        await session.step(hidden())

    run(main, engine)


def test_too_many_sessions_are_refused_as_busy(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        client = await peer.connect()
        first = SessionDriver(client)
        await first.step(hidden())
        second = SessionDriver(client)
        assert await refusal_of(second.step(hidden())) == (RefusalReason.BUSY, "1 sessions are open already")
        first.close()
        await second.step(hidden())

    run(main, engine, max_sessions=1)


def test_closed_session_is_unknown(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        session = SessionDriver(await peer.connect())
        await session.step(hidden())
        session.close()
        session.close()
        assert await refusal_of(session.step(hidden())) == (RefusalReason.SESSION_LOST, "unknown session")
        assert peer.used_bytes == 0

    run(main, engine)


def test_session_closed_while_a_step_waits_is_lost_and_frees_its_bytes(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        gate = Gate()
        blocker = await begun(peer.executor, gate)
        session = SessionDriver(await peer.connect())
        running = asyncio.create_task(session.step(hidden(1, 4)))
        await turns()
        waiting = asyncio.create_task(session.step(hidden(), step_id=1, position=4, create=False))
        await turns()
        assert peer.used_bytes == ROW_BYTES
        session.close()
        await turns()
        assert (peer.num_sessions, peer.used_bytes) == (0, 0)
        gate.open()
        await blocker
        assert (await running).shape == (1, 4, HIDDEN_SIZE)
        assert await refusal_of(waiting) == (RefusalReason.SESSION_LOST, "the session was closed meanwhile")
        assert (peer.num_sessions, peer.used_bytes) == (0, 0)

    run(main, engine)


# -------------------------------------------------------------------------------- attention masks

PADDED = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
ONE_MORE = torch.tensor([[1], [1]])


def whole(mask: torch.Tensor, num_more: int) -> torch.Tensor:
    return torch.cat([mask, *[ONE_MORE[: len(mask)]] * num_more], dim=1)


async def padded_session(peer: Peer, engine: Engine) -> tuple[SessionDriver, Twin]:
    session, twin = SessionDriver(await peer.connect()), Twin(engine)
    output = await session.step(hidden(2, 4), mask_is_whole=True, tensors={"attention_mask": PADDED})
    assert torch.equal(output, twin.step(hidden(2, 4), attention_mask=PADDED))
    return session, twin


def test_columns_of_new_tokens_are_appended_to_the_mask(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        session, twin = await padded_session(peer, engine)
        for number in (1, 2, 3):
            new = hidden(2, 1, seed=number)
            output = await session.step(new, tensors={"attention_mask": ONE_MORE})
            assert torch.equal(output, twin.step(new, attention_mask=whole(PADDED, number)))

    run(main, engine)


def test_whole_mask_replaces_the_one_before(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        session, twin = await padded_session(peer, engine)
        other = whole(PADDED.flip(0), 1)
        output = await session.step(hidden(2, 1), mask_is_whole=True, tensors={"attention_mask": other})
        assert torch.equal(output, twin.step(hidden(2, 1), attention_mask=other))
        output = await session.step(hidden(2, 1), tensors={"attention_mask": ONE_MORE})
        assert torch.equal(output, twin.step(hidden(2, 1), attention_mask=whole(other, 1)))

    run(main, engine)


@pytest.mark.parametrize(
    ("ops", "position", "rows"), [((crop(3),), 3, 2), ((select(ROWS),), 4, 2)], ids=["crop", "reorder"]
)
def test_operations_need_the_whole_mask(engine: Engine, ops: tuple[CacheOp, ...], position: int, rows: int) -> None:
    async def main(peer: Peer) -> None:
        session, twin = await padded_session(peer, engine)
        tensors = {ROWS: torch.tensor([1, 0]), "attention_mask": ONE_MORE}
        refused = await refusal_of(session.step(hidden(rows, 1), ops=ops, position=position, tensors=tensors))
        assert refused == (
            RefusalReason.BAD_REQUEST,
            "a step with cache operations must bring the whole attention mask",
        )
        kept = PADDED.flip(0) if ops[0].kind == "select" else PADDED[:, :3]
        tensors["attention_mask"] = whole(kept, 1)
        output = await session.step(
            hidden(rows, 1), ops=ops, position=position, mask_is_whole=True, tensors=dict(tensors)
        )
        expected = twin.step(hidden(rows, 1), ops=ops, attention_mask=whole(kept, 1), tensors=tensors)
        assert torch.equal(output, expected)

    run(main, engine)


@pytest.mark.parametrize("columns", [2, 4])
def test_forward_needs_a_mask_of_its_tokens(engine: Engine, columns: int) -> None:
    async def main(peer: Peer) -> None:
        client = await peer.connect()
        mask = torch.ones(1, columns, dtype=torch.int64)
        refused = await refusal_of(forward(client, hidden(1, 3), tensors={"attention_mask": mask}))
        assert refused == (RefusalReason.BAD_REQUEST, f"attention_mask must have 3 columns, got {columns}")

    run(main, engine)


def test_backward_without_gradient_is_refused(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        client = await peer.connect()
        refused = await refusal_of(backward(client, {"hidden_states": hidden()}))
        assert refused == (RefusalReason.BAD_REQUEST, "a backward needs a tensor 'grad.hidden_states'")

    run(main, engine)


# -------------------------------------------------------------------------------- memory


def test_session_that_does_not_fit_is_refused_before_work_and_nobody_is_hurt(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        gate = Gate()
        client = await peer.connect()
        victim, twin = SessionDriver(client), Twin(engine)
        await victim.step(hidden(1, 4))
        twin.step(hidden(1, 4))
        blocker = await begun(peer.executor, gate)
        greedy = SessionDriver(client)
        refused = await refusal_of(greedy.step(hidden(2, 1)))  # answered although the device is busy
        assert refused == (
            RefusalReason.OUT_OF_MEMORY,
            f"KV cache needs {2 * ROW_BYTES} more bytes, {ROW_BYTES} of {2 * ROW_BYTES} are free",
        )
        assert (peer.num_sessions, peer.used_bytes) == (1, ROW_BYTES)
        gate.open()
        await blocker
        await check_unharmed(victim, twin)
        await SessionDriver(client).step(hidden())  # what does fit is taken

    run(main, engine, budget_bytes=2 * ROW_BYTES)


def test_session_that_cannot_grow_stays_as_it_was(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        session, twin = SessionDriver(await peer.connect()), Twin(engine)
        await session.step(hidden(1, 60))
        twin.step(hidden(1, 60))
        reason, _ = await refusal_of(session.step(hidden(1, 5)))
        assert reason is RefusalReason.OUT_OF_MEMORY
        assert peer.used_bytes == ROW_BYTES
        await check_unharmed(session, twin)
        rows = {ROWS: torch.zeros(2, dtype=torch.int64)}
        reason, _ = await refusal_of(session.step(hidden(2, 1), ops=(select(ROWS),), tensors=rows))
        assert reason is RefusalReason.OUT_OF_MEMORY
        await check_unharmed(session, twin)

    run(main, engine, budget_bytes=ROW_BYTES)


def test_rows_that_a_step_has_only_in_between_count_too(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        session, twin = SessionDriver(await peer.connect()), Twin(engine)
        await session.step(hidden(1, 4))
        twin.step(hidden(1, 4))
        ops = (select("indices.0"), select("indices.1"))
        tensors = {"indices.0": torch.zeros(4, dtype=torch.int64), "indices.1": torch.tensor([3])}
        reason, _ = await refusal_of(session.step(hidden(), ops=ops, tensors=dict(tensors)))
        assert reason is RefusalReason.OUT_OF_MEMORY
        assert peer.used_bytes == ROW_BYTES
        tensors = {"indices.0": torch.zeros(3, dtype=torch.int64), "indices.1": torch.tensor([2])}
        output = await session.step(hidden(), ops=ops, tensors=dict(tensors))
        assert torch.equal(output, twin.step(hidden(), ops=ops, tensors=tensors))
        assert peer.used_bytes == ROW_BYTES
        await check_unharmed(session, twin)

    run(main, engine, budget_bytes=3 * ROW_BYTES)


# -------------------------------------------------------------------------------- failures of our own


@pytest.mark.parametrize(
    ("error", "reason", "text"),
    [
        (RuntimeError("/secret/path is broken"), RefusalReason.INTERNAL, "the computation failed"),
        (IndexError("secret"), RefusalReason.INTERNAL, "the computation failed"),
        (torch.OutOfMemoryError("secret"), RefusalReason.OUT_OF_MEMORY, "the device has no memory for this request"),
        (ZeroDivisionError("secret"), RefusalReason.INTERNAL, "internal error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_failure_on_the_device_drops_the_session_and_its_bytes(
    engine: Engine, caplog: pytest.LogCaptureFixture, error: Exception, reason: RefusalReason, text: str
) -> None:
    caplog.set_level(logging.CRITICAL, "remote_modules.server.served")
    broken = BrokenEngine(engine.model)

    async def main(peer: Peer) -> None:
        client = await peer.connect()
        session, other, twin = SessionDriver(client), SessionDriver(client), Twin(engine)
        await session.step(hidden(1, 4))
        await other.step(hidden(1, 4))
        twin.step(hidden(1, 4))
        broken.error = error
        assert await refusal_of(session.step(hidden())) == (reason, text)
        assert await refusal_of(forward(client, hidden())) == (reason, text)
        broken.error = None
        assert (peer.num_sessions, peer.used_bytes) == (1, ROW_BYTES)
        assert await refusal_of(session.step(hidden())) == (RefusalReason.SESSION_LOST, "unknown session")
        await check_unharmed(other, twin)

    run(main, broken)


def test_full_queue_is_refused_as_busy_and_drops_a_session_no_earlier_than_its_step(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        gate = Gate()
        blocker = await begun(peer.executor, gate)
        client = await peer.connect()
        waiting = asyncio.create_task(forward(client, hidden()))
        await turns()
        assert await refusal_of(forward(client, hidden())) == (
            RefusalReason.BUSY,
            "1 requests wait for the device already",
        )
        reason, _ = await refusal_of(SessionDriver(client).step(hidden()))
        assert reason is RefusalReason.BUSY
        assert (peer.num_sessions, peer.used_bytes) == (0, 0)
        gate.open()
        await asyncio.gather(blocker, waiting)

    run(main, engine, max_queue=1)


def test_step_refused_as_busy_leaves_its_session_as_it_was(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        client = await peer.connect()
        session, twin = SessionDriver(client), Twin(engine)
        assert torch.equal(await session.step(hidden(1, 4)), twin.step(hidden(1, 4)))
        gate = Gate()
        blocker = await begun(peer.executor, gate)
        waiting = asyncio.create_task(forward(client, hidden()))
        await turns()
        assert (await refusal_of(session.step(hidden(1, 1), ops=(crop(2),), position=2)))[0] is RefusalReason.BUSY
        double = {"ops": (select(ROWS),), "tensors": {ROWS: torch.tensor([0, 0])}}
        assert (await refusal_of(session.step(hidden(2, 1), **double)))[0] is RefusalReason.BUSY
        assert peer.num_sessions == 1
        gate.open()
        await asyncio.gather(blocker, waiting)
        await check_unharmed(session, twin)

    run(main, engine, max_queue=1)


# -------------------------------------------------------------------------------- draining


def test_draining_peer_serves_old_sessions_and_refuses_new_ones(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        client = await peer.connect()
        session, twin = SessionDriver(client), Twin(engine)
        await session.step(hidden(1, 4))
        twin.step(hidden(1, 4))
        peer.handler.start_draining()
        await turns()
        assert client.is_draining
        refused = await refusal_of(SessionDriver(client).step(hidden()))
        assert refused == (RefusalReason.DRAINING, "this peer is leaving")
        await check_unharmed(session, twin)
        await forward(client, hidden())
        late = await peer.connect()
        await turns()
        assert late.is_draining

    run(main, engine)


def test_connection_without_a_hello_is_not_told_of_draining(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        end = peer.connect_silent()
        peer.handler.start_draining()
        await turns()
        assert end.is_open
        assert end.messages_so_far() == []

    run(main, engine)


# -------------------------------------------------------------------------------- limits of a connection


def test_too_many_connections_are_not_accepted(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        first, _ = await peer.connect(), await peer.connect()
        assert peer.handler.num_connections == 2
        assert peer.handler.accept() is None
        first.close()
        await turns()
        await forward(await peer.connect(), hidden())

    run(main, engine, max_connections=2)


def test_too_many_requests_on_one_connection_are_refused_as_busy(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        gate = Gate()
        blocker = await begun(peer.executor, gate)
        client, other = await peer.connect(), await peer.connect()
        tasks = [asyncio.create_task(forward(client, hidden())) for _ in range(MAX_REQUESTS_PER_CONNECTION)]
        await turns(2 * MAX_REQUESTS_PER_CONNECTION)
        assert await refusal_of(forward(client, hidden())) == (
            RefusalReason.BUSY,
            f"{MAX_REQUESTS_PER_CONNECTION} requests are under way on this connection",
        )
        tasks.append(asyncio.create_task(forward(other, hidden())))
        await turns()
        gate.open()
        await blocker
        outputs = await asyncio.gather(*tasks)
        assert all(torch.equal(output, outputs[0]) for output in outputs)
        await forward(client, hidden())

    run(main, engine, max_queue=1000)


def test_request_id_in_use_ends_the_connection(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        gate = Gate()
        blocker = await begun(peer.executor, gate)
        end = await peer.connect_plain()
        for step_id in (0, 1):
            end.send(*step_request(7, {"hidden_states": hidden()}, step_id=step_id, create=True))
        await asyncio.wait_for(end.closed.wait(), 1.0)
        gate.open()
        await blocker
        await turns()
        assert (peer.num_sessions, peer.used_bytes) == (0, 0)

    run(main, engine)


def test_ping_is_answered_while_the_device_works(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        gate = Gate()
        blocker = await begun(peer.executor, gate)
        end = await peer.connect_plain()
        end.send(messages.Ping(77))
        assert await end.message(messages.Pong) == messages.Pong(77, load=1)
        gate.open()
        await blocker

    run(main, engine)


# -------------------------------------------------------------------------------- cancelled, or gone


def test_cancelled_request_that_waits_is_dropped(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        gate = Gate()
        blocker = await begun(peer.executor, gate)
        end = await peer.connect_plain()
        end.send(*step_request(1, {"hidden_states": hidden()}, create=True))
        await turns()
        assert (peer.used_bytes, peer.executor.load) == (ROW_BYTES, 2)
        end.send(messages.Cancel(1))
        end.send(messages.Cancel(12345))
        await turns()
        assert (peer.num_sessions, peer.used_bytes, peer.executor.load) == (0, 0, 1)
        assert end.messages_so_far() == []
        end.send(*step_request(1, {"hidden_states": hidden()}, create=True))  # its id is free again
        await turns()
        gate.open()
        await blocker
        assert (await end.message(messages.Output)).request_id == 1

    run(main, engine)


def test_client_that_vanishes_while_its_step_waits_leaves_nothing(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        gate = Gate()
        blocker = await begun(peer.executor, gate)
        client = await peer.connect()
        step = asyncio.create_task(SessionDriver(client).step(hidden()))
        await turns()
        assert peer.used_bytes == ROW_BYTES
        client.abort()
        with pytest.raises(PeerUnreachable):
            await step
        await turns()
        assert (peer.num_sessions, peer.used_bytes, peer.executor.load) == (0, 0, 1)
        gate.open()
        await blocker

    run(main, engine)


def test_client_that_vanishes_while_its_step_runs_leaves_nothing_once_it_ends(engine: Engine) -> None:
    gate = Gate()

    class SlowEngine(Engine):
        def step(self, *args: Any) -> dict[str, torch.Tensor]:
            gate()
            return super().step(*args)

    async def main(peer: Peer) -> None:
        client = await peer.connect()
        step = asyncio.create_task(SessionDriver(client).step(hidden()))
        await gate.has_begun()
        client.abort()
        with pytest.raises(PeerUnreachable):
            await step
        await turns()
        assert peer.used_bytes == ROW_BYTES  # the device still writes into the cache
        gate.open()
        await until(lambda: peer.used_bytes == 0)
        assert peer.num_sessions == 0

    run(main, SlowEngine(engine.model))


def test_sessions_of_a_vanished_client_are_dropped_after_the_orphan_time(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        gone, staying = await peer.connect(), await peer.connect()
        sessions = [SessionDriver(gone) for _ in range(3)]
        for session in sessions:
            await session.step(hidden(1, 4))
        other = SessionDriver(staying)
        await other.step(hidden(1, 4))
        gone.abort()
        await turns()
        assert peer.handler.num_connections == 1
        peer.expire(after_s=ORPHAN_S - 0.1)
        assert peer.used_bytes == 4 * ROW_BYTES
        peer.expire(after_s=0.1)
        assert (peer.num_sessions, peer.used_bytes) == (1, ROW_BYTES)
        peer.expire(after_s=IDLE_S - ORPHAN_S - 0.1)
        await other.step(hidden())
        peer.expire(after_s=IDLE_S - 0.1)
        assert peer.num_sessions == 1
        peer.expire(after_s=0.1)
        assert (peer.num_sessions, peer.used_bytes) == (0, 0)

    run(main, engine)


# -------------------------------------------------------------------------------- strangers

HELLO = b"".join(encode_frame(encode_message(client_hello())))
OVERSIZED = (TensorMeta("hidden_states", "float32", (2**30,)),)


def frame(message: messages.Message, body: bytes = b"") -> bytes:
    return b"".join(encode_frame(encode_message(message), [body] if body else []))


def oversized_frame() -> bytes:
    """The prefix and header of a frame whose body would be one byte too long."""
    body = bytes(MAX_BODY_BYTES + 1)
    return frame(messages.ForwardRequest(1, 1, 3, OVERSIZED, 1.0), body)[:4096]


BEFORE_HELLO: dict[str, bytes] = {
    "http": b"GET / HTTP/1.1\r\nHost: peer\r\n\r\n",
    "zeros": bytes(100),
    "request": frame(messages.ForwardRequest(1, 1, 3, (), 1.0)),
    "hello-with-body": frame(client_hello(), bytes(64)),
    "hello-and-request": HELLO + frame(messages.ForwardRequest(1, 1, 3, (), 1.0)),
    "two-hellos": HELLO + HELLO,
}
AFTER_HELLO: dict[str, bytes] = {
    "zeros": bytes(100),
    "second-hello": HELLO,
    "server-message": frame(messages.Draining()),
    "oversized-frame": oversized_frame(),
    "bad-header-checksum": frame(messages.Ping(1))[:-1] + b"\xff",
    "bad-body-checksum": frame(messages.ForwardRequest(1, 1, 3, (), 1.0), bytes(64))[:-1] + b"\xff",
    "tensors-without-body": frame(messages.ForwardRequest(1, 1, 3, OVERSIZED, 1.0)),
    "body-without-tensors": frame(messages.ForwardRequest(1, 1, 3, (), 1.0), bytes(64)),
    "unknown-dtype": frame(messages.ForwardRequest(1, 1, 3, (TensorMeta("a", "int4", (0,)),), 1.0)),
}


async def greeted_stranger(peer: Peer) -> RawEnd:
    stranger = raw_stranger(peer)
    stranger.send(HELLO)
    await until(lambda: bool(stranger.received))
    return stranger


def raw_stranger(peer: Peer) -> RawEnd:
    accepted = peer.handler.accept()
    assert accepted is not None
    stranger = RawEnd()
    join(stranger, accepted)
    return stranger


@pytest.mark.parametrize(
    ("data", "is_greeted"),
    [*((data, False) for data in BEFORE_HELLO.values()), *((data, True) for data in AFTER_HELLO.values())],
    ids=[*(f"first-{name}" for name in BEFORE_HELLO), *(f"then-{name}" for name in AFTER_HELLO)],
)
def test_nonsense_ends_only_its_own_connection(engine: Engine, data: bytes, *, is_greeted: bool) -> None:
    async def main(peer: Peer) -> None:
        session, twin = SessionDriver(await peer.connect()), Twin(engine)
        await session.step(hidden(1, 4))
        twin.step(hidden(1, 4))
        stranger = await greeted_stranger(peer) if is_greeted else raw_stranger(peer)
        stranger.send(data)
        await asyncio.wait_for(stranger.closed.wait(), 1.0)
        assert peer.handler.num_connections == 1
        assert peer.used_bytes == ROW_BYTES
        await check_unharmed(session, twin)

    run(main, engine)


def test_frame_that_never_ends_holds_no_session_and_hurts_nobody(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        stranger = await greeted_stranger(peer)
        message, body = step_request(1, {"hidden_states": hidden(1, 100)}, create=True)
        data = b"".join(encode_frame(encode_message(message), body))
        for start in range(0, len(data) - 1, 1000):
            stranger.send(data[start : min(start + 1000, len(data) - 1)])
        await turns()
        assert (peer.num_sessions, peer.handler.num_connections) == (0, 1)
        await forward(await peer.connect(), hidden())
        stranger.send(data[-1:])
        await until(lambda: peer.num_sessions == 1)

    run(main, engine)


@pytest.mark.parametrize("major", [0, 2, 2**40 - 1])
def test_other_version_is_rejected_naming_both(engine: Engine, major: int) -> None:
    async def main(peer: Peer) -> None:
        end = peer.connect_silent()
        end.send(msgspec.structs.replace(client_hello(), major=major, minor=7))
        text = f"peer speaks protocol {major}.7, we speak 1.5; update the older side"
        assert await end.message(messages.Reject) == messages.Reject(text)
        await asyncio.wait_for(end.closed.wait(), 1.0)
        assert peer.handler.num_connections == 0

    run(main, engine)


@pytest.mark.parametrize("minor", [0, 9])
def test_hello_says_who_the_peer_is_and_what_it_takes(engine: Engine, minor: int) -> None:
    async def main(peer: Peer) -> None:
        end = peer.connect_silent()
        end.send(msgspec.structs.replace(client_hello(), minor=minor))
        hello = await end.message(messages.ServerHello)
        assert (hello.major, hello.minor) == (1, 5)
        assert hello.public_key == SERVER.public_key
        assert (hello.instance_id, hello.software) == ("first", "test peer")
        assert hello.max_body_bytes == MAX_BODY_BYTES

    run(main, engine)


def test_hello_is_bound_to_the_certificate_in_use(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        accepted = peer.handler.accept()
        assert accepted is not None
        client = client_connection(certificate_sha256="0" * 64)
        join(client, accepted)
        with pytest.raises(PeerUnreachable, match="signature of the hello does not fit its key"):
            await client.handshake(1.0)

    run(main, engine)


def test_aborted_peer_drops_all_connections_and_sessions(engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        clients = [await peer.connect() for _ in range(3)]
        for client in clients:
            await SessionDriver(client).step(hidden())
        peer.handler.abort()
        await turns()
        assert (peer.handler.num_connections, peer.num_sessions, peer.used_bytes) == (0, 0, 0)
        assert not any(client.is_open for client in clients)

    run(main, engine)
