"""Direct hops: all hops get their requests at once, and each sends its outputs on to the next one, beside the client.

So a token is under way for N+1 one-way delays instead of 2N. Nothing else changes: every hop answers the client, its
outputs become the history of the next boundary, and the retry loop (`client.chain`) goes from hop to hop as ever. A
request that was sent ahead is a `Flight`; when its hop's turn comes its answer is awaited, and is there or nearly so.
Where a hop could not send its outputs on, where it failed, and where they got lost, the client sends them itself: a
flight waits for its input, whoever brings it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine, Sequence
from typing import Any

import msgspec

from remote_modules.client.call import Named
from remote_modules.client.hop_caches import HopCaches, PeerCache
from remote_modules.client.owner_history import StepInputs
from remote_modules.errors import LocalProtocolError, PeerTimeout
from remote_modules.net.client_connection import ClientConnection
from remote_modules.peers import short_id
from remote_modules.plan.routing import Hop
from remote_modules.wire.messages import Destination, Output, Push, StepRequest

__all__ = ["Flight", "Flights", "addressed", "can_forward", "prompt_chunks"]

MAX_CHUNKS = 16  # of one step: a peer takes 64 requests of one connection at once


class Flights:
    """The requests of one step that were sent ahead: of each hop one, or one for each chunk of a long prompt.

    Attributes:
        brought: (session, step) of those to which the hop before sent their input.
    """

    def __init__(self, session: HopCaches) -> None:
        self.brought: set[tuple[str, int]] = set()
        self._session = session
        self._pushed: set[tuple[str, int]] = set()
        self._flights: dict[str, list[Flight]] = {}

    def __contains__(self, session_id: str) -> bool:
        return session_id in self._flights

    def add(self, flight: Flight) -> None:
        self._flights.setdefault(flight.message.session_id, []).append(flight)

    def link(self, flight: Flight, target: Hop) -> None:
        """What ``flight`` does not send on to the next hop goes there from here as soon as it comes."""
        there = self._session.caches[target.span].session_id
        number = len(self._flights[flight.message.session_id]) - 1

        def pass_on(answer: asyncio.Future[Named]) -> None:
            later = self._flights.get(there, ())
            if answer.cancelled() or answer.exception() or number >= len(later):
                return
            if flight.output is not None and not flight.output.is_forwarded:
                self.push(later[number], answer.result())

        flight.answer.add_done_callback(pass_on)

    def take(self, session_id: str) -> list[Flight]:
        """Those of a hop whose turn has come."""
        return self._flights.pop(session_id, [])

    def drop(self, session_id: str) -> None:
        for flight in self.take(session_id):
            flight.abandon()

    def ground(self) -> None:
        """Nobody waits any more for what was sent ahead."""
        for session_id in list(self._flights):
            self.drop(session_id)

    def push(self, flight: Flight, inputs: Named, *, again: bool = False) -> None:
        """Send a flight its input ourselves, once or ``again``; it is ignored where it is there already."""
        if flight.key not in self._pushed or again:
            self._pushed.add(flight.key)
            push_input(self._session, flight, inputs)


class Flight:
    """A request that was sent before its hop's turn.

    Args:
        message: as it was planned; what travels may have another id.

    Attributes:
        answer: the tensors of the answer; may fail as a request does.
        output: what they came with.
        num_bytes: of the request.
    """

    def __init__(self, hop: Hop, message: StepRequest, connection: ClientConnection) -> None:
        self.hop = hop
        self.message = message
        self.connection = connection
        self.output: Output | None = None
        self.num_bytes = 0
        self.answer: asyncio.Future[Named] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[Named] | None = None

    @property
    def key(self) -> tuple[str, int]:
        return self.message.session_id, self.message.step_id

    def begin(self, work: Coroutine[Any, Any, Named]) -> None:
        self._task = asyncio.get_running_loop().create_task(work)
        self._task.add_done_callback(self._end)

    def abandon(self, error: Exception | None = None) -> None:
        """Nobody wants the answer any more; whoever awaits it gets ``error``."""
        if error is not None:
            self._fail(error)
        self.answer.cancel()
        if self._task is not None:
            self._task.cancel()

    def expire(self, limit_s: float) -> None:
        """The peer lives, but does not answer."""
        peer_id, start, end = self.hop.peer_id, self.message.start, self.message.end
        text = f"peer '{short_id(peer_id)}' did not answer a step of blocks {start}:{end} within {limit_s:.1f} s"
        self.abandon(PeerTimeout(text, peer_id=peer_id))

    def _fail(self, error: BaseException) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)
            self.answer.exception()  # seen, even when its turn never comes

    def _end(self, task: asyncio.Task[Named]) -> None:
        if task.cancelled():
            self.answer.cancel()
        elif (error := task.exception()) is not None:
            self._fail(error)
        elif not self.answer.done():
            self.answer.set_result(task.result())


def can_forward(session: HopCaches, hops: Sequence[Hop], links: Sequence[ClientConnection | None]) -> bool:
    """Whether any of ``hops`` may send its outputs on to the next one. Args: as of `addressed`."""
    return any(
        links[index] is not None and _is_open(session, hops[index], hops[index + 1], links[index + 1])
        for index in range(len(hops) - 1)
    )


def prompt_chunks(session: HopCaches, hops: Sequence[Hop], step: StepInputs) -> list[tuple[int, int]]:
    """Ranges of new tokens that go through the hops one after another: all in one, or a long prompt's chunks.

    Chunks follow each other without waiting, so all hops work at once. Their outputs are those of the whole prompt but
    for rounding, and only where a step can be made of several: attention without masks of its own.
    """
    stack, num_tokens, size = session.swarm.stack, step.call.num_tokens, session.swarm.config.prefill_chunk_tokens
    start, end = step.position, step.position + num_tokens
    is_plain = stack.is_croppable and not (stack.replays_steps or step.masks)
    if not size or not is_plain or num_tokens < 2 * size or any(step.call.adapter_of(hop.span) for hop in hops):
        return [(start, end)]
    size = max(size, -(-num_tokens // MAX_CHUNKS))
    step.cuts = (*range(start + size, end, size), end)
    return list(itertools.pairwise((start, *step.cuts)))


def addressed(
    session: HopCaches,
    hops: Sequence[Hop],
    links: Sequence[ClientConnection | None],
    index: int,
    message: StepRequest,
    part: int = 0,
) -> StepRequest:
    """The request of ``hops[index]``, which says where its input comes from and where its outputs go.

    Args:
        links: to the hops' peers; None where there is none, and no request is sent ahead.
        part: number of the chunk.
    """
    cache, goes_to = session.caches[hops[index].span], None
    if index + 1 < len(hops) and (link := links[index + 1]) is not None:
        goes_to = _destination(session, hops[index], cache, hops[index + 1], link, part)
    key = b"" if cache.knows_key or not (index or goes_to) else session.key.public_key
    is_new = cache.step_id == 0  # so for each chunk, which may come before the session is there
    return msgspec.structs.replace(message, awaits_input=index > 0, forward_to=goes_to, client_key=key, create=is_new)


def _destination(
    session: HopCaches, hop: Hop, cache: PeerCache, target: Hop, link: ClientConnection, part: int
) -> Destination | None:
    """Where the outputs of ``hop`` go; None if they have to come here first."""
    if not _is_open(session, hop, target, link) or link.record is None:
        return None
    there = session.caches[target.span]
    step_id = there.step_id + part
    if cache.forwards_to == there.session_id:
        return Destination(there.session_id, step_id)
    grant = session.key.grant(hop.peer_id, target.peer_id, there.session_id)
    return Destination(there.session_id, step_id, grant, link.record)


def _is_open(session: HopCaches, hop: Hop, target: Hop, link: ClientConnection | None) -> bool:
    swarm = session.swarm
    is_known = link is not None and link.record is not None
    return is_known and swarm.edges.is_open(hop.peer_id, target.peer_id, now_s=swarm.clock())


def push_input(session: HopCaches, flight: Flight, inputs: Named) -> None:
    """Send a flight its input ourselves; it is ignored where it is there already."""
    swarm, link, message = session.swarm, flight.connection, flight.message
    metas, body = session.coding.encode_inputs(message, inputs, link)
    grant = session.key.grant("", flight.hop.peer_id, message.session_id)
    timeout_s = swarm.config.max_request_timeout_s
    push = Push(link.new_request_id(), message.session_id, message.step_id, "", grant, metas, timeout_s)
    try:
        link.send(push, body)
    except LocalProtocolError as exc:
        flight.abandon(exc)
    swarm.count_bytes(link)
