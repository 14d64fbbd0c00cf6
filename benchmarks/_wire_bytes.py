"""How long the frames of one token are, and what is lost where outliers are kept apart."""

from __future__ import annotations

import torch

from remote_modules.wire import codecs
from remote_modules.wire.framing import encode_frame
from remote_modules.wire.messages import CallMeta, Output, StepRequest, encode_message
from remote_modules.wire.tensors import encode_tensors

__all__ = ["ordinary_error", "token_share"]

NUM_TOKENS, ORDINARY_SIZE = 64, 8192
OUTLIERS = (1234, 4321)  # channels


def token_share(hidden_size: int, codec: str) -> float:
    """Bytes of the longer of the request and the reply of a decode step, headers included, to those of fp16 values.

    Numbers in the headers are those of a long session of a large model.
    """
    hidden = torch.randn(1, 1, hidden_size, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    metas, body = encode_tensors({"hidden_states": hidden}, {"hidden_states": codec}, pad_end=False)
    call = CallMeta(rows=1, num_tokens=1, reply_codec=codec, position_rows=1)
    step = StepRequest(2**20, "s" * 22, 2**16, 127, 255, 2**16 - 1, (), metas, 30, call)
    output = Output(2**20, metas, 0.001, 0.001, 3, 2**20)
    sizes = [sum(map(len, encode_frame(encode_message(message), body))) for message in (step, output)]
    return max(sizes) / hidden.nbytes


def ordinary_error(codec: str) -> float:
    """Relative, of channels of ordinary size beside two that are 50 times as large and one value of 900."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.exp(0.5 * torch.randn(ORDINARY_SIZE, generator=generator))
    tensor = torch.randn(NUM_TOKENS, ORDINARY_SIZE, generator=generator) * sizes
    for channel, size in zip(OUTLIERS, (60.0, -45.0), strict=True):
        tensor[:, channel] = size + tensor[:, 0]
    tensor[0, OUTLIERS[0]] = 900.0
    is_ordinary = torch.ones(ORDINARY_SIZE, dtype=torch.bool)
    is_ordinary[list(OUTLIERS)] = False
    error = (codecs.rounded(codec, tensor) - tensor)[:, is_ordinary].norm()
    return float(error / tensor[:, is_ordinary].norm())
