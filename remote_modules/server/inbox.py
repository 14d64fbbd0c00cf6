"""Inputs of steps that somebody else brings than the step's own request: the peer before, or its client later.

Input and step come over different connections, in any order. What comes first is kept, but not for long, and within
limits: strangers may send here, too. An input for a session whose client's key is known must have that client's grant.
One that comes before its session is kept unchecked, in a small corner where the oldest gives way, and is checked when
the step comes. Whatever is lost here costs time and nothing else: the client pushes the input itself (`client.direct`).
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch

from remote_modules.errors import PeerRefused, RefusalReason, RemoteProtocolError
from remote_modules.identity import verify_push
from remote_modules.peers import PeerId
from remote_modules.server.checks import refuse
from remote_modules.server.sessions import SessionTable
from remote_modules.wire.framing import Body
from remote_modules.wire.messages import Push, StepRequest
from remote_modules.wire.tensors import decode_tensors, decoded_bytes

__all__ = ["Inbox"]

Named = dict[str, torch.Tensor]
Key = tuple[str, int]

MAX_INPUTS = 256
MAX_SESSION_INPUTS = 32  # of one session: two prompts' chunks
MAX_UNCHECKED = 32
UNCHECKED_SHARE = 4  # of the bytes, one part in so many
MAX_KEPT_S = 30.0
MAX_WAIT_S = 120.0


@dataclass(frozen=True, slots=True)
class _Input:
    """
    Attributes:
        body: of what is not decoded before it is known to be wanted.
        num_bytes: decoded.
    """

    push: Push
    body: Body
    num_bytes: int
    until_s: float


class Inbox:
    """Of one peer.

    Args:
        peer_id: our own, which grants name.
        names: of the tensors that go from block to block; no others are taken.
        max_bytes: of inputs that wait for their steps.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        sessions: SessionTable,
        *,
        peer_id: PeerId,
        names: Collection[str],
        max_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        self._sessions = sessions
        self._peer_id = peer_id
        self._names = frozenset(names)
        self._max_bytes = max_bytes
        self._clock = clock
        self._checked: OrderedDict[Key, _Input] = OrderedDict()
        self._unchecked: OrderedDict[Key, _Input] = OrderedDict()
        self._waiting: dict[Key, list[_Waiter]] = {}
        self._turns: dict[str, asyncio.Future[None]] = {}  # of the step that came last, by session

    @property
    def num_bytes(self) -> int:
        """Of inputs that wait for their steps."""
        return _size(self._checked) + _size(self._unchecked)

    def put(self, push: Push, body: Body) -> None:
        """Take an input; one for a step that has its input already is ignored.

        Raises:
            PeerRefused: it is not taken.
            RemoteProtocolError: the tensors do not decode.
        """
        key = (push.session_id, push.step_id)
        session = self._sessions.get(push.session_id)
        if key in self._checked or (session is not None and session.last_step_id >= push.step_id):
            return
        if wrong := sorted({meta.name for meta in push.tensors} - self._names):
            refuse(f"tensor {wrong[0]!r} does not go from block to block: {sorted(self._names)[:8]}")
        num_bytes = max(len(body), decoded_bytes(push.tensors))
        if num_bytes > self._max_bytes:
            refuse(f"an input of {num_bytes} bytes exceeds the limit of {self._max_bytes} bytes")
        waiters = self._waiting.get(key, [])
        client_key = waiters[0].client_key if waiters else b"" if session is None else session.client_key
        entry = _Input(push, body, num_bytes, self._clock() + min(push.timeout_s, MAX_KEPT_S))
        if not client_key:
            self._keep_unchecked(key, entry)
            return
        if not self._is_granted(push, client_key):
            refuse("the client of this session did not grant that")
        tensors = decode_tensors(push.tensors, body)
        for waiter in waiters:
            waiter.bring(tensors)
        self._keep(key, entry, is_awaited=bool(waiters))

    @contextmanager
    def turn(self, request: StepRequest) -> Iterator[asyncio.Future[None] | None]:
        """Steps of one session may be asked for at once: gives the one before, which has to be over first."""
        before = self._turns.get(request.session_id)
        mine = self._turns[request.session_id] = asyncio.get_running_loop().create_future()
        try:
            yield before
        finally:
            mine.set_result(None)
            if self._turns.get(request.session_id) is mine:
                del self._turns[request.session_id]

    async def take(self, request: StepRequest) -> Named:
        """The input of a step, once it is here; it stays until `drop`, for a step that is sent again.

        Raises:
            PeerRefused: it does not come, does not decode, or the client has not said by which key to know it.
        """
        key = (request.session_id, request.step_id)
        client_key = self._client_key(request)
        if (entry := self._unchecked.pop(key, None)) is not None and self._is_granted(entry.push, client_key):
            self._keep(key, entry, is_awaited=True)
            return _decoded(entry)
        if (entry := self._checked.get(key)) is not None:
            return _decoded(entry)
        waiter = _Waiter(client_key)
        self._waiting.setdefault(key, []).append(waiter)
        limit_s = min(request.timeout_s, MAX_WAIT_S)
        timer = asyncio.get_running_loop().call_later(limit_s, waiter.expire, limit_s)
        try:
            return await waiter.answer
        finally:
            timer.cancel()
            self._waiting[key].remove(waiter)
            if not self._waiting[key]:
                del self._waiting[key]

    def drop(self, request: StepRequest) -> None:
        """The step is done."""
        self._checked.pop((request.session_id, request.step_id), None)

    def expire(self) -> None:
        """Forget what was kept for long enough."""
        now_s = self._clock()
        for entries in (self._checked, self._unchecked):
            for key in [key for key, entry in entries.items() if entry.until_s <= now_s]:
                del entries[key]

    def _client_key(self, request: StepRequest) -> bytes:
        session = self._sessions.get(request.session_id)
        known = b"" if session is None else session.client_key
        if known and request.client_key not in (b"", known):
            refuse("the session has another client_key")
        if not (known or request.client_key):
            refuse("a step that awaits its input must bring the client_key of its session")
        return known or request.client_key

    def _is_granted(self, push: Push, client_key: bytes) -> bool:
        return _is_granted(client_key, push.grant, push.sender, self._peer_id, push.session_id)

    def _keep(self, key: Key, entry: _Input, *, is_awaited: bool) -> None:
        num_own = sum(session_id == key[0] for session_id, _ in self._checked)
        has_room = len(self._checked) < MAX_INPUTS and num_own < MAX_SESSION_INPUTS
        if has_room and _size(self._checked) + entry.num_bytes <= self._max_bytes:
            self._checked[key] = entry
        elif not is_awaited:
            refuse(f"{len(self._checked)} inputs wait for their steps", RefusalReason.BUSY)

    def _keep_unchecked(self, key: Key, entry: _Input) -> None:
        most = self._max_bytes // UNCHECKED_SHARE
        if entry.num_bytes > most:
            refuse(f"an input of {entry.num_bytes} bytes may not come before its session", RefusalReason.BUSY)
        self._unchecked.pop(key, None)
        self._unchecked[key] = entry
        while len(self._unchecked) > MAX_UNCHECKED or _size(self._unchecked) > most:
            self._unchecked.popitem(last=False)


class _Waiter:
    """A step that awaits its input."""

    def __init__(self, client_key: bytes) -> None:
        self.client_key = client_key
        self.answer: asyncio.Future[Named] = asyncio.get_running_loop().create_future()

    def bring(self, tensors: Named) -> None:
        if not self.answer.done():
            self.answer.set_result(tensors)

    def expire(self, limit_s: float) -> None:
        if not self.answer.done():
            text = f"the step's input did not come within {limit_s:.1f} s"
            self.answer.set_exception(PeerRefused(text, peer_id="", reason=RefusalReason.BUSY))


def _decoded(entry: _Input) -> Named:
    try:
        return decode_tensors(entry.push.tensors, entry.body)
    except RemoteProtocolError as exc:  # the fault of who brought it, not of who sent the step
        refuse(f"the step's input does not decode: {exc}")


def _size(entries: OrderedDict[Key, _Input]) -> int:
    return sum(entry.num_bytes for entry in entries.values())


@lru_cache(maxsize=4096)  # each step of a session comes with the same grant
def _is_granted(client_key: bytes, grant: bytes, sender: str, receiver: str, session_id: str) -> bool:
    try:
        verify_push(public_key=client_key, grant=grant, sender=sender, receiver=receiver, session_id=session_id)
    except RemoteProtocolError:
        return False
    return True
