from __future__ import annotations

import pytest

from remote_modules.cli.options import Sources


def test_trackers_come_from_the_environment_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMOTE_MODULES_TRACKERS", "http://a, http://b")
    assert Sources.of(None, None, mdns=True).trackers == ("http://a", "http://b")
    assert Sources.of(["http://c"], None, mdns=True).trackers == ("http://c",)


def test_arguments_can_be_pasted() -> None:
    sources = Sources(trackers=("http://a/?x=1&y",), peers=("127.0.0.1:5",), mdns=False)
    assert sources.arguments() == "--tracker 'http://a/?x=1&y' --peer 127.0.0.1:5"


def test_text_names_all_sources() -> None:
    assert str(Sources(trackers=("http://a",), peers=(), mdns=True)) == "http://a, the local network"
    assert Sources(trackers=(), peers=(), mdns=False).is_empty
