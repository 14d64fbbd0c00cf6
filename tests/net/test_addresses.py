from __future__ import annotations

import pytest

from remote_modules.net.addresses import dialable_host


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]"), ("[::1]", "[::1]"), ("peer.example", "peer.example")],
)
def test_one_host_is_announced_as_it_is(host: str, expected: str) -> None:
    assert dialable_host(host) == expected


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_all_interfaces_give_an_own_address_or_say_what_to_do(host: str) -> None:
    try:
        answer = dialable_host(host)
    except ValueError as exc:  # this machine has no route of that family
        answer = str(exc)
    assert "--announce" in answer or answer not in ("0.0.0.0", "[::]")
