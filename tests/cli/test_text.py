from __future__ import annotations

import pytest

from remote_modules.cli.text import Sampling, StopWatch


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(max_new_tokens=1), {"do_sample": False}),
        (Sampling(max_new_tokens=1, temperature=0.0, top_p=0.5), {"do_sample": False}),
        (Sampling(max_new_tokens=1, temperature=0.7), {"do_sample": True, "temperature": 0.7, "top_p": 1.0}),
        (Sampling(max_new_tokens=1, top_p=0.5), {"do_sample": True, "temperature": 1.0, "top_p": 0.5}),
    ],
    ids=["default", "temperature 0", "temperature", "top_p"],
)
def test_sampling_only_when_asked_for(sampling: Sampling, expected: dict[str, object]) -> None:
    assert sampling.arguments() == {"max_new_tokens": 1, **expected}


def test_speed_leaves_the_first_token_out() -> None:
    watch = StopWatch(began_s=0.0, first_s=10.0, last_s=12.0, num_tokens=5)
    assert watch.tokens_per_s == 2.0
    assert (watch.first_token_s, watch.total_s) == (10.0, 12.0)


def test_speed_of_nothing_is_zero() -> None:
    watch = StopWatch()
    assert (watch.tokens_per_s, watch.first_token_s, watch.total_s) == (0.0, 0.0, 0.0)
