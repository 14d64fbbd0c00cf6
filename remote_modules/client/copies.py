"""KV caches that go from peer to peer, so that nothing is computed again.

They go away from a peer that is leaving, to a better route, to a buddy that takes over when the hop fails, and to a
fork. Peers copy among themselves (`CopyRequest`); a copy that fails is no loss: the cache is built by replay.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from remote_modules.client.hop_caches import Copy, HopCaches, PeerCache
from remote_modules.errors import LocalProtocolError, NoRouteError, PeerError, PeerRefused, RefusalReason, SessionError
from remote_modules.peers import PeerId, short_id
from remote_modules.plan.routing import Demand, Hop
from remote_modules.spans import Span
from remote_modules.wire.messages import CopyRequest, CopySource
from remote_modules.wire.tensors import encode_tensors

__all__ = ["CacheCopies"]

logger = logging.getLogger(__name__)

COMPARE_S = 3.0  # between looks for a better route
RETRY_S = 0.5  # between looks for peers that take over from one that is leaving
MAX_ROUNDS = 3  # of copying what came meanwhile, before the session is held for the rest
MAX_FAILURES = 3  # of bringing a buddy up to date
MAX_OPS = 512  # that a buddy may be behind


class CacheCopies:
    """The copies of one session; on the loop.

    Attributes:
        busy: held by whoever changes the route: a step, or the end of a hand-over.
    """

    def __init__(self, caches: HopCaches) -> None:
        self.caches = caches
        self.busy = asyncio.Lock()
        self._swarm = caches.swarm
        self._demand: Demand | None = None
        self._leaving: dict[PeerId, asyncio.Task[None]] = {}
        self._seeking: dict[Span, asyncio.Task[None]] = {}  # a buddy
        self._tasks: set[asyncio.Task[None]] = set()
        self._forks: set[asyncio.Task[None]] = set()
        self._looked_s = float("-inf")
        self._compared_s = self._swarm.clock()

    # before a step

    async def begin_step(self, demand: Demand) -> None:
        """Wait for forks of what the caches hold now; watch peers; bring buddies up to date."""
        self._demand = demand
        self._swarm.watchers.add(self)
        await self.await_forks()
        for peer_id in self._swarm.leaving_peers():
            self.peer_is_leaving(peer_id)
        if self._swarm.config.replicate_kv:
            self._start_syncs()
        if demand.is_decode and self._swarm.clock() - self._compared_s >= COMPARE_S:
            self._compared_s = self._swarm.clock()
            self._seek_better(demand)

    @property
    def has_forks(self) -> bool:
        """Whether some are still on their way."""
        return bool(self._forks)

    async def await_forks(self) -> None:
        """Until all forks have their copies."""
        while self._forks:
            await asyncio.wait(self._forks)

    def close(self) -> list[asyncio.Task[None]]:
        """Stop what is under way: tasks that end soon."""
        tasks = [*self._tasks, *self._forks]
        for task in tasks:
            task.cancel()
        return tasks

    # forks

    def fork_into(self, fork: CacheCopies, copies: Sequence[Copy]) -> None:
        """Let peers copy what the caches held when they were forked."""
        earlier = set(self._forks)
        task = asyncio.get_running_loop().create_task(self._fork(fork.caches, copies, earlier))
        for side in (self, fork):
            side._forks.add(task)
            task.add_done_callback(side._forks.discard)

    async def _fork(self, caches: HopCaches, copies: Sequence[Copy], earlier: set[asyncio.Task[None]]) -> None:
        if earlier:  # what is forked may be a fork on its way itself
            await asyncio.wait(earlier)
        for copy in copies:
            cache, position = copy.cache, copy.cache.position
            try:
                await self._copy(copy, copy.hop.peer_id, position=position)
                self._swarm.stats.forks += 1
            except (PeerError, SessionError) as exc:
                logger.info("fork is built by replay span=%s: %s", copy.hop.span, exc)
                with caches.mutex:
                    if caches.caches.get(copy.hop.span) is cache:
                        del caches.caches[copy.hop.span]

    # away from a peer that is leaving, and to a better route

    def peer_is_leaving(self, peer_id: PeerId) -> None:
        """Begin to move what the session has there."""
        if peer_id not in self._leaving and any(hop.peer_id == peer_id for hop in self.caches.hops):
            task = self._start(lambda: self._leave(peer_id))
            self._leaving[peer_id] = task
            task.add_done_callback(lambda _: self._leaving.pop(peer_id, None))

    def _seek_better(self, demand: Demand) -> None:
        """Begin to move hops to peers that are clearly faster; only to such as take over the blocks of one hop."""
        hops, position = list(self.caches.hops), self.caches.position
        if self._leaving or self.caches.targets or not (hops and position):
            return
        better = self._swarm.better_route(hops, demand, position)
        if better is None:
            return
        leaving = self._swarm.leaving_peers()
        for hop in hops:
            parts = [new for new in better if hop.span.start <= new.span.start and new.span.end <= hop.span.end]
            is_whole = sum(len(new.span) for new in parts) == len(hop.span)
            if hop not in parts and is_whole and leaving.isdisjoint(new.peer_id for new in parts):
                self._start(partial(self.move_hop, hop, parts))

    async def _leave(self, peer_id: PeerId) -> None:
        """Until the session has nothing there: nobody may cover its blocks yet."""
        while self._swarm.open_connection(peer_id, "step") is not None:
            hop = next((hop for hop in self.caches.hops if hop.peer_id == peer_id), None)
            if hop is None:
                return
            avoid = self._swarm.leaving_peers() | {peer_id}
            if self._demand is not None and self._swarm.router.has_route(hop.span, self._demand, avoid=avoid):
                hops = await self._swarm.route(hop.span, self._demand, avoid=avoid)
                if not await self.move_hop(hop, hops):
                    await asyncio.sleep(RETRY_S)
            else:
                await asyncio.sleep(RETRY_S)
                await self._swarm.refresh()

    async def move_hop(self, hop: Hop, hops: Sequence[Hop]) -> bool:
        """Let ``hops``, which cover the same blocks, take over from ``hop``; whether they got copies of its cache.

        The bulk is copied while steps go on; the session is held for what came meanwhile alone.
        """
        source = self.caches.caches.get(hop.span)
        targets: list[Copy] = []
        if source is not None and source.step_id and source.position:
            with self.caches.mutex:
                targets = [Copy(new, source.twin(), source.session_id) for new in hops]
                self.caches.targets += targets
        try:
            for _ in range(MAX_ROUNDS):
                late = [target for target in targets if source is not None and _is_behind(target.cache, source)]
                await self._copy_all(hop, late, targets, may_retry=True)
            async with self.busy:
                return await self._switch(hop, tuple(hops), targets)
        finally:
            for target in [target for target in targets if target in self.caches.targets]:
                self._drop_target(target)

    async def _switch(self, hop: Hop, hops: tuple[Hop, ...], targets: list[Copy]) -> bool:
        """The session is held: copy the rest, and change the route."""
        caches = self.caches
        source = caches.caches.get(hop.span)
        if hop not in caches.hops or any(source is None or t.source_id != source.session_id for t in targets):
            return False  # it failed meanwhile
        if any(self._swarm.router.is_backing_off(new.peer_id) for new in hops):
            return False
        if source is not None:
            late = [target for target in targets if _is_behind(target.cache, source)]
            await self._copy_all(hop, late, targets)
        taken = [target for target in targets if target in caches.targets]
        with caches.mutex:
            caches.targets = [target for target in caches.targets if target not in taken]
        tokens = sum(target.cache.position for target in taken)
        caches.replace(hop, hops, {target.hop.span: target.cache for target in taken})
        self._swarm.stats.handed_over_tokens += tokens
        new = " => ".join(f"{hop.span} {short_id(hop.peer_id)}" for hop in hops)
        logger.info("moved from=%s to %s copies=%d", short_id(hop.peer_id), new, len(taken))
        return len(taken) == len(hops)

    async def _copy_all(self, hop: Hop, late: Sequence[Copy], targets: list[Copy], *, may_retry: bool = False) -> None:
        """Bring ``targets`` that are ``late`` up to date, and give up those for which that is refused.

        Args:
            may_retry: a step may have come in between, so that another try may do.
        """
        for target in late:
            try:
                await self._copy(target, hop.peer_id)
            except (PeerError, SessionError) as exc:
                if may_retry and isinstance(exc, PeerRefused) and exc.reason is RefusalReason.SESSION_LOST:
                    continue
                logger.info("not copied, to be built by replay span=%s: %s", target.hop.span, exc)
                targets.remove(target)
                self._drop_target(target)

    def _drop_target(self, target: Copy) -> None:
        with self.caches.mutex:
            self.caches.targets = [other for other in self.caches.targets if other is not target]
        self.caches.free(target.hop, target.cache)

    # buddies

    def _start_syncs(self) -> None:
        for hop in self.caches.hops:
            cache = self.caches.caches.get(hop.span)
            if cache is None or not cache.position or hop.span in self._seeking:
                continue
            buddy = self.caches.buddies.get(hop.span)
            if buddy is not None and (buddy.source_id != cache.session_id or buddy.num_failures > MAX_FAILURES):
                self._drop_buddy(buddy)
                buddy = None
            if buddy is None:
                task = self._start(partial(self._seek, hop, cache))
                self._seeking[hop.span] = task
                task.add_done_callback(lambda _, span=hop.span: self._seeking.pop(span, None))  # type: ignore[misc]
            elif buddy.task is None or buddy.task.done():
                num_new = cache.position - buddy.cache.position
                if buddy.num_failures or num_new >= self._swarm.config.replicate_tokens:
                    buddy.task = self._start(partial(self._sync, buddy, hop.peer_id))

    async def _seek(self, hop: Hop, cache: PeerCache) -> None:
        """Find a buddy and begin to copy."""
        other = await self._find_buddy(hop)
        if other is not None and self.caches.caches.get(hop.span) is cache:
            with self.caches.mutex:
                buddy = Copy(other, cache.twin(), cache.session_id)
                self.caches.buddies[hop.span] = buddy
            buddy.task = self._start(partial(self._sync, buddy, hop.peer_id))

    async def _sync(self, buddy: Copy, source_peer: PeerId) -> None:
        try:
            await self._copy(buddy, source_peer)
            buddy.num_failures = 0
        except (PeerError, SessionError) as exc:
            logger.info("buddy not brought up to date span=%s: %s", buddy.hop.span, exc)
            buddy.num_failures += 1
            if len(buddy.cache.pending) > MAX_OPS or not buddy.cache.position:
                self._drop_buddy(buddy)

    async def _find_buddy(self, hop: Hop) -> Hop | None:
        """A peer that could do the hop alone, if possible one that is not on the route."""
        now_s, demand = self._swarm.clock(), self._demand
        assert demand is not None
        on_route = {other.peer_id for other in self.caches.hops}
        for avoid in (on_route, {hop.peer_id}):
            avoid = avoid | self._swarm.leaving_peers()
            if self._swarm.router.has_route(hop.span, demand, avoid=avoid):
                hops = await self._swarm.route(hop.span, demand, avoid=avoid)
                if len(hops) == 1:
                    return hops[0]
        if now_s - self._looked_s > self._swarm.config.refresh_interval_s:
            self._looked_s = now_s
            await self._swarm.refresh()
        return None

    def _drop_buddy(self, buddy: Copy) -> None:
        with self.caches.mutex:
            if self.caches.buddies.get(buddy.hop.span) is buddy:
                del self.caches.buddies[buddy.hop.span]
        self.caches.free(buddy.hop, buddy.cache)

    # one copy

    async def _copy(self, copy: Copy, source_peer: PeerId, *, position: int | None = None) -> None:
        """Bring ``copy`` up to date.

        Args:
            position: for a fork, tokens that it holds; what is ``pending`` for it is not for the source. None: as many
                as there are.

        Raises:
            PeerError: it was not done.
        """
        caches, swarm, cache = self.caches, self._swarm, copy.cache
        with caches.mutex:
            ops, indices = cache.ops() if position is None else ((), {})
            version, is_new = cache.version, cache.step_id == 0 or position is not None
        if len(ops) > MAX_OPS:
            raise self._refused(copy, f"{len(ops)} cache operations behind")
        span = copy.hop.span
        if swarm.router.is_backing_off(copy.hop.peer_id):
            raise self._refused(copy, "it failed moments ago")
        connection = await swarm.connect(copy.hop.peer_id, "step")
        if not connection.knows_copies:
            raise self._refused(copy, "it is too old to copy sessions")
        metas, body = encode_tensors(indices)
        timeout_s = swarm.config.copy_timeout_s
        request = CopyRequest(
            connection.new_request_id(),
            cache.session_id,
            span.start,
            span.end,
            version,
            ops,
            metas,
            timeout_s,
            copy.source_id,
            source=None if source_peer == copy.hop.peer_id else self._address_of(source_peer),
            create=is_new,
            position=position,
        )
        try:
            output, _ = await connection.request(request, body, timeout_s=timeout_s)
        except LocalProtocolError as exc:
            raise self._refused(copy, str(exc)) from exc
        finally:
            swarm.count_bytes(connection)
        meta = output.cache
        num_seen = -1 if meta is None else meta.version - version
        with caches.mutex:
            if meta is None or not 0 <= num_seen <= len(cache.pending) or meta.position == 0:
                raise self._refused(copy, "its answer to a copy makes no sense")
            del cache.pending[:num_seen]
            cache.version, cache.position = meta.version, meta.position
            cache.step_id, cache.is_copy = max(1, cache.step_id), True
        swarm.stats.copied_bytes += meta.num_bytes

    def _address_of(self, peer_id: PeerId) -> CopySource:
        record = self._swarm.record(peer_id)
        return CopySource(peer_id, record.addresses, record.certificate_sha256)

    def _refused(self, copy: Copy, text: str) -> PeerRefused:
        peer_id = copy.hop.peer_id
        text = f"peer '{short_id(peer_id)}' made no copy: {text}"
        return PeerRefused(text, peer_id=peer_id, reason=RefusalReason.SESSION_LOST)

    def _start(self, work: Callable[[], Coroutine[Any, Any, object]]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(self._guarded(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _guarded(self, work: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Nobody awaits the work: what stops it is only logged."""
        try:
            await work()
        except (PeerError, NoRouteError, SessionError) as exc:
            logger.info("caches stay where they are: %s", exc)


def _is_behind(cache: PeerCache, source: PeerCache) -> bool:
    return (cache.version, cache.position) != (source.version, source.position)
