"""Everything that can happen to a simulated swarm: each fault by name, begun at random, ended within two minutes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from random import Random
from typing import Any

from remote_modules.testing.memory_links import Path
from remote_modules.testing.simulated_device import Ailment, broken, busy, out_of_memory
from remote_modules.testing.simulation import SimulatedPeer, SimulatedSwarm

HOUR_S = 3600.0
LONGEST_S = 15.0
SUSPENDED_S = 90.0
UNLISTED_S = 35.0  # longer than a lease
NUM_TWINS = 100  # numbers of hosts from here on

Named = dict[str, Any]


@dataclass
class Weather:
    """The faults of one run.

    Attributes:
        clients: hosts of clients; the last is the one in use.
        begun: what began, and when.
        suspended_s: how long the client in use slept, in all.
    """

    swarm: SimulatedSwarm
    rng: Random
    clients: list[str]
    begun: list[str] = field(default_factory=list)
    suspended_s: float = 0.0
    _pending: set[asyncio.Task[None]] = field(default_factory=set)

    async def blow(self, kinds: list[str] | None = None, most: int = 5) -> None:
        """Begin some faults, one after the other."""
        for _ in range(self.rng.randint(1, most)):
            await asyncio.sleep(self.rng.uniform(0.0, 0.8))
            kind = self.rng.choice(kinds or KINDS)
            peer = self.rng.choice(self.swarm.peers)
            self.begun.append(f"{self.swarm.clock():.3f} {kind} {peer.span}")
            await FAULTS[kind](self, peer, self.rng.uniform(0.2, LONGEST_S))

    async def clear(self) -> None:
        """Wait until everything has ended, and bring back whoever is gone."""
        while self._pending:
            await asyncio.gather(*self._pending)
        for peer in self.swarm.peers:
            await restart(peer)

    def count(self, name: str, times: int = 1) -> None:
        self.swarm.network.fired[name] += times

    def later(self, delay_s: float, action: Callable[[], object]) -> None:
        """Call, and await what comes of it, after a while; `clear` waits for it."""

        async def run() -> None:
            await asyncio.sleep(delay_s)
            result = action()
            if isinstance(result, Coroutine):
                await result

        task = asyncio.get_running_loop().create_task(run())
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)

    @property
    def servers(self) -> list[str]:
        return [peer.host.address for peer in self.swarm.peers] + [tracker.address for tracker in self.swarm.trackers]


async def restart(peer: SimulatedPeer) -> None:
    if not peer.is_up:
        await peer.start()


# ------------------------------------------------------------------------------- processes and hosts


async def crash(weather: Weather, peer: SimulatedPeer, lasts_s: float) -> None:
    weather.count("crash", peer.is_up)
    peer.crash()
    weather.later(lasts_s, lambda: restart(peer))


async def power(weather: Weather, peer: SimulatedPeer, lasts_s: float) -> None:
    """Half-open connections."""
    weather.count("power", bool(peer.host.num_connections))
    peer.lose_power()
    weather.later(lasts_s, lambda: restart(peer))


async def restart_at_once(weather: Weather, peer: SimulatedPeer, lasts_s: float) -> None:
    weather.count("restart at once", peer.is_up)
    peer.crash()
    weather.later(0.0, lambda: restart(peer))


async def gone(weather: Weather, peer: SimulatedPeer, lasts_s: float) -> None:
    """All who hold some block."""
    weather.count("all replicas gone")
    block = weather.rng.choice(list(peer.span))
    for other in weather.swarm.peers:
        if block in other.span:
            other.crash()
            weather.later(lasts_s, lambda other=other: restart(other))  # type: ignore[misc]


async def freeze(weather: Weather, peer: SimulatedPeer, lasts_s: float) -> None:
    weather.count("freeze", peer.is_up)
    peer.freeze()
    weather.later(lasts_s, peer.thaw)


async def suspend(weather: Weather, peer: SimulatedPeer, lasts_s: float) -> None:
    """A peer's machine sleeps for longer than a lease, and knows nothing of it."""
    weather.count("suspend", peer.is_up)
    peer.freeze()
    weather.later(SUSPENDED_S / 2, peer.thaw)


async def client_sleeps(weather: Weather, peer: SimulatedPeer, lasts_s: float) -> None:
    weather.count("client sleeps")
    swarm, address = weather.swarm, weather.clients[-1]
    host, loop = swarm.network.dialler(address), peer._loop
    host.stall()
    loop.suspend(address)
    weather.suspended_s += SUSPENDED_S

    def wake() -> None:
        loop.resume(address)
        host.heal()

    weather.later(SUSPENDED_S, wake)


async def wall_jump(weather: Weather, peer: SimulatedPeer, lasts_s: float) -> None:
    """The wall clock moves by an hour, and the process starts again."""
    weather.count("wall jump")
    peer.wall_offset_s += weather.rng.choice([-HOUR_S, HOUR_S])
    peer.crash()
    weather.later(min(lasts_s, 2.0), lambda: restart(peer))


async def upgrade(weather: Weather, peer: SimulatedPeer, lasts_s: float) -> None:
    weather.later(0.0, lambda: _upgrade([peer], weather, min(lasts_s, 5.0)))


async def upgrade_all(weather: Weather, peer: SimulatedPeer, lasts_s: float) -> None:
    weather.later(0.0, lambda: _upgrade(list(weather.swarm.peers), weather, min(lasts_s, 3.0)))


async def _upgrade(peers: list[SimulatedPeer], weather: Weather, drain_s: float) -> None:
    for peer in peers:
        weather.count("upgrade", peer.is_up)
        await peer.drain(drain_s)
        await restart(peer)


async def twin(weather: Weather, peer: SimulatedPeer, lasts_s: float) -> None:
    """Another process starts with the same identity: the first gives way, until its operator starts it again."""
    swarm = weather.swarm
    weather.count("twin")
    other = SimulatedPeer(swarm, peer._holding, number=NUM_TWINS + len(weather.begun), identity=peer.identity)
    await other.start()

    async def sort_out() -> None:
        other.crash()
        peer.crash()
        await restart(peer)

    weather.later(lasts_s, sort_out)


async def forget(weather: Weather, peer: SimulatedPeer, lasts_s: float) -> None:
    """The peer's sessions expire."""
    weather.count("session expiry", peer.drop_sessions())


# ------------------------------------------------------------------------------------------- devices


async def _ail(weather: Weather, peer: SimulatedPeer, lasts_s: float, ailment: Ailment) -> None:
    spoils = [other for other in weather.swarm.peers if other.device.ailment is not None]
    if ailment.spoil is not None and spoils:
        return  # values that are not finite are believed when two peers agree on them
    peer.device.ailment = ailment

    def mend() -> None:
        peer.device.ailment = None  # whichever device it has by now

    weather.later(lasts_s, mend)


def _ailing(make: Callable[[Random], Ailment]) -> Callable[[Weather, SimulatedPeer, float], Awaitable[None]]:
    async def fault(weather: Weather, peer: SimulatedPeer, lasts_s: float) -> None:
        await _ail(weather, peer, lasts_s, make(weather.rng))

    return fault


def _each(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def spoil(answer: Any) -> Any:
        is_named = isinstance(answer, dict)  # what a copy is asked first is the form of a cache
        return {name: change(tensor) for name, tensor in answer.items()} if is_named else answer

    return spoil


slow_device = _ailing(lambda rng: Ailment("slow device", slowness=10.0))
gray = _ailing(lambda rng: Ailment("gray", share=rng.choice([0.05, 0.3]), error=broken))
no_memory = _ailing(lambda rng: Ailment("out of memory", error=out_of_memory))
overload = _ailing(lambda rng: Ailment("overload", share=rng.choice([0.5, 1.0]), error=busy))
nan = _ailing(lambda rng: Ailment("nan", spoil=_each(lambda t: t * float("nan") if t.is_floating_point() else t)))
wrong_shape = _ailing(lambda rng: Ailment("wrong shape", spoil=_each(lambda t: t[..., :-1].contiguous())))
wrong_dtype = _ailing(lambda rng: Ailment("wrong dtype", spoil=_each(lambda t: t.double())))
nothing = _ailing(lambda rng: Ailment("empty reply", spoil=lambda named: {}))


async def full(weather: Weather, peer: SimulatedPeer, lasts_s: float) -> None:
    """No room for another KV cache."""
    if peer.handler is None:
        return
    budget = peer.handler.sessions.budget
    weather.count("no KV room")
    total, budget.total_bytes = budget.total_bytes, budget.used_bytes

    def mend() -> None:
        budget.total_bytes = max(total, budget.total_bytes)

    weather.later(lasts_s, mend)


# --------------------------------------------------------------------------------------------- links


async def cut(weather: Weather, peer: SimulatedPeer, lasts_s: float) -> None:
    """One host is cut off from everybody."""
    weather.count("cut")
    peer.host.stall()
    weather.later(lasts_s, peer.host.heal)


async def reset(weather: Weather, peer: SimulatedPeer, lasts_s: float) -> None:
    """All connections break; the peer lives and listens on."""
    weather.count("reset", bool(peer.host.num_connections))
    peer.host.reset()


async def partition(weather: Weather, peer: SimulatedPeer, lasts_s: float) -> None:
    """Between two sides, both ways."""
    _part(weather, lasts_s, is_one_way=False)


async def partition_one_way(weather: Weather, peer: SimulatedPeer, lasts_s: float) -> None:
    _part(weather, lasts_s, is_one_way=True)


def _part(weather: Weather, lasts_s: float, *, is_one_way: bool) -> None:
    network, servers = weather.swarm.network, weather.servers
    far = weather.rng.sample(servers, weather.rng.randint(1, len(servers)))
    near = [*weather.clients, *(server for server in servers if server not in far)]
    sides = (near, far) if weather.rng.random() < 0.5 else (far, near)
    weather.count("partition one way" if is_one_way else "partition")
    network.partition(*sides, is_one_way=is_one_way)
    weather.later(lasts_s, lambda: network.mend(near, far))


async def unlisted(weather: Weather, peer: SimulatedPeer, lasts_s: float) -> None:
    """No tracker hears of the peer until its lease is over."""
    weather.count("lease expiry")
    network = weather.swarm.network
    here, trackers = [peer.host.address], [tracker.address for tracker in weather.swarm.trackers]
    network.partition(here, trackers)
    weather.later(UNLISTED_S, lambda: network.mend(here, trackers))


async def swizzle(weather: Weather, peer: SimulatedPeer, lasts_s: float) -> None:
    """Links stop one by one, and are released in another order."""
    network, rng = weather.swarm.network, weather.rng
    links = [(client, server) for client in weather.clients for server in weather.servers]
    rng.shuffle(links)
    step_s = lasts_s / len(links) / 2
    for number, (client, server) in enumerate(links):
        weather.later(number * step_s, lambda c=client, s=server: network.partition([c], [s]))  # type: ignore[misc]
    rng.shuffle(links)
    for number, (client, server) in enumerate(links):
        release_s = lasts_s / 2 + number * step_s
        weather.later(release_s, lambda c=client, s=server: network.mend([c], [s]))  # type: ignore[misc]
    weather.count("swizzled links", len(links))


def _way(change: Callable[[Path, Random], None]) -> Callable[[Weather, SimulatedPeer, float], Awaitable[None]]:
    """A fault of the paths between clients and one peer."""

    async def fault(weather: Weather, peer: SimulatedPeer, lasts_s: float) -> None:
        network, address = weather.swarm.network, peer.host.address
        for client in weather.clients:
            change(network.path(client, address), weather.rng)
            change(network.path(address, client), weather.rng)
        weather.later(lasts_s, lambda: network.mend(weather.clients, [address]))

    return fault


def _set(**values: Any) -> Callable[[Path, Random], None]:
    def change(path: Path, rng: Random) -> None:
        for name, value in values.items():
            setattr(path, name, value)

    return change


FAULTS: dict[str, Callable[[Weather, SimulatedPeer, float], Awaitable[None]]] = {
    "crash": crash,
    "power": power,
    "restart at once": restart_at_once,
    "all replicas gone": gone,
    "freeze": freeze,
    "suspend": suspend,
    "client sleeps": client_sleeps,
    "wall jump": wall_jump,
    "upgrade": upgrade,
    "upgrade all": upgrade_all,
    "twin": twin,
    "session expiry": forget,
    "slow device": slow_device,
    "gray": gray,
    "out of memory": no_memory,
    "overload": overload,
    "nan": nan,
    "wrong shape": wrong_shape,
    "wrong dtype": wrong_dtype,
    "empty reply": nothing,
    "no KV room": full,
    "cut": cut,
    "reset": reset,
    "partition": partition,
    "partition one way": partition_one_way,
    "lease expiry": unlisted,
    "swizzle": swizzle,
    "slow link": _way(_set(delay_s=0.3)),
    "loss": _way(_set(loss=0.3)),
    "jitter": _way(_set(jitter_s=0.2)),
    "bandwidth": _way(_set(bytes_per_s=4000.0)),
    "slices": _way(_set(max_slice_bytes=1)),
    "truncate": _way(_set(truncate=0.1)),
    "flip": _way(_set(flip=0.1)),
}


async def tracker_restart(weather: Weather, peer: SimulatedPeer, lasts_s: float) -> None:
    """One tracker is killed, and comes back empty."""
    tracker = weather.rng.choice(weather.swarm.trackers)
    weather.count("tracker restart")
    tracker.kill()
    weather.later(lasts_s, tracker.restart)


async def trackers_gone(weather: Weather, peer: SimulatedPeer, lasts_s: float) -> None:
    weather.count("all trackers gone")
    for tracker in weather.swarm.trackers:
        tracker.kill()
        weather.later(lasts_s, tracker.restart)


async def tracker_late(weather: Weather, peer: SimulatedPeer, lasts_s: float) -> None:
    tracker = weather.rng.choice(weather.swarm.trackers)
    tracker.late_s = weather.rng.choice([0.5, 3.0, 8.0])

    def mend() -> None:
        tracker.late_s = 0.0

    weather.later(lasts_s, mend)


async def tracker_lies(weather: Weather, peer: SimulatedPeer, lasts_s: float) -> None:
    """One tracker answers with old records."""
    tracker = weather.rng.choice(weather.swarm.trackers)
    tracker.lies = True

    def mend() -> None:
        tracker.lies = False

    weather.later(lasts_s, mend)


FAULTS |= {
    "tracker restart": tracker_restart,
    "all trackers gone": trackers_gone,
    "tracker late": tracker_late,
    "tracker lies": tracker_lies,
}
KINDS = [*FAULTS, "crash", "freeze", "reset", "cut"]  # the most common a little more often
