"""What a client knows of the swarm, and its connections into it. All on one event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from random import Random
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary, WeakSet

from remote_modules.client.adapter_uploads import AdapterUploads
from remote_modules.client.coding import Coding
from remote_modules.client.fitness import obstacle
from remote_modules.client.history_store import HistoryStore
from remote_modules.client.router import Router
from remote_modules.client.stats import StatsRecorder
from remote_modules.config import ClientConfig
from remote_modules.discovery.base import Discovery
from remote_modules.errors import DiscoveryError, NoRouteError, PeerError, PeerUnreachable, SessionError
from remote_modules.model.stack import StackSpec
from remote_modules.net.client_connection import ClientConnection
from remote_modules.net.http import Dialer
from remote_modules.peers import PeerId, PeerRecord, short_id
from remote_modules.plan.compatibility import is_allowed, matching
from remote_modules.plan.edges import Edges
from remote_modules.plan.routing import Demand, Hop
from remote_modules.plan.wire_choice import PLAIN
from remote_modules.spans import Span

__all__ = ["Swarm", "Watcher"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

FRESH_S = 0.05  # a view of this age was looked up for the very route that is asked for


class Watcher(Protocol):
    """Wants to know when a peer leaves."""

    def peer_is_leaving(self, peer_id: PeerId) -> None:
        """It said so; on the loop."""

    def close(self) -> list[asyncio.Task[None]]:
        """Stop, since connections are closed now: tasks that end soon."""


class Swarm:
    """Records and connections of one client; `router` chooses among the peers.

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
        self.edges = Edges()
        self.stack = stack
        self.hidden_size = hidden_size
        self.num_blocks = stack.num_blocks
        self.coding = Coding(PLAIN if config.wire == "auto" else config.wire, stack.coded)  # see `client.wire_choice`
        self.router = Router(stack, config, clock=clock, rng=rng, rtt_of=self._rtt_of)
        self.histories = HistoryStore(
            memory_bytes=config.history_memory_bytes, dtype=config.history_dtype, folder=config.history_folder
        )
        stats.histories = self.histories
        self.uploads = AdapterUploads(stats, max_wait_s=config.silence_timeout_s, offers=self._offers_adapters)
        self._discovery = discovery
        self._dialer = dialer
        self._model_key = model_key
        self._known_digests = known_digests
        self._num_excluded = 0  # peers that the user does not let us use
        self._looked_up_s = float("-inf")
        self._lookup: asyncio.Task[None] | None = None
        self._lookup_error: DiscoveryError | None = None
        self._has_found = False
        self._connections: dict[tuple[PeerId, str], ClientConnection] = {}
        self._dialling: dict[tuple[PeerId, str], asyncio.Task[ClientConnection]] = {}
        self._counted: WeakKeyDictionary[ClientConnection, tuple[int, int]] = WeakKeyDictionary()
        self._tasks: set[asyncio.Task[None]] = set()  # that find out whether peers are alive
        self._is_closed = False
        self.watchers: WeakSet[Watcher] = WeakSet()
        self.most_tokens = 0  # of a microbatch, after peers had no room for more; 0: none ever said so
        self.microbatches = asyncio.Semaphore(config.max_microbatches_in_flight)  # of all passes

    def record(self, peer_id: PeerId) -> PeerRecord:
        """The latest record of a peer on a route.

        Raises:
            PeerUnreachable: it is known no more.
        """
        record = self.router.records.get(peer_id)
        if record is None:
            raise PeerUnreachable(f"peer '{short_id(peer_id)}' is no longer announced", peer_id=peer_id)
        return record

    async def route(self, blocks: Span, demand: Demand, *, avoid: Collection[PeerId] = ()) -> tuple[Hop, ...]:
        """The best hops for ``blocks`` now; looks the swarm up when nothing is known, and when nothing fits.

        Raises:
            NoRouteError: nobody covers some of the blocks.
            SessionError: `aclose` was called.
        """
        return await self._found(
            lambda: self.router.find(blocks, demand, avoid={*avoid, *self._better_avoided(blocks, demand, avoid)})
        )

    async def shares(self, blocks: Span, demand: Demand, count: int) -> list[tuple[Hop, ...]]:
        """A route for each of ``count`` microbatches, in proportion to what peers have free. As `route`."""
        return await self._found(
            lambda: self.router.find_shares(blocks, demand, count, avoid=self._better_avoided(blocks, demand))
        )

    async def find_adapter(self, name: str) -> str:
        """``name@digest`` of an adapter that peers offer; looks the swarm up if none of the known ones does.

        Raises:
            NoRouteError: nobody offers it, or different ones have that name.
        """
        self._check_open()
        if (found := self.router.find_adapter(name)) is None:
            await self.refresh()
            found = self.router.find_adapter(name)
        if found is None:
            offered = sorted({one.rpartition("@")[0] for r in self.router.records.values() for one in r.adapters})
            there = f"they offer {', '.join(offered[:8])}" if offered else "they offer none"
            text = f"no peer offers the adapter '{name}': {len(self.router.records)} peers known, {there}"
            raise NoRouteError(text, missing=(Span(0, self.num_blocks),))
        return found

    def better_route(
        self, hops: Sequence[Hop], demand: Demand, position: int, *, kv_bytes_per_token: float | None = None
    ) -> tuple[Hop, ...] | None:
        """Hops to which a session should move now, or None to stay. Takes milliseconds: ask every few seconds.

        Only a route that is clearly faster, and soon pays back what filling its KV caches costs, is named. Hops that
        are in both routes keep their caches.

        Args:
            hops: the session's route.
            demand: of its next step.
            position: tokens in the session.
            kv_bytes_per_token: of one row in one block, where caches can be copied from peer to peer.
        """
        self._start_probes()
        better = self.router.find_better(hops, demand, position, kv_bytes_per_token=kv_bytes_per_token)
        if better is not None:
            self.router.claim(better)
        if self.clock() - self._looked_up_s > self.config.refresh_interval_s:
            self._start_lookup()
        return better

    @property
    def is_unanswered(self) -> bool:
        """Whether no source of discovery has ever given a usable answer: waiting would only hide a wrong address."""
        return self._lookup_error is not None and not self._has_found

    async def refresh(self) -> None:
        """Look the swarm up; failures leave the old view standing."""
        await asyncio.shield(self._start_lookup())

    async def connect(self, peer_id: PeerId, lane: str) -> ClientConnection:
        """The open connection of a lane ("step", "prefill" or "bulk") to a peer; dials if there is none.

        Raises:
            PeerError: the peer cannot be reached.
            SessionError: `aclose` was called.
        """
        self._check_open()
        if (connection := self.open_connection(peer_id, lane)) is not None:
            return connection
        return await asyncio.shield(self._start_dial((peer_id, lane)))

    def dial_soon(self, peer_ids: Iterable[PeerId]) -> None:
        """Open the connections that steps will need, all at once, without waiting; who needs one sees its failure."""
        for peer_id in peer_ids:
            if self.open_connection(peer_id, "step") is None:
                self._start_dial((peer_id, "step"))

    def open_connection(self, peer_id: PeerId, lane: str) -> ClientConnection | None:
        """The connection of a lane if it is open; never dials."""
        connection = self._connections.get((peer_id, lane))
        return connection if connection is not None and connection.is_open else None

    def check_soon(self, peer_id: PeerId, lane: str) -> None:
        """Find out in the background whether a peer that lets us wait is alive; one that is not is left alone."""
        connection = self.open_connection(peer_id, lane)
        if connection is not None:
            self._start_task(self._check(connection, self.router.instance_of(peer_id)))

    def batch_limit(self, peer_id: PeerId) -> int:
        """Tokens that the peer takes in a request, all rows; 0 if unknown."""
        links = (self.open_connection(peer_id, lane) for lane in ("bulk", "step"))
        return next((link.max_batch_tokens for link in links if link is not None), 0)

    def unfit_peers(self, demand: Demand, num_tokens: int) -> set[PeerId]:
        """Those that we are connected to and that would refuse a request of so many tokens; see `fitness.obstacle`."""
        links = self._connections.items()
        return {peer_id for (peer_id, _), link in links if link.is_open and obstacle(link, demand, num_tokens)}

    def _better_avoided(self, blocks: Span, demand: Demand, avoid: Collection[PeerId] = ()) -> set[PeerId]:
        """Peers that would refuse even one row, where others can stand in."""
        unfit = self.unfit_peers(demand, 0 if demand.kv_tokens else demand.num_tokens)
        return unfit if unfit and self.router.has_route(blocks, demand, avoid={*avoid, *unfit}) else set()

    def leaving_peers(self) -> set[PeerId]:
        """Those that we are connected to and that said that they are leaving."""
        return {key[0] for key, link in self._connections.items() if link.is_draining and link.is_open}

    def count_bytes(self, connection: ClientConnection) -> None:
        """Add what moved on a connection since the last call to the statistics."""
        sent, received = self._counted.get(connection, (0, 0))
        self.stats.bytes_sent += connection.bytes_sent - sent
        self.stats.bytes_received += connection.bytes_received - received
        self._counted[connection] = (connection.bytes_sent, connection.bytes_received)

    async def aclose(self) -> None:
        """Close connections and discovery; idempotent."""
        self._is_closed = True
        pending = [task for task in (self._lookup, *self._dialling.values(), *self._tasks) if task is not None]
        for task in pending:
            task.cancel()
        pending += [task for watcher in list(self.watchers) for task in watcher.close()]
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

    async def _found(self, find: Callable[[], T]) -> T:
        self._check_open()
        age_s = self.clock() - self._looked_up_s
        if not self.router.records:
            await self.refresh()
        elif age_s > self.config.refresh_interval_s:
            self._start_lookup()  # in the background: a failover must not wait for a tracker
        self._start_probes()
        try:
            return find()
        except NoRouteError as exc:
            if self.clock() - self._looked_up_s < FRESH_S:
                raise self._explained(exc) from self._lookup_error
        await self.refresh()
        try:
            return find()
        except NoRouteError as exc:
            raise self._explained(exc) from self._lookup_error

    def _explained(self, error: NoRouteError) -> NoRouteError:
        num_shut = self.router.num_shut()
        text = f"{error} ({num_shut} more failed moments ago)" if num_shut else str(error)
        if self._num_excluded:
            text += f" ({self._num_excluded} more are excluded by allowed_peers or blocked_peers)"
        if self._lookup_error is not None:
            text += f"; last lookup failed: {self._lookup_error}"
        return NoRouteError(text, missing=error.missing)

    def _offers_adapters(self, peer_id: PeerId) -> bool:
        record = self.router.records.get(peer_id)
        return record is not None and bool(record.adapters)

    def _rtt_of(self, peer_id: PeerId) -> float | None:
        connection = self._connections.get((peer_id, "step")) or self._connections.get((peer_id, "bulk"))
        return connection.rtt_s if connection is not None else None

    def _start_probes(self) -> None:
        """Ask those whose back-off is over whether they are alive, so that no pass has to find out."""
        for peer_id, instance_id in self.router.breakers.take_due(now_s=self.clock()):
            if self.router.instance_of(peer_id) == instance_id:
                self._start_task(self._probe(peer_id, instance_id))

    def _start_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _probe(self, peer_id: PeerId, instance_id: str) -> None:
        try:
            connection = await self.connect(peer_id, "step")
        except PeerError:
            self.router.breakers.fail(peer_id, instance_id, is_hard=True, now_s=self.clock())
        except SessionError:
            return  # closed meanwhile
        else:
            await self._check(connection, instance_id)

    async def _check(self, connection: ClientConnection, instance_id: str) -> None:
        try:
            await connection.ping()
        except PeerError:
            self.router.breakers.fail(connection.peer_id, instance_id, is_hard=True, now_s=self.clock())
        else:
            self.router.breakers.prove(connection.peer_id, instance_id)

    def _start_lookup(self) -> asyncio.Task[None]:
        if self._lookup is None or self._lookup.done():
            self._lookup = asyncio.get_running_loop().create_task(self._look_up())
        return self._lookup

    async def _look_up(self) -> None:
        try:
            found = await asyncio.wait_for(self._discovery.lookup(self._model_key), self.config.lookup_timeout_s)
            allowed, blocked = self.config.allowed_peers, self.config.blocked_peers
            usable = [record for record in found if is_allowed(record.peer_id, allowed=allowed, blocked=blocked)]
            records = matching([r for r in usable if r.num_blocks == self.num_blocks], self._known_digests)
            self._num_excluded = len(found) - len(usable)
        except asyncio.TimeoutError:
            self._lookup_error = DiscoveryError(f"no answer within {self.config.lookup_timeout_s:.1f} s")
        except DiscoveryError as exc:
            self._lookup_error = exc
        except NoRouteError as exc:
            self._lookup_error = DiscoveryError(str(exc))
            self.router.records = {}
        else:
            self._lookup_error = None
            fresh = {PeerId(record.peer_id): record for record in records}
            for peer_id, record in self.router.records.items():
                if peer_id not in fresh and self._is_connected(peer_id):
                    fresh[peer_id] = record  # its lease ran out, but we are talking to it
            self.router.records = fresh
            self._has_found = True
        self._looked_up_s = self.clock()

    def _is_connected(self, peer_id: PeerId) -> bool:
        return any(key[0] == peer_id and link.is_open for key, link in self._connections.items())

    def _start_dial(self, key: tuple[PeerId, str]) -> asyncio.Task[ClientConnection]:
        task = self._dialling.get(key)
        if task is None:
            task = self._dialling[key] = asyncio.get_running_loop().create_task(self._dial(key))
            task.add_done_callback(lambda done: self._dialled(key, done))
        return task

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
