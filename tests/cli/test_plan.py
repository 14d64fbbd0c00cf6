from __future__ import annotations

import json
from pathlib import Path

import pytest

from .program import NAMES, Outcome, invoke

TOML = """
[[peers]]
name = "desk"
tokens_per_s = 600
max_blocks = 6
rtt_s = 0.01

[[peers]]
name = "laptop"
tokens_per_s = 200
memory_gib = 8
bandwidth_mbit = 100
"""


@pytest.fixture
def peers(tmp_path: Path) -> Path:
    path = tmp_path / "peers.toml"
    path.write_text(TOML)
    return path


def planned(path: Path, *arguments: str) -> Outcome:
    return invoke("plan", NAMES.model, "--peers", str(path), *arguments)


def test_json_has_spans_and_what_the_swarm_will_do(peers: Path) -> None:
    outcome = planned(peers, "--json", "--keep-all")
    assert outcome.json == {
        "model": "pydoc-2m",
        "num_blocks": 8,
        "spans": {"desk": "0:6", "laptop": "6:8"},
        "dropped": [],
        "missing": [],
        "bottleneck_tokens_per_s": 100.0,
        "bound_tokens_per_s": 100.0,
        "one_client_tokens_per_s": pytest.approx(1 / (0.01 + 6 / 600 + 2 / 200)),
        "num_hops": 2,
    }


def test_table_shows_who_holds_what(peers: Path) -> None:
    text = planned(peers, "--keep-all").out
    assert [line.split() for line in text.splitlines()[1:3]] == [
        ["desk", "0:6", "6", "100"],
        ["laptop", "6:8", "2", "100"],
    ]
    assert "100 tokens/s at the weakest block, 100% of what no plan exceeds" in text
    assert "33.3 tokens/s on the fastest route" in text


def test_json_lists_are_read_with_and_without_the_name(tmp_path: Path) -> None:
    entries = [{"name": "one", "tokens_per_s": 8.0, "max_blocks": 8}]
    for content in (entries, {"peers": entries}):
        path = tmp_path / "peers.json"
        path.write_text(json.dumps(content))
        assert planned(path, "--json").json["spans"] == {"one": "0:8"}


def test_memory_is_for_weights_kv_cache_and_workspace(tmp_path: Path) -> None:
    path = tmp_path / "peers.toml"
    path.write_text('[[peers]]\nname = "a"\ntokens_per_s = 8\nmemory_gib = 0.51\n')
    small, large = ("--kv-tokens", "0"), ("--kv-tokens", "100000")
    assert planned(path, "--json", *small).json["spans"] == {"a": "0:8"}
    outcome = planned(path, "--json", *large)
    assert (outcome.code, outcome.json["spans"]) == (1, {})
    assert outcome.json["dropped"] == [{"name": "a", "reason": "no span fits into it"}]
    assert outcome.json["missing"] == ["0:8"]
    assert planned(path, "--json", "--workspace-gib", "0.6", *small).code == 1


def test_gaps_are_shown_and_the_exit_code_is_1(tmp_path: Path) -> None:
    path = tmp_path / "peers.toml"
    path.write_text('[[peers]]\nname = "a"\ntokens_per_s = 8\nmax_blocks = 3\n')
    outcome = planned(path)
    assert outcome.code == 1
    assert "blocks 3:8 of 8 fit nowhere: add peers, memory or quantization" in outcome.out


def test_peer_that_only_slows_the_swarm_is_left_out_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "peers.toml"
    path.write_text(
        '[[peers]]\nname = "fast"\ntokens_per_s = 900\nmax_blocks = 8\nrtt_s = 0.02\n'
        '[[peers]]\nname = "slow"\ntokens_per_s = 120\nmax_blocks = 3\nrtt_s = 0.05\n'
    )
    text = planned(path).out
    assert "left out slow: a token takes 0.0861 s with it and 0.0289 s without" in text
    assert planned(path, "--json", "--keep-all").json["dropped"] == []


ENTRY = 'name = "a"\ntokens_per_s = 1\n'


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("", "Object missing required field `peers`"),
        ("peers = []", "must list 1 to 1000 peers, got 0"),
        ("[[peers]", "Expected ']]' at the end of an array declaration"),
        ("[[peers]]\n" + ENTRY, "peer 'a' must have memory_gib or max_blocks, and not both"),
        ("[[peers]]\nmax_blocks = 2\nmemory_gib = 1\n" + ENTRY, "peer 'a' must have memory_gib or max_blocks"),
        ('[[peers]]\nmax_blocks = "2"\n' + ENTRY, "Expected `int | null`, got `str` - at `$.peers[0].max_blocks`"),
        ("[[peers]]\nmax_blocks = 0\n" + ENTRY, "max_blocks of peer 'a' must be positive and finite, got 0"),
        ("[[peers]]\nmemory_gib = nan\n" + ENTRY, "memory_gib of peer 'a' must be positive and finite, got nan"),
        ("[[peers]]\nmax_blocks = 2\nrtt_s = -1\n" + ENTRY, "rtt_s of peer 'a' must not be negative, got -1"),
        ("[[peers]]\nmax_blocks = 2\ncolour = 1\n" + ENTRY, "Object contains unknown field `colour`"),
        (2 * ("[[peers]]\nmax_blocks = 2\n" + ENTRY), "servers must have different names, got 'a' twice"),
        ("#" * 2**20 + "##", "must be at most 1048576 bytes"),
    ],
    ids=lambda value: value[:30],
)
def test_bad_file_is_one_line(tmp_path: Path, content: str, error: str) -> None:
    path = tmp_path / "peers.toml"
    path.write_text(content)
    assert error in planned(path).error


def test_bad_bytes_and_missing_files_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "peers.toml"
    assert "no such file" in planned(path).error
    path.write_bytes(b"\xff\xfe\x00")
    assert "must be UTF-8 text" in planned(path).error
    path = tmp_path / "peers.json"
    path.write_text('{"peers": [}')
    assert f"peers file '{path}': " in planned(path).error
