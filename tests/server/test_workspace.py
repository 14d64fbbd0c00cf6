from __future__ import annotations

import torch

from remote_modules.server.workspace import extrapolate, peak_bytes


def test_tensors_that_live_at_once_are_counted() -> None:
    def two_at_a_time() -> None:
        tensor = torch.zeros(1000)
        for _ in range(10):
            tensor = tensor + 1.0

    assert peak_bytes(two_at_a_time) == 2 * 4000


def test_views_and_what_was_there_before_cost_nothing() -> None:
    before = torch.zeros(1000)

    def look() -> torch.Tensor:
        before.add_(1.0)
        return before.view(10, 100)[3:].transpose(0, 1)

    assert peak_bytes(look) == 0


def test_only_the_peak_counts_in_inference_mode_too() -> None:
    def large_then_small() -> None:
        with torch.inference_mode():
            large = torch.zeros(5000)
            del large
            torch.zeros(10)

    assert peak_bytes(large_then_small) == 20_000


def test_line_and_square_are_told_apart() -> None:
    def bytes_of(num_tokens: int) -> int:
        return 7 * num_tokens + 3 * num_tokens**2

    assert extrapolate(1000, 10, bytes_of(10), bytes_of(20)) == bytes_of(1000)
    assert extrapolate(1000, 10, 70, 140) == 7000
    assert extrapolate(1000, 10, 70, 100) == 7000  # a constant part: too much rather than too little
