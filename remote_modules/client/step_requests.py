"""The requests of one step of a session: what each hop is told, and which tensors go along."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import torch

from remote_modules.client.call import Named
from remote_modules.client.hop_caches import HopCaches, PeerCache
from remote_modules.client.owner_history import StepInputs
from remote_modules.model.past import length_of, select_layers
from remote_modules.plan.routing import Hop
from remote_modules.wire.messages import StepRequest

__all__ = ["StepRequests"]


@dataclass(frozen=True, slots=True)
class StepRequests:
    """Args: as of `client.step.Step`."""

    session: HopCaches
    step: StepInputs

    def build(
        self,
        request_id: int,
        hop: Hop,
        cache: PeerCache,
        tokens: tuple[int, int],
        num_outputs: int | None,
        entry: Named,
    ) -> tuple[StepRequest, Named]:
        """The request for ``tokens``, and its tensors.

        Args:
            num_outputs: how many tokens' outputs are wanted; None for all.
            entry: what enters the hop for these tokens.
        """
        stack, old_end = self.session.swarm.stack, self.step.position
        ops, indices = cache.ops()
        past, start = {}, cache.next_position
        if cache.position == 0:
            past, start = select_layers(self.session.past, stack.layers_of(hop.span)), length_of(self.session.past)
        assert start == tokens[0], "the peer is where we think it is"
        end = tokens[1]
        shared = self.step.tensors(start, end, stack.side_specs(hop.span))
        tensors = {**entry, **indices, **shared, **past}
        mask, is_whole = self._mask(start, end, bool(ops) or cache.position == 0 or cache.is_copy)
        if mask is not None and not any(name.startswith("attention_mask") for name in shared):
            tensors["attention_mask"] = mask
        meta = self.step.call.meta(end - start)
        if end <= old_end:
            meta = msgspec.structs.replace(meta, record=())
        message = StepRequest(
            request_id,
            cache.session_id,
            cache.step_id,
            hop.span.start,
            hop.span.end,
            start,
            ops,
            (),
            0.0,
            call=meta,
            mask_is_whole=is_whole,
            create=cache.step_id == 0,
            num_outputs=num_outputs,
            version=cache.version if cache.is_copy else None,
        )
        return message, tensors

    def _mask(self, start: int, end: int, is_whole: bool) -> tuple[torch.Tensor | None, bool]:
        """The mask columns to send for tokens start..end: the new ones when the peer has the others already."""
        mask = self.step.attention_mask
        if mask is None:
            return None, False
        old = self.step.old.attention_mask
        if not is_whole and start == self.step.position and old is not None and torch.equal(old, mask[:, :start]):
            return mask[:, start:end].contiguous(), False
        return mask[:, :end].contiguous(), True
