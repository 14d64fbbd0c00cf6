from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from remote_modules.config import (
    ClientConfig,
    ServerConfig,
    TrackerConfig,
    check_tracker_urls,
    default_trackers,
)

NOT_POSITIVE = [0, -1, math.nan]


def refused_message(config: type[Any], **fields: Any) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (callers compare the text)
        config(**fields)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Trackers.


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", ()),
        (" , ", ()),
        ("http://a:1", ("http://a:1",)),
        (" http://a:1 ,https://b,", ("http://a:1", "https://b")),
    ],
)
def test_default_trackers_are_read_when_called(
    monkeypatch: pytest.MonkeyPatch, value: str, expected: tuple[str, ...]
) -> None:
    monkeypatch.setenv("REMOTE_MODULES_TRACKERS", value)
    assert default_trackers() == expected
    monkeypatch.delenv("REMOTE_MODULES_TRACKERS")
    assert default_trackers() == ()


def test_configs_do_not_read_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMOTE_MODULES_TRACKERS", "http://a:1")
    assert ServerConfig(model="tiny").trackers == ()


@pytest.mark.parametrize("url", ["", "a:1", "ftp://a:1", "HTTP//a"])
def test_tracker_that_is_no_http_url_is_refused(url: str) -> None:
    expected = f"tracker must be an http:// or https:// URL, got {url!r}"
    assert refused_message(ServerConfig, model="tiny", trackers=("http://a:1", url)) == expected


def test_trackers_given_as_one_string_are_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"write \['http://a:1'\]"):
        check_tracker_urls("http://a:1")


@pytest.mark.parametrize("urls", [[], ("http://a:1",), ["https://b/swarm", "http://[::1]:80"]], ids=str)
def test_http_urls_are_accepted(urls: list[str]) -> None:
    check_tracker_urls(urls)


# ClientConfig.


@pytest.mark.parametrize("value", NOT_POSITIVE)
@pytest.mark.parametrize(
    "name",
    [
        "connect_timeout_s",
        "silence_timeout_s",
        "pass_deadline_s",
        "min_request_timeout_s",
        "max_request_timeout_s",
        "min_hedge_s",
        "retry_ratio",
        "refresh_interval_s",
        "lookup_timeout_s",
        "ban_s",
        "max_ban_s",
        "max_replay_tokens",
        "max_request_bytes",
        "microbatch_tokens",
        "max_microbatches_in_flight",
    ],
)
def test_client_number_that_is_not_positive_is_refused(name: str, value: float) -> None:
    assert refused_message(ClientConfig, **{name: value}) == f"{name} must be positive and finite, got {value!r}"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"ban_s": 2.0, "max_ban_s": 1.0}, "max_ban_s must be at least ban_s, got 1.0 and 2.0"),
        (
            {"min_request_timeout_s": 40.0},
            "max_request_timeout_s must be at least min_request_timeout_s, got 30.0 and 40.0",
        ),
        *(
            (
                {name: ("abcdef", peer_id)},
                f"{name} must hold peer ids, or their first 6 or more characters, got {peer_id!r}",
            )
            for name in ("allowed_peers", "blocked_peers")
            for peer_id in ("", "abcde", "a" * 53, "ABCDEF", "abcde1", "abcdef\n")
        ),
    ],
    ids=str,
)
def test_bad_client_field_is_refused(fields: dict[str, Any], expected: str) -> None:
    assert refused_message(ClientConfig, **fields) == expected


@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_lease_of_activations_may_be_zero_but_not_less(value: float) -> None:
    assert ClientConfig(retain_activations_s=0).retain_activations_s == 0
    expected = f"retain_activations_s must be positive and finite, got {value!r}"
    assert refused_message(ClientConfig, retain_activations_s=value) == expected


def test_peer_ids_given_as_one_string_are_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"allowed_peers must be a list of peer ids, got the string 'abcdef'"):
        ClientConfig(allowed_peers="abcdef")  # type: ignore[arg-type]


def test_good_peer_ids_are_kept() -> None:
    config = ClientConfig(allowed_peers=("abcdef", "a" * 52), blocked_peers=("abcdef",))
    assert (config.allowed_peers, config.blocked_peers) == (("abcdef", "a" * 52), ("abcdef",))


# ServerConfig.


@pytest.mark.parametrize("value", NOT_POSITIVE)
@pytest.mark.parametrize(
    "name",
    ["num_blocks", "max_batch_tokens", "max_sessions", "max_queue", "session_idle_s", "announce_interval_s"],
)
def test_server_number_that_is_not_positive_is_refused(name: str, value: float) -> None:
    message = refused_message(ServerConfig, model="tiny", **{name: value})
    assert message == f"{name} must be positive and finite, got {value!r}"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model": ""}, "model must name a hub id or a checkpoint folder"),
        ({"blocks": "4"}, "span must look like START:END, for example 0:4, got '4'"),
        ({"blocks": "4:2"}, "span must satisfy"),
        ({"blocks": "0:4", "num_blocks": 4}, "give blocks or num_blocks, not both"),
        ({"port": -1}, "port must be in 0:65536, got -1"),
        ({"port": 65536}, "port must be in 0:65536, got 65536"),
        ({"dtype": "float8"}, "dtype must be one of auto, float32, bfloat16, float16, got 'float8'"),
        ({"quantization": "int3"}, "quantization must be one of none, int8, nf4, got 'int3'"),
        ({"announce_addresses": ("example.org",)}, "address must look like HOST:PORT, got 'example.org'"),
        ({"peers": ("10.0.0.1:1", "x")}, "address must look like HOST:PORT, got 'x'"),
    ],
    ids=str,
)
def test_bad_server_field_is_refused(fields: dict[str, Any], expected: str) -> None:
    assert expected in refused_message(ServerConfig, **({"model": "tiny"} | fields))


@pytest.mark.parametrize("name", ["drain_s", "activation_budget_bytes"])
def test_server_number_may_be_zero_but_not_negative(name: str) -> None:
    assert getattr(ServerConfig(model="tiny", **{name: 0}), name) == 0  # type: ignore[arg-type]
    assert refused_message(ServerConfig, model="tiny", **{name: -1}) == f"{name} must not be negative, got -1"


def test_good_server_fields_are_kept() -> None:
    fields: dict[str, Any] = {
        "model": "tiny",
        "blocks": "0:4",
        "port": 65535,
        "dtype": "bfloat16",
        "announce_addresses": ("[::1]:1",),
        "peers": ("10.0.0.1:1",),
        "trackers": ("http://a:1",),
    }
    config = ServerConfig(**fields)
    assert {name: getattr(config, name) for name in fields} == fields
    assert ServerConfig(model="tiny", num_blocks=4).num_blocks == 4


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False)],
)
def test_server_is_local_only_on_loopback(host: str, expected: bool) -> None:
    assert ServerConfig(model="tiny", host=host).is_local is expected


def test_server_listens_on_loopback_unless_told() -> None:
    assert ServerConfig(model="tiny").is_local


def test_peer_cache_and_exchange_are_switched_by_their_fields(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REMOTE_MODULES_PEER_CACHE", str(tmp_path))
    for default, changed in (
        (ClientConfig(), ClientConfig(peer_cache=None, peer_exchange=False)),
        (ServerConfig(model="tiny"), ServerConfig(model="tiny", peer_cache=None, peer_exchange=False)),
    ):
        assert (default.peer_cache, default.peer_exchange) == (tmp_path, True)
        assert (changed.peer_cache, changed.peer_exchange) == (None, False)


# TrackerConfig.


@pytest.mark.parametrize("value", NOT_POSITIVE)
@pytest.mark.parametrize(
    "name", ["lease_s", "max_records", "max_body_bytes", "max_announces_per_s", "source_per_s", "identity_per_s"]
)
def test_tracker_number_that_is_not_positive_is_refused(name: str, value: float) -> None:
    assert refused_message(TrackerConfig, **{name: value}) == f"{name} must be positive and finite, got {value!r}"


@pytest.mark.parametrize("port", [-1, 65536])
def test_tracker_port_out_of_range_is_refused(port: int) -> None:
    assert refused_message(TrackerConfig, port=port) == f"port must be in 0:65536, got {port}"


# All of them.


@pytest.mark.parametrize("config", [ClientConfig(), ServerConfig(model="tiny"), TrackerConfig()])
def test_config_is_frozen_and_keyword_only_after_the_first(config: Any) -> None:
    name = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, getattr(config, name))
    with pytest.raises(TypeError):
        type(config)("the first", "another")
    with pytest.raises(TypeError, match="surprise"):
        dataclasses.replace(config, surprise=1)


@pytest.mark.parametrize("wire", ["", "INT8", "int2", "float16"])
def test_wire_that_is_not_known_is_refused(wire: str) -> None:
    assert refused_message(ClientConfig, wire=wire) == f"wire must be one of compute, int8, int4, auto, got {wire!r}"
