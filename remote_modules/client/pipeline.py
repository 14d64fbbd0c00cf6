"""Microbatches of one pass under way at once: where each goes, how many there are, and in which order they begin."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from remote_modules.client.chain import Chain
from remote_modules.client.coding import Coding
from remote_modules.client.failures import PassFailures
from remote_modules.client.stats import HopTiming
from remote_modules.client.swarm import Swarm
from remote_modules.plan.routing import Demand, Hop
from remote_modules.spans import Span

__all__ = ["Pipeline"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Pipeline:
    """One pass, of one microbatch or several.

    Args:
        routes: of each microbatch, as planned.
        demand: of one microbatch.
        coding: of the tensors.
    """

    swarm: Swarm
    routes: Sequence[tuple[Hop, ...]]
    demand: Demand
    failures: PassFailures
    coding: Coding
    chains: list[Chain]  # of the microbatches, as they began

    @classmethod
    async def plan(cls, swarm: Swarm, blocks: Span, demand: Demand, count: int) -> Pipeline:
        """Find routes for ``count`` microbatches.

        Raises:
            NoRouteError: see `Chain.route`.
        """
        failures = PassFailures(swarm.stats)
        routes = await Chain.begin(swarm, swarm.coding, failures).shares(blocks, demand, count)
        return cls(swarm, routes, demand, failures, swarm.coding, [])

    @classmethod
    def along(cls, swarm: Swarm, routes: Sequence[tuple[Hop, ...]], demand: Demand, coding: Coding) -> Pipeline:
        """The way back."""
        return cls(swarm, routes, demand, PassFailures(swarm.stats), coding, [])

    def begin(self) -> Chain:
        """The chain of the next microbatch; its deadline begins now."""
        chain = Chain.begin(self.swarm, self.coding, self.failures)
        self.chains.append(chain)
        return chain

    async def route(self, number: int, chain: Chain) -> tuple[Hop, ...]:
        """The hops of a microbatch that begins now: as planned, unless one of them failed meanwhile."""
        route = self.routes[number]
        if number and any(self.swarm.router.is_backing_off(hop.peer_id) for hop in route):
            blocks = Span(route[0].span.start, route[-1].span.end)
            (route,) = await chain.shares(blocks, self.demand, 1)
        return route

    async def run(self, do: Callable[[int], Awaitable[T]]) -> list[T]:
        """Do all microbatches, so many at once that no hop waits; results in order of number.

        Raises:
            Exception: of the first one by number that failed; the others are stopped.
        """
        if len(self.routes) == 1:
            return [await do(0)]
        room = asyncio.Semaphore(self._num_at_once())

        async def one(number: int) -> T:
            async with room, self.swarm.microbatches:  # a peer takes so many requests of one connection
                return await do(number)

        tasks = [asyncio.get_running_loop().create_task(one(number)) for number in range(len(self.routes))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        errors = [task.exception() for task in tasks if not task.cancelled()]
        if (error := next((error for error in errors if error is not None), None)) is not None:
            raise error
        return [task.result() for task in tasks]

    def finish(self, route: tuple[Hop, ...]) -> None:
        """Note the pass as done; ``route`` is what its first microbatch took."""
        timings: list[HopTiming] = [timing for chain in self.chains for timing in chain.requests.timings]
        self.swarm.stats.finish(route, timings)

    def _num_at_once(self) -> int:
        hops = {hop.peer_id: hop for route in self.routes for hop in route}
        return max(2, sum(self.swarm.router.depth(hop, self.demand) for hop in hops.values()))
