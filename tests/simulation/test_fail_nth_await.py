"""Each input and output of a run fails once, and each wait of the client is cancelled once: nothing else changes.

The first run counts the points (dials, sends, receives, lookups, announcements, jobs of devices), the others let
each of them fail in each of its ways. None is left out, and each is seen to fail.
"""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any

import pytest
import torch

from remote_modules.client.passes import backward, forward
from remote_modules.client.session import SessionState
from remote_modules.client.swarm import Swarm
from remote_modules.errors import NoRouteError, PeerError
from remote_modules.testing.fault_points import WAYS, CancelledAt, FaultPoints
from remote_modules.testing.simulation import SESSION_IDLE_S, SimulatedSwarm
from remote_modules.testing.virtual_time import run_virtual

from .oracle import Oracle, lesson_of, positions, wrong_in_lesson
from .scenario import blocks_of
from .tiny import PAD, TinyModel, call_of, tiny_model

SPANS = ("0:1", "0:1", "1:2", "1:2")
NUM_TOKENS = 20
REORDERED_AT, CROPPED_AT, CROPPED_BY = 7, 13, 3
NUM_STORMS = 60  # runs with several failures each
FAILURES_PER_STORM = 4


def model() -> TinyModel:
    return tiny_model(2, ("0:1", "1:2"))


class Failing:
    """Runs passes, and each again after an error that has a type; counts these."""

    def __init__(self, cancel_at: int | None = None) -> None:
        self.errors: list[str] = []
        self.num_waits = 0
        self._cancel_at = cancel_at

    async def run(self, begin: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        while True:
            at = None if self._cancel_at is None else self._cancel_at - self.num_waits
            work = CancelledAt(begin(), at)
            task = asyncio.ensure_future(_awaited(work))
            await asyncio.wait([task])
            self.num_waits += work.num_waits
            if task.cancelled():
                assert work.fired
                self.errors.append("CancelledError")
            elif isinstance(error := task.exception(), (NoRouteError, PeerError)):
                self.errors.append(type(error).__name__)
                await asyncio.sleep(1.0)
            else:
                return task.result()


async def _awaited(work: CancelledAt) -> Any:
    return await work


async def generate(client: Swarm, failing: Failing, oracle: Oracle) -> torch.Tensor:
    """Logits ``[20, B, V]`` of a ragged generation with a reordering and a rollback."""
    tiny, order = model(), torch.tensor([1, 1])
    tokens = torch.tensor([[PAD, 11, 12, 13], [21, 22, 23, 24]])
    mask = (tokens != PAD).long()
    session = SessionState(client, blocks_of(model()), lambda callback: callback())
    all_logits, start = [], 0
    for number in range(NUM_TOKENS):
        new = tiny.embed(tokens[:, start:])
        call = call_of(new, positions(tokens, mask)[:, start:], mask)
        outputs = await failing.run(functools.partial(session.step, {"hidden_states": new}, call))
        logits = tiny.logits(outputs["hidden_states"][:, -1:])
        oracle.note(f"token {number}", tokens, mask, logits)
        all_logits.append(logits[:, -1])
        start = tokens.shape[1]
        tokens = torch.cat([tokens, logits.argmax(-1)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        if number == REORDERED_AT:
            session.select(order)
            tokens, mask = tokens[order], mask[order]
        if number == CROPPED_AT:
            start -= CROPPED_BY
            session.crop(start)
            tokens, mask = tokens[:, : start + 1], mask[:, : start + 1]
    await session.close()
    return torch.stack(all_logits)


async def train(client: Swarm, failing: Failing, oracle: Oracle) -> torch.Tensor:
    """The gradient of one training step with an adapter, which must be that of the local model."""
    lesson = lesson_of(model(), 0, has_adapter=True, is_ragged=False)
    named = {"hidden_states": lesson.inputs}
    outputs, _, segments = await failing.run(lambda: forward(client, blocks_of(model()), named, lesson.call))
    ones = {"hidden_states": torch.ones_like(lesson.inputs)}
    grads, of_adapter = await failing.run(lambda: backward(client, segments, ones))
    assert wrong_in_lesson(lesson, outputs["hidden_states"], grads["hidden_states"], of_adapter) == []
    grad: torch.Tensor = grads["hidden_states"]
    return grad


WORK = {"generation": generate, "training": train}


async def run(name: str, points: FaultPoints, failing: Failing, *, is_checked: bool = False) -> torch.Tensor:
    """One run from the start of the peers to the end of the client; then everything is given back."""
    holdings = [model().holdings[span] for span in SPANS]
    swarm = SimulatedSwarm(1, holdings, points=points)
    await swarm.start()
    client = swarm.client()
    oracle = Oracle(model(), None)
    result = await WORK[name](client, failing, oracle)
    swarm.network.points = None
    await client.aclose()
    await asyncio.sleep(SESSION_IDLE_S + 5.0)
    assert [peer.kv_bytes for peer in swarm.peers] == [0] * len(SPANS)
    assert [peer.host.num_connections for peer in swarm.peers] == [0] * len(SPANS)
    assert swarm.violations == []
    if is_checked:
        assert oracle.differences() == []
    swarm.stop()
    return result


@functools.cache
def undisturbed(name: str) -> tuple[torch.Tensor, FaultPoints, int]:
    """What comes out, which points there are, and how often the client waits."""
    points, failing = FaultPoints(), Failing()
    result = run_virtual(run(name, points, failing, is_checked=True))
    assert failing.errors == []
    return result, points, failing.num_waits


@pytest.mark.parametrize("name", WORK)
def test_every_point_fails_once_and_changes_nothing(name: str) -> None:
    expected, counted, _ = undisturbed(name)
    cases = list(counted.cases())
    failed: set[int] = set()
    kinds: Counter[str] = Counter()
    for number, way in cases:
        points, failing = FaultPoints({number: way}), Failing()
        found = run_virtual(run(name, points, failing))
        assert len(points.fired) == 1, f"point {number} did not fail"
        failed.add(number)
        kinds[points.fired[0][0]] += 1
        what = f"point {number}: {' '.join(points.fired[0])}"
        assert len(failing.errors) <= 1, f"{what} gave errors {failing.errors}"
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4), f"{what} changed the result"
    assert failed == set(range(len(counted.seen)))
    assert set(kinds) == set(WAYS)
    assert len(cases) >= (400 if name == "generation" else 50)


@pytest.mark.parametrize("name", WORK)
def test_every_wait_of_the_client_is_cancelled_once_and_changes_nothing(name: str) -> None:
    expected, _, num_waits = undisturbed(name)
    assert num_waits >= (2 * NUM_TOKENS if name == "generation" else 4)
    for number in range(1, num_waits + 1):
        failing = Failing(cancel_at=number)
        found = run_virtual(run(name, FaultPoints(), failing))
        assert failing.errors == ["CancelledError"], f"wait {number} was not cancelled"
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4), f"cancelling wait {number} changed the result"


@pytest.mark.parametrize("name", WORK)
def test_several_points_fail_and_change_nothing(name: str) -> None:
    expected, counted, _ = undisturbed(name)
    num_fired = 0
    for seed in range(NUM_STORMS):
        rng = Random(seed)
        numbers = rng.sample(range(len(counted.seen)), FAILURES_PER_STORM)
        points = FaultPoints({number: rng.randrange(3) for number in numbers})  # all but "crash": nobody comes back
        found = run_virtual(run(name, points, Failing()))
        num_fired += len(points.fired)
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4), f"seed {seed} changed the result: {points.fired}"
    assert num_fired >= 2 * NUM_STORMS
