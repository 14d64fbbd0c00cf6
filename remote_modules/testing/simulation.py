"""A whole swarm in one process under virtual time: client, peers, trackers and everything that can happen to them.

The code under test is the real one (`client`, `server.handler`, `wire`, `plan`, the lease table, the model); only
sockets, the device thread and the clocks are replaced. A run is decided by its seed alone. Rules that must hold at
every moment are watched here, and what breaks them is noted in `SimulatedSwarm.violations`.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any

from remote_modules.client.stats import StatsRecorder
from remote_modules.client.swarm import Swarm
from remote_modules.config import ClientConfig
from remote_modules.discovery.base import Discovery
from remote_modules.discovery.merged import MergedDiscovery
from remote_modules.identity import Identity
from remote_modules.net.client_connection import ClientConnection, Reply
from remote_modules.peers import PeerRecord, PeerState, SignedRecord
from remote_modules.plan.breakers import NEEDED_S
from remote_modules.server.announcer import Announcer
from remote_modules.server.engine import Engine
from remote_modules.server.handler import Handler
from remote_modules.server.limits import HandlerLimits
from remote_modules.server.sessions import KVBudget, KVCost, SessionTable
from remote_modules.server.steps import Steps
from remote_modules.spans import Span
from remote_modules.testing.fault_points import FaultPoints
from remote_modules.testing.memory_network import CLIENT, MemoryDialer, MemoryHost, MemoryNetwork
from remote_modules.testing.simulated_device import SimulatedDevice
from remote_modules.testing.simulated_tracker import SimulatedTracker, TrackerLink
from remote_modules.testing.virtual_time import VirtualLoop
from remote_modules.wire.messages import AnyRequest, StepRequest

__all__ = ["Holding", "SimulatedPeer", "SimulatedSwarm"]

MODEL_KEY = "simulated"
ANNOUNCE_S = 10.0
SWEEP_S = 2.0
SESSION_IDLE_S = 60.0
SESSION_ORPHAN_S = 20.0
EPOCH_S = 1.8e9  # what wall clocks show when a run begins
MAX_VIOLATIONS = 20
NUM_IDENTITIES = 4  # of each peer, by seed: they decide what comes first among equals
KV_BUDGET_BYTES = 64 * 1024 * 1024
MAX_CONNECTIONS = 64


@dataclass(frozen=True, slots=True)
class Holding:
    """What one simulated peer holds, what its KV caches cost, and how long one request takes.

    Attributes:
        kv_costs: `Engine.kv_costs`, measured once and shared by all runs.
        compute_s: virtual seconds of each request.
    """

    engine: Engine
    kv_costs: dict[int, KVCost]
    compute_s: float = 0.02


class SimulatedPeer:
    """One peer; `start` and `crash` may alternate, each start is a new instance of the same identity.

    Attributes:
        wall_offset_s: how wrong its wall clock is.
    """

    def __init__(
        self, swarm: SimulatedSwarm, holding: Holding, *, number: int, identity: Identity | None = None
    ) -> None:
        self.identity = _identity(swarm.seed % NUM_IDENTITIES, number) if identity is None else identity
        self.engine = holding.engine
        self.host: MemoryHost = swarm.network.host(f"10.0.0.{number}:1")
        self.handler: Handler | None = None
        self.device = SimulatedDevice(holding.compute_s, swarm.fault_rng, swarm.network.fired)
        self.is_frozen = False
        self.wall_offset_s = 0.0
        self.instance_id = ""
        self._swarm = swarm
        self._holding = holding
        self._announcer: Announcer | None = None
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._instances = itertools.count()
        self._number = number

    @property
    def span(self) -> Span:
        return self.engine.model.span

    @property
    def is_up(self) -> bool:
        return self.handler is not None

    @property
    def kv_bytes(self) -> int:
        """Reserved now."""
        return self.handler.sessions.budget.used_bytes if self.handler is not None else 0

    async def start(self) -> None:
        """Come online under a new instance id; nothing if it is online already."""
        await self._on_host(self._start())

    async def _start(self) -> None:
        if self.is_up:  # somebody else started it while the host slept
            return
        swarm, holding = self._swarm, self._holding
        self.instance_id = f"instance-{self._number}-{next(self._instances)}"
        ailment, self.device = (
            self.device.ailment,
            SimulatedDevice(holding.compute_s, swarm.fault_rng, swarm.network.fired),
        )
        self.device.ailment, self.device.points, self.device.on_crash = ailment, swarm.network.points, self.crash
        budget = KVBudget(KV_BUDGET_BYTES, holding.kv_costs)
        handler = _WatchedHandler(
            self.engine,
            self.device,
            SessionTable(budget, max_sessions=64, idle_s=SESSION_IDLE_S, orphan_s=SESSION_ORPHAN_S),
            identity=self.identity,
            instance_id=self.instance_id,
            limits=HandlerLimits(
                max_batch_tokens=4096,
                max_body_bytes=1 << 26,
                max_connections=MAX_CONNECTIONS,
                activation_bytes=1 << 26,
            ),
            clock=swarm.clock,
            dialer=MemoryDialer(swarm.network, swarm.config, self.host.address),
            record=lambda: self._announcer.signed if self._announcer is not None else None,
        )
        assert isinstance(handler.steps, _WatchedSteps)
        handler.steps.on_violation = swarm.note_violation
        self.handler, self.host.accept = handler, handler.accept
        self._announcer = Announcer(
            swarm.discovery(self.host.address),
            self.identity,
            describe=self._describe,
            interval_s=ANNOUNCE_S,
            first_sequence=int((EPOCH_S + swarm.clock() + self.wall_offset_s) * 1000),
        )
        self._announcer.start()
        self._sweep(handler)
        await self._announcer.set_state(PeerState.ONLINE)

    def crash(self) -> None:
        """Vanish: connections are reset, memory is gone, the lease runs out by itself."""
        if self._end():
            self.host.crash()

    def lose_power(self) -> None:
        """The same, and nobody is told: connections stay half open."""
        if self._end():
            self.host.vanish()

    async def stop(self) -> None:
        """Leave in order: withdraw, then close everything."""
        announcer = self._announcer
        if self.handler is not None and announcer is not None:
            await self._on_host(announcer.stop())
            self.crash()

    async def drain(self, timeout_s: float) -> None:
        """As a server does on SIGTERM: refuse new sessions, wait for the others to end or move, then stop."""
        handler, announcer = self.handler, self._announcer
        if handler is None or announcer is None:
            return
        handler.start_draining()
        await self._on_host(announcer.set_state(PeerState.DRAINING))
        deadline_s = self._swarm.clock() + timeout_s
        while self._swarm.clock() < deadline_s and (len(handler.sessions) or handler.executor.load):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        if self.handler is handler:  # it may have crashed meanwhile
            await self.stop()

    def freeze(self) -> None:
        """Hang: connections stay open, nothing runs and nothing is answered."""
        self.is_frozen = True
        self.host.stall()
        self._loop.suspend(self.host.address)

    def thaw(self) -> None:
        self.is_frozen = False
        self._loop.resume(self.host.address)
        self.host.heal()

    def drop_sessions(self) -> int:
        """Forget all sessions that no step is using now, as when they expire; how many there were."""
        return len(self.handler.sessions.expire(float("inf"))) if self.handler is not None else 0

    @property
    def _loop(self) -> VirtualLoop:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        return loop

    async def _on_host(self, work: Coroutine[Any, Any, None]) -> None:
        """Run as the host does: not while it is frozen."""
        await self.host.context.run(asyncio.get_running_loop().create_task, work)

    def _end(self) -> bool:
        """What the end of the process means here; False if there is none."""
        handler, self.handler = self.handler, None
        if handler is None:
            return False
        self.is_frozen = False
        self._loop.resume(self.host.address)
        self.device.stop()
        handler.forwarding.close()
        handler.sessions.close_all()
        if self._announcer is not None:
            self._announcer.abandon()
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        return True

    def _describe(self) -> PeerRecord:
        span = self.span
        return PeerRecord(
            peer_id=self.identity.peer_id,
            instance_id=self.instance_id,
            sequence=0,
            model="simulated",
            model_key=MODEL_KEY,
            num_blocks=self._swarm.num_blocks,
            start=span.start,
            end=span.end,
            addresses=(self.host.address,),
            state=PeerState.ONLINE,
            prefill_tokens_per_s=1000.0,
            decode_tokens_per_s=200.0,
            free_kv_tokens=100_000,
        )

    def _sweep(self, handler: Handler) -> None:
        handler.expire_sessions()
        held = sum(session.reserved_bytes for session in handler.sessions._sessions.values())
        if held != handler.sessions.budget.used_bytes:
            self._swarm.note_violation(f"I3: {held} KV bytes are held, {handler.sessions.budget.used_bytes} reserved")
        self._sweep_timer = self._loop.call_later(SWEEP_S, self._sweep, handler, context=self.host.context)


class _QuickIdentity(Identity):
    """Signs equal records once: most of what peers announce is the same in all runs."""

    def sign_record(self, record: PeerRecord) -> SignedRecord:
        return _signed(self, record)


@lru_cache(maxsize=4096)
def _signed(identity: Identity, record: PeerRecord) -> SignedRecord:
    return Identity.sign_record(identity, record)


@lru_cache(maxsize=1024)
def _identity(seed: int, number: int) -> Identity:
    return _QuickIdentity.from_seed(hashlib.sha256(f"{seed}/{number}".encode()).digest())


class _WatchedSteps(Steps):
    """Notes steps that are applied twice to one cache."""

    on_violation: Callable[[str], None]

    async def new_step(self, request: StepRequest, session: Any, *args: Any) -> Any:
        reply = await super().new_step(request, session, *args)
        done = self.__dict__.setdefault("steps_done", {}).setdefault(session.session_id, [])
        if request.step_id in done:
            self.on_violation(f"I2: step {request.step_id} was applied twice to session {session.session_id[:6]}")
        done.append(request.step_id)
        return reply


class _WatchedHandler(Handler):
    steps_type = _WatchedSteps


class _WatchedConnection(ClientConnection):
    """Says to whom a request goes, before it does."""

    on_request: Callable[[str], None]

    async def request(self, message: AnyRequest, body: list[Any], *, timeout_s: float) -> Reply:
        self.on_request(self.peer_id)
        return await super().request(message, body, timeout_s=timeout_s)


class _WatchedDialer(MemoryDialer):
    connection_class = _WatchedConnection
    on_request: Callable[[str], None]

    def new_connection(self, record: PeerRecord) -> ClientConnection:
        connection = super().new_connection(record)
        assert isinstance(connection, _WatchedConnection)
        connection.on_request = self.on_request
        return connection


class SimulatedSwarm:
    """Peers, trackers, and clients; make it inside `run_virtual`.

    Args:
        seed: decides everything random.
        holdings: one for each peer.

    Attributes:
        violations: what broke a rule that must always hold, in order.
        fault_rng: for faults that happen by chance.
        watches_bans: whether a request to a banned peer is a violation. With several passes at once it is none: one
            goes on where it began while another bans the peer.
    """

    def __init__(
        self,
        seed: int,
        holdings: Sequence[Holding],
        *,
        config: ClientConfig | None = None,
        num_trackers: int = 1,
        points: FaultPoints | None = None,
    ) -> None:
        self.seed = seed
        self.rng = Random(seed)
        self.fault_rng = Random(seed + 2)
        self.num_blocks = holdings[0].engine.model.stack.num_blocks
        self.config = config or ClientConfig()
        self.clock = asyncio.get_running_loop().time
        self.violations: list[str] = []
        self.watches_bans = True
        self.network = MemoryNetwork(Random(seed + 1))
        self.network.points = points
        fired = self.network.fired
        self.trackers = [SimulatedTracker(self.clock, f"tracker-{n}", fired) for n in range(num_trackers)]
        self.peers = [SimulatedPeer(self, holding, number=number) for number, holding in enumerate(holdings, start=1)]

    @property
    def tracker(self) -> SimulatedTracker:
        """The only one, or the first."""
        return self.trackers[0]

    async def start(self) -> None:
        for peer in self.peers:
            await peer.start()

    def discovery(self, source: str) -> Discovery:
        """The trackers, as ``source`` reaches them."""
        links = [TrackerLink(tracker, self.network, source) for tracker in self.trackers]
        return links[0] if len(links) == 1 else MergedDiscovery(links)

    def client(self, source: str = CLIENT) -> Swarm:
        """A client's swarm, for `client.session.SessionState`, `client.chain.forward` and `backward`."""
        self.network.dialler(source)
        dialer = _WatchedDialer(self.network, self.config, source)
        client = Swarm(
            self.discovery(source),
            dialer,
            model_key=MODEL_KEY,
            stack=self.peers[0].engine.model.stack,
            hidden_size=self.peers[0].engine.hidden_size,
            known_digests={},
            config=self.config,
            clock=self.clock,
            rng=self.rng,
            stats=StatsRecorder(),
        )
        dialer.on_request = lambda peer_id: self._check_not_banned(client, peer_id)
        return client

    def _check_not_banned(self, client: Swarm, peer_id: str) -> None:
        peer, router = self.peer_of(peer_id).identity.peer_id, client.router
        breaker = router.breakers._breakers.get(peer)
        if not self.watches_bans or breaker is None or breaker.instance_id != router.instance_of(peer):
            return
        if breaker.is_open and self.clock() < min(breaker.until_s, breaker.opened_s + NEEDED_S):
            self.note_violation(f"I7: a request went to the banned peer {peer_id[:6]} at {self.clock():.3f} s")

    def note_violation(self, text: str) -> None:
        """A rule is broken; raises once there are so many that the run tells nothing new."""
        self.violations.append(text)
        assert len(self.violations) <= MAX_VIOLATIONS, f"too many violations, first {self.violations[0]}"

    def peer_of(self, peer_id: str) -> SimulatedPeer:
        return next(peer for peer in self.peers if peer.identity.peer_id == peer_id)

    def stop(self) -> None:
        for peer in self.peers:
            peer.crash()
