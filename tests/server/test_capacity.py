from __future__ import annotations

from collections.abc import Collection

import pytest
import torch
from torch import nn

from remote_modules.peers import PeerRecord, PeerState
from remote_modules.server.capacity import KV_TOKENS, choose_blocks, free_bytes, parameter_bytes
from remote_modules.spans import Span

CPU = torch.device("cpu")


def holder(start: int, end: int, *, decode_tokens_per_s: float = 0.0) -> PeerRecord:
    return PeerRecord(
        peer_id="alice",
        instance_id="first",
        sequence=1,
        model="tiny",
        model_key="tiny-key",
        num_blocks=8,
        start=start,
        end=end,
        addresses=("127.0.0.1:4000",),
        state=PeerState.ONLINE,
        decode_tokens_per_s=decode_tokens_per_s,
    )


def chosen(
    wanted: int | None,
    records: list[PeerRecord],
    *,
    block_bytes: int = 1,
    kv_token_bytes: int = 1,
    cuts: Collection[int] = (),
) -> Span:
    return choose_blocks(
        num_blocks_of_model=8,
        wanted=wanted,
        block_bytes=block_bytes,
        kv_token_bytes=kv_token_bytes,
        device=CPU,
        records=records,
        cuts=cuts,
    )


def test_free_memory_is_that_of_this_machine() -> None:
    assert 2**20 < free_bytes(CPU) < 2**50


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, 48), (torch.bfloat16, 24)], ids=str)
def test_parameters_are_counted_in_the_dtype_of_the_computation(dtype: torch.dtype, expected: int) -> None:
    assert parameter_bytes(nn.Linear(3, 3), dtype) == expected


def test_empty_swarm_first_blocks_are_chosen() -> None:
    assert chosen(3, []) == Span(0, 3)


def test_blocks_that_nobody_holds_are_chosen() -> None:
    assert chosen(3, [holder(0, 4, decode_tokens_per_s=0.001), holder(7, 8)]) == Span(4, 7)


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([holder(0, 4), holder(4, 8, decode_tokens_per_s=1e-3)], Span(0, 4)),  # as fast as the fastest: a tie
        ([holder(0, 4), holder(0, 8, decode_tokens_per_s=1e3)], Span(4, 8)),
        ([holder(0, 4)], Span(4, 8)),
        ([holder(0, 4), holder(4, 8)], Span(0, 4)),
    ],
    ids=["beside-a-slow-one", "beside-a-fast-one", "alone", "all"],
)
def test_peer_that_has_not_measured_yet_counts_as_the_fastest(records: list[PeerRecord], expected: Span) -> None:
    assert chosen(4, records) == expected


@pytest.mark.parametrize("wanted", [None, 8, 100])
def test_more_than_the_model_is_the_whole_model(wanted: int | None) -> None:
    assert chosen(wanted, []) == Span(0, 8)


@pytest.mark.parametrize(("wanted", "expected"), [(5, "3:8"), (4, "4:8"), (3, "0:3"), (None, "0:8")])
def test_span_begins_and_ends_at_cuts(wanted: int | None, expected: str) -> None:
    records = [holder(0, 3, decode_tokens_per_s=1.0)]
    if wanted == 3:
        records = []
    assert str(chosen(wanted, records, cuts={0, 1, 2, 3, 4, 8})) == expected


def test_group_that_does_not_fit_is_refused_naming_the_cuts() -> None:
    with pytest.raises(ValueError, match=r"^3 blocks are too few: the shortest .* has 4, as .* only at 0, 4, 8$"):
        chosen(3, [], cuts={0, 4, 8})
    third = free_bytes(CPU) // 4
    with pytest.raises(ValueError, match=r"blocks are too few: the shortest span that may be served has 4"):
        chosen(None, [], block_bytes=third, cuts={0, 4, 8})


def test_as_many_blocks_as_fit_are_chosen() -> None:
    third = free_bytes(CPU) // 4  # what is free moves a little between two looks
    assert chosen(None, [], block_bytes=third) in (Span(0, 3), Span(0, 2))
    assert chosen(None, [], kv_token_bytes=third // KV_TOKENS) in (Span(0, 3), Span(0, 2))


def test_not_even_one_block_fits_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^one block needs .* are free; lower the KV budget"):
        chosen(None, [], block_bytes=2**60)
