"""One step of a session: through the hops in order, feeding those that are behind.

A hop is behind when its peer's KV cache lacks old tokens: it is new, its peer lost the cache, or the cache is a copy
that stopped earlier. It is fed them from the history of the boundary where it begins. A boundary may have no history
(the cache behind it was copied from peer to peer, or the client keeps none there): then the hop before it starts
afresh, and its outputs are that history.
"""

from __future__ import annotations

import copy

import msgspec
import torch

from remote_modules.client.call import Named
from remote_modules.client.chain import Chain, Work
from remote_modules.client.hop_caches import HopCaches, PeerCache
from remote_modules.client.owner_history import StepInputs
from remote_modules.model.past import length_of, select_layers
from remote_modules.model.tensors import concat, slice_tokens
from remote_modules.net.client_connection import ClientConnection
from remote_modules.plan.routing import Demand, Hop
from remote_modules.wire import messages

__all__ = ["Step"]

MAX_TAIL_STEPS = 64


class Step(Work):
    """One step under way.

    Args:
        session: what the step goes by; its histories are not changed.
        inputs: hidden states and what else enters the first hop.
        step: what the owner gave.

    Attributes:
        outputs: of the last hop that is done, for the new tokens.
        recorded: ``record.<kind>.<block>`` of all hops that are done.
        inputs: what entered each hop, by its first block.
        histories: of the session, and those of boundaries that are new.
    """

    def __init__(self, session: HopCaches, inputs: Named, step: StepInputs, demand: Demand) -> None:
        self.session = session
        self.demand = demand
        self.hops = list(session.hops)
        self.done: list[Hop] = []
        self.outputs = inputs
        self.recorded: Named = {}
        self.inputs: dict[int, Named] = {}
        self.histories = dict(session.histories)
        self._position = session.position
        self._start = length_of(session.past)
        self._step = step
        self._stack = session.swarm.stack

    async def do_hop(self, hop: Hop, chain: Chain) -> None:
        if self._step_back():
            return
        cache = self.session.caches.setdefault(hop.span, PeerCache())
        if cache.position:  # a peer that is leaving serves what it has until that is elsewhere (`client.copies`)
            connection = await chain.swarm.connect(hop.peer_id, "step")
        else:
            connection = await chain.connect(hop, "step", self.demand)
        if cache.replaces:
            connection.send(messages.CloseSession(cache.replaces))
            cache.replaces = ""
        start, end = hop.span.start, hop.span.end
        if self._position == self._start and self.session.keeps_history(start):
            self.histories.setdefault(start, self.session.new_history())
        is_next_without = len(self.hops) > 1 and self._lacks_history(self.hops[1])
        old, new = await self._feed(hop, cache, chain, connection, keep_all=is_next_without)
        self.inputs[start] = self.outputs
        if is_next_without:
            self.histories[end] = self.session.new_history()
            self.histories[end].append(old, self._position - self._start)
        self.outputs = new
        self.done.append(self.hops.pop(0))

    async def replace_hop(self, hop: Hop, hops: tuple[Hop, ...], chain: Chain) -> None:
        self._free(hop)
        buddy = self.session.promote(hop.span)
        if buddy is not None:
            hops = (buddy.hop,)
            self.session.caches[hop.span] = buddy.cache
            chain.swarm.stats.promotions += 1
        self.hops[:1] = hops
        self.session.hops = [*self.done, *self.hops]

    def forget_hop(self, hop: Hop) -> None:
        self.session.caches.pop(hop.span, None)

    def rival(self, hop: Hop) -> Step | None:
        if hop.span.start not in self.histories or (len(self.hops) > 1 and self._lacks_history(self.hops[1])):
            return None  # it could not be fed, or would have to give the next hop its history, too
        rival = copy.copy(self)
        rival.session = copy.copy(self.session)
        rival.session.hops, rival.session.caches = [hop], {}
        rival.hops, rival.done = [hop], []
        rival.inputs, rival.histories, rival.recorded = {}, dict(self.histories), {}
        return rival

    def adopt(self, hop: Hop, rival: Work) -> None:
        assert isinstance(rival, Step)
        self._free(hop)
        self.session.caches.update(rival.session.caches)
        self.inputs.update(rival.inputs)
        self.histories.update(rival.histories)
        self.recorded.update(rival.recorded)
        self.outputs = rival.outputs
        self.hops.pop(0)
        self.done += rival.done
        self.session.hops = [*self.done, *self.hops]

    def discard(self) -> None:
        self.session.drop_peers()

    def num_past_tokens(self) -> int:
        return self._position - self._start

    def _free(self, hop: Hop) -> None:
        cache = self.session.caches.pop(hop.span, None)
        if cache is not None:
            self.session.free(hop, cache)

    def _step_back(self) -> bool:
        """Let hops start afresh whose outputs for old tokens are needed again; whether some were done already."""
        hops = [*self.done, *self.hops]
        earliest = len(self.done)
        for index in range(len(hops) - 1, 0, -1):
            before = hops[index - 1]
            if not self._lacks_history(hops[index]):
                continue
            if index <= len(self.done) or self._behind(before) < self._position - self._start:
                self._free(before)
            earliest = min(earliest, index - 1)
        if earliest == len(self.done):
            return False
        self.outputs = self.inputs[self.done[earliest].span.start]
        self.hops = hops[earliest:]
        del self.done[earliest:]
        return True

    def _behind(self, hop: Hop) -> int:
        """Old tokens that the hop's peer lacks."""
        cache = self.session.caches.get(hop.span)
        if cache is None or cache.position == 0 or not self._step.may_begin_at(cache.next_position):
            return self._position - self._start
        return max(0, self._position - cache.next_position)  # one that is done holds the new tokens too

    def _lacks_history(self, hop: Hop) -> bool:
        return hop.span.start not in self.histories and self._behind(hop) > 0

    async def _feed(
        self, hop: Hop, cache: PeerCache, chain: Chain, connection: ClientConnection, *, keep_all: bool
    ) -> tuple[Named, Named]:
        """Send what the hop has not seen; outputs of the old tokens (for ``keep_all``), and of the new ones."""
        behind = self._behind(hop)
        if cache.position and behind and behind == self._position - self._start:
            self._free(hop)  # what it holds is of no use
            cache = self.session.caches.setdefault(hop.span, PeerCache())
        call = self._step.call
        self.session.swarm.stats.replayed_tokens += behind
        is_exact = self._stack.replays_steps or chain.swarm.config.exact_replay or self._is_short(behind)
        chunks = self._step.chunks(
            behind,
            max(1, chain.swarm.config.max_replay_tokens // max(1, call.rows)),
            is_exact=is_exact,
            is_apart=bool(call.record),
        )
        old: list[Named] = []
        new: list[Named] = []
        for start, end in chunks:
            wanted = end - start if keep_all else max(0, min(end - start, end - self._position))
            outputs = await self._send(
                hop, cache, chain, connection, (start, end), wanted, is_merged=behind > 0 and not is_exact
            )
            num_old = max(0, wanted - max(0, end - max(start, self._position)))
            if num_old:
                old.append(self._cut(outputs, 0, num_old))
            if wanted > num_old:
                new.append(self._cut(outputs, num_old, None) if num_old else outputs)
        return self._joined(old), self._joined(new)

    def _is_short(self, behind: int) -> bool:
        """Whether a copy lacks a few last steps only: made again one by one, they give the very same cache."""
        if not 0 < behind < self._position - self._start:
            return False
        return len(self._step.old.step_ends(after=self._position - behind)) <= MAX_TAIL_STEPS

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
        cache: PeerCache,
        chain: Chain,
        connection: ClientConnection,
        tokens: tuple[int, int],
        num_outputs: int,
        *,
        is_merged: bool,
    ) -> Named:
        ops, indices = cache.ops()
        past, start = {}, cache.next_position
        if cache.position == 0:
            past, start = select_layers(self.session.past, self._stack.layers_of(hop.span)), self._start
        assert start == tokens[0], "the peer is where we think it is"
        end = tokens[1]
        num_tokens = end - start
        entry = self._entry(hop, start, end)
        shared = self._step.tensors(start, end, self._stack.side_specs(hop.span))
        tensors = {**entry, **indices, **shared, **past}
        mask, is_whole = self._mask(start, end, bool(ops) or cache.position == 0 or cache.is_copy)
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
            version=cache.version if cache.is_copy else None,
        )
        kind = "decode" if num_tokens == 1 else "prefill"
        try:
            replies = await chain.requests.send(hop, kind, message, tensors, connection, adapter, is_merged=is_merged)
            recorded = {name: replies.pop(name) for name in list(replies) if name.startswith("record.")}
            recorded = chain.answers.check_recorded(hop, recorded, meta)
            output = chain.answers.check_outputs(hop, replies, entry, meta, num_outputs)
        except BaseException:
            self.forget_hop(hop)  # whether the peer did the step is not known: a new session, by replay
            self.session.free(hop, cache)
            raise
        self.recorded.update(recorded)
        cache.position, cache.step_id, cache.is_copy = end, cache.step_id + 1, False
        cache.version += len(ops)
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
