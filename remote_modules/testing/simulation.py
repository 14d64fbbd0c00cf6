"""A whole swarm in one process under virtual time: client, peers, tracker and everything that can happen to them.

The code under test is the real one (`client`, `server.handler`, `wire`, `plan`, the lease table, the model); only
sockets, the device thread and the clock are replaced. A run is decided by its seed alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from remote_modules.client.stats import StatsRecorder
from remote_modules.client.swarm import Swarm
from remote_modules.config import ClientConfig
from remote_modules.errors import DiscoveryError
from remote_modules.identity import Identity, verify_record
from remote_modules.peers import PeerRecord, PeerState, SignedRecord
from remote_modules.plan.leases import LeaseTable, merge_records
from remote_modules.server.announcer import Announcer
from remote_modules.server.engine import Engine
from remote_modules.server.executor import Priority, Timed
from remote_modules.server.handler import Handler, HandlerLimits
from remote_modules.server.sessions import KVBudget, KVCost, SessionTable
from remote_modules.spans import Span
from remote_modules.testing.memory_network import MemoryDialer, MemoryHost, MemoryNetwork

__all__ = ["Holding", "SimulatedPeer", "SimulatedSwarm", "SimulatedTracker"]

T = TypeVar("T")

MODEL_KEY = "simulated"
LEASE_S = 30.0
ANNOUNCE_S = 10.0
KV_BUDGET_BYTES = 64 * 1024 * 1024


class InlineExecutor:
    """Work takes virtual seconds and runs one at a time, in order of arrival.

    Args:
        compute_s: what each job takes.
    """

    def __init__(self, compute_s: float) -> None:
        self.compute_s = compute_s
        self._lock = asyncio.Lock()
        self._load = 0

    @property
    def load(self) -> int:
        return self._load

    async def run(self, priority: Priority, work: Callable[[], T]) -> Timed[T]:
        self._load += 1
        try:
            async with self._lock:
                await asyncio.sleep(self.compute_s)
                return Timed(work(), 0.0, self.compute_s)
        finally:
            self._load -= 1

    def stop(self) -> None:
        """Nothing runs on its own."""


class SimulatedTracker:
    """A tracker in memory: the real lease table behind a `Discovery` that can be down."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.is_up = True
        self._clock = clock
        self._table = LeaseTable(max_records=1000)

    def kill(self) -> None:
        self.is_up = False

    def restart(self) -> None:
        """Come back empty."""
        self.is_up = True
        self._table = LeaseTable(max_records=1000)

    async def announce(self, signed: SignedRecord) -> None:
        await self._answer()
        self._table.announce(signed, verify_record(signed), self._clock(), LEASE_S)

    async def withdraw(self, signed: SignedRecord) -> None:
        await self._answer()
        self._table.withdraw(verify_record(signed), self._clock())

    async def lookup(self, model_key: str | None) -> list[PeerRecord]:
        await self._answer()
        return merge_records([[lease.record for lease in self._table.lookup(model_key, self._clock())]])

    async def aclose(self) -> None:
        """Nothing is held."""

    async def _answer(self) -> None:
        await asyncio.sleep(0.01)
        if not self.is_up:
            raise DiscoveryError("tracker is down")


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
    """One peer; `start` and `crash` may alternate, each start is a new instance of the same identity."""

    def __init__(
        self,
        swarm: SimulatedSwarm,
        holding: Holding,
        *,
        number: int,
    ) -> None:
        seed = hashlib.sha256(f"{swarm.seed}/{number}".encode()).digest()
        self.identity = Identity.from_seed(seed)
        self.engine = holding.engine
        self.host: MemoryHost = swarm.network.host(f"10.0.0.{number}:1")
        self.handler: Handler | None = None
        self.is_frozen = False
        self._swarm = swarm
        self._holding = holding
        self._announcer: Announcer | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self._instances = itertools.count()
        self._instance_id = ""

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
        """Come online under a new instance id."""
        self._instance_id = f"instance-{next(self._instances)}"
        budget = KVBudget(KV_BUDGET_BYTES, self._holding.kv_costs)
        clock = self._swarm.clock
        self.handler = Handler(
            self.engine,
            InlineExecutor(self._holding.compute_s),
            SessionTable(budget, max_sessions=64, idle_s=120.0, orphan_s=20.0),
            identity=self.identity,
            instance_id=self._instance_id,
            limits=HandlerLimits(max_batch_tokens=4096, max_body_bytes=1 << 26, max_connections=64),
            clock=clock,
            dialer=MemoryDialer(self._swarm.network, self._swarm.config),
        )
        self.host.accept = self.handler.accept
        self._announcer = Announcer(
            self._swarm.tracker,
            self.identity,
            describe=self._describe,
            interval_s=ANNOUNCE_S,
            first_sequence=int((clock() + 1) * 1000),
        )
        await self._announcer.set_state(PeerState.ONLINE)
        self._announcer.start()
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep(self.handler))

    def crash(self) -> None:
        """Vanish: connections are reset, memory is gone, the lease runs out by itself."""
        handler, self.handler = self.handler, None
        if handler is None:
            return
        self.is_frozen = False
        self.host.crash()
        handler.sessions.close_all()
        assert self._announcer is not None
        assert self._sweeper is not None
        self._announcer.abandon()
        self._sweeper.cancel()

    def freeze(self) -> None:
        """Hang: connections stay open, nothing is answered."""
        self.is_frozen = True
        self.host.stall()

    def thaw(self) -> None:
        self.is_frozen = False
        self.host.heal()

    def _describe(self) -> PeerRecord:
        span = self.span
        return PeerRecord(
            peer_id=self.identity.peer_id,
            instance_id=self._instance_id,
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

    async def _sweep(self, handler: Handler) -> None:
        while True:
            await asyncio.sleep(1.0)
            handler.expire_sessions()


class SimulatedSwarm:
    """Peers, a tracker, and clients; make it inside `run_virtual`.

    Args:
        seed: decides everything random.
        holdings: one for each peer.
    """

    def __init__(self, seed: int, holdings: Sequence[Holding], *, config: ClientConfig | None = None) -> None:
        self.seed = seed
        self.rng = Random(seed)
        self.num_blocks = holdings[0].engine.model.stack.num_blocks
        self.config = config or ClientConfig()
        self.clock = asyncio.get_running_loop().time
        self.network = MemoryNetwork(Random(seed + 1))
        self.tracker = SimulatedTracker(self.clock)
        self.peers = [SimulatedPeer(self, holding, number=number) for number, holding in enumerate(holdings, start=1)]

    async def start(self) -> None:
        for peer in self.peers:
            await peer.start()

    def client(self) -> Swarm:
        """A client's swarm, for `client.session.SessionState`, `client.chain.forward` and `backward`."""
        return Swarm(
            self.tracker,
            MemoryDialer(self.network, self.config),
            model_key=MODEL_KEY,
            stack=self.peers[0].engine.model.stack,
            hidden_size=self.peers[0].engine.hidden_size,
            known_digests={},
            config=self.config,
            clock=self.clock,
            rng=self.rng,
            stats=StatsRecorder(),
        )

    def peer_of(self, peer_id: str) -> SimulatedPeer:
        return next(peer for peer in self.peers if peer.identity.peer_id == peer_id)

    def stop(self) -> None:
        for peer in self.peers:
            peer.crash()
