from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest

from remote_modules.discovery.page import render_page
from remote_modules.discovery.swarm_state import (
    MAX_MODELS,
    ModelSummary,
    PeerSummary,
    SwarmState,
)

NASTY = "<script>alert(1)</script>\"'&"


class Outline(HTMLParser):
    """Tags still open, and every tag and class seen."""

    VOID = ("meta", "link", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.labels: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        if tag == "i" and "title" in values:
            self.cells.append(values["class"] or "")
        if "aria-label" in values:
            self.labels.append(values["aria-label"] or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def make_peer(**changes: Any) -> PeerSummary:
    fields: dict[str, Any] = {
        "id": "abcdef",
        "span": "0:4",
        "state": "online",
        "dtype": "float32",
        "quantization": "none",
        "prefill_tokens_per_s": 1234.5,
        "decode_tokens_per_s": 56.7,
        "free_kv_tokens": 4096,
        "load": 2,
        "version": "0.1",
        "age_s": 3.0,
    }
    return PeerSummary(**(fields | changes))


def make_state(coverage: list[int], *, num_models: int = 1, **changes: Any) -> SwarmState:
    fields: dict[str, Any] = {
        "model": "tiny",
        "model_key": "tiny-key",
        "num_blocks": len(coverage),
        "coverage": coverage,
        "weakest_block": coverage.index(min(coverage)),
        "num_peers": 1,
        "peers": [make_peer()],
    }
    model = ModelSummary(**(fields | changes))
    return SwarmState(num_peers=model.num_peers, num_models=num_models, models=[model] * num_models)


def test_one_cell_for_each_block_coloured_by_its_peers() -> None:
    page = outline(render_page(make_state([0, 1, 2, 3, 9])))
    assert page.cells == ["c0", "c1", "c2", "c3", "c3"]


def test_bar_is_spoken_and_table_has_headers() -> None:
    page = outline(render_page(make_state([2, 2, 1, 0])))
    assert page.labels == ["coverage of blocks: 0:2 2 peers, 2:3 1 peer, 3:4 0 peers", "peers of tiny"]
    assert page.tags.count("th") == page.tags.count("td")
    assert "script" not in page.tags


def test_weakest_block_and_peer_are_shown() -> None:
    page = render_page(make_state([2, 2, 1, 2]))
    assert "4 of 4 blocks covered; weakest block 2 (1 peer)" in page
    for text in ("abcdef", "0:4", "online", "57", "1,234", "4,096", "3 s ago"):
        assert f"{text}</" in page


def test_uncovered_blocks_are_named() -> None:
    assert "not usable: no peer for blocks 1:3, 4:5" in render_page(make_state([1, 0, 0, 1, 0]))


def test_more_blocks_than_cells_show_the_weakest_of_each_group() -> None:
    coverage = [3] * 400
    coverage[399] = 0
    page = outline(render_page(make_state(coverage)))
    assert len(page.cells) == 100
    assert page.cells[-1] == "c0"
    assert set(page.cells[:-1]) == {"c3"}


def test_strangers_text_is_escaped() -> None:
    page = render_page(
        make_state([1], model=NASTY, model_key=NASTY, peers=[make_peer(id=NASTY, dtype=NASTY, quantization=NASTY)])
    )
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    outline(page)


def test_empty_tracker_says_how_to_start_a_peer() -> None:
    page = render_page(SwarmState(num_peers=0, num_models=0, models=[]))
    assert "No peer has announced itself yet" in page
    outline(page)


def test_models_and_peers_beyond_the_caps_are_counted() -> None:
    page = render_page(make_state([1], num_models=64, num_peers=100, peers=[make_peer()] * 100))
    assert "54 more models not shown" in page
    assert "and 93 more peers" in page


@pytest.mark.parametrize("num_models", [1, 10, MAX_MODELS])
def test_worst_page_stays_below_100_kb(num_models: int) -> None:
    """Every text as long as a record allows, all of it escaped; every number at its largest."""
    text = "'" * 256
    peer = make_peer(
        id="''''''",
        span="4095:4096",
        dtype=text,
        quantization=text,
        version=text,
        decode_tokens_per_s=1e12,
        prefill_tokens_per_s=1e12,
        free_kv_tokens=2**53,
        load=2**53,
        age_s=1e6,
    )
    coverage = [index % 2 * 10_000 for index in range(4096)]
    state = make_state(
        coverage, num_models=num_models, model=text, model_key=text, peers=[peer] * 256, num_peers=10_000
    )
    page = render_page(state)
    assert len(page.encode()) < 100_000
    outline(page)
