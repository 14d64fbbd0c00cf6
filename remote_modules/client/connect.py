"""From a model's name to a connected swarm."""

from __future__ import annotations

import atexit
import contextlib
import functools
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from remote_modules.client.stats import StatsRecorder
from remote_modules.client.swarm import Swarm
from remote_modules.config import ClientConfig, check_tracker_urls, default_trackers
from remote_modules.discovery.known_peers import KnownPeers
from remote_modules.discovery.merged import build_discovery
from remote_modules.errors import CheckpointError, UnsupportedCallError
from remote_modules.model.checkpoint import BUILT_IN, Checkpoint, open_checkpoint
from remote_modules.model.classes import serving_class
from remote_modules.model.fingerprint import block_digests, model_key
from remote_modules.model.loading import load_span, read_config
from remote_modules.model.probe import probe_stack
from remote_modules.model.shadow import shadow_block
from remote_modules.model.stack import StackSpec, meta_skeleton
from remote_modules.net.http import HttpDialer
from remote_modules.net.loop import LoopThread, shared_loop
from remote_modules.peers import check_address
from remote_modules.spans import Span

__all__ = ["SwarmHandle", "connect_swarm"]


EXIT_TIMEOUT_S = 2.0


@dataclass(eq=False)
class SwarmHandle:
    """A client's swarm and the thread that drives it; shared by a `RemoteSequential` and its slices."""

    swarm: Swarm
    io: LoopThread
    stats: StatsRecorder
    model_config: PreTrainedConfig
    checkpoint: Checkpoint | None
    stack: StackSpec
    skeleton: PreTrainedModel

    @property
    def num_blocks(self) -> int:
        return self.stack.num_blocks

    @property
    def hidden_size(self) -> int:
        size: int = self.model_config.get_text_config(decoder=True).hidden_size
        return size

    @property
    def model_name(self) -> str:
        return self.checkpoint.name if self.checkpoint is not None else str(self.model_config.model_type)

    @property
    def no_cache(self) -> str:
        """Why calls with a KV cache are refused; "" if they are carried."""
        if not self.stack.no_cache:
            return ""
        kind, why = self.model_config.model_type, self.stack.no_cache
        return f"KV caches of '{kind}' models are not carried ({why}); call the model with use_cache=False"

    def check_alone(self, blocks: Span) -> None:
        """Whether ``blocks`` can be called without their model.

        Raises:
            UnsupportedCallError: they take more than hidden states.
        """
        if self.stack.sides or (self.stack.states and blocks.start):
            kind = self.model_config.model_type
            raise UnsupportedCallError(f"blocks of '{kind}' take more than hidden states; call them through the model")

    def shadow(self, block: int, forward: Callable[..., Any]) -> nn.Module:
        """The module tree of one block without its weights, whose call is ``forward``."""
        return shadow_block(
            self.stack.blocks(self.skeleton)[block],
            forward,
            dtype=_dtype_of(self.model_config),
            device="cpu",
            read_weight=partial(self._read_weight, block) if self.checkpoint is not None else None,
        )

    def _read_weight(self, block: int, name: str) -> torch.Tensor:
        """A weight of one block as the checkpoint has it: some adapters are made from them."""
        assert self.checkpoint is not None
        span = Span(block, block + 1)
        model, stack = load_span(self.checkpoint, self.model_config, type(self.skeleton), span)
        return stack.blocks(model)[block].get_parameter(name).detach()

    def close(self) -> None:
        """Close connections and discovery; idempotent."""
        if self.io.loop.is_running():
            self.io.run(self.swarm.aclose())


def connect_swarm(
    model: object,
    *,
    trackers: Sequence[str],
    mdns: bool,
    peers: Sequence[str],
    invite: str | None,
    config: ClientConfig | None,
    **hub: Any,
) -> SwarmHandle:
    """Prepare everything; the first pass will look peers up.

    Args:
        hub: ``revision``, ``cache_dir`` and ``token`` of `open_checkpoint`, for a model that is named.

    Raises:
        ValueError, TypeError: bad arguments, before any I/O.
        CheckpointError: the model's config cannot be read.
        UnsupportedCallError: an invite, or an architecture that is not carried.
    """
    if invite is not None:
        raise UnsupportedCallError("invites are not carried yet; give trackers or peers")
    config = config or ClientConfig()
    check_tracker_urls(trackers)
    if isinstance(peers, str):
        raise TypeError(f"peers must be a list of HOST:PORT, got the string {peers!r}; write [{peers!r}]")
    for address in peers:
        check_address(address)
    urls = tuple(trackers) or default_trackers()
    if not (urls or mdns or peers):
        raise ValueError("nowhere to look for peers: give trackers or peers, or leave mdns on")
    model_config, checkpoint = _resolve(model, hub)
    cls, model_config = serving_class(model_config)
    stack = probe_stack(cls, model_config)
    digests: Mapping[int, str] = block_digests(checkpoint, stack, range(stack.num_blocks)) if checkpoint else {}
    io = shared_loop()
    stats = StatsRecorder()
    discovery = build_discovery(
        trackers=urls,
        mdns=mdns,
        peers=peers,
        mdns_interfaces=config.mdns_interfaces,
        timeout_s=config.lookup_timeout_s,
        known=KnownPeers.kept_in(config.peer_cache) if config.peer_exchange else None,
    )
    swarm = Swarm(
        discovery,
        HttpDialer(config, software="remote-modules"),
        model_key=model_key(model_config),
        stack=stack,
        hidden_size=model_config.get_text_config(decoder=True).hidden_size,
        known_digests=digests,
        config=config,
        clock=time.monotonic,
        rng=Random(),
        stats=stats,
    )
    handle = SwarmHandle(
        swarm=swarm,
        io=io,
        stats=stats,
        model_config=model_config,
        checkpoint=checkpoint,
        stack=stack,
        skeleton=meta_skeleton(cls, model_config),
    )
    weakref.finalize(handle, _close_later, io, swarm).atexit = False
    _close_at_exit()
    _open_handles.add(handle)
    return handle


_open_handles: weakref.WeakSet[SwarmHandle] = weakref.WeakSet()


@functools.cache
def _close_at_exit() -> None:
    atexit.register(_close_all)


def _close_all() -> None:
    """The interpreter ends: say goodbye to peers and sockets, briefly."""
    for handle in list(_open_handles):
        if handle.io.loop.is_running():
            with contextlib.suppress(TimeoutError, FutureTimeoutError):
                handle.io.submit(handle.swarm.aclose()).result(timeout=EXIT_TIMEOUT_S)


def _close_later(io: LoopThread, swarm: Swarm) -> None:
    """The last user of a swarm is gone: close it without waiting."""
    io.call_soon(lambda: io.loop.create_task(swarm.aclose()))


def _resolve(model: object, hub: Mapping[str, Any]) -> tuple[PreTrainedConfig, Checkpoint | None]:
    if isinstance(model, PreTrainedModel):
        return model.config, _local_checkpoint(model.config)
    if isinstance(model, PreTrainedConfig):
        return model, _local_checkpoint(model)
    if isinstance(model, str | Path):
        checkpoint = open_checkpoint(str(model), **hub)
        return read_config(checkpoint), checkpoint
    kind = type(model).__name__
    raise TypeError(f"model must be a hub id, folder, PreTrainedConfig or PreTrainedModel, got {kind}")


def _dtype_of(config: PreTrainedConfig) -> torch.dtype:
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.get_default_dtype()


def _local_checkpoint(config: PreTrainedConfig) -> Checkpoint | None:
    """The folder that a config came from, if it is still there; its weights tell the right peers."""
    path = getattr(config, "_name_or_path", "")
    if not path or not (path == BUILT_IN or Path(path).is_dir()):
        return None
    try:
        return open_checkpoint(path)
    except CheckpointError:
        return None  # a config is all that was asked for
