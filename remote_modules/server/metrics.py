"""What a peer shows at ``/metrics``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from remote_modules.server.handler import Handler

__all__ = ["peer_metrics"]

KINDS = ("step", "forward", "backward", "copy", "read")
BACKWARDS: dict[str, Callable[[Handler], float]] = {
    "kept": lambda now: now.activations.num_used,
    "lost": lambda now: now.activations.num_lost,
    "recomputed": lambda now: now.activations.num_recomputed,
}


def peer_metrics(handler: Callable[[], Handler | None], num_restarts: Callable[[], int]) -> Callable[[], bytes]:
    """The text to serve.

    Args:
        handler: the one that answers now; None while nothing is held.
        num_restarts: times that the device came back.
    """

    def read(of: Callable[[Handler], float]) -> float:
        now = handler()
        return of(now) if now is not None else 0.0

    registry = CollectorRegistry()
    gauges: dict[str, tuple[str, Callable[[Handler], float]]] = {
        "remote_modules_sessions": ("Open sessions.", lambda now: len(now.sessions)),
        "remote_modules_kv_bytes": ("Reserved KV cache.", lambda now: now.sessions.budget.used_bytes),
        "remote_modules_kept_graphs": ("Forwards kept for their backwards.", lambda now: len(now.activations)),
        "remote_modules_kept_bytes": ("Memory that these hold.", lambda now: now.activations.used_bytes),
        "remote_modules_load": ("Requests queued or running.", lambda now: now.executor.load),
        "remote_modules_batches": (
            "Times that steps of several sessions ran as one.",
            lambda now: now.executor.num_batches,
        ),
        "remote_modules_batched_steps": ("Steps of these.", lambda now: now.executor.num_batched),
        "remote_modules_connections": ("Open connections.", lambda now: now.num_connections),
        "remote_modules_adapters": ("Adapters that clients sent, held now.", lambda now: len(now.adapters)),
        "remote_modules_adapter_bytes": ("Their tensors, held now.", lambda now: now.adapters.num_bytes),
        "remote_modules_adapters_received": ("Times that adapters came.", lambda now: now.adapters.num_received),
        "remote_modules_adapter_bytes_received": ("Tensors of these.", lambda now: now.adapters.bytes_received),
        "remote_modules_tasks": ("Tasks on the event loop.", lambda _: len(asyncio.all_tasks())),
        "remote_modules_device_restarts": ("Times that the device came back.", lambda _: num_restarts()),
    }
    for name, (text, of) in gauges.items():
        Gauge(name, text, registry=registry).set_function(partial(read, of))
    requests = Gauge("remote_modules_requests", "Requests taken since start.", ["kind"], registry=registry)
    for kind in KINDS:
        requests.labels(kind).set_function(partial(read, partial(_num_requests, kind)))
    backwards = Gauge("remote_modules_backwards", "Backwards by where their forward was.", ["of"], registry=registry)
    for name, of in BACKWARDS.items():
        backwards.labels(name).set_function(partial(read, of))
    return lambda: generate_latest(registry)


def _num_requests(kind: str, handler: Handler) -> float:
    return handler.num_requests.get(kind, 0)
