"""Sessions: generation with KV caches on peers, that survives the loss of any of them.

A session keeps the history of inputs of the boundaries between hops (`client.hop_caches`). A step (`client.step`) is
appended to them only when the whole pass is done, so the position, which is the length of the first history, always
says what is certain.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace

import torch

from remote_modules.client.call import CallArguments, Named, demand_of
from remote_modules.client.chain import Chain
from remote_modules.client.copies import CacheCopies
from remote_modules.client.hop_caches import HopCaches
from remote_modules.client.owner_history import OwnerHistory, StepInputs
from remote_modules.client.step import Step
from remote_modules.client.swarm import Swarm
from remote_modules.client.wire_choice import coding_for
from remote_modules.errors import SessionError
from remote_modules.model.past import length_of
from remote_modules.plan.routing import Hop
from remote_modules.spans import Span

__all__ = ["SessionState"]

KV_TOKENS_AHEAD = 256  # room to ask for beyond what is known to be needed

_dropping: set[asyncio.Task[None]] = set()  # a task that nobody holds may vanish


class SessionState:
    """One session over ``blocks``; all coroutines run on the swarm's loop, one step at a time."""

    def __init__(self, swarm: Swarm, blocks: Span, submit: Callable[[Callable[[], object]], object]) -> None:
        self.swarm = swarm
        self.blocks = blocks
        self.is_closed = False
        self.needs_grad = False
        self.masks_may_end = False  # see `OwnerHistory.begin`
        self.caches = HopCaches(swarm, blocks)
        self.copies = CacheCopies(self.caches)
        self._submit = submit
        self._owner = OwnerHistory(swarm.histories)
        self._lock = threading.Lock()

    @property
    def position(self) -> int:
        """Tokens in the session."""
        return self.caches.position

    @property
    def route(self) -> tuple[Hop, ...]:
        return tuple(self.caches.hops)

    def begin_with(self, past: Named) -> None:
        """Let an unused session begin with these keys and values (`model.past`)."""
        self.caches.begin_with(past)
        self._owner = OwnerHistory(self.swarm.histories, length_of(past))

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        if length < self.position:
            self.caches.crop(length)
            self._owner.crop(length)

    def reset(self) -> None:
        """Forget all tokens."""
        self.crop(0)

    def select(self, indices: torch.Tensor) -> None:
        """Batch rows become those at ``indices`` ``[B']``."""
        if self.position:
            indices = indices.detach().to("cpu", torch.int64, copy=True)
            self.caches.select(indices)
            self._owner.select(indices)

    def repeat(self, repeats: int) -> None:
        """Each batch row comes ``repeats`` times in a row."""
        if self.position and self.swarm.stack.hidden.batch is not None:
            self.select(torch.arange(self.caches.num_rows()).repeat_interleave(repeats))

    def remember(self, inputs: Named, call: CallArguments) -> None:
        """Note what was run without a session: peers get it by replay if it goes on."""
        self._owner.commit(self._begin(call))
        self.caches.first_history.append(inputs, call.num_tokens)

    def __deepcopy__(self, memo: dict[int, object]) -> SessionState:
        """A fork: equal history, KV caches of its own, copied by the peers, or built when it is used."""
        fork = SessionState(self.swarm, self.blocks, self._submit)
        fork.caches, copies = self.caches.fork()
        fork.copies = CacheCopies(fork.caches)
        if copies:
            self._submit(lambda: self.copies.fork_into(fork.copies, copies))
        fork.masks_may_end = self.masks_may_end
        fork._owner = self._owner.copy()
        memo[id(self)] = fork
        return fork

    async def step(self, inputs: Named, call: CallArguments) -> Named:
        """Run new tokens (CPU) through all blocks: what the last one returned, and ``record.<kind>.<block>``.

        Raises:
            PeerError, NoRouteError: see `Chain.drive`; the session is as before the step.
            UnsupportedCallError: the owner's inputs do not fit those of earlier steps.
            SessionError: it is closed, or another step is under way.
        """
        if self.is_closed:
            raise SessionError("session is closed")
        if not self._lock.acquire(blocking=False):
            raise SessionError("another step of this session is under way")
        try:
            return await self._step(inputs, self._begin(call))
        finally:
            self._lock.release()

    def _begin(self, call: CallArguments) -> StepInputs:
        specs = self.swarm.stack.side_specs(self.blocks)
        return self._owner.begin(self.position, call, specs, masks_may_end=self.masks_may_end)

    async def _step(self, inputs: Named, step: StepInputs) -> Named:
        async with self.copies.busy:
            return await self._step_alone(inputs, step)

    async def _step_alone(self, inputs: Named, step: StepInputs) -> Named:
        caches, num_tokens = self.caches, step.call.num_tokens
        chain = Chain.begin(self.swarm, caches.coding)
        kv_tokens = self.position + num_tokens + KV_TOKENS_AHEAD
        num_bytes = caches.coding.num_bytes(inputs, num_tokens)
        demand = demand_of(num_bytes, step.call, kv_tokens=kv_tokens, is_decode=num_tokens == 1)
        await self.copies.begin_step(demand)
        if not caches.hops:
            caches.hops = list(await chain.route(self.blocks, demand))
            self.swarm.dial_soon(hop.peer_id for hop in caches.hops)
            if not self.position:
                caches.coding = coding_for(self.swarm, caches.hops, demand, inputs, num_tokens)
                chain = replace(chain, coding=caches.coding)
        work = Step(caches, inputs, step, demand)
        try:
            if self.swarm.config.direct:
                await work.launch(chain)
            await chain.drive(work)
        except BaseException:
            caches.drop_peers()  # some hops did the step and some did not: all start afresh from the history
            raise
        finally:
            work.ground()
        caches.hops = work.done
        self._owner.commit(step)
        caches.commit(work.inputs, work.histories, num_tokens)
        self.swarm.stats.finish(self.route, chain.requests.timings)
        return work.outputs | work.recorded

    async def close(self) -> None:
        """Free the KV caches on all peers that still hold some; idempotent, never raises for a lost peer."""
        self.is_closed = True
        await self._drop()

    async def _drop(self) -> None:
        await self.copies.await_forks()  # they need what the caches hold
        self.copies.close()
        self.caches.drop_peers()

    def close_soon(self) -> None:
        """`close` from any thread, without waiting."""
        self.is_closed = True
        self._submit(self._begin_drop)

    def _begin_drop(self) -> None:
        if self.copies.has_forks:
            task = asyncio.get_running_loop().create_task(self._drop())
            _dropping.add(task)
            task.add_done_callback(_dropping.discard)
        else:
            self.copies.close()
            self.caches.drop_peers()
