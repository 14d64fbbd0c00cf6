"""Sessions: generation with KV caches on peers, that survives the loss of any of them.

A `SessionState` keeps, for each boundary between hops, the history of inputs (`client.history`). A step appends to
it only when the whole pass is done, so the position (the length of the first history) always says what is certain. A
hop that is behind — new, or its peer lost the cache — is fed its history first, in bounded requests; its outputs
become the history of the next boundary if that is new too.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from remote_modules.client.chain import Chain, Work, demand_of
from remote_modules.client.history import History, SideInputs
from remote_modules.client.swarm import Swarm
from remote_modules.errors import SessionError
from remote_modules.net.client_connection import ClientConnection
from remote_modules.plan.routing import Demand, Hop
from remote_modules.spans import Span
from remote_modules.wire import messages
from remote_modules.wire.messages import CacheOp

__all__ = ["SessionState"]

KV_TOKENS_AHEAD = 256  # room to ask for beyond what is known to be needed


@dataclass(slots=True)
class _PeerCache:
    """The session on one hop's peer, as we know it."""

    session_id: str = field(default_factory=lambda: secrets.token_hex(16))
    position: int = 0
    step_id: int = 0
    pending: list[torch.Tensor | int] = field(default_factory=list)  # selections, and lengths to crop to


class SessionState:
    """One session over ``blocks``; all coroutines run on the swarm's loop, one step at a time.

    Cache operations (`crop`, `select`, `repeat`, `reset`) are queued: they cost no message of their own.
    """

    def __init__(self, swarm: Swarm, blocks: Span, submit: Callable[[Callable[[], object]], object]) -> None:
        self.swarm = swarm
        self.blocks = blocks
        self.is_closed = False
        self.needs_grad = False
        self._submit = submit
        self._hops: list[Hop] = []
        self._caches: dict[Span, _PeerCache] = {}
        self._histories: dict[int, History] = {blocks.start: History()}
        self._sides = SideInputs()
        self._lock = threading.Lock()

    @property
    def position(self) -> int:
        """Tokens in the session; derived from the history."""
        return len(self._histories[self.blocks.start])

    @property
    def route(self) -> tuple[Hop, ...]:
        return tuple(self._hops)

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        if length < self.position:
            for history in self._histories.values():
                history.crop(length)
            self._sides.crop(length)
            for cache in self._caches.values():
                cache.pending.append(length)

    def reset(self) -> None:
        """Forget all tokens."""
        self.crop(0)

    def select(self, indices: torch.Tensor) -> None:
        """Batch rows become those at ``indices`` ``[B']``."""
        if self.position == 0:
            return
        indices = indices.detach().to("cpu", torch.int64, copy=True)
        for history in self._histories.values():
            history.select(indices)
        self._sides.select(indices)
        for cache in self._caches.values():
            cache.pending.append(indices)

    def repeat(self, repeats: int) -> None:
        """Each batch row comes ``repeats`` times in a row."""
        if self.position:
            rows = self._histories[self.blocks.start].read().shape[0]
            self.select(torch.arange(rows).repeat_interleave(repeats))

    def remember(
        self, inputs: torch.Tensor, position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> None:
        """Note inputs ``[B, T, D]`` that were run without a session: peers get them by replay if it goes on."""
        self._sides = self._sides.extended(self.position, inputs.shape[1], position_ids, attention_mask)
        self._histories[self.blocks.start].append(inputs)

    def __deepcopy__(self, memo: dict[int, object]) -> SessionState:
        """A fork: equal history, KV caches of its own, built when it is used."""
        fork = SessionState(self.swarm, self.blocks, self._submit)
        fork._histories = {self.blocks.start: self._histories[self.blocks.start].copy()}
        fork._sides = self._sides.copy()
        memo[id(self)] = fork
        return fork

    async def step(
        self,
        hidden_states: torch.Tensor,
        *,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        autocast: str = "",
    ) -> torch.Tensor:
        """Run new tokens ``[B, T, D]`` (CPU) through all blocks; same shape and dtype.

        Raises:
            PeerError, NoRouteError: see `Chain.drive`; the session is as before the step.
            SessionError: it is closed, or another step is under way.
        """
        if self.is_closed:
            raise SessionError("session is closed")
        if not self._lock.acquire(blocking=False):
            raise SessionError("another step of this session is under way")
        try:
            sides = self._sides.extended(self.position, hidden_states.shape[1], position_ids, attention_mask)
            return await self._step(hidden_states, sides, autocast)
        finally:
            self._lock.release()

    async def _step(self, hidden_states: torch.Tensor, sides: SideInputs, autocast: str) -> torch.Tensor:
        chain = Chain.begin(self.swarm)
        num_tokens = hidden_states.shape[1]
        demand = demand_of(
            hidden_states, kv_tokens=self.position + num_tokens + KV_TOKENS_AHEAD, is_decode=num_tokens == 1
        )
        if not self._hops:
            self._hops = list(await chain.route(self.blocks, demand))
        work = _Step(self, hidden_states, sides, demand, autocast)
        try:
            await chain.drive(work)
        except BaseException:
            self._drop_peers()  # some hops did the step and some did not: all start afresh from the history
            raise
        self._hops = work.done
        self._commit(work, sides)
        self.swarm.stats.finish(tuple(self._hops), chain.timings)
        return work.outputs

    def _commit(self, work: _Step, sides: SideInputs) -> None:
        self._sides = sides
        starts = {hop.span.start for hop in self._hops}
        self._histories = {start: work.histories[start] for start in sorted(starts)}
        for start, history in self._histories.items():
            history.append(work.inputs[start])
        spans = {hop.span for hop in self._hops}
        for span in [span for span in self._caches if span not in spans]:
            del self._caches[span]

    async def close(self) -> None:
        """Free the KV caches on all peers that still hold some; idempotent, never raises for a lost peer."""
        self.is_closed = True
        self._drop_peers()

    def close_soon(self) -> None:
        """`close` from any thread, without waiting."""
        self.is_closed = True
        self._submit(self._drop_peers)

    def _drop_peers(self) -> None:
        """Free all KV caches; the history stays, so that a later step can build them anew."""
        hops, self._hops = self._hops, []
        for hop in hops:
            cache = self._caches.pop(hop.span, None)
            if cache is not None:
                self._free(hop, cache)
        self._histories = {self.blocks.start: self._histories[self.blocks.start]}

    def _free(self, hop: Hop, cache: _PeerCache) -> None:
        connection = self.swarm.open_connection(hop.peer_id, "step")
        if connection is not None:
            connection.send(messages.CloseSession(cache.session_id))


class _Step(Work):
    """One step under way: walks the hops, feeding those that are behind."""

    def __init__(
        self, session: SessionState, hidden_states: torch.Tensor, sides: SideInputs, demand: Demand, autocast: str
    ) -> None:
        self.session = session
        self.demand = demand
        self.hops = list(session._hops)
        self.done: list[Hop] = []
        self.outputs = hidden_states
        self.inputs: dict[int, torch.Tensor] = {}
        self.histories = dict(session._histories)
        self._position = session.position
        self._sides = sides
        self._autocast = autocast

    async def do_hop(self, hop: Hop, chain: Chain) -> None:
        connection = await chain.connect(hop, "step", self.demand)
        cache = self.session._caches.setdefault(hop.span, _PeerCache())
        start = hop.span.start
        history = self.histories.setdefault(start, History())
        assert len(history) == self._position, "a new boundary gets its history from the hop before it"
        is_next_new = len(self.hops) > 1 and self._needs_history(self.hops[1])
        outputs = await self._feed(hop, cache, chain, connection, keep_all=is_next_new)
        self.inputs[start] = self.outputs
        num_new = self.outputs.shape[1]
        if is_next_new:
            old, self.outputs = outputs[:, :-num_new], outputs[:, -num_new:].contiguous()
            self.histories[hop.span.end] = History([old] if old.shape[1] else [])
        else:
            self.outputs = outputs
        self.done.append(self.hops.pop(0))

    async def replace_hop(self, hop: Hop, hops: tuple[Hop, ...], chain: Chain) -> None:
        cache = self.session._caches.pop(hop.span, None)
        if cache is not None:
            self.session._free(hop, cache)
        self.hops[:1] = hops
        self.session._hops = [*self.done, *self.hops]

    def forget_hop(self, hop: Hop) -> None:
        self.session._caches.pop(hop.span, None)

    def _needs_history(self, hop: Hop) -> bool:
        return len(self.histories.get(hop.span.start, ())) < self._position

    async def _feed(
        self, hop: Hop, cache: _PeerCache, chain: Chain, connection: ClientConnection, *, keep_all: bool
    ) -> torch.Tensor:
        """Send what the hop has not seen; outputs of the new tokens, or of all tokens for ``keep_all``."""
        new = self.outputs
        behind = self._position if cache.position == 0 else 0
        assert behind or not keep_all, "only a hop that is fed its whole history can give one to the next"
        chunks = self._chunks(hop, new, behind, chain.swarm.config.max_replay_tokens)
        self.session.swarm.stats.replayed_tokens += behind
        outputs = []
        position = self._position - behind
        for chunk in chunks:
            position += chunk.shape[1]
            wanted = chunk.shape[1] if keep_all else max(0, min(chunk.shape[1], position - self._position))
            outputs.append(await self._send(hop, cache, chain, connection, chunk, wanted))
        return outputs[-1] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _chunks(self, hop: Hop, new: torch.Tensor, behind: int, max_tokens: int) -> Sequence[torch.Tensor]:
        if behind == 0:
            return [new]
        old = self.histories[hop.span.start].read()
        length = max(1, max_tokens // old.shape[0])
        chunks: tuple[torch.Tensor, ...] = torch.cat([old, new], dim=1).split(length, dim=1)
        return chunks

    async def _send(
        self,
        hop: Hop,
        cache: _PeerCache,
        chain: Chain,
        connection: ClientConnection,
        chunk: torch.Tensor,
        num_outputs: int,
    ) -> torch.Tensor:
        num_tokens = chunk.shape[1]
        ops, indices, start = _cache_ops(cache)
        end = start + num_tokens
        tensors = {"hidden_states": chunk, **indices}
        mask, is_whole = self._mask(start, end, bool(ops) or start == 0)
        if mask is not None:
            tensors["attention_mask"] = mask
        if self._sides.position_ids is not None:
            tensors["position_ids"] = self._sides.position_ids[:, start:end]
        message = messages.StepRequest(
            connection.new_request_id(),
            cache.session_id,
            cache.step_id,
            hop.span.start,
            hop.span.end,
            start,
            ops,
            (),
            0.0,
            mask_is_whole=is_whole,
            create=cache.step_id == 0,
            autocast=self._autocast,
            num_outputs=None if num_outputs == num_tokens else num_outputs,
        )
        kind = "decode" if num_tokens == 1 else "prefill"
        try:
            replies = await chain.request(hop, kind, message, tensors, connection)
            output = chain.check_output(hop, replies.get("hidden_states"), chunk, num_outputs)
        except BaseException:
            self.forget_hop(hop)  # whether the peer did the step is not known: a new session, by replay
            self.session._free(hop, cache)
            raise
        cache.position, cache.step_id = end, cache.step_id + 1
        cache.pending.clear()
        return output

    def _mask(self, start: int, end: int, is_whole: bool) -> tuple[torch.Tensor | None, bool]:
        """The mask columns to send for tokens start..end: the new ones when the peer has the others already."""
        mask = self._sides.attention_mask
        if mask is None:
            return None, False
        old = self.session._sides.attention_mask
        if not is_whole and start == self._position and old is not None and torch.equal(old, mask[:, :start]):
            return mask[:, start:end].contiguous(), False
        return mask[:, :end].contiguous(), True


def _cache_ops(cache: _PeerCache) -> tuple[tuple[CacheOp, ...], dict[str, torch.Tensor], int]:
    """The queued operations as messages, their index tensors, and the position after them."""
    ops = []
    tensors = {}
    position = cache.position
    for number, op in enumerate(cache.pending):
        if isinstance(op, int):
            position = min(position, op)
            ops.append(CacheOp("crop", length=position))
        else:
            name = f"indices.{number}"
            tensors[name] = op
            ops.append(CacheOp("select", tensor=name))
    return tuple(ops), tensors, position
