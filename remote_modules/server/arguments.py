"""How the owner of the blocks is to be called, of what came with a request and what its session has kept."""

from __future__ import annotations

import torch

from remote_modules.model.adapters import Adapter
from remote_modules.model.replay import OwnerArguments
from remote_modules.server.checks import RequestTensors, refuse
from remote_modules.wire.messages import CallMeta, StepRequest
from remote_modules.wire.tensors import DTYPES

__all__ = ["owner_arguments", "whole_mask"]

Mask = torch.Tensor | dict[str, torch.Tensor | None]


def owner_arguments(
    call: CallMeta,
    tensors: RequestTensors,
    mask: Mask | None,
    adapter: Adapter | None,
) -> OwnerArguments:
    """The owner's call, of what came with a request."""
    return OwnerArguments(
        rows=call.rows,
        num_tokens=call.num_tokens,
        position_ids=tensors.position_ids,
        attention_mask=mask,
        tensors=tensors.owner,
        options={option.name: option.value for option in call.options},
        use_cache=call.use_cache,
        autocast=DTYPES.get(call.autocast),
        record=call.record,
        adapter=adapter,
        seed=call.seed,
        first_row=call.first_row,
        adapter_rows=call.adapter_rows,
        with_grad=call.with_grad,
    )


def whole_mask(request: StepRequest, kept: torch.Tensor | None, columns: Mask | None, num_columns: int) -> Mask | None:
    """The attention mask of all tokens, from the ``columns`` that came and those that the session has ``kept``.

    Raises:
        PeerRefused: they do not make one mask of ``num_columns``.
    """
    if columns is None or isinstance(columns, dict) or columns.dim() > 2:
        return columns
    mask = columns
    if not request.mask_is_whole:
        if request.ops:  # the mask that the session kept does not follow them
            refuse("a step with cache operations must bring the whole attention mask")
        if kept is None or kept.shape[0] != columns.shape[0]:
            refuse("the session has no attention mask to append to; send the whole one")
        mask = torch.cat([kept, columns.to(kept.dtype)], dim=1)
    if mask.shape[1] != num_columns:
        refuse(f"attention_mask must have {num_columns} columns, got {mask.shape[1]}")
    return mask
