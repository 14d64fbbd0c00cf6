"""How a client's tensors travel: as they are, or in codecs (`wire.codecs`).

Every value that peers see, and every one that they answered, has gone through the codec, also where the peer is too old
for it and the bytes are plain: the numbers of a run do not depend on who serves it.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import torch

from remote_modules.client.call import Named
from remote_modules.net.client_connection import ClientConnection
from remote_modules.plan.wire_choice import PLAIN
from remote_modules.wire.codecs import can_encode, rounded
from remote_modules.wire.codecs import num_bytes as coded_bytes
from remote_modules.wire.framing import Buffer
from remote_modules.wire.messages import BackwardRequest, Output, Request, StepRequest, TensorMeta
from remote_modules.wire.tensors import encode_tensors

__all__ = ["Coding"]

FINE, COARSE = "int8o", "int4o"
LEAST_COARSE_TOKENS = 16  # of a step in 4 bits: fewer are decoding, and what it guesses ahead


@dataclass(frozen=True, slots=True)
class Coding:
    """What one client does with the tensors of its requests.

    Args:
        wire: `ClientConfig.wire`, or what is chosen for ``"auto"``.
        names: of the tensors that may lose bits: `StackSpec.coded`.
    """

    wire: str
    names: frozenset[str]

    @property
    def is_plain(self) -> bool:
        """Whether tensors travel as they are."""
        return self.wire == PLAIN

    def encode(
        self, message: Request, tensors: Named, connection: ClientConnection, *, is_merged: bool = False
    ) -> tuple[Request, list[Buffer]]:
        """The message that lists ``tensors`` and says how to answer, and its body.

        Args:
            is_merged: whether a step holds the tokens of several steps.
        """
        is_thin = connection.knows_thin_wire
        coded = self._codecs(message, tensors, is_merged=is_merged)
        if is_thin:
            message, tensors = _without_positions(message, tensors)
        else:
            tensors = {n: rounded(coded[n], tensor) if n in coded else tensor for n, tensor in tensors.items()}
        metas, body = encode_tensors(tensors, coded if is_thin else None, pad_end=not is_thin)
        call = message.call
        if not self.is_plain and is_thin:
            reply_codec = self._reply_codec(message, is_merged=is_merged)
            call = msgspec.structs.replace(call, reply_codec=reply_codec)
        return msgspec.structs.replace(message, tensors=metas, call=call), body

    def encode_inputs(
        self, message: StepRequest, tensors: Named, connection: ClientConnection
    ) -> tuple[tuple[TensorMeta, ...], list[Buffer]]:
        """What enters a hop that awaits it for ``message``, as the hop before would send it."""
        coded = self._codecs(message, tensors, is_merged=False)
        is_thin = connection.knows_thin_wire
        return encode_tensors(tensors, coded if is_thin else None, pad_end=not is_thin)

    def settle(self, message: Request, output: Output, replies: Named, *, is_merged: bool = False) -> Named:
        """What was answered, as if all of it had come in the codec that `encode` asks for."""
        if self.is_plain:
            return replies
        codec = self._reply_codec(message, is_merged=is_merged)
        plain = {meta.name for meta in output.tensors if not meta.codec} & self.names
        return {name: rounded(codec, tensor) if name in plain else tensor for name, tensor in replies.items()}

    def num_bytes(self, tensors: Named, num_tokens: int = LEAST_COARSE_TOKENS) -> int:
        """What ``tensors`` of so many tokens take on the wire, if their values are finite."""
        codec = self._codec(num_tokens)
        return sum(
            coded_bytes(codec, tuple(tensor.shape)) if self._is_coded(codec, name, tensor) else tensor.nbytes
            for name, tensor in tensors.items()
        )

    def _is_coded(self, codec: str, name: str, tensor: torch.Tensor) -> bool:
        return not self.is_plain and name in self.names and can_encode(codec, tensor)

    def _codecs(self, message: Request, tensors: Named, *, is_merged: bool) -> dict[str, str]:
        """By the names of what is coded."""
        if self.is_plain:
            return {}
        codec = FINE if is_merged else self._codec(_num_tokens(message))
        return {name: FINE if name.startswith("grad.") else codec for name in tensors if name in self.names}

    def _reply_codec(self, message: Request, *, is_merged: bool) -> str:
        if is_merged or isinstance(message, BackwardRequest):
            return FINE
        num_outputs = message.num_outputs if isinstance(message, StepRequest) else None
        return self._codec(_num_tokens(message) if num_outputs is None else num_outputs)

    def _codec(self, num_tokens: int) -> str:
        return COARSE if self.wire == "int4" and num_tokens >= LEAST_COARSE_TOKENS else FINE


def _num_tokens(message: Request) -> int:
    """Of a step; of other requests so many that they travel in 4 bits, however they are cut."""
    return message.call.num_tokens if isinstance(message, StepRequest) else LEAST_COARSE_TOKENS


def _without_positions(message: Request, tensors: Named) -> tuple[Request, Named]:
    """Positions that follow the KV cache are told by the number of their rows."""
    positions = tensors.get("position_ids")
    if positions is None or not isinstance(message, StepRequest) or positions.dim() != 2:
        return message, tensors
    if positions.dtype != torch.int64 or not _follow(positions, message.position):
        return message, tensors
    others = {name: tensor for name, tensor in tensors.items() if name != "position_ids"}
    call = msgspec.structs.replace(message.call, position_rows=len(positions))
    return msgspec.structs.replace(message, call=call), others


def _follow(positions: torch.Tensor, start: int) -> bool:
    """Whether ``[n, T]`` count up from ``start`` in each row."""
    num_tokens = positions.shape[1]
    if num_tokens == 1:  # as in each step of decoding
        return all(position == start for position in positions.flatten().tolist())
    return torch.equal(positions, torch.arange(start, start + num_tokens).expand(len(positions), -1))
