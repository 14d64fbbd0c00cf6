"""What one peer takes on, from its settings and the memory that is free."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from remote_modules.config import ServerConfig
from remote_modules.server.capacity import activation_budget, upload_budget

__all__ = ["MAX_BODY_BYTES", "HandlerLimits"]

MAX_BODY_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class HandlerLimits:
    """See `ServerConfig`."""

    max_batch_tokens: int
    max_body_bytes: int
    max_connections: int
    adapter_budget_bytes: int = 1 << 28
    adapter_lease_s: float = 600.0
    activation_bytes: int = 0
    upload_bytes: int = 0  # of inputs on an accelerator whose turn has not come

    @classmethod
    def configured(cls, config: ServerConfig, device: torch.device) -> HandlerLimits:
        """Those of ``config`` on a ``device`` that holds the weights already."""
        return cls(
            max_batch_tokens=config.max_batch_tokens,
            max_body_bytes=MAX_BODY_BYTES,
            max_connections=config.max_connections,
            adapter_budget_bytes=config.adapter_budget_bytes,
            adapter_lease_s=config.adapter_lease_s,
            activation_bytes=activation_budget(config.activation_budget_bytes, device),
            upload_bytes=upload_budget(device),
        )
