"""A peer's side of its connections: checks each request, admits it, runs it, answers.

Independent of the transport and of the device: a real peer gives it sockets and a device thread, a simulation gives it
memory links and virtual time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

import msgspec
import torch

from remote_modules.errors import (
    PeerRefused,
    RefusalReason,
    RemoteModulesError,
    UnsupportedCallError,
)
from remote_modules.identity import Identity
from remote_modules.model.adapters import Adapter
from remote_modules.model.past import length_of
from remote_modules.net.connection import Connection
from remote_modules.net.http import Dialer
from remote_modules.net.loop import new_body
from remote_modules.peers import SignedRecord
from remote_modules.server.activations import Activations
from remote_modules.server.adapter_store import AdapterStore, Offload
from remote_modules.server.arguments import owner_arguments
from remote_modules.server.cache_device import CacheDevice
from remote_modules.server.checks import (
    RequestTensors,
    check_blocks,
    check_kept_gradients,
    check_tensors,
    refuse,
)
from remote_modules.server.copies import Copies
from remote_modules.server.engine import Engine
from remote_modules.server.executor import Executor
from remote_modules.server.forwarding import Forwarding
from remote_modules.server.graphs import is_out_of_memory
from remote_modules.server.inbox import Inbox
from remote_modules.server.jobs import Priority, Timed
from remote_modules.server.limits import HandlerLimits
from remote_modules.server.served import Served
from remote_modules.server.sessions import SessionTable
from remote_modules.server.steps import Steps
from remote_modules.server.training import Training
from remote_modules.server.uploads import Uploads
from remote_modules.spans import Span
from remote_modules.wire import messages
from remote_modules.wire.codecs import CODECS, THIN_CODECS
from remote_modules.wire.framing import Body, Buffer
from remote_modules.wire.messages import (
    AdapterRequest,
    AnyRequest,
    BackwardRequest,
    CacheMeta,
    CopyRequest,
    ForwardRequest,
    Output,
    ReadRequest,
    StepRequest,
)
from remote_modules.wire.protocol import Protocol, Role, check_version
from remote_modules.wire.tensors import decode_tensors, encode_tensors

__all__ = ["Handler"]

logger = logging.getLogger(__name__)

Reply = tuple[Output, list[Buffer]]


class Handler:
    """All connections of one peer.

    Args:
        identity, instance_id: what the hello says.
        certificate_sha256: of the TLS certificate in use, or "".
        clock: monotonic seconds.
        dialer: reaches the peers whose sessions are copied, and those that outputs go on to.
        record: what the peer announces, for others that shall dial it; None while it announces nothing.
        offload: see `AdapterStore`.
        preloaded: adapters that are kept for good, by name.
    """

    steps_type: type[Steps] = Steps

    def __init__(
        self,
        engine: Engine,
        executor: Executor,
        sessions: SessionTable,
        *,
        identity: Identity,
        instance_id: str,
        limits: HandlerLimits,
        clock: Callable[[], float],
        certificate_sha256: str = "",
        software: str = "",
        dialer: Dialer | None = None,
        record: Callable[[], SignedRecord | None] = lambda: None,
        offload: Offload | None = None,
        preloaded: Mapping[str, Adapter] | None = None,
    ) -> None:
        self.engine = engine
        self.executor = executor
        self.sessions = sessions
        self.is_draining = False
        self.num_requests: dict[str, int] = {}
        self._identity = identity
        self._instance_id = instance_id
        self.adapters = AdapterStore(
            max_bytes=limits.adapter_budget_bytes, lease_s=limits.adapter_lease_s, clock=clock, offload=offload
        )
        for name, adapter in (preloaded or {}).items():
            self.adapters.preload(adapter, name, device=engine.model.device)
        self.activations = Activations(max_bytes=limits.activation_bytes)
        uploads = Uploads(engine.model.device, max_bytes=limits.upload_bytes)
        self.training = Training(engine, self.activations, uploads, run=self._run, clock=clock)
        self.steps = self.steps_type(engine, sessions, run=self._run, reply=self._reply, clock=clock)
        self._limits = limits
        self._clock = clock
        self._certificate_sha256 = certificate_sha256
        self._software = software
        self._copies = Copies(
            CacheDevice(engine, executor),
            sessions,
            dialer=dialer,
            peer_id=identity.peer_id,
            needs_certificate=bool(certificate_sha256),
            max_body_bytes=limits.max_body_bytes,
            clock=clock,
        )
        names = engine.model.stack.carried
        self.inbox = Inbox(
            sessions, peer_id=identity.peer_id, names=names, max_bytes=limits.max_body_bytes, clock=clock
        )
        self.forwarding = Forwarding(
            sessions,
            dialer=dialer,
            peer_id=identity.peer_id,
            needs_certificate=bool(certificate_sha256),
            names=names,
            clock=clock,
        )
        self._record = record
        self._served: dict[int, Served] = {}
        self._next_connection = 0

    @property
    def num_connections(self) -> int:
        return len(self._served)

    def accept(self) -> Connection | None:
        """The server's side of a new connection; None when there are too many."""
        if len(self._served) >= self._limits.max_connections:
            return None
        self._next_connection += 1
        served = Served(self, self._next_connection)
        self._served[served.connection_id] = served
        return served.connection

    def start_draining(self) -> None:
        """Refuse new sessions from now on and tell all clients."""
        self.is_draining = True
        self.activations.close()
        for served in self._served.values():
            served.say_draining()

    @property
    def is_idle(self) -> bool:
        """Whether nothing would be lost by an end: no session, no request, no answer on its way."""
        return not len(self.sessions) and not any(served.is_busy for served in self._served.values())

    def abort(self) -> None:
        """Drop every connection and session."""
        for served in list(self._served.values()):
            served.connection.abort()
        self.forwarding.close()
        self.drop_state()

    def drop_state(self) -> None:
        """Forget what lies on the device beside the weights."""
        self.sessions.close_all()
        self.activations.clear()

    def expire_sessions(self) -> None:
        """Drop sessions, adapters and kept graphs that nobody used for long."""
        self.activations.expire(self._clock())
        self.inbox.expire()
        self.forwarding.expire()
        for session_id in self.sessions.expire(self._clock()):
            logger.info("session expired session=%s", session_id[:6])
        self.adapters.expire()

    def hello(self, hello: messages.ClientHello) -> messages.ServerHello | messages.Reject:
        """The answer to a client's hello."""
        text = check_version(hello.major, hello.minor)
        if text is not None:
            return messages.Reject(text)
        return messages.ServerHello(
            messages.VERSION_MAJOR,
            messages.VERSION_MINOR,
            self._identity.public_key,
            self._identity.sign_hello(nonce=hello.nonce, certificate_sha256=self._certificate_sha256),
            self._instance_id,
            self._limits.max_body_bytes,
            self._software,
            self._limits.max_batch_tokens,
            _proof_of(self._record()),
        )

    def new_protocol(self) -> Protocol:
        return Protocol(Role.SERVER, max_body_bytes=self._limits.max_body_bytes, new_body=new_body)

    def forget(self, connection_id: int) -> None:
        self._served.pop(connection_id, None)
        self.adapters.forget(connection_id)
        self.activations.forget(connection_id)
        self.sessions.disown(connection_id)

    async def answer(self, request: AnyRequest, body: Body, connection_id: int) -> Reply:
        """Do what is asked.

        Raises:
            PeerRefused: the request is not done; its text and reason go to the client.
            RemoteProtocolError: the tensors do not decode.
        """
        model = self.engine.model
        kind = messages.kind_of(request)
        if isinstance(request, ReadRequest):
            self._count(kind)
            meta, parts = await self._copies.read(request)
            return self._reply(request, Timed(parts, 0.0, 0.0), meta)
        if isinstance(request, AdapterRequest):
            self._count(kind)
            await self.adapters.bring(request.parts, decode_tensors(request.tensors, body), connection_id)
            return self._reply(request, Timed({}, 0.0, 0.0))
        blocks = check_blocks(request, model.span, model.stack)
        self._count(kind)
        if isinstance(request, CopyRequest):
            indices = decode_tensors(request.tensors, body)
            meta = await self._copies.copy(request, indices, connection_id, may_open=not self.is_draining)
            return self._reply(request, Timed({}, 0.0, 0.0), meta)
        if isinstance(request, BackwardRequest) and request.kept is not None:
            grads = check_kept_gradients(decode_tensors(request.tensors, body))
            return self._reply(request, await self.training.kept_backward(request, blocks, grads, connection_id))
        if isinstance(request, StepRequest) and (request.awaits_input or request.forward_to is not None):
            return await self._direct_step(request, blocks, body, connection_id)
        return await self._compute(request, blocks, decode_tensors(request.tensors, body), connection_id)

    async def _direct_step(self, request: StepRequest, blocks: Span, body: Body, connection_id: int) -> Reply:
        """A step whose input comes from somebody else, or whose outputs go on, or both."""
        served = self._served.get(connection_id)
        source = "" if served is None else served.connection.remote_host
        self.forwarding.prepare(request, source, connection_id)
        reply = self.steps.answered(request, may_open=not self.is_draining)
        if reply is None:
            tensors = decode_tensors(request.tensors, body)
            with self.inbox.turn(request) as before:
                if request.awaits_input:
                    tensors = _joined(tensors, await self.inbox.take(request))
                if before is not None:
                    await asyncio.wait([before])
                reply = await self._compute(request, blocks, tensors, connection_id)
            self.inbox.drop(request)
        output, buffers = reply
        is_forwarded = self.forwarding.send(request, output, buffers)
        return msgspec.structs.replace(output, is_forwarded=is_forwarded), buffers

    async def _compute(
        self, request: messages.Request, blocks: Span, named: Mapping[str, torch.Tensor], connection_id: int
    ) -> Reply:
        model = self.engine.model
        tensors = check_tensors(
            named,
            request,
            model.stack,
            blocks,
            hidden_size=self.engine.hidden_size,
            vocab_size=self.engine.vocab_size,
            max_batch_tokens=self._limits.max_batch_tokens,
        )
        adapter = await self.adapters.of(request.call, tensors, model.blocks, connection_id)
        if isinstance(request, StepRequest):
            may_open = not self.is_draining
            return await self.steps.do(request, blocks, tensors, adapter, connection_id, may_open=may_open)
        return await self._pass(request, blocks, tensors, adapter, connection_id)

    def _count(self, kind: str) -> None:
        self.num_requests[kind] = self.num_requests.get(kind, 0) + 1

    async def _pass(
        self,
        request: ForwardRequest | BackwardRequest,
        blocks: Span,
        tensors: RequestTensors,
        adapter: Adapter | None,
        connection_id: int,
    ) -> Reply:
        mask, num_tokens = tensors.attention_mask, length_of(tensors.past) + request.call.num_tokens
        if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] != num_tokens:
            refuse(f"attention_mask must have {num_tokens} columns, got {mask.shape[1]}")
        arguments = owner_arguments(request.call, tensors, mask, adapter)
        if isinstance(request, BackwardRequest):
            return self._reply(
                request, await self.training.backward(request, blocks, tensors, arguments, connection_id)
            )
        timed, is_kept = await self.training.forward(request, blocks, tensors, arguments, connection_id)
        output, buffers = self._reply(request, timed)
        return msgspec.structs.replace(output, is_kept=is_kept), buffers

    async def _run(
        self,
        request: AnyRequest,
        connection_id: int,
        priority: Priority,
        work: Callable[[], dict[str, torch.Tensor]],
        on_admitted: Callable[[], object] | None = None,
    ) -> Timed[dict[str, torch.Tensor]]:
        try:
            return await self.executor.run(
                priority, work, client=connection_id, timeout_s=request.timeout_s, on_admitted=on_admitted
            )
        except PeerRefused:
            raise
        except UnsupportedCallError as exc:  # this architecture cannot do what is asked, here or anywhere
            refuse(str(exc))
        except (RuntimeError, IndexError, ValueError, TypeError, RemoteModulesError) as exc:
            if is_out_of_memory(exc):
                text = "the device has no memory for this request"
                raise PeerRefused(text, peer_id="", reason=RefusalReason.OUT_OF_MEMORY) from exc
            logger.exception("request failed on the device")
            raise PeerRefused("the computation failed", peer_id="", reason=RefusalReason.INTERNAL) from exc

    def _reply(
        self, request: AnyRequest, timed: Timed[dict[str, torch.Tensor]], cache: CacheMeta | None = None
    ) -> Reply:
        wanted = request.call.reply_codec if isinstance(request, messages.Request) else ""
        coded = dict.fromkeys(self.engine.model.stack.coded, wanted) if wanted in CODECS else None
        metas, body = encode_tensors(timed.value, coded, pad_end=wanted not in THIN_CODECS)
        output = Output(
            request.request_id,
            metas,
            timed.queue_s,
            timed.compute_s,
            self.executor.load,
            self.sessions.budget.free_tokens,
            cache,
        )
        return output, body


def _joined(tensors: dict[str, torch.Tensor], pushed: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if twice := sorted(tensors.keys() & pushed.keys()):
        refuse(f"tensor {twice[0]!r} came with a step that awaits its input")
    return {**tensors, **pushed}


def _proof_of(signed: SignedRecord | None) -> messages.RecordProof | None:
    return None if signed is None else messages.RecordProof(signed.payload, signed.public_key, signed.signature)
