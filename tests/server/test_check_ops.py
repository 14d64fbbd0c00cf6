"""Cache operations of a step, checked before any is applied."""

from __future__ import annotations

import pytest
import torch

from remote_modules.errors import RefusalReason
from remote_modules.server.checks import check_ops
from remote_modules.wire.messages import CacheOp

from .test_checks import Tensors, bad_request, refusal_of, step

ROWS: Tensors = {
    "swap": torch.tensor([1, 0]),
    "repeat": torch.tensor([0, 0, 0, 1, 1, 1]),
    "one": torch.tensor([1]),
    "beyond": torch.tensor([0, 2]),
    "negative": torch.tensor([-1, 0]),
    "none": torch.tensor([], dtype=torch.int64),
    "floats": torch.tensor([0.0, 1.0]),
    "square": torch.tensor([[0, 1]]),
}
RESET = CacheOp("reset")


def crop(length: int) -> CacheOp:
    return CacheOp("crop", length=length)


def select(name: str) -> CacheOp:
    return CacheOp("select", tensor=name)


@pytest.mark.parametrize(
    ("ops", "after"),
    [
        ((), (10, 2, 0)),
        ((crop(10),), (10, 2, 2)),
        ((crop(4),), (4, 2, 2)),
        ((crop(0),), (0, 2, 0)),
        ((RESET,), (0, 2, 0)),
        ((select("swap"),), (10, 2, 2)),
        ((select("repeat"),), (10, 6, 6)),
        ((select("one"),), (10, 1, 1)),
        ((select("repeat"), select("one")), (10, 1, 6)),
        ((select("repeat"), crop(3), RESET), (0, 6, 6)),
        ((RESET, select("beyond")), (0, 2, 0)),
    ],
    ids=str,
)
def test_operations_give_position_rows_and_most_rows(ops: tuple[CacheOp, ...], after: tuple[int, int, int]) -> None:
    assert check_ops(step(*ops), ROWS, position=10, rows=2) == after


@pytest.mark.parametrize(
    ("ops", "is_refused"),
    [
        ((), False),
        ((crop(10),), False),
        ((crop(0),), False),
        ((RESET,), False),
        ((RESET, crop(0)), False),
        ((select("swap"),), False),
        ((crop(9),), True),
        ((crop(1), RESET), True),
        ((select("swap"), crop(4)), True),
    ],
    ids=str,
)
def test_cache_that_cannot_go_back_is_a_lost_session(ops: tuple[CacheOp, ...], *, is_refused: bool) -> None:
    if not is_refused:
        check_ops(step(*ops), ROWS, position=10, rows=2, can_go_back=False)
        return
    assert refusal_of(lambda: check_ops(step(*ops), ROWS, position=10, rows=2, can_go_back=False)) == (
        RefusalReason.SESSION_LOST,
        "this model's cache cannot go back; open another session",
    )


@pytest.mark.parametrize(
    ("ops", "text"),
    [
        ((crop(11),), "cannot crop to 11 tokens, the session has 10"),
        ((crop(4), crop(5)), "cannot crop to 5 tokens, the session has 4"),
        ((RESET, crop(1)), "cannot crop to 1 tokens, the session has 0"),
        ((select("missing"),), "select needs an int64 vector named 'missing'"),
        ((select("none"),), "select needs an int64 vector named 'none'"),
        ((select("floats"),), "select needs an int64 vector named 'floats'"),
        ((select("square"),), "select needs an int64 vector named 'square'"),
        ((select("beyond"),), "select names rows 0..2, the session has 2"),
        ((select("negative"),), "select names rows -1..0, the session has 2"),
        ((select("one"), select("swap")), "select names rows 0..1, the session has 1"),
    ],
    ids=str,
)
def test_operations_that_do_not_fit_the_session_are_refused(ops: tuple[CacheOp, ...], text: str) -> None:
    assert bad_request(lambda: check_ops(step(*ops), ROWS, position=10, rows=2)) == text
