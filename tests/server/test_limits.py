from __future__ import annotations

import torch

from remote_modules.config import ServerConfig
from remote_modules.server.limits import HandlerLimits

CPU = torch.device("cpu")


def test_limits_are_those_of_the_settings() -> None:
    config = ServerConfig(
        "tiny",
        max_batch_tokens=7,
        max_connections=3,
        adapter_budget_bytes=11,
        adapter_lease_s=5.0,
        activation_budget_bytes=13,
    )
    limits = HandlerLimits.configured(config, CPU)
    assert (limits.max_batch_tokens, limits.max_connections) == (7, 3)
    assert (limits.adapter_budget_bytes, limits.adapter_lease_s, limits.activation_bytes) == (11, 5.0, 13)


def test_graphs_are_kept_by_default_and_not_at_a_budget_of_zero() -> None:
    assert HandlerLimits.configured(ServerConfig("tiny"), CPU).activation_bytes > 0
    assert HandlerLimits.configured(ServerConfig("tiny", activation_budget_bytes=0), CPU).activation_bytes == 0
