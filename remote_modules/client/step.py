"""One step of a session: through the hops in order, feeding those that are behind.

A hop is behind when its peer's KV cache lacks old tokens: it is new, its peer lost the cache, or the cache is a copy
that stopped earlier. It is fed them from the history of the boundary where it begins. A boundary may have no history
(the cache behind it was copied from peer to peer, or the client keeps none there): then the hop before it starts
afresh, and its outputs are that history.
"""

from __future__ import annotations

import asyncio
import copy
from functools import partial

import torch

from remote_modules.client.call import Named
from remote_modules.client.chain import Chain, Work
from remote_modules.client.direct import Flight, Flights, addressed, can_forward, prompt_chunks
from remote_modules.client.hop_caches import HopCaches, PeerCache
from remote_modules.client.lanes import close_session, step_lane
from remote_modules.client.owner_history import StepInputs
from remote_modules.client.remote_head import without_logits
from remote_modules.client.stats import HopTiming
from remote_modules.client.step_requests import StepRequests
from remote_modules.errors import PeerError
from remote_modules.model.past import length_of
from remote_modules.model.tensors import concat_all, slice_tokens
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
        self._requests = StepRequests(session, step)
        self._flights = Flights(session)
        self._unlinked: dict[Hop, PeerError] = {}  # those whose peers could not be reached

    async def launch(self, chain: Chain) -> None:
        """Send all hops their requests now, if some can send their outputs on to the next (`client.direct`)."""
        hops = self.hops
        if len(hops) < 2 or self._step.call.record or any(self._behind(hop) for hop in hops):
            return
        links = await self._links(chain)
        if not can_forward(self.session, hops, links):
            return
        ranges = prompt_chunks(self.session, hops, self._step)
        for index, (hop, link) in enumerate(zip(hops, links, strict=True)):
            if link is None:
                continue
            cache, adapter = self.session.caches[hop.span], self._step.call.adapter_of(hop.span)
            for part, tokens in enumerate(ranges):
                entry = {} if index else self._entry(hop, *tokens)
                message, tensors = self._requests.build(link.new_request_id(), hop, cache, tokens, None, entry)
                cache = cache.after(message)
                message = addressed(self.session, hops, links, index, message, part)
                flight = chain.requests.launch(hop, message, tensors, link, adapter)
                self._flights.add(flight)
                if index + 1 < len(hops):
                    self._flights.link(flight, hops[index + 1])
            if index == 0:
                await asyncio.sleep(0)  # it leaves while we make the others

    def ground(self) -> None:
        """Nobody waits any more for what was sent ahead."""
        self._flights.ground()

    async def do_hop(self, hop: Hop, chain: Chain) -> None:
        if self._step_back():
            return
        cache = self.session.cache_of(hop)
        flights = self._flights.take(cache.session_id)
        start, end = hop.span.start, hop.span.end
        if self._position == self._start and self.session.keeps_history(start):
            self.histories.setdefault(start, self.session.new_history())
        is_next_without = len(self.hops) > 1 and self._lacks_history(self.hops[1])
        if not flights:
            connection = await self._connect(hop, cache, chain)
            old, new = await self._feed(hop, cache, chain, connection, keep_all=is_next_without)
            self._flights.brought.clear()
        else:
            assert not is_next_without, "where the next hop needs old outputs, `_step_back` has freed this one"
            old, new = {}, await self._land_all(flights, hop, cache, chain)
        self.inputs[start] = self.outputs
        if is_next_without:
            self.histories[end] = self.session.new_history()
            self.histories[end].append(old, self._position - self._start)
        self.outputs = new
        self.done.append(self.hops.pop(0))

    async def replace_hop(self, hop: Hop, hops: tuple[Hop, ...], chain: Chain) -> None:
        self._free(hop)
        buddy = self.session.promote(hop)
        if buddy is not None:
            hops = (buddy.hop,)
            self.session.caches[hop.span] = buddy.cache
            chain.swarm.stats.promotions += 1
        self.hops[:1] = hops
        self.session.hops = [*self.done, *self.hops]

    def forget_hop(self, hop: Hop) -> None:
        self._forget(hop)

    def rival(self, hop: Hop) -> Step | None:
        if hop.span.start not in self.histories or (len(self.hops) > 1 and self._lacks_history(self.hops[1])):
            return None  # it could not be fed, or would have to give the next hop its history, too
        rival = copy.copy(self)
        rival.session = copy.copy(self.session)
        rival.session.hops, rival.session.caches = [hop], {}
        rival.hops, rival.done = [hop], []
        rival.inputs, rival.histories, rival.recorded = {}, dict(self.histories), {}
        rival._flights, rival._unlinked = Flights(rival.session), {}
        return rival

    def adopt(self, hop: Hop, rival: Work) -> None:
        assert isinstance(rival, Step)
        self._free(hop)
        self.session.caches.update(rival.session.caches)
        self.inputs.update(rival.inputs)
        self.histories.update(rival.histories)
        self.recorded = without_logits(self.recorded) | rival.recorded
        self.outputs = rival.outputs
        self._flights.brought.clear()
        self.hops.pop(0)
        self.done += rival.done
        self.session.hops = [*self.done, *self.hops]

    def discard(self) -> None:
        self.session.drop_peers()

    def num_past_tokens(self) -> int:
        return self._position - self._start

    def _free(self, hop: Hop) -> None:
        cache = self._forget(hop)
        if cache is not None:
            self.session.free(hop, cache)

    def _forget(self, hop: Hop) -> PeerCache | None:
        cache = self.session.caches.pop(hop.span, None)
        if cache is not None:
            self._flights.drop(cache.session_id)
        return cache

    async def _connect(self, hop: Hop, cache: PeerCache, chain: Chain) -> ClientConnection:
        if (error := self._unlinked.pop(hop, None)) is not None:
            raise error
        lane = step_lane(chain.swarm, hop.peer_id, cache.session_id, self._num_bytes(hop))
        connection = await chain.connect(hop, lane, self.demand, has_cache=cache.position > 0)
        if cache.replaces:
            close_session(chain.swarm, hop.peer_id, cache.replaces)
            cache.replaces = ""
        return connection

    async def _links(self, chain: Chain) -> list[ClientConnection | None]:
        """To all hops; where some have to be dialled, that is done at once."""
        if all(chain.swarm.open_connection(hop.peer_id, "step") for hop in self.hops):
            return [await self._link(hop, chain) for hop in self.hops]
        return await asyncio.gather(*(self._link(hop, chain) for hop in self.hops))

    async def _link(self, hop: Hop, chain: Chain) -> ClientConnection | None:
        """A connection over which a request can be sent ahead; None where that has to wait for its turn."""
        cache = self.session.cache_of(hop)
        try:
            connection = await self._connect(hop, cache, chain)
        except PeerError as exc:
            self._unlinked[hop] = exc  # raised when its turn comes
            return None
        is_rounded_here = not (connection.knows_thin_wire or self.session.coding.is_plain)  # what it puts out
        return connection if connection.knows_direct and not is_rounded_here else None

    async def _land_all(self, flights: list[Flight], hop: Hop, cache: PeerCache, chain: Chain) -> Named:
        """The outputs of a hop whose requests were sent ahead."""
        parts = []
        try:
            for flight in flights:
                start, entry = flight.message.position, self.outputs
                if len(flights) > 1:
                    entry = self._entry(hop, start, start + flight.message.call.num_tokens)
                parts.append(await self._land(flight, hop, cache, chain, entry))
        except BaseException:
            for flight in flights:
                flight.abandon()
            self._free(hop)  # whether the peer did the step is not known: a new session, by replay
            if flights[len(parts)].output is not None:  # it gave nonsense, and sent that on
                for later in self.hops[1:]:
                    if (known := self.session.caches.get(later.span)) and known.session_id in self._flights:
                        self._free(later)
            raise
        return self._joined(parts)

    async def _land(self, flight: Flight, hop: Hop, cache: PeerCache, chain: Chain, entry: Named) -> Named:
        message, brought = flight.message, self._flights.brought
        is_brought = message.awaits_input and flight.key in brought
        push = partial(self._push_again, flight, entry) if is_brought else None
        if message.awaits_input and not is_brought:
            self._flights.push(flight, entry)
        adapter = self._step.call.adapter_of(hop.span)
        num_bytes = self.session.coding.num_bytes(entry, message.call.num_tokens) if message.awaits_input else 0
        kind = "decode" if message.call.num_tokens == 1 else "prefill"
        offered = adapter.name if adapter is not None and adapter.content is None else ""
        replies = await chain.requests.land(flight, kind, push=push, num_bytes=num_bytes, offered=offered)
        outputs = self._taken(hop, cache, chain, message, replies, entry)
        if is_brought:
            self._note_way(hop, chain.requests.timings[-1], is_late=flight.key not in brought)
        self._note_edge(hop, cache, flight)
        return outputs

    def _push_again(self, flight: Flight, entry: Named) -> None:
        """The input of a hop may have been lost on its way from the one before."""
        self._flights.brought.discard(flight.key)
        self._flights.push(flight, entry, again=True)

    def _note_way(self, hop: Hop, timing: HopTiming, *, is_late: bool) -> None:
        """Whether what the hop before sent on was there in time."""
        edges, before = self.session.swarm.edges, self.done[-1]
        if not is_late or timing.queue_s + timing.compute_s > timing.wire_s:  # or the hop was slow
            edges.work(before.peer_id, hop.peer_id)
        else:
            edges.lose(before.peer_id, hop.peer_id, now_s=self.session.swarm.clock())

    def _note_edge(self, hop: Hop, cache: PeerCache, flight: Flight) -> None:
        swarm, message, output = self.session.swarm, flight.message, flight.output
        assert output is not None
        cache.knows_key = cache.knows_key or bool(message.client_key)
        cache.forwards_to = ""
        if message.forward_to is not None and output.is_forwarded:
            cache.forwards_to = message.forward_to.session_id
            self._flights.brought.add((message.forward_to.session_id, message.forward_to.step_id))
            swarm.stats.forwarded += 1
        elif message.forward_to is not None:
            swarm.edges.miss(hop.peer_id, self.hops[1].peer_id, now_s=swarm.clock())

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
        self._flights.brought.clear()
        self.hops = hops[earliest:]
        del self.done[earliest:]
        return True

    def _num_bytes(self, hop: Hop) -> int:
        """What enters the hop, about."""
        return self.demand.bytes_per_token * self.demand.rows * (self.demand.num_tokens + self._behind(hop))

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
            cache = self.session.cache_of(hop)
        call = self._step.call
        if not (behind or self._step.cuts):
            tokens = (self._position, self._position + call.num_tokens)
            return {}, await self._send(hop, cache, chain, connection, tokens, call.num_tokens, is_merged=False)
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
        return concat_all(parts, self._stack.carried)

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
        entry = self._entry(hop, *tokens)
        num_tokens = tokens[1] - tokens[0]
        wanted = None if num_outputs == num_tokens else num_outputs
        message, tensors = self._requests.build(connection.new_request_id(), hop, cache, tokens, wanted, entry)
        kind = "decode" if num_tokens == 1 else "prefill"
        adapter = self._step.call.adapter_of(hop.span)
        try:
            replies = await chain.requests.send(hop, kind, message, tensors, connection, adapter, is_merged=is_merged)
            return self._taken(hop, cache, chain, message, replies, entry)
        except BaseException:
            self.forget_hop(hop)  # whether the peer did the step is not known: a new session, by replay
            self.session.free(hop, cache)
            raise

    def _taken(
        self, hop: Hop, cache: PeerCache, chain: Chain, message: messages.StepRequest, replies: Named, entry: Named
    ) -> Named:
        """The outputs of a request that the peer has done, once they can be true."""
        call = message.call
        recorded = {name: replies.pop(name) for name in list(replies) if name.startswith("record.")}
        recorded = chain.answers.check_recorded(hop, recorded, call)
        output = chain.answers.check_outputs(hop, replies, entry, call, message.num_outputs)
        self.recorded = without_logits(self.recorded) | recorded
        cache.position, cache.step_id, cache.is_copy = message.position + call.num_tokens, cache.step_id + 1, False
        cache.version += len(message.ops)
        cache.pending.clear()
        return output
