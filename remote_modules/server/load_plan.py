"""From a checkpoint's name to a span in memory, measured and ready to serve."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection

import torch

from remote_modules.config import ServerConfig
from remote_modules.model.adapter_files import FrozenAdapter
from remote_modules.model.checkpoint import Checkpoint, open_checkpoint
from remote_modules.model.classes import model_class, serving_class
from remote_modules.model.fingerprint import block_digests, model_key
from remote_modules.model.loading import check_span, load_head, load_span, read_config
from remote_modules.model.probe import probe_stack
from remote_modules.model.quantization import check_quantization, quantized_bytes
from remote_modules.model.quantized_cache import QuantizedCache, model_digest
from remote_modules.model.replay import SpanModel
from remote_modules.model.stack import meta_skeleton
from remote_modules.peers import PeerRecord
from remote_modules.plan.throughput import Capacity, Layout
from remote_modules.server.capacity import (
    KV_TOKENS,
    WORKSPACE_BYTES,
    choose_blocks,
    free_bytes,
    free_unused,
    parameter_bytes,
)
from remote_modules.server.captures import can_capture, capture_steps
from remote_modules.server.engine import Engine, Speeds
from remote_modules.server.packing import packing_fault
from remote_modules.server.preloaded import Preloaded
from remote_modules.server.sessions import KVCost
from remote_modules.spans import Span

__all__ = ["LoadPlan", "LoadedSpan"]

logger = logging.getLogger(__name__)

SPARE_FACTOR = 1.5  # workspace of a load
CHUNK_TOKENS = 256  # of a prompt, while others decode: fewer read the weights more often than they compute
CPU_CHUNK_TOKENS = 64


class LoadedSpan:
    """A span in memory and what was measured of it.

    Args:
        batches: whether steps of several sessions may run as one, if the model can.
    """

    def __init__(
        self,
        config: ServerConfig,
        model: SpanModel,
        digests: dict[int, str],
        adapters: dict[str, FrozenAdapter],
        *,
        batches: bool = False,
    ) -> None:
        self._config = config
        self._batches = batches
        self.model = model
        self.engine = Engine(model)
        self.digests = tuple(digests.get(block, "") for block in model.span)
        self.adapters = adapters
        self.speeds = Speeds(0.0, 0.0)
        self.kv_costs: dict[int, KVCost] = {}
        self.kv_budget_bytes = 0

    def measure(self) -> None:
        """Check that the architecture runs, and time it."""
        self.kv_costs = self.engine.kv_costs()
        self.speeds = self.engine.measure()
        fault = packing_fault(self.engine) if self._batches else "it is switched off"
        self.engine.packs = not fault
        if self._batches:
            self.engine.chunk_tokens = CPU_CHUNK_TOKENS if self.model.device.type == "cpu" else CHUNK_TOKENS
        logger.info("sessions decode %s", f"one by one: {fault}" if fault else "together")

    def prepare(self) -> None:
        """Make it ready to be served: take memory for KV caches, capture steps where that is possible, measure."""
        config, model = self._config, self.model
        self.kv_budget_bytes = config.kv_budget_bytes or free_bytes(model.device) // 2
        if config.graphs and can_capture(model):
            capture_steps(model, self.kv_budget_bytes, compiled=config.compile_rows)
        self.measure()
        free_unused()


class LoadPlan:
    """What is known of a model before any weight is read."""

    def __init__(self, config: ServerConfig, checkpoint: Checkpoint) -> None:
        if config.quantization != "none":
            check_quantization(config.quantization)
        self._config = config
        self._checkpoint = checkpoint
        self._cls, self._model_config = serving_class(read_config(checkpoint))
        self._skeleton = meta_skeleton(self._cls, self._model_config)
        self._stack = probe_stack(self._cls, self._model_config)
        self._device = _device(config.device)
        self._adapters = Preloaded(config.adapters, self._stack.path, cache_dir=config.cache_dir, token=config.token)
        self.key = model_key(self._model_config)
        self.num_blocks = self._stack.num_blocks
        self.block_load_s = 0.0  # known after `probe`
        self._speeds = Speeds(0.0, 0.0)
        self._workspace_bytes = WORKSPACE_BYTES
        self._num_fitting = 0  # known after `choose`: what is loaded later takes from what is free

    @classmethod
    def read(cls, config: ServerConfig) -> LoadPlan:
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        checkpoint = open_checkpoint(
            config.model, revision=config.revision, cache_dir=config.cache_dir, token=config.token
        )
        plan = cls(config, checkpoint)
        if config.blocks is not None:
            plan.check(Span.parse(config.blocks))
        elif config.num_blocks is None:
            plan.probe()
        return plan

    def probe(self) -> None:
        """Load the first blocks that may be served, and measure how fast and how large a pass is here.

        Raises:
            CheckpointError, UnsupportedCallError: as `load` and `LoadedSpan.measure` do.
        """
        layout = Layout.of(self.num_blocks, self._stack.cuts)
        first = Span(0, int(layout.bounds[1]))
        began_s = time.perf_counter()
        loaded = self.load(first)
        self.block_load_s = (time.perf_counter() - began_s) / len(first)
        loaded.measure()
        self._speeds = loaded.speeds
        self._workspace_bytes = loaded.engine.workspace_bytes(self._config.max_batch_tokens)
        del loaded
        free_unused()

    def choose(self, records: list[PeerRecord]) -> Span:
        """The span that the swarm of ``records`` needs most.

        Raises:
            ValueError: no span that may be served fits.
        """
        layout, capacity = self.layout(), self.capacity()
        self._num_fitting = layout.longest(capacity)
        return choose_blocks(layout, capacity, records, token_bytes=self.token_bytes)

    def layout(self, kv_tokens: int = KV_TOKENS) -> Layout:
        """The model's blocks with what each needs: weights, and the KV cache of ``kv_tokens`` tokens."""
        kv_bytes = kv_tokens * self._kv_token_bytes() if self._config.kv_budget_bytes is None else 0
        sizes = [num_bytes + kv_bytes for num_bytes in self._weight_bytes()]
        return Layout.of(self.num_blocks, self._stack.cuts, sizes)

    def _weight_bytes(self) -> list[int]:
        """Of each block, as it is held."""
        quantization = self._config.quantization
        blocks = self._stack.blocks(self._skeleton)
        if quantization == "none":
            return [parameter_bytes(block, self.dtype) for block in blocks]
        return [quantized_bytes(block, self.dtype, quantization) for block in blocks]

    def capacity(self) -> Capacity:
        """Of this machine, now. The speed is 0 without `probe`."""
        config = self._config
        rest = (config.kv_budget_bytes or 0) + self._workspace_bytes + (self._head_bytes() if config.head else 0)
        network_tokens_per_s = math.inf
        if config.bandwidth_mbit is not None:
            network_tokens_per_s = config.bandwidth_mbit * 125_000 / self.token_bytes
        return Capacity(
            tokens_per_s=self._speeds.decode_tokens_per_s,
            max_blocks=config.num_blocks or self.num_blocks,
            room_bytes=free_bytes(self._device) - rest if config.num_blocks is None else math.inf,
            network_tokens_per_s=network_tokens_per_s,
            is_full=config.num_blocks is not None,
        )

    def max_blocks(self, span: Span) -> int:
        """What to announce: blocks that could be held here, ``span`` being held; 0 where the operator chose it."""
        return 0 if self._config.blocks is not None else max(len(span), self._num_fitting)

    @property
    def cuts(self) -> Collection[int]:
        """Where spans may begin and end; empty for everywhere."""
        return self._stack.cuts

    @property
    def token_bytes(self) -> int:
        """Hidden states of one token, as they travel."""
        hidden_size: int = self._model_config.get_text_config(decoder=True).hidden_size
        return hidden_size * self.dtype.itemsize

    def _head_bytes(self) -> int:
        """Of the LM head, as far as the config tells; any span may come to be the last."""
        text = self._model_config.get_text_config(decoder=True)
        return int(text.vocab_size * self.token_bytes)

    def _kv_token_bytes(self) -> int:
        """Keys and values of one token in one block, as far as the config tells."""
        text = self._model_config.get_text_config(decoder=True)
        query_heads = getattr(text, "num_attention_heads", None) or 1
        heads = getattr(text, "num_key_value_heads", None) or query_heads
        head_size = getattr(text, "head_dim", None) or text.hidden_size // query_heads
        return int(2 * heads * head_size * self.dtype.itemsize)

    def check(self, span: Span) -> None:
        """Raise `ValueError` or `UnsupportedCallError` for a span that the model does not have, or not apart."""
        check_span(span, self.num_blocks, self._config.model)
        self._stack.check_cuts(span)

    def fits_beside(self, span: Span) -> bool:
        """Whether ``span`` can be loaded while what is held stays in memory."""
        needed = sum(self._weight_bytes()[span.start : span.end])
        return needed * SPARE_FACTOR < free_bytes(self._device)

    def load(self, span: Span) -> LoadedSpan:
        quantization = self._config.quantization
        dtype = "auto" if self._config.dtype == "auto" else self.dtype
        cache = None
        if quantization != "none" and self._config.quantized_cache:
            key = model_digest(self._checkpoint, self._model_config, quantization=quantization, dtype=dtype)
            cache = QuantizedCache(key)
        model, _ = load_span(
            self._checkpoint,
            self._model_config,
            self._cls,
            span,
            dtype=dtype,
            device=self._device,
            quantization=quantization,
            quantized_cache=cache,
        )
        # a cached block brings its digest along: its shards are not opened
        digests = block_digests(self._checkpoint, self._stack, span) if cache is None else cache.digests
        runner = SpanModel(model, self._stack, span)
        batches = self._config.batching and quantization != "int8"  # outliers of one row are those of all there
        adapters = self._adapters.of_blocks(runner.blocks)
        loaded = LoadedSpan(self._config, runner, digests, adapters, batches=batches)
        if self._config.head and span.end == self.num_blocks:
            cls, model_config = model_class(read_config(self._checkpoint))
            loaded.engine.head = load_head(self._checkpoint, model_config, cls, dtype=dtype, device=self._device)
        return loaded

    @property
    def dtype(self) -> torch.dtype:
        """What the span will compute in."""
        named = self._config.dtype
        dtype = self._model_config.dtype if named == "auto" else getattr(torch, named)
        return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise ValueError(f"device must look like cpu, cuda or cuda:1, got {name!r}") from exc
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} asked for, but torch finds no CUDA here; use --device cpu")
    return device
