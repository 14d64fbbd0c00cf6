"""Outputs of steps that go on to the next peer, beside the client.

A client says where to, and a stranger may be a client. So only addresses of a record are dialled that the peer itself
has signed, and of these only such as the client's own address may name; nothing is sent before the hello has proven
that the record's peer is at the other end, nor without that peer's client having granted it. Whoever does not want what
comes says so once. No step ever waits for a dial: until there is a connection the client pushes the outputs itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import msgspec

from remote_modules.discovery.addresses import usable_addresses
from remote_modules.discovery.rate_limits import TokenBuckets, source_key
from remote_modules.errors import LocalProtocolError, PeerError, RemoteProtocolError
from remote_modules.identity import verify_push, verify_record
from remote_modules.net.client_connection import ClientConnection
from remote_modules.net.http import Dialer
from remote_modules.peers import PeerId, PeerRecord, SignedRecord, short_id
from remote_modules.server.sessions import SessionTable
from remote_modules.wire.framing import Buffer
from remote_modules.wire.messages import Destination, Output, Push, StepRequest

__all__ = ["Forwarding"]

logger = logging.getLogger(__name__)

MAX_TARGETS = 4096  # sessions that outputs go on to
MAX_CONNECTION_TARGETS = 256  # of one client's connection
MAX_LINKS = 64
MAX_DIALS = 8  # under way at a time
DIALS_PER_S = 1.0  # for clients at one address, and sixteen at once
DIAL_BURST = 16.0
IDLE_S = 60.0  # without a step
UNUSED_S = 5.0  # the same without a session, or where another one needs the place
RETRY_S = 0.5  # after a dial that failed, doubled for each one more
MAX_RETRY_S = 8.0
MAX_PUSH_S = 60.0  # to keep what was sent for a step that has not come
MAX_UNSENT_BYTES = 64 * 1024 * 1024  # that wait for a peer to read them

LinkKey = tuple[str, tuple[str, ...], str | None]


@dataclass(frozen=True, slots=True)
class _Target:
    """A session at another peer.

    Attributes:
        told: what the client told of it.
        record: of the peer, with the addresses that may be dialled.
        grant: of the client, for pushes from here.
        connection_id: by which the client told it.
    """

    told: Destination
    record: PeerRecord
    grant: bytes
    connection_id: int

    @property
    def link_key(self) -> LinkKey:
        return (self.record.peer_id, self.record.addresses, self.record.certificate_sha256)


@dataclass(slots=True)
class _Link:
    """The connection to one peer, when there is one.

    Attributes:
        num_failed: dials, in a row.
        pushes: the latest, by request id: whose target a refusal ends.
    """

    used_s: float
    connection: ClientConnection | None = None
    task: asyncio.Task[None] | None = None
    num_failed: int = 0
    retry_at_s: float = 0.0
    pushes: OrderedDict[int, tuple[str, str]] = field(default_factory=OrderedDict)

    @property
    def open_connection(self) -> ClientConnection | None:
        return self.connection if self.connection is not None and self.connection.is_open else None

    def fail(self, now_s: float) -> None:
        self.retry_at_s = now_s + min(MAX_RETRY_S, RETRY_S * 2.0**self.num_failed)
        self.num_failed = min(self.num_failed + 1, 16)

    def close(self) -> None:
        if self.task is not None:
            self.task.cancel()
        if self.connection is not None:
            self.connection.close()


class Forwarding:
    """Of one peer.

    Args:
        sessions: whose outputs go on.
        dialer: reaches other peers; None: nothing goes on.
        peer_id: our own.
        needs_certificate: whether to dial no peer whose record names no certificate.
        names: of the tensors that go from block to block.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        sessions: SessionTable,
        *,
        dialer: Dialer | None,
        peer_id: PeerId,
        needs_certificate: bool,
        names: Collection[str],
        clock: Callable[[], float],
    ) -> None:
        self._sessions = sessions
        self._dialer = dialer
        self._peer_id = peer_id
        self._needs_certificate = needs_certificate
        self._names = frozenset(names)
        self._clock = clock
        self._targets: OrderedDict[tuple[str, str], _Target] = OrderedDict()
        self._links: dict[LinkKey, _Link] = {}
        self._dials = TokenBuckets(per_s=DIALS_PER_S, burst=DIAL_BURST)
        self._is_closed = False

    @property
    def num_links(self) -> int:
        return len(self._links)

    def prepare(self, request: StepRequest, source: str, connection_id: int) -> None:
        """Learn where the outputs of a step are to go, and begin to dial.

        Args:
            source: the client's IP address; "" if unknown.
        """
        told = request.forward_to
        if told is None or self._dialer is None or self._is_closed:
            return
        key = (request.session_id, told.session_id)
        target = self._targets.get(key)
        if told.record is not None and (target is None or target.told.record != told.record):
            try:
                target = self._target(request, told, source, connection_id)
            except (RemoteProtocolError, ValueError) as exc:
                logger.info("outputs do not go on session=%s: %s", request.session_id[:6], exc)
                return
            self._add(key, target)
        if target is not None:
            self._targets.move_to_end(key)
            self._connect(target, source)

    def send(self, request: StepRequest, output: Output, body: Sequence[Buffer]) -> bool:
        """Send on what a step has put out; whether that could be."""
        told = request.forward_to
        target = None if told is None else self._targets.get((request.session_id, told.session_id))
        link = None if target is None else self._links.get(target.link_key)
        if told is None or target is None or link is None or (connection := link.open_connection) is None:
            return False
        is_whole = request.num_outputs in (None, request.call.num_tokens)
        if not is_whole or {meta.name for meta in output.tensors} - self._names:
            return False
        if connection.unsent_bytes > MAX_UNSENT_BYTES:
            return False
        number, timeout_s = connection.new_request_id(), min(request.timeout_s, MAX_PUSH_S)
        push = Push(number, told.session_id, told.step_id, self._peer_id, target.grant, output.tensors, timeout_s)
        try:
            connection.send(push, list(body))
        except LocalProtocolError as exc:
            logger.info("outputs do not go on session=%s: %s", request.session_id[:6], exc)
            return False
        link.used_s = self._clock()
        link.pushes[number] = (request.session_id, told.session_id)
        while len(link.pushes) > MAX_LINKS:
            link.pushes.popitem(last=False)
        return True

    def expire(self) -> None:
        """Forget what ended with its session, and close connections that no session uses any more."""
        now_s = self._clock()
        for session_id, target_id in list(self._targets):
            if self._sessions.get(session_id) is None:
                del self._targets[session_id, target_id]
        wanted = {target.link_key for target in self._targets.values()}
        for key, link in list(self._links.items()):
            is_wanted = key in wanted and link.open_connection is not None
            if link.task is None and now_s - link.used_s >= (IDLE_S if is_wanted else UNUSED_S):
                self._links.pop(key).close()

    def close(self) -> None:
        """Close all connections; nothing goes on any more."""
        self._is_closed = True
        for link in self._links.values():
            link.close()
        self._links.clear()
        self._targets.clear()

    def _add(self, key: tuple[str, str], target: _Target) -> None:
        """One client's oldest give way to its newest, not those of others."""
        self._targets.pop(key, None)
        own = [one for one, other in self._targets.items() if other.connection_id == target.connection_id]
        if len(own) >= MAX_CONNECTION_TARGETS:
            del self._targets[own[0]]
        self._targets[key] = target
        while len(self._targets) > MAX_TARGETS:
            self._targets.popitem(last=False)

    def _target(self, request: StepRequest, told: Destination, source: str, connection_id: int) -> _Target:
        """What the client told, once its proofs hold. Raises `RemoteProtocolError` and `ValueError`."""
        proof = told.record
        assert proof is not None
        signed = SignedRecord(payload=proof.payload, public_key=proof.public_key, signature=proof.signature)
        record = verify_record(signed)
        if record.peer_id == self._peer_id:
            raise ValueError("the record is our own")
        session = self._sessions.get(request.session_id)
        known = b"" if session is None else session.client_key
        verify_push(
            public_key=known or request.client_key,
            grant=told.grant,
            sender=self._peer_id,
            receiver=record.peer_id,
            session_id=told.session_id,
        )
        name = short_id(record.peer_id)
        if self._needs_certificate and record.certificate_sha256 is None:
            raise ValueError(f"the record of peer '{name}' names no certificate")
        addresses = usable_addresses(record.addresses, source)
        if not addresses:
            raise ValueError(f"no address of peer '{name}' may be dialled for a client at {source or 'nowhere'}")
        return _Target(told, msgspec.structs.replace(record, addresses=addresses), told.grant, connection_id)

    def _connect(self, target: _Target, source: str) -> None:
        now_s = self._clock()
        link = self._links.get(target.link_key)
        if link is not None:
            if link.open_connection is not None:
                link.used_s = now_s
                return
            if link.task is not None or now_s < link.retry_at_s:
                return
        num_dials = sum(one.task is not None for one in self._links.values())
        if num_dials >= MAX_DIALS or (link is None and len(self._links) >= MAX_LINKS and not self._make_room()):
            return
        who = source_key(source)
        if who is not None and self._dials.take(who, now_s):
            return
        if link is None:
            link = self._links[target.link_key] = _Link(used_s=now_s)
        link.task = asyncio.get_running_loop().create_task(self._dial(link, target.record))

    def _make_room(self) -> bool:
        """Close the connection that was used least recently, if that is some time ago."""
        key, link = min(self._links.items(), key=lambda item: item[1].used_s)
        if link.task is not None or self._clock() - link.used_s < UNUSED_S:
            return False
        self._links.pop(key).close()
        return True

    async def _dial(self, link: _Link, record: PeerRecord) -> None:
        assert self._dialer is not None
        try:
            connection = await self._dialer.dial(record)
        except PeerError as exc:
            logger.info("outputs do not go on to peer=%s: %s", short_id(record.peer_id), exc)
            link.fail(self._clock())
            return
        finally:
            link.task = None
        if not connection.knows_direct or self._is_closed:
            connection.close()
            link.fail(self._clock())
            return
        connection.on_refused = lambda number: self._forget(link, number)
        link.connection, link.num_failed = connection, 0

    def _forget(self, link: _Link, number: int) -> None:
        """The peer did not take a push: the client has to grant anew what follows."""
        key = link.pushes.pop(number, None)
        if key is not None:
            self._targets.pop(key, None)
