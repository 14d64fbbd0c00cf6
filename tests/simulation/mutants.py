"""Clients and peers that are broken on purpose: each of these mistakes must be found by the random simulations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
import torch

from remote_modules.client.answers import AnswerChecker
from remote_modules.client.chain import Chain
from remote_modules.client.history import History
from remote_modules.client.hop_caches import HopCaches
from remote_modules.client.session import SessionState
from remote_modules.client.step import Step
from remote_modules.client.step_requests import StepRequests
from remote_modules.net.client_connection import ClientConnection
from remote_modules.peers import PeerId, PeerRecord
from remote_modules.plan import leases
from remote_modules.plan.breakers import Breakers
from remote_modules.server.handler import Handler
from remote_modules.server.sessions import SessionTable
from remote_modules.wire import framing
from remote_modules.wire.messages import StepRequest

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
        make: makes it.
        kinds: faults under which it shows; None for all.
        finds: what the simulation says about it, in part; "stall": a pass takes longer than a sound client's ever does.
        most: how many faults may happen.
        swarms: where it shows; None for all.
    """

    make: Callable[[Patch], None]
    kinds: list[str] | None = None
    finds: str = ""
    most: int = 5
    swarms: tuple[str, ...] | None = None


def reorder_not_in_history(patch: Patch) -> None:
    """A beam reorder reaches the peers, but not what lost caches are rebuilt from (the defect of Petals)."""
    patch.setattr(History, "select", lambda self, indices: None)


def mask_not_reordered(patch: Patch) -> None:
    """Rows move, and the peer goes on with the padding that it knows."""
    mask_of = StepRequests._mask

    def broken(self: StepRequests, start: int, end: int, is_whole: bool) -> tuple[torch.Tensor | None, bool]:
        mask = self.step.attention_mask
        if mask is not None and 0 < start == self.step.position:
            return mask[:, start:end].contiguous(), False
        return mask_of(self, start, end, is_whole)

    patch.setattr(StepRequests, "_mask", broken)


def crop_off_by_one(patch: Patch) -> None:
    """A rollback keeps one token too many in the history of each boundary, and loses the first."""
    crop = History.crop

    def broken(self: History, length: int) -> None:
        whole = self.read() if self._length > length - self.start else None
        crop(self, length)
        if whole is not None and self._length and "hidden_states" in whole:
            kept = {name: tensor[:, 1 : 1 + self._length] for name, tensor in whole.items()}
            self._sealed, self._newest, count = [], [], self._length
            self._selections.clear()
            self._length = 0
            self.append(kept, count)

    patch.setattr(History, "crop", broken)


def crop_not_sent(patch: Patch) -> None:
    """A rollback does not reach the peers."""
    crop = HopCaches.crop

    def broken(self: HopCaches, length: int) -> None:
        fed = self._fed_caches
        self._fed_caches = lambda: iter(())  # type: ignore[method-assign]
        crop(self, length)
        self._fed_caches = fed  # type: ignore[method-assign]

    patch.setattr(HopCaches, "crop", broken)


def step_noted_at_each_attempt(patch: Patch) -> None:
    """The history grows when a hop is begun, not when the pass is done: a repeated step is in it twice."""
    recover = Chain._recover

    async def broken(self: Chain, work: Any, hop: Any, error: Any) -> None:
        if isinstance(work, Step) and hop.span.start in work.histories:
            entered = work.inputs.get(hop.span.start, work.outputs)
            work.session.histories[hop.span.start].append(entered, work._step.call.num_tokens)
        await recover(self, work, hop, error)

    patch.setattr(Chain, "_recover", broken)


def step_repeated(patch: Patch) -> None:
    """The client sends each step twice, the second time for the next position, and the peer forgot that it did it."""
    request, get = ClientConnection.request, SessionTable.get

    async def twice(self: ClientConnection, message: Any, body: Any, *, timeout_s: float) -> Any:
        reply = await request(self, message, body, timeout_s=timeout_s)
        if isinstance(message, StepRequest) and message.step_id:
            position = message.position + message.call.num_tokens
            again = msgspec.structs.replace(
                message, request_id=self.new_request_id(), position=position, ops=(), mask_is_whole=False
            )
            await request(self, again, body, timeout_s=timeout_s)
        return reply

    def forgetful(self: SessionTable, session_id: str) -> Any:
        session = get(self, session_id)
        if session is not None:
            session.last_reply = None
        return session

    patch.setattr(ClientConnection, "request", twice)
    patch.setattr(SessionTable, "get", forgetful)


def ban_ignored(patch: Patch) -> None:
    """Routes go to peers that failed as to others, but for those that only asked to be left alone."""

    def broken(self: Breakers, peer_id: PeerId, instance_id: str, *, now_s: float, is_needed: bool = False) -> bool:
        breaker = self._breakers.get(peer_id)
        return breaker is None or breaker.instance_id != instance_id or now_s >= breaker.avoid_until_s

    patch.setattr(Breakers, "is_usable", broken)
    patch.setattr(Breakers, "is_backing_off", lambda self, peer_id, instance_id, *, now_s: False)


def checksum_ignored(patch: Patch) -> None:
    """Frames are believed whatever their checksum."""
    patch.setattr(framing, "crc32", lambda data, value=0: 0)


def nan_believed(patch: Patch) -> None:
    """Values that are not finite are taken."""
    patch.setattr(AnswerChecker, "_check_finite", lambda self, hop, outputs, like: None)


def cancelled_pass_keeps_caches(patch: Patch) -> None:
    """After a pass that was given up, some hops are a step ahead of others."""
    patch.setattr(HopCaches, "drop_peers", lambda self: None)


def orphans_kept(patch: Patch) -> None:
    """Peers never drop a session."""
    patch.setattr(SessionTable, "expire", lambda self, now_s: [])


def leases_never_end(patch: Patch) -> None:
    """The tracker lists who was there once, and lets no later instance take its place."""
    check = leases.check_announced

    def broken(record: PeerRecord, held: leases.Lease) -> tuple[str, ...]:
        if record.instance_id != held.instance_id:
            raise leases.StaleRecordError("another instance was here", newest=held.signed)
        return check(record, held)

    patch.setattr(leases, "check_announced", broken)
    patch.setattr(leases.LeaseTable, "get", lambda self, peer_id, now_s: self._leases.get(peer_id))
    patch.setattr(leases.LeaseTable, "lookup", lambda self, model_key, now_s: list(self._leases.values()))
    patch.setattr(leases.LeaseTable, "_drop_expired", lambda self, now_s: None)


def silence_endured(patch: Patch) -> None:
    """A peer that says nothing is waited for until the end, unless a hedge outruns it."""
    patch.setattr(ClientConnection, "_tick", lambda self: None)
    patch.setattr(ClientConnection, "_expire", lambda self, *args: None)


def sessions_not_freed(patch: Patch) -> None:
    """A closed session keeps its bytes."""
    close = SessionTable.close

    def broken(self: SessionTable, session_id: str) -> None:
        used = self.budget.used_bytes
        close(self, session_id)
        self.budget.used_bytes = used

    patch.setattr(SessionTable, "close", broken)


def connections_kept(patch: Patch) -> None:
    """A lost connection keeps its place at the peer."""
    patch.setattr(Handler, "forget", lambda self, connection_id: None)


def fork_shares_history(patch: Patch) -> None:
    """A fork and its origin append to one history."""
    patch.setattr(SessionState, "__deepcopy__", lambda self, memo: self)


MUTANTS = {
    "reorder not in history": Mutant(reorder_not_in_history, finds="I1"),
    "mask not reordered": Mutant(mask_not_reordered),
    "crop off by one": Mutant(crop_off_by_one, finds="I1"),
    "crop not sent": Mutant(crop_not_sent),
    "step noted at each attempt": Mutant(step_noted_at_each_attempt),
    "step repeated": Mutant(step_repeated, finds="I2"),
    "ban ignored": Mutant(ban_ignored, finds="I7"),
    "checksum ignored": Mutant(checksum_ignored, kinds=["flip"]),
    "nan believed": Mutant(nan_believed, kinds=["nan"]),
    "cancelled pass keeps caches": Mutant(cancelled_pass_keeps_caches),
    "orphans kept": Mutant(orphans_kept, finds="I3"),
    "leases never end": Mutant(leases_never_end, finds="I8"),
    "silence endured": Mutant(silence_endured, kinds=["suspend"], finds="stall", most=1, swarms=("pairs",)),
    "sessions not freed": Mutant(sessions_not_freed, finds="I3"),
    "connections kept": Mutant(connections_kept, finds="I3, I4"),
    "fork shares history": Mutant(fork_shares_history),
}
