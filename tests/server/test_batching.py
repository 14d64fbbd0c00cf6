"""Sessions that decode at once: as one call, each as if alone; what fails together runs alone; prompts in chunks."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from net.memory import turns
from tiny_models import save_tiny

from remote_modules.errors import PeerRefused, RefusalReason
from remote_modules.model.checkpoint import open_checkpoint
from remote_modules.model.classes import serving_class
from remote_modules.model.kv import SpanCache
from remote_modules.model.loading import read_config
from remote_modules.server import batcher
from remote_modules.server.batcher import StepWork
from remote_modules.server.engine import Engine
from remote_modules.server.executor import DeviceThread
from remote_modules.server.jobs import Batchable, Priority
from remote_modules.server.packing import packing_fault
from remote_modules.spans import Span

from .device import Gate, begun, device
from .peer_support import Peer, SessionDriver, crop, running_peer
from .tiny import given, hidden, load_engine, owner_call

SPAN = Span(1, 3)
TOLERANCE = 6e-5
CHUNK = 16


@dataclass(eq=False)
class Job(Batchable):
    """Answers its name, with those it ran with."""

    name: str
    log: list[list[str]]
    group: Hashable | None = "g"
    rows: int = 1
    error: BaseException | None = None
    is_bad_company: bool = False
    others: list[str] = field(default_factory=list)

    @property
    def who(self) -> Hashable:  # type: ignore[override]
        return self.name

    def __call__(self) -> str:
        self.log.append([self.name])
        if self.error is not None:
            raise self.error
        return self.name

    def with_others(self, others: Sequence[Job]) -> list[str]:
        jobs = [self, *others]
        self.log.append([job.name for job in jobs])
        if any(job.is_bad_company for job in jobs):
            raise next((job.error for job in jobs if job.error is not None), ValueError("together"))
        return [job.name for job in jobs]

    def parted(self) -> None:
        self.log.append(["parted"])


async def answers_of(executor: DeviceThread, jobs: Sequence[Job]) -> list[Any]:
    """Of jobs, one for each client, that wait while the device is at something else."""
    gate = Gate()
    first = await begun(executor, gate)
    waiting = [
        asyncio.create_task(executor.run(Priority.DECODE, job, client=number)) for number, job in enumerate(jobs)
    ]
    await turns()
    gate.open()
    await first
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    return [answer if isinstance(answer, BaseException) else answer.value for answer in answers]


def test_jobs_of_one_group_that_wait_run_as_one() -> None:
    async def main() -> None:
        log: list[list[str]] = []
        jobs = [Job(name, log) for name in "abc"] + [Job("other", log, "h"), Job("alone", log, None)]
        async with device() as executor:
            assert await answers_of(executor, jobs) == ["a", "b", "c", "other", "alone"]
            assert (executor.num_batches, executor.num_batched, executor.load) == (1, 3, 0)
        assert log == [["a", "b", "c"], ["other"], ["alone"]]

    asyncio.run(main())


def test_what_fails_together_runs_alone_and_only_the_guilty_fails() -> None:
    async def main() -> None:
        log: list[list[str]] = []
        bad = Job("b", log, error=ValueError("of b"), is_bad_company=True)
        async with device() as executor:
            answers = await answers_of(executor, [Job("a", log), bad, Job("c", log)])
            assert log == [["a", "b", "c"], ["a"], ["b"], ["c"]]
            assert (answers[0], answers[2]) == ("a", "c")
            assert isinstance(answers[1], ValueError)
            assert (executor.num_batches, executor.load) == (0, 0)

    asyncio.run(main())


def test_what_fails_together_and_not_alone_is_told() -> None:
    async def main() -> None:
        log: list[list[str]] = []
        async with device() as executor:
            answers = await answers_of(executor, [Job("a", log), Job("b", log, is_bad_company=True)])
            assert answers == ["a", "b"]
        assert log == [["a", "b"], ["a"], ["b"], ["parted"]]

    asyncio.run(main())


def test_an_error_that_breaks_the_device_is_the_answer_of_all() -> None:
    async def main() -> None:
        log: list[list[str]] = []
        broken: list[BaseException] = []
        executor = DeviceThread(max_queue=8, is_fatal=lambda exc: isinstance(exc, ZeroDivisionError))
        executor.on_broken = broken.append
        try:
            bad = Job("b", log, error=ZeroDivisionError("fatal"), is_bad_company=True)
            answers = await answers_of(executor, [Job("a", log), bad, Job("other", log, "h")])
            assert [type(answer) for answer in answers] == [ZeroDivisionError, ZeroDivisionError, PeerRefused]
            assert answers[2].reason is RefusalReason.INTERNAL
            assert log == [["a", "b"]]
            assert executor.is_broken
            assert broken == [bad.error]
            assert executor.load == 0
        finally:
            executor.stop()

    asyncio.run(main())


def test_a_device_that_is_free_waits_for_who_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        log: list[list[str]] = []
        async with device() as executor:
            num_here = 0

            def wait_until(*, free_s: float, now_s: float) -> float:
                return now_s + 60.0 if num_here < 2 else free_s

            monkeypatch.setattr(executor._rounds, "wait_until", wait_until)
            first = asyncio.create_task(executor.run(Priority.DECODE, Job("a", log)))
            await turns()
            assert not first.done()
            assert executor.load == 1
            num_here = 2
            second = asyncio.create_task(executor.run(Priority.DECODE, Job("b", log)))
            assert [(await task).value for task in (first, second)] == ["a", "b"]
            assert log == [["a", "b"]]

    asyncio.run(main())


def test_a_device_that_waits_begins_when_others_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        log: list[list[str]] = []
        async with device() as executor:
            monkeypatch.setattr(executor._rounds, "wait_until", lambda *, free_s, now_s: now_s + 60.0)
            waiting = asyncio.create_task(executor.run(Priority.DECODE, Job("a", log)))
            await turns()
            assert not waiting.done()
            prefill = await executor.run(Priority.PREFILL, lambda: log.append(["prefill"]))
            assert prefill.value is None
            assert (await waiting).value == "a"
            assert log == [["a"], ["prefill"]]

    asyncio.run(main())


# -------------------------------------------------------------------------------- steps


@pytest.fixture
def batching(checkpoint: Path) -> Engine:
    engine = load_engine(checkpoint, SPAN)
    engine.packs, engine.chunk_tokens = True, CHUNK
    return engine


def cache_of(engine: Engine, length: int, rows: int = 1) -> SpanCache:
    cache = engine.new_cache()
    inputs = hidden(rows, length, seed=length)
    engine.step(cache, SPAN, (), given(inputs), owner_call(inputs))
    return cache


def work_of(engine: Engine, cache: SpanCache, inputs: torch.Tensor, **changes: Any) -> StepWork:
    fields: dict[str, Any] = {
        "engine": engine,
        "who": "session",
        "cache": cache,
        "blocks": SPAN,
        "ops": (),
        "tensors": given(inputs),
        "arguments": owner_call(inputs, **changes.pop("call", {})),
        "num_outputs": None,
        "position": cache.length,
    }
    return StepWork(**(fields | changes))


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape == expected.shape and bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


SIZES = [(1, 3), (2, 30), (1, 64)]


def test_steps_together_give_what_they_give_alone(batching: Engine) -> None:
    inputs = [hidden(rows, 1, seed=rows + length) for rows, length in SIZES]
    calls: list[dict[str, Any]] = [
        {"call": {"attention_mask": torch.ones(rows, length + 1, dtype=torch.int64)}} for rows, length in SIZES
    ]
    calls[0] = {"call": {"position_ids": torch.tensor([[3]])}}
    alone = [
        work_of(batching, cache_of(batching, length, rows), each, **call)()
        for (rows, length), each, call in zip(SIZES, inputs, calls, strict=True)
    ]
    works = [
        work_of(batching, cache_of(batching, length, rows), each, **call)
        for (rows, length), each, call in zip(SIZES, inputs, calls, strict=True)
    ]
    found = works[0].with_others(works[1:])
    assert all(close(one["hidden_states"], two["hidden_states"]) for one, two in zip(found, alone, strict=True))
    assert [work.cache.length for work in works] == [length + 1 for _, length in SIZES]


def test_crops_are_applied_together_too(batching: Engine) -> None:
    inputs = [hidden(1, 1, seed=number) for number in range(2)]
    expected = work_of(batching, cache_of(batching, 20), inputs[0], ops=(crop(5),), position=5)()
    works = [
        work_of(batching, cache_of(batching, 20), inputs[0], ops=(crop(5),), position=5),
        work_of(batching, cache_of(batching, 9), inputs[1]),
    ]
    assert works[0].group == works[1].group
    assert close(works[0].with_others(works[1:])[0]["hidden_states"], expected["hidden_states"])
    assert [work.cache.length for work in works] == [6, 10]


def test_a_failure_together_leaves_each_as_it_was_and_ends_batches_in_the_end(
    batching: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = hidden(1, 1)
    expected = work_of(batching, cache_of(batching, 8), inputs, ops=(crop(5),), position=5)()
    works = [work_of(batching, cache_of(batching, length), inputs) for length in (8, 12)]
    works[0] = work_of(batching, works[0].cache, inputs, ops=(crop(5),), position=5)

    def fail(*_: object) -> None:
        raise RuntimeError("of the last block")

    handle = batching.model.blocks[2].register_forward_hook(fail)
    for number in range(batcher.MAX_FAILURES):
        assert (batching.packs, batching.packing_failures) == (True, number)
        with pytest.raises(RuntimeError, match="^of the last block$"):
            works[0].with_others(works[1:])
        assert [work.cache.length for work in works] == [5, 12]
        works[0].parted()
    handle.remove()
    assert not batching.packs
    assert torch.equal(works[0]()["hidden_states"], expected["hidden_states"])
    assert work_of(batching, works[0].cache, inputs).group is None


@pytest.mark.parametrize(
    ("length", "inputs", "changes"),
    [
        (0, hidden(1, 1), {}),
        (5, hidden(1, 2), {}),
        (5, hidden(1, 1), {"call": {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])}}),
        (5, hidden(1, 1), {"call": {"attention_mask": torch.zeros(1, 1, 1, 6)}}),
        (5, hidden(1, 1), {"call": {"record": ("hidden_states",)}}),
        (5, hidden(1, 1), {"call": {"tensors": {"token_type_ids": torch.zeros(1, 1)}}}),
        (5, hidden(1, 1), {"num_outputs": 0}),
    ],
    ids=["first", "two tokens", "padding", "given mask", "record", "owner's tensors", "no outputs"],
)
def test_steps_of_other_kinds_run_alone(batching: Engine, length: int, inputs: torch.Tensor, changes: Any) -> None:
    cache = cache_of(batching, length) if length else batching.new_cache()
    assert work_of(batching, cache, inputs, **changes).group is None
    assert work_of(batching, cache_of(batching, 5), hidden(1, 1)).group is not None


def test_steps_of_different_calls_are_of_different_groups(batching: Engine) -> None:
    cache = cache_of(batching, 5)
    groups = {
        work_of(batching, cache, hidden(1, 1)).group,
        work_of(batching, cache, hidden(1, 1).to(torch.bfloat16)).group,
        work_of(batching, cache, hidden(1, 1), call={"autocast": torch.bfloat16}).group,
        work_of(batching, cache, hidden(1, 1), call={"options": {"scale": 2.0}}).group,
        work_of(batching, cache, hidden(1, 1), call={"use_cache": False}).group,
    }
    assert len(groups) == 5


@pytest.mark.parametrize("wanted", [None, 1, 5])
def test_parts_of_a_long_step_make_the_whole(batching: Engine, wanted: int | None) -> None:
    inputs = hidden(2, 11, seed=4)
    call = {"attention_mask": torch.ones(2, 16, dtype=torch.int64), "position_ids": torch.arange(5, 16)[None]}
    call["attention_mask"][0, :2] = 0
    expected = work_of(batching, cache_of(batching, 9, 2), inputs, ops=(crop(5),), position=5, call=call)()
    whole = work_of(
        batching, cache_of(batching, 9, 2), inputs, ops=(crop(5),), position=5, call=call, num_outputs=wanted
    )
    assert whole.may_cut
    first, rest = whole.cut(4)
    second, third = rest.cut(4)
    found = whole.join([part() for part in (first, second, third)])
    assert close(found["hidden_states"], expected["hidden_states"][:, -(wanted or 11) :])
    assert whole.cache.length == 16


# -------------------------------------------------------------------------------- a peer


def run(engine: Engine, main: Any, **limits: Any) -> None:
    async def whole() -> None:
        async with running_peer(engine, **limits) as peer:
            await main(peer)

    asyncio.run(whole())


async def together(peer: Peer, sessions: Sequence[SessionDriver], inputs: Sequence[torch.Tensor]) -> Any:
    """One step of each, all of which wait before the first begins."""
    gate = Gate()
    first = await begun(peer.executor, gate)
    steps = [asyncio.create_task(session.step(each)) for session, each in zip(sessions, inputs, strict=True)]
    await turns(50)
    assert peer.executor.load == 1 + len(sessions)
    gate.open()
    await first
    return await asyncio.gather(*steps)


def test_sessions_of_different_clients_decode_as_one(batching: Engine, engine: Engine) -> None:
    lengths = (3, 70, 20)

    async def main(peer: Peer) -> None:
        sessions = [SessionDriver(await peer.connect()) for _ in lengths]
        twins = [engine.new_cache() for _ in lengths]
        for session, twin, length in zip(sessions, twins, lengths, strict=True):
            prompt = hidden(1, length, seed=length)
            expected = engine.step(twin, SPAN, (), given(prompt), owner_call(prompt))
            assert torch.equal(await session.step(prompt), expected["hidden_states"])  # alone: to the last bit
        for number in range(3):
            inputs = [hidden(1, 1, seed=10 * number + length) for length in lengths]
            found = await together(peer, sessions, inputs)
            for output, each, twin in zip(found, inputs, twins, strict=True):
                assert close(output, engine.step(twin, SPAN, (), given(each), owner_call(each))["hidden_states"])
            assert (peer.executor.num_batches, peer.executor.num_batched) == (number + 1, 3 * (number + 1))
        await sessions[0].step(hidden(1, 1))
        assert peer.executor.num_batches == 3

    run(batching, main)


def test_the_fault_of_one_session_is_not_anothers(batching: Engine, engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        sessions = [SessionDriver(await peer.connect()) for _ in range(2)]
        prompts = [hidden(1, 4, seed=number) for number in range(2)]
        for session, prompt in zip(sessions, prompts, strict=True):
            await session.step(prompt)
        spoilt = peer.handler.sessions.get(sessions[1].session_id)
        assert spoilt is not None
        spoilt.cache.held[1].update = None  # the bug of a cache
        twin = engine.new_cache()
        engine.step(twin, SPAN, (), given(prompts[0]), owner_call(prompts[0]))
        tasks = [asyncio.create_task(together(peer, sessions, [hidden(1, 1)] * 2))]
        with pytest.raises(PeerRefused, match="the computation failed"):
            await tasks[0]
        assert (peer.executor.num_batches, batching.packing_failures) == (0, 0)  # it is not the batch's fault
        output = await sessions[0].step(hidden(1, 1, seed=9), position=5, step_id=2)  # its step was done
        for each in (hidden(1, 1), hidden(1, 1, seed=9)):
            expected = engine.step(twin, SPAN, (), given(each), owner_call(each))["hidden_states"]
        assert torch.equal(output, expected)

    run(batching, main)


def test_a_prompt_runs_in_chunks_while_others_decode_and_at_once_otherwise(batching: Engine, engine: Engine) -> None:
    async def main(peer: Peer) -> None:
        num_tokens: list[int] = []
        step = batching.step
        batching.step = lambda *args: num_tokens.append(args[4].num_tokens) or step(*args)  # type: ignore[method-assign,func-returns-value]
        prompt = hidden(1, 2 * CHUNK + 3, seed=1)
        expected = engine.step(engine.new_cache(), SPAN, (), given(prompt), owner_call(prompt))["hidden_states"]
        decoder = SessionDriver(await peer.connect())
        await decoder.step(prompt)
        assert num_tokens == [2 * CHUNK + 3]  # nobody decodes yet
        await decoder.step(hidden(1, 1))
        output = await SessionDriver(await peer.connect()).step(prompt)
        assert num_tokens[2:] == [CHUNK, CHUNK, 3]
        assert close(output, expected)
        decoder.close()
        await turns(50)
        assert torch.equal(await SessionDriver(await peer.connect()).step(prompt), expected)  # it decodes no more

    run(batching, main)


def test_a_prompt_whose_later_chunk_is_refused_loses_its_session(batching: Engine) -> None:
    async def main(peer: Peer) -> None:
        decoder, prompt = SessionDriver(await peer.connect()), SessionDriver(await peer.connect())
        await decoder.step(hidden(1, 2))
        await decoder.step(hidden(1, 1))
        calls: list[int] = []
        real = peer.handler.executor.run

        async def refusing(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                raise PeerRefused("full", peer_id="", reason=RefusalReason.BUSY)
            return await real(*args, **kwargs)

        peer.handler.executor.run = refusing  # type: ignore[method-assign]
        with pytest.raises(PeerRefused) as caught:
            await prompt.step(hidden(1, 2 * CHUNK))
        assert caught.value.reason is RefusalReason.SESSION_LOST
        assert len(calls) == 2
        assert peer.num_sessions == 1

    run(batching, main)


# -------------------------------------------------------------------------------- which models


@pytest.mark.parametrize(
    ("family", "fault"),
    [
        ("llama", ""),
        ("mistral", ""),
        ("gpt_oss", ""),
        ("bloom", "the blocks keep keys and values by themselves"),
        ("mamba", "these caches, or the attention of this model, cannot be packed"),
        ("llama4_text", "results differ by"),
    ],
)
def test_models_are_tried_when_they_are_loaded(tmp_path: Path, family: str, fault: str) -> None:
    engine = engine_of(save_tiny(tmp_path, family))
    found = packing_fault(engine)
    assert found.startswith(fault)
    assert bool(found) == bool(fault)


def engine_of(folder: Path) -> Engine:
    config = serving_class(read_config(open_checkpoint(str(folder))))[1]
    engine = load_engine(folder, Span(0, config.num_hidden_layers))
    engine.kv_costs()
    return engine


def test_models_of_dynamic_tables_are_not_tried(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    engine = engine_of(save_tiny(tmp_path, "llama", rope_parameters=rope))
    assert packing_fault(engine) == "its cache, or what its blocks take, is of another kind"
