"""Every setting, with its unit and default. One field, one line of meaning."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from pathlib import Path

from remote_modules.peers import check_address, is_loopback
from remote_modules.spans import Span

__all__ = [
    "ClientConfig",
    "ServerConfig",
    "TrackerConfig",
    "check_tracker_urls",
    "default_peer_cache",
    "default_trackers",
]


_GRAPH_ROWS = (1, 2, 4, 8, 16, 32, 64)  # as `model.decode_graphs` has them
_PEER_ID = re.compile(r"[a-z2-7]{6,52}\Z")


def default_trackers() -> tuple[str, ...]:
    """The tracker URLs in ``$REMOTE_MODULES_TRACKERS`` (comma separated), read when called."""
    return tuple(url.strip() for url in os.environ.get("REMOTE_MODULES_TRACKERS", "").split(",") if url.strip())


def default_peer_cache() -> Path | None:
    """The folder in ``$REMOTE_MODULES_PEER_CACHE`` ("off": none), or ``remote-modules/peers`` where caches are kept."""
    named = os.environ.get("REMOTE_MODULES_PEER_CACHE", "")
    if named:
        return None if named == "off" else Path(named)
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return folder / "remote-modules" / "peers"


def check_tracker_urls(urls: Sequence[str]) -> None:
    """Raise `ValueError` for anything that is not an http(s) URL, and `TypeError` for a bare string."""
    if isinstance(urls, str):
        raise TypeError(f"trackers must be a list of URLs, got the string {urls!r}; write [{urls!r}]")
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"tracker must be an http:// or https:// URL, got {url!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """How a client finds, times and replaces peers. Durations are seconds."""

    connect_timeout_s: float = 3.0  # one dial, TLS and hello included
    silence_timeout_s: float = 2.0  # a peer with work of ours that says nothing for so long is frozen or gone
    pass_deadline_s: float = 120.0  # one prefill, decode, or microbatch of a forward or backward, failures included
    min_request_timeout_s: float = 2.0  # least time that a live peer gets to compute one request
    max_request_timeout_s: float = 30.0  # most, unless it is known to need longer, or nobody else holds the blocks
    hedge: bool = True  # ask a second peer when the first is slower than expected
    min_hedge_s: float = 0.25  # no answer is called slow before
    keep_warm_s: float = 60.0  # after a step, that silences on far connections are filled: TCP stays ready; 0: not
    refresh_interval_s: float = 5.0  # age at which the view of the swarm is looked up again
    lookup_timeout_s: float = 5.0  # one lookup at one discovery source
    ban_s: float = 0.2  # shortest time that a failed peer is left alone; the longest doubles with each failure in a row
    max_ban_s: float = 60.0  # up to this
    retry_ratio: float = 0.1  # retries that one request earns; beyond them, and a few more, retries wait first
    allowed_peers: tuple[str, ...] = ()  # ids, or their first 6 or more characters, of the only peers to use
    blocked_peers: tuple[str, ...] = ()  # the same of peers never to use
    max_replay_tokens: int = 512  # tokens of one replay request (times batch rows)
    exact_replay: bool = False  # feed a lost KV cache the same steps as at first: bitwise equal, one request each
    keep_histories: str = "each_hop"  # or "first": least memory; a lost hop costs a replay of those before it too
    history_memory_bytes: int = 4 * 1024**3  # what sessions keep to rebuild lost KV caches; beyond it goes to disk
    history_dtype: str = "compute"  # as it came, or "int8": a quarter of float32, and replays that are a little off
    history_folder: Path | None = None  # for the file beyond history_memory_bytes; None: the system's choice
    # Hidden states and gradients as they are, "int8": in half of 16 bits, "int4": prefill and forwards in a third; or
    # "auto": coded where links are what takes the time, so that numbers depend on what was measured of them.
    wire: str = "compute"
    direct: bool = True  # peers send their outputs on to each other beside the client: N+1 one-way delays, not 2N
    prefill_chunk_tokens: int = 0  # longer prompts go through direct hops in such chunks, all hops at once; 0: whole
    max_request_bytes: int = 256 * 1024 * 1024  # tensors of one request
    microbatch_tokens: int = 1024  # rows x tokens of one request of a training pass; larger batches are cut by rows
    max_microbatches_in_flight: int = 48  # of all passes; fewer where fewer keep all hops busy
    replicate_kv: bool = False  # keep a copy of each hop's KV cache at another peer, which takes over if the hop fails
    replicate_tokens: int = 8  # new tokens after which the copy is brought up to date, in the background
    copy_timeout_s: float = 60.0  # one copy of a KV cache from peer to peer; then it is built by replay
    retain_activations_s: float = 60.0  # how long peers may keep a forward's graph for its backward; 0: they recompute
    allow_mixed_dtypes: bool = False  # whether one route may join peers that compute in different dtypes
    mdns_interfaces: tuple[str, ...] = ()  # local IP addresses to ask on; empty means all
    adapter: str | None = None  # name of a LoRA that peers offer, for all calls; see `RemoteSequential.set_adapter`
    peer_exchange: bool = True  # ask known peers for the peers that they know
    peer_cache: Path | None = field(default_factory=default_peer_cache)  # folder of known peers; None: none on disk

    def __post_init__(self) -> None:
        for one in fields(self):
            if isinstance(value := getattr(self, one.name), int | float) and not isinstance(value, bool):
                if value != 0 or one.name not in _MAY_BE_ZERO:
                    _check_positive(one.name, value)
        _check_choice("keep_histories", self.keep_histories, ("each_hop", "first"))
        _check_choice("history_dtype", self.history_dtype, ("compute", "int8"))
        _check_choice("wire", self.wire, ("compute", "int8", "int4", "auto"))
        if self.max_ban_s < self.ban_s:
            raise ValueError(f"max_ban_s must be at least ban_s, got {self.max_ban_s} and {self.ban_s}")
        if self.max_request_timeout_s < self.min_request_timeout_s:
            got = f"got {self.max_request_timeout_s} and {self.min_request_timeout_s}"
            raise ValueError(f"max_request_timeout_s must be at least min_request_timeout_s, {got}")
        for name in ("allowed_peers", "blocked_peers"):
            _check_peer_ids(name, getattr(self, name))


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What one peer serves, and within which limits.

    Raises:
        ValueError: a field is out of range, or ``blocks`` and ``num_blocks`` are both given.
    """

    model: str  # hub id, local checkpoint folder, or the name of the built-in model
    _: KW_ONLY
    blocks: str | None = None  # "start:end"; None: choose by what the swarm needs most
    num_blocks: int | None = None  # how many to choose; None: as many as fit
    host: str = "127.0.0.1"
    port: int = 0  # 0: any free one
    announce_addresses: tuple[str, ...] = ()  # "host:port" that others should dial, if not host:port itself
    trackers: tuple[str, ...] = ()
    mdns: bool = True
    peers: tuple[str, ...] = ()  # other peers' addresses, asked when choosing a span
    peer_exchange: bool = True  # tell known peers of itself and others, and answer who asks
    peer_cache: Path | None = field(default_factory=default_peer_cache)  # folder of known peers; None: none on disk
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:1"
    dtype: str = "auto"  # "auto" (the checkpoint's), "float32", "bfloat16", "float16"
    quantization: str = "none"  # of the weights: "none", "int8", "nf4"
    head: bool = False  # with the last blocks, also run norm and LM head for clients that ask for logits
    quantized_cache: bool = True  # keep quantized blocks on disk for the next start
    graphs: bool = True  # capture steps of one token as CUDA graphs, where they give the same within rounding
    compile_rows: tuple[int, ...] = ()  # of graphs whose blocks are compiled at the start: 1, 2, 4, 8, 16, 32, 64
    revision: str | None = None
    cache_dir: str | None = None
    token: str | None = None  # hub token; never logged or announced
    identity_path: Path | None = None  # None: a new identity for this process
    rebalance: bool = True  # whether a server that chose its blocks may move to others that the swarm needs more
    bandwidth_mbit: float | None = None  # of the slower direction, for placement; None: unknown, taken for enough
    kv_budget_bytes: int | None = None  # None: half of what is free after loading
    activation_budget_bytes: int | None = None  # kept graphs of forwards; None: a quarter of what is free; 0: none
    max_batch_tokens: int = 8192  # rows x tokens of one request
    batching: bool = True  # decode steps of several sessions that wait run as one; results may differ by rounding
    max_sessions: int = 1024
    max_queue: int = 256  # requests waiting for the device
    max_connections: int = 512
    session_idle_s: float = 600.0  # a session without steps for so long is dropped
    orphan_session_s: float = 30.0  # the same once its client's connection is gone
    adapters: tuple[str, ...] = ()  # LoRA to offer: folders or hub ids, or "NAME=" before one of these
    adapter_budget_bytes: int = 1024**3  # of adapters that clients sent, in memory of the CPU
    adapter_lease_s: float = 600.0  # an adapter that nobody used for so long is dropped
    announce_interval_s: float = 15.0
    drain_s: float = 30.0  # longest wait for running sessions on SIGTERM
    num_threads: int | None = None  # torch threads; None: torch's own choice
    show_progress: bool = False

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model must name a hub id or a checkpoint folder, got an empty string")
        if self.blocks is not None:
            _check_field("blocks", Span.parse, self.blocks)
            if self.num_blocks is not None:
                raise ValueError("give blocks or num_blocks, not both")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must be in 0:65536, got {self.port}")
        _check_choice("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        _check_choice("quantization", self.quantization, ("none", "int8", "nf4"))
        _check_rows("compile_rows", self.compile_rows)
        for name in ("announce_addresses", "peers"):
            for address in getattr(self, name):
                _check_field(name, check_address, address)
        check_tracker_urls(self.trackers)
        _check_list("adapters", self.adapters)
        for name in _POSITIVE:
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        _check_not_negative("drain_s", self.drain_s)
        _check_not_negative("activation_budget_bytes", self.activation_budget_bytes)

    @property
    def is_local(self) -> bool:
        """Whether the server listens on loopback only; elsewhere TLS is on."""
        return is_loopback(self.host)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackerConfig:
    """Where a tracker listens and how much it holds."""

    host: str = "127.0.0.1"
    port: int = 0  # 0: any free one
    storage: str = "memory"  # or redis://, rediss://, unix://: leases that several trackers share
    lease_s: float = 45.0  # how long an announcement lives; longer once there are too many peers
    max_records: int = 10_000  # about 2 KiB each
    max_body_bytes: int = 64 * 1024
    max_announces_per_s: float = 2000.0  # of all peers; what is above is told to come back later
    source_per_s: float = 20.0  # requests of one address, and five seconds' worth at once; this machine has no limit
    identity_per_s: float = 10.0  # announcements of one peer, and five seconds' worth at once

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must be in 0:65536, got {self.port}")
        for name in ("lease_s", "max_records", "max_body_bytes", "max_announces_per_s", "source_per_s"):
            _check_positive(name, getattr(self, name))
        _check_positive("identity_per_s", self.identity_per_s)


_MAY_BE_ZERO = ("keep_warm_s", "prefill_chunk_tokens", "retain_activations_s")
_POSITIVE = (
    "num_blocks",
    "bandwidth_mbit",
    "kv_budget_bytes",
    "max_batch_tokens",
    "max_sessions",
    "max_queue",
    "max_connections",
    "session_idle_s",
    "orphan_session_s",
    "adapter_budget_bytes",
    "adapter_lease_s",
    "announce_interval_s",
    "num_threads",
)


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value!r}")


def _check_list(name: str, values: Sequence[str]) -> None:
    if isinstance(values, str):
        raise TypeError(f"{name} must be a list, got the string {values!r}; write ({values!r},)")


def _check_not_negative(name: str, value: float | None) -> None:
    if value is not None and not value >= 0:
        raise ValueError(f"{name} must not be negative, got {value}")


def _check_peer_ids(name: str, peer_ids: Sequence[str]) -> None:
    if isinstance(peer_ids, str):
        raise TypeError(f"{name} must be a list of peer ids, got the string {peer_ids!r}; write ({peer_ids!r},)")
    for peer_id in peer_ids:
        if not _PEER_ID.match(peer_id):
            raise ValueError(f"{name} must hold peer ids, or their first 6 or more characters, got {peer_id!r}")


def _check_field(name: str, check: Callable[[str], object], value: str) -> None:
    try:
        check(value)
    except ValueError as exc:
        raise ValueError(f"{name}: {exc}") from exc


def _check_rows(name: str, rows: tuple[int, ...]) -> None:
    if not set(rows) <= set(_GRAPH_ROWS):
        raise ValueError(f"{name} must be of {', '.join(map(str, _GRAPH_ROWS))}, got {rows!r}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
