"""Every message of the protocol, one frozen struct each.

A message travels as the msgpack header of a frame (an array: the type tag, then the fields in order); its tensors
travel in the body. Fields may be appended with a default in a new minor version; anything else needs a new major
version. The tables of docs/protocol.md are checked against these classes by a test.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from remote_modules.errors import LocalProtocolError, RefusalReason, RemoteProtocolError
from remote_modules.wire.control_messages import Cancel, CloseSession, Draining, Ping, Pong, Push, ReleaseGraph
from remote_modules.wire.parts import (
    AdapterParts,
    Base,
    Block,
    CacheMeta,
    CacheOp,
    CacheOps,
    CallMeta,
    CopySource,
    Count,
    Destination,
    Id,
    Key,
    Name,
    Nonce,
    Option,
    RecordProof,
    Seconds,
    SessionId,
    TensorMeta,
    Tensors,
    Text,
)

__all__ = [
    "AdapterRequest",
    "AnyRequest",
    "BackwardRequest",
    "CacheMeta",
    "CacheOp",
    "CallMeta",
    "Cancel",
    "ClientHello",
    "CloseSession",
    "CopyRequest",
    "CopySource",
    "Destination",
    "Draining",
    "ForwardRequest",
    "Message",
    "Option",
    "Output",
    "Ping",
    "Pong",
    "Push",
    "ReadRequest",
    "RecordProof",
    "Refused",
    "Reject",
    "ReleaseGraph",
    "Request",
    "ServerHello",
    "StepRequest",
    "TensorMeta",
    "decode_message",
    "encode_message",
    "kind_of",
]

VERSION_MAJOR = 1
VERSION_MINOR = 5
COPIES_SINCE_MINOR = 2  # who speaks an older one knows no `CopyRequest` and no `ReadRequest`
CODECS_SINCE_MINOR = 3  # nor `TensorMeta.codec`
ADAPTER_PARTS_SINCE_MINOR = 3  # who speaks an older one gets an adapter whole, once for each connection
MORE_METHODS_SINCE_MINOR = 3  # nor any adapter but LoRA and IA3
ADAPTER_ROWS_SINCE_MINOR = 4  # who speaks an older one has one adapter for all rows
DIRECT_SINCE_MINOR = 5  # nor `Push`


class ClientHello(Base, frozen=True, tag="client_hello"):
    """The first message of a connection.

    Attributes:
        major, minor: version spoken; another major is rejected, the lower minor is used.
        nonce: fresh random bytes that the server signs.
        max_body_bytes: largest body that this side takes.
        software: name and version, for logs.
    """

    major: Count
    minor: Count
    nonce: Nonce
    max_body_bytes: Count
    software: Name = ""


class ServerHello(Base, frozen=True, tag="server_hello"):
    """The answer to it; proves the server's identity.

    Attributes:
        major, minor: version spoken.
        public_key: raw Ed25519 key; the peer id is its digest.
        signature: over the client's nonce and the digest of the TLS certificate in use (see docs/protocol.md).
        instance_id: as in the peer's record.
        max_body_bytes: largest body that this side takes.
        software: name and version, for logs.
        max_batch_tokens: rows x tokens that a request may hold; 0 if unknown.
        record: the peer's record, for those that other peers shall dial; None if it announces none.
    """

    major: Count
    minor: Count
    public_key: Annotated[bytes, Meta(min_length=32, max_length=32)]
    signature: Annotated[bytes, Meta(min_length=64, max_length=64)]
    instance_id: Name
    max_body_bytes: Count
    software: Name = ""
    max_batch_tokens: Count = 0
    record: RecordProof | None = None


class Reject(Base, frozen=True, tag="reject"):
    """The connection is refused; it closes after this."""

    text: Text


class StepRequest(Base, frozen=True, tag="step"):
    """Run new tokens of a session through blocks ``[start, end)``.

    Idempotent by (session, step): the peer answers a repeated step from its memory of the last reply.

    Attributes:
        request_id: chosen by the client, unique on the connection.
        session_id: chosen by the client, unguessable.
        step_id: rises by one with each new step of the session on this peer.
        start, end: blocks to run.
        position: tokens that the KV cache must hold after ``ops``; otherwise the peer answers ``session_lost``.
        ops: cache operations to apply first.
        tensors: those of a `ForwardRequest`; ``attention_mask`` holds the new columns, or all columns when
            ``mask_is_whole``; index tensors of ``ops``.
        timeout_s: after this the client no longer waits.
        call: how the owner of the blocks was called.
        mask_is_whole: see ``tensors``.
        create: whether an unknown session is to be opened.
        num_outputs: answer only the last so many tokens; None for all.
        version: cache operations that the session must have seen before ``ops``, else ``session_lost``; None for any.
        awaits_input: whether ``hidden_states`` and states come by a `Push` instead.
        forward_to: where the outputs go beside the client.
        client_key: the client's Ed25519 key for this session, which signs grants; empty where the session has it.
    """

    request_id: Id
    session_id: SessionId
    step_id: Id
    start: Block
    end: Block
    position: Count
    ops: CacheOps
    tensors: Tensors
    timeout_s: Seconds
    call: CallMeta = CallMeta()
    mask_is_whole: bool = False
    create: bool = False
    num_outputs: Count | None = None
    version: Count | None = None
    awaits_input: bool = False
    forward_to: Destination | None = None
    client_key: Key = b""


class ForwardRequest(Base, frozen=True, tag="forward"):
    """Run what enters block ``start`` through blocks ``[start, end)`` without a session.

    Attributes:
        request_id, start, end, timeout_s, call: as in `StepRequest`.
        tensors: ``hidden_states``, and ``state.<k>`` for what else the block before returned that this one takes;
            ``side.<argument>`` for arguments of blocks that depend on the text (``side.<argument>.<block>`` when each
            block has its own); ``position_ids``, ``attention_mask`` or ``attention_mask.<type>``,
            ``owner.<argument>`` as the owner got them; ``adapter.<n>``, part ``n`` of ``call.adapter_parts``, where the
            peer lacks it (before 1.3: ``adapter``, the entries, and ``adapter.<n>``, all tensors).
        keep_s: how long the peer may keep the graph of this forward for a `BackwardRequest`; 0 for not at all.
    """

    request_id: Id
    start: Block
    end: Block
    tensors: Tensors
    timeout_s: Seconds
    call: CallMeta = CallMeta()
    keep_s: Seconds = 0.0


class BackwardRequest(Base, frozen=True, tag="backward"):
    """Recompute the forward of the same fields, and return the gradients of its floating-point inputs.

    Attributes:
        tensors: as in `ForwardRequest`, and ``grad.<name>`` for each floating-point output ``<name>``; these alone
            where the forward's graph is ``kept``.
        kept: ``request_id`` of a forward on this connection whose graph the peer keeps: nothing is recomputed, and the
            graph is used up. A peer that has it no more answers ``session_lost``.
    """

    request_id: Id
    start: Block
    end: Block
    tensors: Tensors
    timeout_s: Seconds
    call: CallMeta = CallMeta()
    kept: Id | None = None


class CopyRequest(Base, frozen=True, tag="copy"):
    """Make the session ``session_id`` here equal to the session ``source_session_id`` of another peer, or of this one.

    A session that holds tokens already gets those that it lacks. Cache operations of a session are counted: all copies
    of one session have the same count where they hold the same.

    Attributes:
        request_id, session_id: as in `StepRequest`.
        start, end: blocks to copy; the source may hold more.
        version: cache operations that the session here has seen; for one that is new, the least that the source has.
        ops: those that followed, in order, as far as the client knows them; those that the source has seen are done.
        tensors: index tensors of ``ops``.
        timeout_s: after this the client no longer waits.
        source_session_id: chosen by the client.
        source: the peer that holds it; None for this very peer.
        create: whether an unknown session is to be opened.
        position: tokens to hold afterwards; None for as many as the source has.
    """

    request_id: Id
    session_id: SessionId
    start: Block
    end: Block
    version: Count
    ops: CacheOps
    tensors: Tensors
    timeout_s: Seconds
    source_session_id: SessionId
    source: CopySource | None = None
    create: bool = False
    position: Count | None = None


class ReadRequest(Base, frozen=True, tag="read"):
    """Read a part of a session's KV cache; peers ask each other. Whoever knows the session's id may read it.

    Attributes:
        request_id, session_id: as in `StepRequest`.
        start, end: blocks whose layers to read; where they are equal, what belongs to no block (masks and the like).
        first, last: tokens to read of what grows with the text; None for as many as there are. A state that does not
            grow is read whole, and only while ``last`` is the length of the session.
        version: cache operations that the session must have seen; None for any number.
        timeout_s: after this nobody waits.
    """

    request_id: Id
    session_id: SessionId
    start: Block
    end: Block
    first: Count
    last: Count | None
    version: Count | None
    timeout_s: Seconds


class AdapterRequest(Base, frozen=True, tag="adapter"):
    """Bring parts of an adapter that a later request on this connection names, where one message cannot bring all.

    Attributes:
        request_id, timeout_s: as in `StepRequest`.
        tensors: ``adapter.<n>`` for each of ``parts``.
        parts: digests.
    """

    request_id: Id
    tensors: Tensors
    timeout_s: Seconds
    parts: AdapterParts


class Output(Base, frozen=True, tag="output"):
    """The result of a request.

    Attributes:
        tensors: ``hidden_states`` and ``state.<k>`` as the last block returned them, ``record.<kind>.<block>``; where
            logits were asked for and the peer has the head ``record.head.values`` and ``record.head.tokens``
            ``[B, n, k]``; for a backward ``grad.<name>`` of each floating-point input, and ``grad.adapter.<n>`` of the
            adapter's tensors.
        queue_s, compute_s: time spent waiting for the device, and on it.
        load: requests queued or running at the peer.
        free_kv_tokens: as in the peer's record, now.
        cache: of the session, for a copy and a read; ``tensors`` of a read are those that `ReadRequest` names.
        is_kept: whether the peer keeps the graph of this forward; it may drop it at any time.
        is_forwarded: whether ``tensors`` were sent on to where ``forward_to`` of the step says.
    """

    request_id: Id
    tensors: Tensors
    queue_s: Seconds
    compute_s: Seconds
    load: Count = 0
    free_kv_tokens: Count = 0
    cache: CacheMeta | None = None
    is_kept: bool = False
    is_forwarded: bool = False


class Refused(Base, frozen=True, tag="refused"):
    """The request was not done.

    Attributes:
        reason: a `RefusalReason`.
        text: one line for a person; never a traceback.
        retry_after_s: a hint for ``busy`` and ``out_of_memory``.
    """

    request_id: Id
    reason: RefusalReason
    text: Text
    retry_after_s: Seconds = 0.0


Request: TypeAlias = StepRequest | ForwardRequest | BackwardRequest
AnyRequest: TypeAlias = Request | CopyRequest | ReadRequest | AdapterRequest
Message: TypeAlias = (
    ClientHello
    | ServerHello
    | Reject
    | StepRequest
    | ForwardRequest
    | BackwardRequest
    | CopyRequest
    | ReadRequest
    | AdapterRequest
    | Output
    | Refused
    | Cancel
    | CloseSession
    | ReleaseGraph
    | Push
    | Ping
    | Pong
    | Draining
)


def kind_of(request: AnyRequest) -> str:
    """``"step"``, ``"forward"``, ``"backward"``, ``"copy"``, ``"read"`` or ``"adapter"``: the request's tag."""
    return str(request.__struct_config__.tag)


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode_message(message: Message) -> bytes:
    """Write a header.

    Raises:
        LocalProtocolError: a field is out of its bounds, so that the other side would close and ban us.
    """
    header = _encoder.encode(message)
    try:
        _decoder.decode(header)
    except msgspec.ValidationError as exc:
        raise LocalProtocolError(f"{type(message).__name__} may not be sent: {exc}") from exc
    return header


def decode_message(header: bytes) -> Message:
    """Read a header; types and bounds are checked field by field.

    Raises:
        RemoteProtocolError: no message of this protocol.
    """
    try:
        return _decoder.decode(header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise RemoteProtocolError(f"header of {len(header)} bytes is no message: {exc}") from exc
