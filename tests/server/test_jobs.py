from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from remote_modules.server.jobs import Job, Priority, Timed, answer_all, fail, tell

TIMED = Timed("done", 0.1, 0.2)


def new_job(**options: Any) -> Job:
    answer: asyncio.Future[Timed[Any]] = asyncio.get_running_loop().create_future()
    return Job(priority=Priority.DECODE, client=0, deadline_s=1.0, work=None, answer=answer, queued_s=0.0, **options)


def test_answers_come_from_another_thread() -> None:
    async def main() -> None:
        jobs = [new_job(), new_job()]
        threading.Thread(target=answer_all, args=(jobs, [TIMED, Timed("other", 0.0, 0.0)])).start()
        assert [(await job.answer).value for job in jobs] == ["done", "other"]
        assert all(job.has_ended for job in jobs)

    asyncio.run(main())


def test_job_that_runs_here_is_answered_at_once() -> None:
    async def main() -> None:
        job = new_job(is_here=True)
        answer_all([job], [TIMED])
        assert job.answer.result() is TIMED
        failed = new_job(is_here=True)
        fail(failed, ValueError("no"))
        assert failed.answer.done()
        with pytest.raises(ValueError, match="no"):
            await failed.answer

    asyncio.run(main())


@pytest.mark.parametrize("has_failed", [False, True])
def test_end_of_a_job_whose_answer_was_cancelled_can_be_awaited(has_failed: bool) -> None:
    async def main() -> None:
        job = new_job()
        job.answer.cancel()
        end = asyncio.create_task(job.wait_end())
        await asyncio.sleep(0)
        assert not end.done()
        if has_failed:
            fail(job, ValueError("late"))
        else:
            answer_all([job], [TIMED])
        await asyncio.wait_for(end, 5.0)
        assert job.answer.cancelled()
        await job.wait_end()  # that it has ended is known

    asyncio.run(main())


def test_loop_that_is_closed_is_told_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> Job:
        return new_job()

    job = asyncio.run(main())
    called: list[int] = []
    with caplog.at_level("DEBUG", logger="remote_modules"):
        tell(job, lambda: called.append(1))
    assert not called
    assert "the event loop is gone" in caplog.text
