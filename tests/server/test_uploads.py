"""Copies ahead of a request's turn, with a device that holds what it is told to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping

import pytest
import torch
from net.memory import until

from remote_modules.errors import PeerRefused, RefusalReason
from remote_modules.server.activations import Activations
from remote_modules.server.engine import Engine
from remote_modules.server.executor import DeviceThread
from remote_modules.server.jobs import Priority, Timed
from remote_modules.server.training import Training
from remote_modules.server.uploads import Uploads
from remote_modules.spans import Span
from remote_modules.wire.messages import AnyRequest, CallMeta, ForwardRequest

from .tiny import given, hidden, owner_call

Named = dict[str, torch.Tensor]
SPAN = Span(1, 3)
ACCELERATOR = torch.device("meta")
BYTES = hidden(2, 3).nbytes


class Memory:
    """Of an accelerator: notes what is copied there."""

    def __init__(self) -> None:
        self.copied: list[Named] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.error: RuntimeError | None = None

    def copy(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> Named:
        assert device is ACCELERATOR
        self.may_go_on.wait(10.0)
        if self.error is not None:
            raise self.error
        found = {name: tensor.clone() for name, tensor in tensors.items()}
        self.copied.append(found)
        return found


def inputs() -> Named:
    return {"hidden_states": hidden(2, 3)}


def test_requests_that_wait_hold_no_more_than_the_budget(engine: Engine) -> None:
    """Of 6 passes behind a busy device, 2 have their inputs there; each answers what it would alone."""

    async def main() -> None:
        memory, executor, is_free = Memory(), DeviceThread(max_queue=6), threading.Event()
        uploads = Uploads(ACCELERATOR, max_bytes=2 * BYTES + 1, copy=memory.copy)

        async def run(
            request: AnyRequest,
            connection_id: int,
            priority: Priority,
            work: Callable[[], Named],
            on_admitted: Callable[[], object] | None = None,
        ) -> Timed[Named]:
            return await executor.run(priority, work, client=connection_id, on_admitted=on_admitted)

        training = Training(engine, Activations(max_bytes=0), uploads, run=run, clock=lambda: 0.0)
        busy = asyncio.ensure_future(executor.run(Priority.DECODE, lambda: is_free.wait(10.0)))
        await asyncio.sleep(0)
        request, tensors, call = ForwardRequest(1, 1, 3, (), 0.0, CallMeta(2, 3)), given(hidden(2, 3)), hidden(2, 3)
        passes = [
            asyncio.ensure_future(training.forward(request, SPAN, tensors, owner_call(call), 1)) for _ in range(7)
        ]
        try:
            await until(lambda: len(memory.copied) >= 2)
            assert uploads.used_bytes == 2 * BYTES
            with pytest.raises(PeerRefused) as refused:
                await passes[6]
            assert refused.value.reason is RefusalReason.BUSY
        finally:
            is_free.set()
        answers = await asyncio.gather(*passes[:6])
        expected = engine.forward(SPAN, tensors, owner_call(call))
        for timed, _ in answers:
            assert torch.equal(timed.value["hidden_states"], expected["hidden_states"])
        await busy
        assert (len([one for one in memory.copied if one]), uploads.used_bytes) == (2, 0)
        executor.stop()

    asyncio.run(main())


def test_nothing_is_copied_before_admission_nor_after_the_end() -> None:
    async def main() -> None:
        memory = Memory()
        uploads = Uploads(ACCELERATOR, max_bytes=BYTES, copy=memory.copy)
        upload = uploads.of(inputs())
        (found,) = upload.take()  # its turn came at once
        upload.end()
        upload.begin()
        assert torch.equal(found["hidden_states"], hidden(2, 3))
        assert (memory.copied, uploads.used_bytes) == ([], 0)

    asyncio.run(main())


def test_copy_counts_until_it_is_made_though_its_request_is_over() -> None:
    async def main() -> None:
        memory = Memory()
        memory.may_go_on.clear()
        uploads = Uploads(ACCELERATOR, max_bytes=BYTES, copy=memory.copy)
        upload = uploads.of(inputs())
        upload.begin()
        await until(upload._copy.running)
        upload.end()
        assert uploads.used_bytes == BYTES
        assert not uploads.reserve(1)
        memory.may_go_on.set()
        await until(lambda: len(memory.copied) >= 1)
        await until(lambda: not uploads.used_bytes)

    asyncio.run(main())


def test_error_of_a_copy_is_the_requests() -> None:
    async def main() -> None:
        memory = Memory()
        memory.error = RuntimeError("the accelerator is gone")
        uploads = Uploads(ACCELERATOR, max_bytes=BYTES, copy=memory.copy)
        upload = uploads.of(inputs())
        upload.begin()
        await until(upload._copy.done)
        with pytest.raises(RuntimeError, match="the accelerator is gone"):
            upload.take()
        upload.end()
        assert uploads.used_bytes == 0

    asyncio.run(main())


def test_cpu_copies_nothing() -> None:
    assert not Uploads(torch.device("cpu"), max_bytes=BYTES).reserve(1)
