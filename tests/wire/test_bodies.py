"""Large bodies share memory only once nobody can see the earlier one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from remote_modules.wire.bodies import REUSED_BYTES, BodyPool

LARGE = 2 * REUSED_BYTES


def address(view: memoryview) -> int:
    return np.frombuffer(view, np.uint8).__array_interface__["data"][0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "view_of",
    [
        lambda body: body,
        lambda body: body[5:9],
        lambda body: np.frombuffer(body, np.uint8),
        lambda body: torch.frombuffer(body, dtype=torch.float32, count=2, offset=64).reshape(2, 1),
    ],
    ids=["itself", "slice", "numpy", "torch"],
)
def test_buffer_is_not_handed_out_while_something_refers_to_it(view_of: Any) -> None:
    pool = BodyPool()
    body = pool.take(LARGE)
    where, view = address(body), view_of(body)
    del body
    other = pool.take(LARGE)
    assert address(other) != where
    del view
    assert address(pool.take(LARGE)) == where


def test_buffer_of_about_the_size_serves_again() -> None:
    pool = BodyPool()
    where = address(pool.take(LARGE))
    again = pool.take(LARGE - 1000)
    assert address(again) == where
    assert len(again) == LARGE - 1000
    del again
    assert len(pool.take(LARGE // 2)) == LARGE // 2
    assert pool.held_bytes == LARGE + LARGE // 2


def test_small_bodies_are_not_held() -> None:
    pool = BodyPool()
    assert len(pool.take(0)) == 0
    assert len(pool.take(REUSED_BYTES - 1)) == REUSED_BYTES - 1
    assert pool.held_bytes == 0


def test_held_memory_is_bounded() -> None:
    pool = BodyPool(max_held_bytes=3 * LARGE)
    bodies = [pool.take(LARGE) for _ in range(4)]
    assert pool.held_bytes == 3 * LARGE  # the fourth is fresh, and forgotten
    assert len(pool.take(4 * LARGE)) == 4 * LARGE
    assert pool.held_bytes == 3 * LARGE
    del bodies
    pool.take(2 * LARGE)  # free ones of another size make room
    assert pool.held_bytes == 3 * LARGE


def test_body_that_is_larger_than_the_pool_leaves_it_empty() -> None:
    pool = BodyPool(max_held_bytes=LARGE)
    pool.take(LARGE)
    assert len(pool.take(2 * LARGE)) == 2 * LARGE
    assert pool.held_bytes == 0
