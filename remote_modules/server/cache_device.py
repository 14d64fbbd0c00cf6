"""Work on KV caches beside steps, on the device thread."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from remote_modules.errors import PeerRefused, RefusalReason, UnsupportedCallError
from remote_modules.model.kv_state import CacheForm
from remote_modules.server.checks import refuse
from remote_modules.server.engine import Engine
from remote_modules.server.executor import Executor
from remote_modules.server.jobs import Priority
from remote_modules.spans import Span

__all__ = ["CacheDevice"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class CacheDevice:
    """The device of one peer, for what is done to caches apart from steps."""

    def __init__(self, engine: Engine, executor: Executor) -> None:
        self.engine = engine
        self._executor = executor

    async def run(self, work: Callable[[], T]) -> T:
        """Do ``work``.

        Raises:
            PeerRefused: ``busy``; or it failed: ``session_lost`` for what did not fit, which is a `ValueError`.
        """

        def run() -> T:
            with torch.inference_mode():
                return work()

        try:
            return (await self._executor.run(Priority.PREFILL, run)).value
        except PeerRefused:
            raise
        except UnsupportedCallError as exc:
            refuse(f"this KV cache cannot be copied: {exc}")
        except ValueError as exc:
            refuse(str(exc), RefusalReason.SESSION_LOST)
        except RuntimeError as exc:
            logger.warning("work on a KV cache failed: %s", exc)
            text = "work on the KV cache failed on the device"
            raise PeerRefused(text, peer_id="", reason=RefusalReason.INTERNAL) from exc

    async def form(self, blocks: Span) -> CacheForm:
        """What caches of ``blocks`` consist of."""
        return await self.run(lambda: self.engine.cache_form(blocks))
