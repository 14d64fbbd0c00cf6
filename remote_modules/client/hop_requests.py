"""The requests of one pass: each is sent to the peer of its hop, timed, and learned from."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import torch

from remote_modules.client.adapters import HopAdapter
from remote_modules.client.call import Named
from remote_modules.client.coding import Coding
from remote_modules.client.direct import Flight
from remote_modules.client.hedging import Hedge
from remote_modules.client.stats import HopTiming
from remote_modules.client.swarm import Swarm
from remote_modules.errors import LocalProtocolError, PeerTimeout
from remote_modules.net.client_connection import ClientConnection
from remote_modules.plan.routing import Hop
from remote_modules.wire.framing import Buffer
from remote_modules.wire.messages import AdapterRequest, CallMeta, Output, Request, StepRequest
from remote_modules.wire.tensors import body_bytes, encode_tensors

__all__ = ["HopRequests"]


class HopRequests:
    """Of one chain.

    Args:
        deadline_s: of the pass.
        coding: of its tensors.

    Attributes:
        hedge: of the hop that is being done.
        output: the latest answer.
        timings: of all answers.
    """

    def __init__(self, swarm: Swarm, deadline_s: float, coding: Coding) -> None:
        self.hedge: Hedge[Any] | None = None
        self.output: Output | None = None
        self.timings: list[HopTiming] = []
        self._swarm = swarm
        self._deadline_s = deadline_s
        self._coding = coding

    async def send(
        self,
        hop: Hop,
        kind: str,
        message: Request,
        tensors: Named,
        connection: ClientConnection,
        adapter: HopAdapter | None = None,
        *,
        is_merged: bool = False,
    ) -> Named:
        """Send one request of ``hop`` and read its tensors; learns from the time it took.

        Args:
            adapter: what the peer lacks of it goes along.
            is_merged: whether a step holds the tokens of several steps.

        Raises:
            PeerError: no usable answer.
            LocalProtocolError: the request is larger than we, or the peer, allow.
        """
        if adapter is None:
            return await self._request(hop, kind, message, tensors, connection, is_merged=is_merged)
        offered = adapter.name if adapter.content is None else ""

        async def send_one(call: CallMeta, brought: Named, *, is_first: bool) -> Named:
            request_id = message.request_id if is_first else connection.new_request_id()
            changed = msgspec.structs.replace(message, call=call, request_id=request_id)
            every = {**tensors, **brought}
            return await self._request(hop, kind, changed, every, connection, offered, is_merged=is_merged)

        return await self._swarm.uploads.send(
            connection, adapter, message.call, send_one, partial(self._bring, connection)
        )

    def launch(
        self,
        hop: Hop,
        message: StepRequest,
        tensors: Named,
        connection: ClientConnection,
        adapter: HopAdapter | None = None,
    ) -> Flight:
        """Send a request of which only `land` awaits the answer. Args: as of `send`."""
        flight = Flight(hop, message, connection)
        if adapter is None:
            flight.begin(self._fly(flight, message, tensors))
            return flight

        async def send_one(call: CallMeta, brought: Named, *, is_first: bool) -> Named:
            request_id = message.request_id if is_first else connection.new_request_id()
            changed = msgspec.structs.replace(message, call=call, request_id=request_id)
            return await self._fly(flight, changed, {**tensors, **brought})

        bring = partial(self._bring, connection)
        flight.begin(self._swarm.uploads.send(connection, adapter, message.call, send_one, bring))
        return flight

    async def _fly(self, flight: Flight, message: StepRequest, tensors: Named) -> Named:
        swarm = self._swarm
        coded, body = self._encoded(message, tensors, flight.connection)
        flight.num_bytes = sum(map(len, body))
        limit_s = max(0.1, self._deadline_s - swarm.clock())  # of each hop alone, `land` sees to that
        coded = msgspec.structs.replace(coded, timeout_s=limit_s)
        try:
            flight.output, replies = await flight.connection.request(coded, body, timeout_s=limit_s)
        finally:
            swarm.count_bytes(flight.connection)
        return self._coding.settle(message, flight.output, replies)

    async def land(
        self, flight: Flight, kind: str, *, push: Callable[[], object] | None, num_bytes: int, offered: str
    ) -> Named:
        """Read the answer of a request that was sent ahead, and whose input is there or on its way; learns from it.

        Args:
            push: sends the input again, in case it was lost; None where it came with the request.
            num_bytes: of the input.
            offered: adapter of the call that peers offer, or "".

        Raises:
            PeerError: no usable answer.
        """
        swarm, hop, call, hedge, router = self._swarm, flight.hop, flight.message.call, self.hedge, self._swarm.router
        work, began_s = float(call.rows * call.num_tokens * len(hop.span)), swarm.clock()
        limit_s = router.timeout_s(hop, kind, work, flight.num_bytes + num_bytes, adapter=offered)
        limit_s = min(limit_s, max(0.1, self._deadline_s - began_s))
        patience_s, loop = router.patience_s(hop, kind, work), asyncio.get_running_loop()
        timers = [loop.call_later(limit_s, flight.expire, limit_s)]
        if push is not None:
            timers.append(loop.call_later(min(patience_s, limit_s / 2) / 2, push))
        try:
            if hedge is not None:
                hedge.request_begins(patience_s, flight.abandon)
            replies = await flight.answer
        except PeerTimeout:
            router.estimator.miss(hop.peer_id)
            raise
        finally:
            for timer in timers:
                timer.cancel()
            if hedge is not None:
                hedge.request_ends()
        assert flight.output is not None
        self.output, took_s = flight.output, swarm.clock() - began_s
        router.observe_direct(hop, kind, work, flight.output, took_s=took_s)
        worked_s = flight.output.queue_s + flight.output.compute_s
        self._note(hop, call.num_tokens, max(took_s, worked_s), flight.output)  # it may have begun before its turn
        return replies

    async def _bring(self, connection: ClientConnection, parts: dict[bytes, torch.Tensor]) -> None:
        swarm = self._swarm
        metas, body = encode_tensors({f"adapter.{number}": tensor for number, tensor in enumerate(parts.values())})
        timeout_s = min(swarm.config.copy_timeout_s, max(0.1, self._deadline_s - swarm.clock()))
        message = AdapterRequest(connection.new_request_id(), metas, timeout_s, tuple(parts))
        try:
            await connection.request(message, body, timeout_s=timeout_s)
        finally:
            swarm.count_bytes(connection)

    async def _request(
        self,
        hop: Hop,
        kind: str,
        message: Request,
        tensors: Named,
        connection: ClientConnection,
        offered: str = "",
        *,
        is_merged: bool = False,
    ) -> Named:
        swarm = self._swarm
        num_tokens = message.call.num_tokens
        work = float(message.call.rows * num_tokens * len(hop.span))
        message, body = self._encoded(message, tensors, connection, is_merged=is_merged)
        num_bytes = sum(map(len, body))
        hedge, router = self.hedge, swarm.router
        alone_s = router.timeout_s(hop, kind, work, num_bytes, adapter=offered)
        sent = router.send(hop, kind, work, alone_s)
        try:
            timeout_s = min(alone_s + sent.ahead_s, max(0.1, self._deadline_s - swarm.clock()))
            message = msgspec.structs.replace(message, timeout_s=math.ceil(timeout_s))  # an integer is shorter
            if hedge is not None:
                patience_s = sent.ahead_s + router.patience_s(hop, kind, work)
                hedge.request_begins(patience_s, partial(connection.abandon, message.request_id))
            output, replies = await connection.request(message, body, timeout_s=timeout_s)
            self.output = output
            took_s, moved = swarm.clock() - sent.began_s, num_bytes + body_bytes(output.tensors)
            router.observe(hop, kind, work, output, num_bytes=moved, took_s=took_s, rtt_s=connection.rtt_s, sent=sent)
        except PeerTimeout:
            router.estimator.miss(hop.peer_id)
            raise
        finally:
            router.requests.end(sent, now_s=swarm.clock())
            if hedge is not None:
                hedge.request_ends()
            swarm.count_bytes(connection)
        self._note(hop, num_tokens, took_s, output)
        return self._coding.settle(message, output, replies, is_merged=is_merged)

    def _encoded(
        self, message: Request, tensors: Named, connection: ClientConnection, *, is_merged: bool = False
    ) -> tuple[Request, list[Buffer]]:
        message, body = self._coding.encode(message, tensors, connection, is_merged=is_merged)
        num_bytes, limit = sum(map(len, body)), self._swarm.config.max_request_bytes
        if num_bytes > limit:  # the answer, of like size, would be refused here and look like the peer's fault
            text = f"request of {num_bytes} bytes exceeds max_request_bytes={limit}; send fewer tokens"
            raise LocalProtocolError(text)
        return message, body

    def _note(self, hop: Hop, num_tokens: int, took_s: float, output: Output) -> None:
        self.timings.append(
            HopTiming(
                hop=hop,
                num_tokens=num_tokens,
                total_s=took_s,
                queue_s=output.queue_s,
                compute_s=output.compute_s,
            )
        )
