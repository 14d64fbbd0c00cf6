"""Forked processes: they do not inherit the swarm, and say so; what they load themselves works."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest

from remote_modules import load
from remote_modules.testing import LocalSwarm

from .loops import adapted, plain, rows

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of peft
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),  # of Python 3.12, and right
]
DEADLINE_S = 100.0


@pytest.fixture
def model(swarm: LocalSwarm) -> Iterator[Any]:
    """Of this process, with connections that are open."""
    base: Any = load(swarm.checkpoint, trackers=swarm.trackers, mdns=False)
    model = adapted(base)
    losses(model)
    yield model
    base.model.layers.close()


def losses(model: Any) -> list[float]:
    return plain(model, rows()[:6])


def forked(work: Callable[[], object]) -> object:
    """What ``work`` returns, or the text of what it raises, in a fork of this process."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(work, theirs))
    child.start()
    try:
        assert ours.poll(DEADLINE_S)
        return ours.recv()
    finally:
        child.kill()
        child.join(DEADLINE_S)
        ours.close()
        theirs.close()


def _send(work: Callable[[], object], result: Connection) -> None:
    try:
        result.send(work())
    except RuntimeError as exc:
        result.send(str(exc))


def test_model_of_the_parent_is_refused_by_name(model: Any) -> None:
    refusal = forked(lambda: losses(model))
    assert isinstance(refusal, str)
    assert "and has none of its connections; load the model again in this process" in refusal
    assert len(losses(model)) == 3, "the parent's connections are as they were"


def test_model_that_the_child_loads_trains(swarm: LocalSwarm, model: Any) -> None:
    def train() -> list[float]:
        base: Any = load(swarm.checkpoint, trackers=swarm.trackers, mdns=False)
        return losses(adapted(base))

    assert forked(train) == train()
