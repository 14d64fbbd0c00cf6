"""The greatest logits after the last block, for clients that do not run the LM head themselves."""

from __future__ import annotations

from collections.abc import Callable

import torch

from remote_modules.server.engine import Engine
from remote_modules.server.transfers import to_cpu
from remote_modules.wire.messages import StepRequest

__all__ = ["logits_of"]

Named = dict[str, torch.Tensor]

MAX_TOP_K = 1024
MAX_PLACES = 256  # rows x tokens; all logits of so many are in memory for a moment


def logits_of(engine: Engine, request: StepRequest, outputs: Named) -> Callable[[], Named] | None:
    """Work for the device; None if no logits were asked for, or this peer cannot give them.

    Of more tokens, or more logits of each, than the limits allow come as many as they allow.
    """
    call, hidden = request.call, outputs.get("hidden_states")
    if engine.head is None or hidden is None or request.end != engine.model.stack.num_blocks:
        return None
    number = min(call.head_tokens, hidden.shape[1], MAX_PLACES // max(1, call.rows))
    if not number or not call.head_top_k:
        return None
    head, last, top_k = engine.head, hidden[:, -number:], min(call.head_top_k, MAX_TOP_K)

    def work() -> Named:
        values, tokens = head.top(last, top_k)
        return to_cpu({"record.head.values": values, "record.head.tokens": tokens}, lambda _, tensor: tensor.dtype)

    return work
