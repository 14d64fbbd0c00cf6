"""The greatest logits after the last block, for clients that do not run the LM head themselves."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from remote_modules.model.head import GreatestLogits
from remote_modules.server.engine import Engine
from remote_modules.server.jobs import Batchable
from remote_modules.server.transfers import to_cpu
from remote_modules.wire.messages import StepRequest

__all__ = ["LogitsWork", "logits_of"]

logger = logging.getLogger(__name__)

Named = dict[str, torch.Tensor]

MAX_TOP_K = 1024
MAX_PLACES = 256  # rows x tokens; all logits of so many are in memory for a moment


@dataclass(slots=True, eq=False)
class LogitsWork(Batchable):
    """The greatest logits after ``hidden`` ``[B, n, D]``; those of several sessions at once, where steps are.

    It ends steps that are done, which nobody waits to do together.
    """

    engine: Engine
    head: GreatestLogits
    hidden: torch.Tensor
    top_k: int
    group: Hashable | None = None
    rows: int = 1
    who: Hashable = None

    def __post_init__(self) -> None:
        self.rows = self.hidden.shape[0] * self.hidden.shape[1]
        if self.engine.packs:
            self.group = ("head", self.top_k, self.hidden.dtype, self.hidden.shape[1:])

    def __call__(self) -> Named:
        return self.with_others([])[0]

    def with_others(self, others: Sequence[LogitsWork]) -> list[Named]:
        works = [self, *others]
        hidden = self.hidden if not others else torch.cat([work.hidden for work in works])
        values, tokens = self.head.top(hidden, self.top_k)
        found = to_cpu({"record.head.values": values, "record.head.tokens": tokens}, lambda _, tensor: tensor.dtype)
        parts = {name: tensor.split([len(work.hidden) for work in works]) for name, tensor in found.items()}
        return [{name: part[number] for name, part in parts.items()} for number in range(len(works))]

    def parted(self) -> None:
        logger.warning("logits of several sessions failed together, and not alone")


def logits_of(engine: Engine, request: StepRequest, outputs: Named) -> LogitsWork | None:
    """Work for the device; None if no logits were asked for, or this peer cannot give them.

    Of more tokens, or more logits of each, than the limits allow come as many as they allow.
    """
    call, hidden = request.call, outputs.get("hidden_states")
    if engine.head is None or hidden is None or request.end != engine.model.stack.num_blocks:
        return None
    number = min(call.head_tokens, hidden.shape[1], MAX_PLACES // max(1, call.rows))
    if not number or not call.head_top_k:
        return None
    top_k = min(call.head_top_k, MAX_TOP_K)
    return LogitsWork(engine, engine.head, hidden[:, -number:], top_k)
