"""The client's side of a connection: a hello that proves the peer, requests and their answers, and a heartbeat.

While answers are awaited, a peer that says nothing is pinged, and given up when it stays silent (`plan.deadlines`).
While sessions are open, a far peer is pinged in silences, so that the next step finds TCP ready (`net.warmth`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from remote_modules.errors import (
    PeerError,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
    RemoteProtocolError,
)
from remote_modules.identity import verify_hello
from remote_modules.net.connection import Connection
from remote_modules.net.loop import new_body
from remote_modules.net.warmth import TICK_S, Warmth
from remote_modules.peers import PeerId, short_id
from remote_modules.plan.deadlines import Beat, Heartbeat
from remote_modules.wire import messages
from remote_modules.wire.framing import Buffer
from remote_modules.wire.messages import Output, Refused
from remote_modules.wire.protocol import MessageReceived, Protocol, Role
from remote_modules.wire.tensors import decode_tensors

__all__ = ["LARGE_BYTES", "ClientConnection", "Reply"]

LARGE_BYTES = 64 * 1024  # others would notice that they wait for it
WARM_NONCE = 1  # of pings that ask for nothing: no round trip is measured by them

Reply: TypeAlias = tuple[Output, dict[str, torch.Tensor]]


class ClientConnection(Connection):
    """The client's side: a hello that proves the peer, then requests.

    Args:
        peer_id: the peer that must be at the other end.
        certificate_sha256: of the TLS certificate in use, or "" without TLS; the peer's hello is bound to it.
        silence_timeout_s: see `plan.deadlines.Heartbeat`.
        max_body_bytes: largest answer to accept.
        software: what we say we are.
        keep_warm_s: how long after the last step of a session silences are filled.
    """

    def __init__(
        self,
        peer_id: PeerId,
        *,
        nonce: bytes,
        certificate_sha256: str,
        silence_timeout_s: float,
        max_body_bytes: int,
        software: str,
        keep_warm_s: float = 0.0,
    ) -> None:
        protocol = Protocol(Role.CLIENT, max_body_bytes=max_body_bytes, new_body=new_body)
        super().__init__(protocol, on_message=self._receive, on_lost=self._lose)
        self.peer_id = peer_id
        self.is_draining = False
        self.on_draining: Callable[[], object] | None = None
        self.on_refused: Callable[[int], object] | None = None  # gets ids that no request of ours has
        self.record: messages.RecordProof | None = None  # of the peer, for others; not verified
        self.load = 0
        self.max_batch_tokens = 0  # that the peer takes in a request; 0 while unknown
        self.rtt_s: float | None = None
        self._loop = asyncio.get_running_loop()
        self._hello = messages.ClientHello(
            messages.VERSION_MAJOR, messages.VERSION_MINOR, nonce, max_body_bytes, software
        )
        self._certificate_sha256 = certificate_sha256
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self._answers: dict[int, asyncio.Future[MessageReceived]] = {}
        self._next_id = 0
        self._heart = Heartbeat(silence_timeout_s=silence_timeout_s)
        self._ticker: asyncio.TimerHandle | None = None
        self._num_large = 0  # steps under way
        self._warmth = Warmth(keep_warm_s)
        self._warmer: asyncio.TimerHandle | None = None
        self._ping_sent_s: float | None = None
        self._pongs: list[asyncio.Future[None]] = []

    @property
    def their_minor(self) -> int:
        """The minor version that the peer speaks."""
        return self._protocol.their_minor

    @property
    def knows_copies(self) -> bool:
        """Whether the peer takes `CopyRequest` and `ReadRequest`."""
        return self._protocol.their_minor >= messages.COPIES_SINCE_MINOR

    @property
    def knows_thin_wire(self) -> bool:
        """Whether the peer reads codecs with outliers, a last tensor without padding, and positions left out."""
        return self._protocol.their_minor >= messages.THIN_WIRE_SINCE_MINOR

    @property
    def knows_direct(self) -> bool:
        """Whether the peer takes inputs of steps by `Push`, and sends outputs on."""
        return self._protocol.their_minor >= messages.DIRECT_SINCE_MINOR

    @property
    def knows_adapter_parts(self) -> bool:
        """Whether the peer takes adapters part by part."""
        return self._protocol.their_minor >= messages.ADAPTER_PARTS_SINCE_MINOR

    @property
    def has_large_under_way(self) -> bool:
        """Whether a step is under way that others should not wait for."""
        return self._num_large > 0

    def has_other_sessions(self, session_id: str) -> bool:
        """Whether sessions other than this one are open here."""
        return self._warmth.has_others(session_id)

    async def handshake(self, timeout_s: float) -> None:
        """Exchange hellos over the transport at hand.

        Raises:
            PeerError: no answer in time, refused, another identity, or not a peer at all.
        """
        started_s = self._loop.time()
        self.send(self._hello)
        try:
            await asyncio.wait_for(self._opened, timeout_s)
        except asyncio.TimeoutError as exc:
            self.abort()
            raise PeerTimeout(
                f"peer '{short_id(self.peer_id)}' did not say hello within {timeout_s:.1f} s", peer_id=self.peer_id
            ) from exc
        except asyncio.CancelledError:
            self.abort()  # whoever dialled has given up and will not own the connection
            raise
        self.rtt_s = self._loop.time() - started_s

    def new_request_id(self) -> int:
        self._next_id += 1
        return self._next_id

    async def request(self, message: messages.AnyRequest, body: list[Buffer], *, timeout_s: float) -> Reply:
        """Send a request and wait for its output.

        Raises:
            PeerRefused: the peer answered no.
            PeerTimeout: no answer within ``timeout_s``, or no sign of life.
            PeerUnreachable: the connection broke, or the peer broke the protocol.
            LocalProtocolError: larger than the peer takes.
        """
        if not self.is_open:
            raise self._unreachable(None)
        answer: asyncio.Future[MessageReceived] = self._loop.create_future()
        self.send(message, body)
        self._answers[message.request_id] = answer
        self._start_heart()
        is_large = self._begin_step(message, body) if isinstance(message, messages.StepRequest) else False
        timer = self._loop.call_later(timeout_s, self._expire, answer, message, timeout_s)
        try:
            event = await answer
        finally:
            timer.cancel()
            if self._answers.pop(message.request_id, None) is not None:  # no answer came, and none is awaited any more
                self._cancel(message.request_id)
            self._num_large -= is_large
        if isinstance(message, messages.StepRequest):
            self._use(message.session_id, len(event.body))
        return self._read_reply(event)

    async def ping(self) -> None:
        """Wait for a sign of life.

        Raises:
            PeerTimeout: it says nothing at all for the silence timeout; the connection is given up.
            PeerUnreachable: the connection broke.
        """
        if not self.is_open:
            raise self._unreachable(None)
        pong: asyncio.Future[None] = self._loop.create_future()
        self._pongs.append(pong)
        self._ping_sent_s = self._ping_sent_s or self._loop.time()
        self.send(messages.Ping(0))
        self._start_heart()
        try:
            await pong
        finally:
            if pong in self._pongs:
                self._pongs.remove(pong)

    def abandon(self, request_id: int, error: Exception) -> None:
        """Let a request fail with ``error``; the peer is told that nobody waits any more."""
        answer = self._answers.get(request_id)
        if answer is not None and not answer.done():
            answer.set_exception(error)

    def _expire(self, answer: asyncio.Future[MessageReceived], message: messages.AnyRequest, timeout_s: float) -> None:
        if not answer.done():
            what = "an adapter"
            if not isinstance(message, messages.AdapterRequest):
                what = f"a {messages.kind_of(message)} of blocks {message.start}:{message.end}"
            text = f"{what} within {timeout_s:.1f} s"
            error = PeerTimeout(f"peer '{short_id(self.peer_id)}' did not answer {text}", peer_id=self.peer_id)
            answer.set_exception(error)

    def close_session(self, session_id: str) -> None:
        """The session is of no more use to us."""
        self._warmth.forget(session_id)
        if self.is_open:
            self.send(messages.CloseSession(session_id))

    def release_graph(self, request_id: int) -> None:
        """No backward will come for this forward, whose graph the peer keeps."""
        if self.is_open:
            self.send(messages.ReleaseGraph(request_id))

    def _read_reply(self, event: MessageReceived) -> Reply:
        reply = event.message
        if isinstance(reply, Refused):
            raise PeerRefused(
                f"peer '{short_id(self.peer_id)}' refused: {reply.text}",
                peer_id=self.peer_id,
                reason=reply.reason,
                retry_after_s=reply.retry_after_s or None,
            )
        assert isinstance(reply, Output)
        self.load = reply.load
        try:
            return reply, decode_tensors(reply.tensors, event.body)
        except RemoteProtocolError as exc:
            self.abort(exc)
            raise self._unreachable(exc) from exc

    def _cancel(self, request_id: int) -> None:
        if self.is_open:
            self.send(messages.Cancel(request_id))

    def _receive(self, event: MessageReceived) -> None:
        match event.message:
            case messages.ServerHello() as hello:
                self._check_hello(hello)
            case messages.Reject(text):
                raise RemoteProtocolError(f"connection rejected: {text}")
            case (Output() | Refused()) as reply:
                self._take(reply, event)
            case messages.Ping(nonce):
                self.send(messages.Pong(nonce))
            case messages.Pong(nonce, load):
                self._hear_pong(nonce, load)
            case messages.Draining():
                self.is_draining = True
                if self.on_draining is not None:
                    self.on_draining()

    def _take(self, reply: Output | Refused, event: MessageReceived) -> None:
        answer = self._answers.pop(reply.request_id, None)
        if answer is not None and not answer.done():  # else cancelled or timed out: late, ignored
            answer.set_result(event)
        elif isinstance(reply, Output) and reply.is_kept:
            self.release_graph(reply.request_id)
        elif isinstance(reply, Refused) and self.on_refused is not None:
            self.on_refused(reply.request_id)

    def _check_hello(self, hello: messages.ServerHello) -> None:
        proven = verify_hello(
            public_key=hello.public_key,
            signature=hello.signature,
            nonce=self._hello.nonce,
            certificate_sha256=self._certificate_sha256,
        )
        if proven != self.peer_id:
            raise RemoteProtocolError(f"expected peer '{short_id(self.peer_id)}', found '{short_id(proven)}'")
        self.max_batch_tokens = hello.max_batch_tokens
        self.record = hello.record
        if not self._opened.done():
            self._opened.set_result(None)

    def _hear_pong(self, nonce: int, load: int) -> None:
        self.load = load
        if nonce == WARM_NONCE:
            return
        if self._ping_sent_s is not None:
            sample_s = self._loop.time() - self._ping_sent_s
            self.rtt_s = sample_s if self.rtt_s is None else min(self.rtt_s, sample_s)
            self._ping_sent_s = None
        pongs, self._pongs = self._pongs, []
        for pong in pongs:
            if not pong.done():
                pong.set_result(None)

    def _lose(self, reason: Exception | None) -> None:
        if self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None
        if self._warmer is not None:
            self._warmer.cancel()
            self._warmer = None
        error = reason if isinstance(reason, PeerError) else self._unreachable(reason)
        if not self._opened.done():
            self._opened.set_exception(error)
            self._opened.exception()  # seen, even when nobody awaits it any more
        answers, self._answers = self._answers, {}
        pongs, self._pongs = self._pongs, []
        awaited: list[asyncio.Future[Any]] = [*answers.values(), *pongs]
        for future in awaited:
            if not future.done():
                future.set_exception(error)

    def _unreachable(self, reason: Exception | None) -> PeerUnreachable:
        why = f": {reason}" if reason is not None and str(reason) else ""
        error = PeerUnreachable(f"connection to peer '{short_id(self.peer_id)}' is lost{why}", peer_id=self.peer_id)
        error.__cause__ = reason
        return error

    # heartbeat

    def _progress(self, now_s: float) -> None:
        self._heart.heard(now_s)

    def _start_heart(self) -> None:
        if len(self._answers) + len(self._pongs) == 1:
            self._heart.wait_begins(self._loop.time())
        if self._ticker is None:
            self._ticker = self._loop.call_later(self._heart.interval_s, self._tick)

    def _tick(self) -> None:
        self._ticker = None
        beat = self._heart.beat(self._loop.time(), awaits_answer=bool(self._answers or self._pongs))
        if beat is Beat.DEAD:
            error = PeerTimeout(f"peer '{short_id(self.peer_id)}' gives no sign of life", peer_id=self.peer_id)
            self.abort(error)
            return
        if beat is Beat.PING:
            self._ping_sent_s = self._loop.time()
            self.send(messages.Ping(0))
        if self._answers or self._pongs:
            self._ticker = self._loop.call_later(self._heart.interval_s, self._tick)

    # silences

    def _begin_step(self, message: messages.StepRequest, body: list[Buffer]) -> bool:
        """Whether it is a large one."""
        num_bytes = sum(map(len, body))
        self._use(message.session_id, num_bytes)
        is_large = num_bytes > LARGE_BYTES
        self._num_large += is_large
        return is_large

    def _use(self, session_id: str, num_bytes: int) -> None:
        now_s = self._loop.time()
        self._warmth.use(session_id, num_bytes, now_s)
        if self._warmer is None and self._warmth.is_wanted(now_s, self.rtt_s) and self.is_open:
            self._warmer = self._loop.call_later(TICK_S, self._warm)

    def _is_warm(self) -> bool:
        return self._warmth.is_wanted(self._loop.time(), self.rtt_s)

    def _warm(self) -> None:
        self._warmer = None
        if not (self.is_open and self._is_warm()):
            return
        if self._warmth.is_silent(self.bytes_sent, self.bytes_received) and not self._outgoing:
            self.send(messages.Ping(WARM_NONCE))
        self._warmer = self._loop.call_later(TICK_S, self._warm)
