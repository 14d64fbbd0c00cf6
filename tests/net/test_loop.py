from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from remote_modules.net import loop as loop_module
from remote_modules.net.loop import LoopThread, shared_loop


@pytest.fixture
def thread() -> Iterator[LoopThread]:
    made = LoopThread("test-loop")
    yield made
    made.stop()


async def name_of_thread() -> str:
    await asyncio.sleep(0)
    return threading.current_thread().name


async def fail() -> None:
    raise ZeroDivisionError("no such number")


async def for_ever(begun: threading.Event, ended: threading.Event) -> None:
    begun.set()
    try:
        await asyncio.Event().wait()
    finally:
        ended.set()


def test_coroutine_runs_on_the_thread_of_the_loop(thread: LoopThread) -> None:
    assert thread.run(name_of_thread()) == "test-loop"
    assert thread.submit(name_of_thread()).result(timeout=2.0) == "test-loop"


def test_failure_of_a_coroutine_is_raised_and_the_loop_lives_on(thread: LoopThread) -> None:
    with pytest.raises(ZeroDivisionError, match="no such number"):
        thread.run(fail())
    assert thread.run(name_of_thread()) == "test-loop"


class LateThread(LoopThread):
    """Its thread gets to the loop late, as on a busy machine."""

    def _run(self) -> None:
        threading.Event().wait(0.02)
        super()._run()


def test_loop_takes_work_as_soon_as_it_is_made() -> None:
    thread = LateThread("test-loop")
    try:
        assert thread.run(name_of_thread()) == "test-loop"
    finally:
        thread.stop()


def test_loop_that_would_wait_for_itself_is_refused(thread: LoopThread) -> None:
    async def run_another() -> None:
        thread.run(name_of_thread())

    with pytest.raises(RuntimeError, match="would wait for itself"):
        thread.run(run_another())


def test_interrupted_wait_cancels_the_coroutine(thread: LoopThread) -> None:
    begun, ended = threading.Event(), threading.Event()
    main_thread = threading.main_thread().ident
    assert main_thread is not None

    def interrupt() -> None:
        while not begun.is_set() or sys._current_frames()[main_thread].f_code.co_name != "result":
            time.sleep(0.001)
        signal.pthread_kill(main_thread, signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        thread.run(for_ever(begun, ended))
    interrupter.join()
    assert ended.wait(2.0)
    assert thread.run(name_of_thread()) == "test-loop"


def test_stop_ends_the_wait_for_a_coroutine() -> None:
    thread = LoopThread("test-loop")
    begun, ended = threading.Event(), threading.Event()

    def stop() -> None:
        begun.wait(2.0)
        thread.stop()

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(asyncio.CancelledError):
        thread.run(for_ever(begun, ended))
    stopper.join()
    assert ended.is_set()


def test_coroutine_cancelled_before_it_began_ends_the_wait(thread: LoopThread) -> None:
    def cancelled(loop: asyncio.AbstractEventLoop, coroutine: Any, **kwargs: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(coroutine, loop=loop, **kwargs)
        task.cancel()
        return task

    thread.loop.set_task_factory(cancelled)
    with pytest.raises(asyncio.CancelledError):
        thread.run(name_of_thread())
    thread.loop.set_task_factory(None)
    assert thread.run(name_of_thread()) == "test-loop"


def test_callback_is_called_on_the_thread(thread: LoopThread) -> None:
    names: list[str] = []
    called = threading.Event()
    thread.call_soon(lambda: names.append(threading.current_thread().name))
    thread.call_soon(called.set)
    assert called.wait(2.0)
    assert names == ["test-loop"]


def test_stop_cancels_what_runs_and_ends_the_thread() -> None:
    before = threading.active_count()
    thread = LoopThread("test-loop")
    begun, ended = threading.Event(), threading.Event()
    future = thread.submit(for_ever(begun, ended))
    assert begun.wait(2.0)
    thread.stop()
    assert ended.is_set()
    assert future.cancelled()
    assert thread.loop.is_closed()
    assert threading.active_count() == before


def test_stopped_loop_refuses_work_and_ignores_callbacks() -> None:
    thread = LoopThread("test-loop")
    thread.stop()
    thread.stop()
    with pytest.raises(RuntimeError, match="the event loop is stopped"):
        thread.run(name_of_thread())
    thread.call_soon(lambda: None)


def test_clients_of_a_process_share_one_loop_until_it_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "_shared", None)
    first = shared_loop()
    try:
        assert shared_loop() is first
        assert first.run(name_of_thread()) == "remote-modules-io"
    finally:
        first.stop()
    second = shared_loop()
    try:
        assert second is not first
        assert second.run(name_of_thread()) == "remote-modules-io"
    finally:
        second.stop()


def test_forked_process_gets_a_loop_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "_shared", None)
    parent = shared_loop()
    try:
        monkeypatch.setattr(loop_module, "_shared_pid", os.getpid() + 1)  # as the child of a fork finds it
        child = shared_loop()
        try:
            assert child is not parent
            assert child.run(name_of_thread()) == "remote-modules-io"
        finally:
            child.stop()
    finally:
        parent.stop()


def test_loop_of_another_process_is_refused(thread: LoopThread, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a fork sees: the loop object is there, its thread is not."""
    with monkeypatch.context() as patch:
        patch.setattr("os.getpid", lambda: 1)
        with pytest.raises(RuntimeError, match=r"^process 1 was forked from \d+ and has none of its connections;"):
            thread.run(name_of_thread())
    assert thread.run(name_of_thread()) == "test-loop"
