"""Run and fine-tune language models too big for one machine, by pooling peers.

>>> from remote_modules import RemoteSequential
>>> model.model.layers = RemoteSequential.from_swarm("org/model", trackers=["https://…"])  # doctest: +SKIP

Importing this package starts nothing and imports neither torch nor transformers: names are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from remote_modules.client.deep_prompts import DeepPrompts
    from remote_modules.client.inference_session import InferenceSession
    from remote_modules.client.loader import load
    from remote_modules.client.sequential import RemoteSequential
    from remote_modules.client.speculation import Speculation
    from remote_modules.client.stats import ClientStats
    from remote_modules.config import ClientConfig, ServerConfig, TrackerConfig
    from remote_modules.errors import (
        NoRouteError,
        PeerError,
        ProtocolError,
        RemoteModulesError,
        SessionError,
        UnsupportedCallError,
    )
    from remote_modules.server.server import Server
    from remote_modules.server.tracker import Tracker
    from remote_modules.training.lightning import RemoteModulesCallback
    from remote_modules.training.trainer import RemoteModulesTrainerCallback

__all__ = [
    "ClientConfig",
    "ClientStats",
    "DeepPrompts",
    "InferenceSession",
    "NoRouteError",
    "PeerError",
    "ProtocolError",
    "RemoteModulesCallback",
    "RemoteModulesError",
    "RemoteModulesTrainerCallback",
    "RemoteSequential",
    "Server",
    "ServerConfig",
    "SessionError",
    "Speculation",
    "Tracker",
    "TrackerConfig",
    "UnsupportedCallError",
    "load",
]

_HOMES = {
    "ClientConfig": "config",
    "ClientStats": "client.stats",
    "DeepPrompts": "client.deep_prompts",
    "InferenceSession": "client.inference_session",
    "RemoteModulesCallback": "training.lightning",
    "RemoteModulesTrainerCallback": "training.trainer",
    "RemoteSequential": "client.sequential",
    "Server": "server.server",
    "ServerConfig": "config",
    "Speculation": "client.speculation",
    "Tracker": "server.tracker",
    "TrackerConfig": "config",
    "load": "client.loader",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'remote_modules' has no attribute '{name}'")
    return getattr(importlib.import_module(f"remote_modules.{_HOMES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return __all__
