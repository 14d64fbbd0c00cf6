"""How a peer finds the others, and is found."""

from __future__ import annotations

from remote_modules.config import ServerConfig
from remote_modules.discovery.base import Discovery
from remote_modules.discovery.known_peers import KnownPeers
from remote_modules.discovery.merged import build_discovery
from remote_modules.peers import PeerRecord, SignedRecord

__all__ = ["discovery_of", "display_name", "is_announced"]


def is_announced(config: ServerConfig) -> bool:
    """Whether others are told of the peer at all."""
    return bool(config.trackers or config.mdns or config.peers)


class _Nowhere:
    """The discovery of a peer that is announced nowhere: it is found by those who were given its address."""

    async def announce(self, signed: SignedRecord) -> None:
        """Accepted without effect."""

    async def withdraw(self, signed: SignedRecord) -> None:
        """Accepted without effect."""

    async def lookup(self, model_key: str | None) -> list[PeerRecord]:
        return []

    async def aclose(self) -> None:
        """Nothing is held."""


def discovery_of(config: ServerConfig, known: KnownPeers) -> Discovery:
    if not is_announced(config):
        return _Nowhere()
    return build_discovery(
        trackers=config.trackers,
        mdns=config.mdns,
        peers=config.peers,
        mdns_interfaces=_mdns_interfaces(config),
        known=known if config.peer_exchange else None,
    )


def _mdns_interfaces(config: ServerConfig) -> tuple[str, ...]:
    host = config.host.strip("[]")
    if host in ("0.0.0.0", "::", ""):
        return ()
    return ("127.0.0.1",) if config.is_local else (host,)


def display_name(name: str) -> str:
    """What to call the model in public: a hub id, or the last part of a local path (paths tell too much)."""
    return name.rstrip("/").rpartition("/")[2] if name.startswith(("/", ".", "~")) else name
