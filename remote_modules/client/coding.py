"""How a client's tensors travel: as they are, or in a codec (`wire.codecs`).

Every value that peers see, and every one that they answered, has gone through the codec, also where the peer is too old
for it and the bytes are plain: the numbers of a run do not depend on who serves it.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import torch

from remote_modules.client.call import Named
from remote_modules.net.client_connection import ClientConnection
from remote_modules.wire.codecs import can_encode, rounded
from remote_modules.wire.codecs import num_bytes as coded_bytes
from remote_modules.wire.framing import Buffer
from remote_modules.wire.messages import Output, Request, TensorMeta
from remote_modules.wire.tensors import encode_tensors

__all__ = ["Coding"]


@dataclass(frozen=True, slots=True)
class Coding:
    """The codec of one client.

    Args:
        codec: its name, or "" for none.
        names: of the tensors that go by it: `StackSpec.coded`.
    """

    codec: str
    names: frozenset[str]

    def encode(self, message: Request, tensors: Named, connection: ClientConnection) -> tuple[Request, list[Buffer]]:
        """The message that lists ``tensors`` and asks for an answer in the same codec, and its body."""
        codec = self.codec if connection.knows_codecs else ""
        if self.codec and not codec:
            tensors = {name: rounded(tensor) if name in self.names else tensor for name, tensor in tensors.items()}
        metas, body = encode_tensors(tensors, codec, self.names)
        call = msgspec.structs.replace(message.call, reply_codec=codec) if codec else message.call
        return msgspec.structs.replace(message, tensors=metas, call=call), body

    def encode_inputs(
        self, tensors: Named, connection: ClientConnection
    ) -> tuple[tuple[TensorMeta, ...], list[Buffer]]:
        """What enters a hop, as the hop before would send it."""
        return encode_tensors(tensors, self.codec if connection.knows_codecs else "", self.names)

    def num_bytes(self, tensors: Named) -> int:
        """What ``tensors`` take on the wire, if their values are finite."""
        return sum(
            coded_bytes(tuple(tensor.shape)) if self._is_coded(name, tensor) else tensor.nbytes
            for name, tensor in tensors.items()
        )

    def _is_coded(self, name: str, tensor: torch.Tensor) -> bool:
        return bool(self.codec) and name in self.names and can_encode(tensor)

    def settle(self, output: Output, replies: Named) -> Named:
        """What was answered, as if all of it had come in the codec."""
        if not self.codec:
            return replies
        plain = {meta.name for meta in output.tensors if not meta.codec} & self.names
        return {name: rounded(tensor) if name in plain else tensor for name, tensor in replies.items()}
