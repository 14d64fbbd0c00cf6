"""What a client knows of the swarm, and its connections into it. All on one event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from random import Random
from typing import Protocol
from weakref import WeakKeyDictionary, WeakSet

from remote_modules.client.history_store import HistoryStore
from remote_modules.client.stats import StatsRecorder
from remote_modules.config import ClientConfig
from remote_modules.discovery.base import Discovery
from remote_modules.errors import DiscoveryError, NoRouteError, PeerUnreachable, SessionError
from remote_modules.model.stack import StackSpec
from remote_modules.net.client_connection import ClientConnection
from remote_modules.net.http import Dialer
from remote_modules.peers import PeerId, PeerRecord, PeerState, short_id
from remote_modules.plan.compatibility import group_of, matching
from remote_modules.plan.deadlines import WorkEstimator
from remote_modules.plan.recovery import BanTable
from remote_modules.plan.routing import Candidate, Demand, Hop, find_route
from remote_modules.spans import Span

__all__ = ["Swarm", "Watcher"]

logger = logging.getLogger(__name__)

FRESH_S = 0.05  # a view of this age was looked up for the very route that is asked for


class Watcher(Protocol):
    """Wants to know when a peer leaves."""

    def peer_is_leaving(self, peer_id: PeerId) -> None:
        """It said so; on the loop."""


class Swarm:
    """Records, bans, measured times and connections of one client.

    Args:
        model_key: what to look up.
        stack: the model's blocks, and what crosses from one to the next.
        hidden_size: of the model.
        known_digests: block weights that we can vouch for; see `plan.compatibility`.
        clock: monotonic seconds.
        rng: for routing and jitter.
    """

    def __init__(
        self,
        discovery: Discovery,
        dialer: Dialer,
        *,
        model_key: str,
        stack: StackSpec,
        hidden_size: int,
        known_digests: Mapping[int, str],
        config: ClientConfig,
        clock: Callable[[], float],
        rng: Random,
        stats: StatsRecorder,
    ) -> None:
        self.config = config
        self.clock = clock
        self.rng = rng
        self.stats = stats
        self.stack = stack
        self.hidden_size = hidden_size
        self.num_blocks = stack.num_blocks
        self.bans = BanTable(ban_s=config.ban_s, max_ban_s=config.max_ban_s)
        self.estimator = WorkEstimator(min_timeout_s=config.min_request_timeout_s)
        self.histories = HistoryStore(
            memory_bytes=config.history_memory_bytes, dtype=config.history_dtype, folder=config.history_folder
        )
        stats.histories = self.histories
        self._discovery = discovery
        self._dialer = dialer
        self._model_key = model_key
        self._known_digests = known_digests
        self._records: dict[PeerId, PeerRecord] = {}
        self._looked_up_s = float("-inf")
        self._lookup: asyncio.Task[None] | None = None
        self._lookup_error: DiscoveryError | None = None
        self._has_found = False
        self._connections: dict[tuple[PeerId, str], ClientConnection] = {}
        self._dialling: dict[tuple[PeerId, str], asyncio.Task[ClientConnection]] = {}
        self._counted: WeakKeyDictionary[ClientConnection, tuple[int, int]] = WeakKeyDictionary()
        self._adapters: WeakKeyDictionary[ClientConnection, set[str]] = WeakKeyDictionary()
        self._is_closed = False
        self.watchers: WeakSet[Watcher] = WeakSet()

    def record(self, peer_id: PeerId) -> PeerRecord:
        """The latest record of a peer on a route.

        Raises:
            PeerUnreachable: it is known no more.
        """
        record = self._records.get(peer_id)
        if record is None:
            raise PeerUnreachable(f"peer '{short_id(peer_id)}' is no longer announced", peer_id=peer_id)
        return record

    def instance_of(self, peer_id: PeerId) -> str:
        record = self._records.get(peer_id)
        return record.instance_id if record is not None else ""

    async def route(self, blocks: Span, demand: Demand, *, avoid: Collection[PeerId] = ()) -> tuple[Hop, ...]:
        """The best hops for ``blocks`` now; looks the swarm up when nothing is known, and when nothing fits.

        Raises:
            NoRouteError: nobody covers some of the blocks.
            SessionError: `aclose` was called.
        """
        self._check_open()
        age_s = self.clock() - self._looked_up_s
        if not self._records:
            await self.refresh()
        elif age_s > self.config.refresh_interval_s:
            self._start_lookup()  # in the background: a failover must not wait for a tracker
        try:
            return self._route_now(blocks, demand, avoid)
        except NoRouteError:
            if self.clock() - self._looked_up_s < FRESH_S:
                raise
        await self.refresh()
        return self._route_now(blocks, demand, avoid)

    @property
    def is_unanswered(self) -> bool:
        """Whether no source of discovery has ever given a usable answer: waiting would only hide a wrong address."""
        return self._lookup_error is not None and not self._has_found

    def has_route(self, blocks: Span, demand: Demand, *, avoid: Collection[PeerId]) -> bool:
        """Whether others than ``avoid`` cover ``blocks``, by what is known now."""
        try:
            self._route_now(blocks, demand, avoid)
        except NoRouteError:
            return False
        return True

    async def refresh(self) -> None:
        """Look the swarm up; failures leave the old view standing."""
        await asyncio.shield(self._start_lookup())

    async def connect(self, peer_id: PeerId, lane: str) -> ClientConnection:
        """The open connection of a lane ("step" or "bulk") to a peer; dials if there is none.

        Raises:
            PeerError: the peer cannot be reached.
            SessionError: `aclose` was called.
        """
        self._check_open()
        if (connection := self.open_connection(peer_id, lane)) is not None:
            return connection
        key = (peer_id, lane)
        task = self._dialling.get(key)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._dial(key))
            self._dialling[key] = task
            task.add_done_callback(lambda done: self._dialled(key, done))
        return await asyncio.shield(task)

    def open_connection(self, peer_id: PeerId, lane: str) -> ClientConnection | None:
        """The connection of a lane if it is open; never dials."""
        connection = self._connections.get((peer_id, lane))
        return connection if connection is not None and connection.is_open else None

    def leaving_peers(self) -> set[PeerId]:
        """Those that we are connected to and that said that they are leaving."""
        return {key[0] for key, link in self._connections.items() if link.is_open and link.is_draining}

    def adapters_sent(self, connection: ClientConnection) -> set[str]:
        """Digests of the adapters that the peer got over this connection."""
        return self._adapters.setdefault(connection, set())

    def count_bytes(self, connection: ClientConnection) -> None:
        """Add what moved on a connection since the last call to the statistics."""
        sent, received = self._counted.get(connection, (0, 0))
        self.stats.bytes_sent += connection.bytes_sent - sent
        self.stats.bytes_received += connection.bytes_received - received
        self._counted[connection] = (connection.bytes_sent, connection.bytes_received)

    async def aclose(self) -> None:
        """Close connections and discovery; idempotent."""
        self._is_closed = True
        pending = [task for task in (self._lookup, *self._dialling.values()) if task is not None]
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        connections, self._connections = self._connections, {}
        for connection in connections.values():
            connection.close()
        for connection in connections.values():
            try:
                await asyncio.wait_for(connection.closed.wait(), 1.0)
            except asyncio.TimeoutError:
                connection.abort()
        await self._dialer.aclose()
        await self._discovery.aclose()
        self.histories.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise SessionError("these remote blocks are closed; make new ones with from_swarm")

    def _route_now(self, blocks: Span, demand: Demand, avoid: Collection[PeerId]) -> tuple[Hop, ...]:
        candidates = [
            self._candidate(record)
            for peer_id, record in self._records.items()
            if record.state is PeerState.ONLINE and peer_id not in avoid and not self._is_banned(record)
        ]
        try:
            return find_route(blocks, candidates, demand, rng=self.rng, cuts=self.stack.cuts)
        except NoRouteError as exc:
            why = f"; last lookup failed: {self._lookup_error}" if self._lookup_error is not None else ""
            num_banned = sum(map(self._is_banned, self._records.values()))
            banned = f" ({num_banned} more failed moments ago)" if num_banned else ""
            raise NoRouteError(f"{exc}{banned}{why}", missing=exc.missing) from self._lookup_error

    def _is_banned(self, record: PeerRecord) -> bool:
        return self.bans.is_banned(PeerId(record.peer_id), record.instance_id, now_s=self.clock())

    def _candidate(self, record: PeerRecord) -> Candidate:
        peer_id = PeerId(record.peer_id)
        connection = self._connections.get((peer_id, "step")) or self._connections.get((peer_id, "bulk"))
        return Candidate(
            peer_id=peer_id,
            span=record.span,
            rtt_s=connection.rtt_s if connection is not None else None,
            decode_tokens_per_s=record.decode_tokens_per_s,
            prefill_tokens_per_s=record.prefill_tokens_per_s,
            free_kv_tokens=record.free_kv_tokens,
            load=connection.load if connection is not None else record.load,
            group=group_of(record, allow_mixed_dtypes=self.config.allow_mixed_dtypes),
        )

    def _start_lookup(self) -> asyncio.Task[None]:
        if self._lookup is None or self._lookup.done():
            self._lookup = asyncio.get_running_loop().create_task(self._look_up())
        return self._lookup

    async def _look_up(self) -> None:
        try:
            found = await asyncio.wait_for(self._discovery.lookup(self._model_key), self.config.lookup_timeout_s)
            records = matching([r for r in found if r.num_blocks == self.num_blocks], self._known_digests)
        except asyncio.TimeoutError:
            self._lookup_error = DiscoveryError(f"no answer within {self.config.lookup_timeout_s:.1f} s")
        except DiscoveryError as exc:
            self._lookup_error = exc
        except NoRouteError as exc:
            self._lookup_error = DiscoveryError(str(exc))
            self._records = {}
        else:
            self._lookup_error = None
            fresh = {PeerId(record.peer_id): record for record in records}
            for peer_id, record in self._records.items():
                if peer_id not in fresh and self._is_connected(peer_id):
                    fresh[peer_id] = record  # its lease ran out, but we are talking to it
            self._records = fresh
            self._has_found = True
        self._looked_up_s = self.clock()

    def _is_connected(self, peer_id: PeerId) -> bool:
        return any(key[0] == peer_id and link.is_open for key, link in self._connections.items())

    async def _dial(self, key: tuple[PeerId, str]) -> ClientConnection:
        connection = await self._dialer.dial(self.record(key[0]))
        self._connections[key] = connection
        connection.on_draining = lambda: self._tell_watchers(key[0])
        if connection.is_draining:
            self._tell_watchers(key[0])
        return connection

    def _tell_watchers(self, peer_id: PeerId) -> None:
        for watcher in list(self.watchers):
            watcher.peer_is_leaving(peer_id)

    def _dialled(self, key: tuple[PeerId, str], task: asyncio.Task[ClientConnection]) -> None:
        self._dialling.pop(key, None)
        if not task.cancelled():
            task.exception()  # seen; whoever awaits the dial gets it
