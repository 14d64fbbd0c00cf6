"""Sessions: generation with KV caches on peers, that survives the loss of any of them.

A `SessionState` keeps, for each boundary between hops, the history of inputs (`client.history`). A step appends to
it only when the whole pass is done, so the position (the length of the first history) always says what is certain. A
hop that is behind — new, or its peer lost the cache — is fed its history first, in bounded requests; its outputs
become the history of the next boundary if that is new too.
"""

from __future__ import annotations

import copy
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import torch

from remote_modules.client.call import CallArguments, Named
from remote_modules.client.chain import Chain, Work, demand_of
from remote_modules.client.history import History, OwnerHistory, StepInputs
from remote_modules.client.swarm import Swarm
from remote_modules.errors import SessionError
from remote_modules.model.past import length_of, select_layers
from remote_modules.model.tensors import concat, slice_tokens
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
    replaces: str = ""  # a session there that is of no more use


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
        self._past: Named = {}
        self.masks_may_end = False  # see `OwnerHistory.begin`
        self._histories: dict[int, History] = {blocks.start: self.new_history()}
        self._owner = OwnerHistory()
        self._lock = threading.Lock()

    @property
    def position(self) -> int:
        """Tokens in the session; derived from the history."""
        return len(self._histories[self.blocks.start])

    @property
    def route(self) -> tuple[Hop, ...]:
        return tuple(self._hops)

    def new_history(self) -> History:
        return History(self.swarm.stack.carried, length_of(self._past))

    def begin_with(self, past: Named) -> None:
        """Let an unused session begin with these keys and values (`model.past`)."""
        self._past = past
        self._histories = {self.blocks.start: self.new_history()}
        self._owner = OwnerHistory(length_of(past))

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        if length < self.position:
            for history in self._histories.values():
                history.crop(length)
            self._owner.crop(length)
            if length < length_of(self._past):
                self._past = {name: tensor[:, :, :length] for name, tensor in self._past.items()} if length else {}
            for span, cache in self._fed_caches():
                if length == 0 or self.swarm.stack.is_croppable:
                    cache.pending.append(length)
                else:  # it keeps a state that cannot go back: the peer computes it anew
                    self._caches[span] = _PeerCache(replaces=cache.session_id)

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
        self._owner.select(indices)
        self._past = {name: tensor[indices] for name, tensor in self._past.items()}
        for _, cache in self._fed_caches():
            cache.pending.append(indices)

    def repeat(self, repeats: int) -> None:
        """Each batch row comes ``repeats`` times in a row."""
        batch = self.swarm.stack.hidden.batch
        if self.position and batch is not None:
            rows = next((len(tensor) for tensor in self._past.values()), 0)
            rows = rows or self._histories[self.blocks.start].read()["hidden_states"].shape[batch]
            self.select(torch.arange(rows).repeat_interleave(repeats))

    def _fed_caches(self) -> list[tuple[Span, _PeerCache]]:
        """Those that hold something; others get all that was done to the history when they are fed."""
        return [(span, cache) for span, cache in self._caches.items() if cache.step_id]

    def remember(self, inputs: Named, call: CallArguments) -> None:
        """Note what was run without a session: peers get it by replay if it goes on."""
        self._owner.commit(self._begin(call))
        self._histories[self.blocks.start].append(inputs, call.num_tokens)

    def __deepcopy__(self, memo: dict[int, object]) -> SessionState:
        """A fork: equal history, KV caches of its own, built when it is used."""
        fork = SessionState(self.swarm, self.blocks, self._submit)
        fork._histories = {self.blocks.start: self._histories[self.blocks.start].copy()}
        fork._owner = self._owner.copy()
        fork.masks_may_end = self.masks_may_end
        fork._past = dict(self._past)
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
        chain = Chain.begin(self.swarm)
        num_tokens = step.call.num_tokens
        kv_tokens = self.position + num_tokens + KV_TOKENS_AHEAD
        demand = demand_of(inputs, step.call, kv_tokens=kv_tokens, is_decode=num_tokens == 1)
        if not self._hops:
            self._hops = list(await chain.route(self.blocks, demand))
        work = _Step(self, inputs, step, demand)
        try:
            await chain.drive(work)
        except BaseException:
            self._drop_peers()  # some hops did the step and some did not: all start afresh from the history
            raise
        self._hops = work.done
        self._commit(work, step)
        self.swarm.stats.finish(tuple(self._hops), chain.timings)
        return work.outputs | work.recorded

    def _commit(self, work: _Step, step: StepInputs) -> None:
        self._owner.commit(step)
        starts = {hop.span.start for hop in self._hops}
        self._histories = {start: work.histories[start] for start in sorted(starts)}
        for start, history in self._histories.items():
            history.append(work.inputs[start], step.call.num_tokens)
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
            for session_id in filter(None, (cache.session_id, cache.replaces)):
                connection.send(messages.CloseSession(session_id))


class _Step(Work):
    """One step under way: walks the hops, feeding those that are behind."""

    def __init__(self, session: SessionState, inputs: Named, step: StepInputs, demand: Demand) -> None:
        self.session = session
        self.demand = demand
        self.hops = list(session._hops)
        self.done: list[Hop] = []
        self.outputs = inputs
        self.recorded: Named = {}
        self.inputs: dict[int, Named] = {}
        self.histories = dict(session._histories)
        self._position = session.position
        self._start = length_of(session._past)
        self._step = step
        self._stack = session.swarm.stack
        self._caches = session._caches
        self._is_rival = False

    async def do_hop(self, hop: Hop, chain: Chain) -> None:
        connection = await chain.connect(hop, "step", self.demand)
        cache = self._caches.setdefault(hop.span, _PeerCache())
        if cache.replaces:
            connection.send(messages.CloseSession(cache.replaces))
            cache.replaces = ""
        start, end = hop.span.start, hop.span.end
        history = self.histories.setdefault(start, self.session.new_history())
        assert len(history) == self._position, "a new boundary gets its history from the hop before it"
        is_next_new = len(self.hops) > 1 and self._needs_history(self.hops[1])
        old, new = await self._feed(hop, cache, chain, connection, keep_all=is_next_new)
        self.inputs[start] = self.outputs
        if is_next_new:
            self.histories[end] = self.session.new_history()
            self.histories[end].append(old, self._position - self._start)
        self.outputs = new
        self.done.append(self.hops.pop(0))

    async def replace_hop(self, hop: Hop, hops: tuple[Hop, ...], chain: Chain) -> None:
        self._drop(hop)
        self.hops[:1] = hops
        if not self._is_rival:
            self.session._hops = [*self.done, *self.hops]

    def forget_hop(self, hop: Hop) -> None:
        self._caches.pop(hop.span, None)

    def rival(self, hop: Hop) -> _Step | None:
        if len(self.hops) > 1 and self._needs_history(self.hops[1]):
            return None  # the hop is to give the next one its history, too
        rival = copy.copy(self)
        rival._is_rival = True
        rival.hops, rival.done, rival._caches = [hop], [], {}
        rival.inputs, rival.histories, rival.recorded = {}, dict(self.histories), {}
        return rival

    def adopt(self, hop: Hop, rival: Work) -> None:
        assert isinstance(rival, _Step)
        self._drop(hop)
        self._caches.update(rival._caches)
        self.inputs.update(rival.inputs)
        self.histories.update(rival.histories)
        self.recorded.update(rival.recorded)
        self.outputs = rival.outputs
        self.hops.pop(0)
        self.done += rival.done
        self.session._hops = [*self.done, *self.hops]

    def discard(self) -> None:
        for hop in (*self.done, *self.hops):
            self._drop(hop)

    def num_past_tokens(self) -> int:
        return self._position - self._start

    def _drop(self, hop: Hop) -> None:
        if (cache := self._caches.pop(hop.span, None)) is not None:
            self.session._free(hop, cache)

    def _needs_history(self, hop: Hop) -> bool:
        history = self.histories.get(hop.span.start)
        return self._position > self._start and (history is None or len(history) < self._position)

    async def _feed(
        self, hop: Hop, cache: _PeerCache, chain: Chain, connection: ClientConnection, *, keep_all: bool
    ) -> tuple[Named, Named]:
        """Send what the hop has not seen; outputs of the old tokens (for ``keep_all``), and of the new ones."""
        behind = self._position - self._start if cache.position == 0 else 0
        assert behind or not keep_all, "only a hop that is fed its whole history can give one to the next"
        call = self._step.call
        self.session.swarm.stats.replayed_tokens += behind
        chunks = self._step.chunks(
            behind,
            max(1, chain.swarm.config.max_replay_tokens // max(1, call.rows)),
            is_exact=self._stack.replays_steps,
            is_apart=bool(call.record),
        )
        old: list[Named] = []
        new: list[Named] = []
        for start, end in chunks:
            wanted = end - start if keep_all else max(0, min(end - start, end - self._position))
            outputs = await self._send(hop, cache, chain, connection, (start, end), wanted)
            num_old = max(0, wanted - max(0, end - max(start, self._position)))
            if num_old:
                old.append(self._cut(outputs, 0, num_old))
            if wanted > num_old:
                new.append(self._cut(outputs, num_old, None) if num_old else outputs)
        return self._joined(old), self._joined(new)

    def _cut(self, tensors: Named, start: int, end: int | None) -> Named:
        specs = self._stack.carried
        return {name: slice_tokens(tensor, specs[name], start, end).contiguous() for name, tensor in tensors.items()}

    def _joined(self, parts: list[Named]) -> Named:
        if len(parts) < 2:
            return parts[0] if parts else {}
        specs = self._stack.carried
        return {name: concat([part[name] for part in parts], specs[name]) for name in parts[0]}

    def _entry(self, hop: Hop, start: int, end: int) -> Named:
        """What enters the hop for tokens ``[start, end)``."""
        if start >= self._position:
            if (start, end) == (self._position, self._position + self._step.call.num_tokens):
                return self.outputs
            return self._cut(self.outputs, start - self._position, end - self._position)
        old = self.histories[hop.span.start].slice(start, min(end, self._position))
        old = {name: self._within(name, tensor.contiguous(), end) for name, tensor in old.items()}
        if end <= self._position:
            return old
        return self._joined([old, self._cut(self.outputs, 0, end - self._position)])

    def _within(self, name: str, tensor: torch.Tensor, end: int) -> torch.Tensor:
        """Of states that are indices of tokens, none of those that came later: the causal mask hides them anyway."""
        return tensor.clamp(max=end - 1) if name in self._stack.carried and not tensor.is_floating_point() else tensor

    async def _send(
        self,
        hop: Hop,
        cache: _PeerCache,
        chain: Chain,
        connection: ClientConnection,
        tokens: tuple[int, int],
        num_outputs: int,
    ) -> Named:
        ops, indices, start = _cache_ops(cache)
        past: Named = {}
        if cache.position == 0:
            past, start = select_layers(self.session._past, self._stack.layers_of(hop.span)), self._start
        assert start == tokens[0], "the peer is where we think it is"
        end = tokens[1]
        num_tokens = end - start
        entry = self._entry(hop, start, end)
        shared = self._step.tensors(start, end, self._stack.side_specs(hop.span))
        tensors = {**entry, **indices, **shared, **past}
        mask, is_whole = self._mask(start, end, bool(ops) or cache.position == 0)
        if mask is not None and not any(name.startswith("attention_mask") for name in shared):
            tensors["attention_mask"] = mask
        call = self._step.call
        adapter = call.adapter_of(hop.span)
        meta = call.meta(num_tokens)
        if end <= self._position:
            meta = msgspec.structs.replace(meta, record=())
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
            call=meta,
            mask_is_whole=is_whole,
            create=cache.step_id == 0,
            num_outputs=None if num_outputs == num_tokens else num_outputs,
        )
        kind = "decode" if num_tokens == 1 else "prefill"
        try:
            replies = await chain.request(hop, kind, message, tensors, connection, adapter)
            recorded = {name: replies.pop(name) for name in list(replies) if name.startswith("record.")}
            output = chain.check_outputs(hop, replies, entry, meta, num_outputs)
        except BaseException:
            self.forget_hop(hop)  # whether the peer did the step is not known: a new session, by replay
            self.session._free(hop, cache)
            raise
        self.recorded.update(recorded)
        cache.position, cache.step_id = end, cache.step_id + 1
        cache.pending.clear()
        return output

    def _mask(self, start: int, end: int, is_whole: bool) -> tuple[torch.Tensor | None, bool]:
        """The mask columns to send for tokens start..end: the new ones when the peer has the others already."""
        mask = self._step.attention_mask
        if mask is None:
            return None, False
        old = self._step.old.attention_mask
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
