from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn

from remote_modules.peers import PeerRecord, PeerState
from remote_modules.plan.throughput import Capacity, Layout
from remote_modules.server.capacity import _allowed_bytes, _available_bytes, choose_blocks, free_bytes, parameter_bytes
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


def chosen(num_blocks: int, records: list[PeerRecord], *, tokens_per_s: float = 0.0, cuts: tuple[int, ...] = ()) -> str:
    capacity = Capacity(tokens_per_s=tokens_per_s, max_blocks=num_blocks, is_full=not tokens_per_s)
    return str(choose_blocks(Layout(8, cuts), capacity, records, token_bytes=100))


def test_free_memory_is_that_of_this_machine() -> None:
    assert 2**20 < free_bytes(CPU) < 2**50


def test_memory_of_the_page_cache_is_free(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  900 kB\nMemFree:  100 kB\nMemAvailable:    700 kB\nBuffers: 5 kB\n")
    assert _available_bytes(meminfo) == 700 * 1024
    meminfo.write_text("MemTotal:  900 kB\n")
    assert _available_bytes(meminfo) > 2**20  # free pages, where nothing else is known
    assert _available_bytes(tmp_path / "nowhere") > 2**20


@pytest.mark.parametrize(
    ("limit", "used", "expected"), [("1000\n", "300\n", 700), ("1000\n", "1300\n", 0), ("max\n", "300\n", 2**62)]
)
def test_memory_that_a_cgroup_forbids_is_not_free(tmp_path: Path, limit: str, used: str, expected: int) -> None:
    (tmp_path / "memory.max").write_text(limit)
    assert _allowed_bytes(tmp_path) == 2**62
    (tmp_path / "memory.current").write_text(used)
    assert _allowed_bytes(tmp_path) == expected


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, 48), (torch.bfloat16, 24)], ids=str)
def test_parameters_are_counted_in_the_dtype_of_the_computation(dtype: torch.dtype, expected: int) -> None:
    assert parameter_bytes(nn.Linear(3, 3), dtype) == expected


def test_empty_swarm_first_blocks_are_chosen() -> None:
    assert chosen(3, []) == "0:3"
    assert chosen(3, [], tokens_per_s=5.0) == "0:3"


def test_blocks_that_nobody_holds_are_chosen() -> None:
    assert chosen(3, [holder(0, 4, decode_tokens_per_s=0.001), holder(7, 8)]) == "4:7"


def test_fewer_blocks_are_chosen_where_the_bottleneck_rises_more() -> None:
    records = [holder(0, 6, decode_tokens_per_s=600.0), holder(6, 8, decode_tokens_per_s=20.0)]
    assert chosen(8, records, tokens_per_s=180.0) == "6:8"


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([holder(0, 4), holder(4, 8, decode_tokens_per_s=1e-3)], "0:4"),  # as fast as the fastest: a tie
        ([holder(0, 4), holder(0, 8, decode_tokens_per_s=1e3)], "4:8"),
        ([holder(0, 4)], "4:8"),
        ([holder(0, 4), holder(4, 8)], "0:4"),
    ],
    ids=["beside-a-slow-one", "beside-a-fast-one", "alone", "all"],
)
def test_peer_that_has_not_measured_yet_counts_as_the_fastest(records: list[PeerRecord], expected: str) -> None:
    assert chosen(4, records) == expected


def test_peer_that_drains_counts_as_gone() -> None:
    leaving = msgspec.structs.replace(holder(4, 8), state=PeerState.DRAINING)
    assert chosen(4, [holder(0, 4), leaving]) == "4:8"


@pytest.mark.parametrize(("wanted", "expected"), [(5, "3:8"), (4, "4:8"), (3, "0:3")])
def test_span_begins_and_ends_at_cuts(wanted: int, expected: str) -> None:
    records = [] if wanted == 3 else [holder(0, 3, decode_tokens_per_s=1.0)]
    assert chosen(wanted, records, cuts=(0, 1, 2, 3, 4, 8)) == expected


def test_group_that_does_not_fit_is_refused_naming_the_cuts() -> None:
    with pytest.raises(ValueError, match=r"^3 blocks are too few: the shortest .* has 4, as .* only at 0, 4, 8$"):
        chosen(3, [], cuts=(0, 4, 8))


def test_links_are_counted_in_tokens_of_their_size() -> None:
    slow = msgspec.structs.replace(holder(0, 4, decode_tokens_per_s=800.0), bandwidth_bytes_per_s=1000.0)
    other = holder(4, 8, decode_tokens_per_s=400.0)
    capacity = Capacity(tokens_per_s=100.0, max_blocks=4)
    assert choose_blocks(Layout(8), capacity, [slow, other], token_bytes=100) == Span(0, 4)
    assert choose_blocks(Layout(8), capacity, [slow, other], token_bytes=1) == Span(4, 8)
