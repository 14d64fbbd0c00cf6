from __future__ import annotations

import asyncio

import pytest

from remote_modules.config import ServerConfig
from remote_modules.discovery.known_peers import KnownPeers
from remote_modules.server.membership import discovery_of, display_name, is_announced


def config_of(**changes: object) -> ServerConfig:
    return ServerConfig(**({"model": "tiny", "mdns": False} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "announced"),
    [({}, False), ({"mdns": True}, True), ({"trackers": ("http://127.0.0.1:1",)}, True), ({"peers": ("a:1",)}, True)],
)
def test_peer_is_announced_where_it_has_somebody_to_tell(changes: dict[str, object], announced: bool) -> None:
    assert is_announced(config_of(**changes)) is announced


def test_peer_that_is_announced_nowhere_finds_nobody() -> None:
    async def main() -> None:
        discovery = discovery_of(config_of(), KnownPeers.kept_in(None, own_peer_id=""))
        assert await discovery.lookup(None) == []
        await discovery.aclose()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("name", "shown"),
    [("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"), ("/home/me/secret/llama/", "llama"), ("./llama", "llama")],
)
def test_local_paths_are_not_told(name: str, shown: str) -> None:
    assert display_name(name) == shown
