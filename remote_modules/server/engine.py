"""What runs on the device thread: steps, forwards and backwards of one span, by replay.

Stateless but for the caches that it is given. Inputs were checked by the handler; what fails here is this peer's own
fault.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch

from remote_modules.errors import UnsupportedCallError, first_line
from remote_modules.model.head import GreatestLogits
from remote_modules.model.kv import SpanCache
from remote_modules.model.kv_state import PROBES, CacheForm
from remote_modules.model.past import fill
from remote_modules.model.replay import OwnerArguments, SpanModel
from remote_modules.model.tensors import TensorSpec, slice_tokens
from remote_modules.server.capacity import free_unused
from remote_modules.server.checks import RequestTensors
from remote_modules.server.graphs import Graph, answer_by_block, forgetting, given_cache, is_out_of_memory, leaf_of
from remote_modules.server.sessions import KVCost
from remote_modules.server.transfers import to_cpu
from remote_modules.server.workspace import SLACK_BYTES, extrapolate, peak_bytes
from remote_modules.spans import Span
from remote_modules.wire.messages import CacheOp

__all__ = ["Engine", "Speeds", "apply_op", "attention_of_any_length"]

Named = dict[str, torch.Tensor]

PROBE_TOKENS = 64
PROBE_SECONDS = 0.3
_MAX_PROBE_SIZE = 65536
_MAX_FORMS = 16  # of different spans of sessions


@dataclass(frozen=True, slots=True)
class Speeds:
    """Tokens per second through one block, one row."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float


class Engine:
    """Runs one `SpanModel`.

    Attributes:
        packs: whether steps of several sessions may run as one (`server.packing`).
        packing_failures: times in a row that they did not.
        chunk_tokens: rows x tokens of a prompt that run at once while others decode; 0: all of it.
    """

    def __init__(self, model: SpanModel) -> None:
        self.model = model
        self.packs = False
        self.packing_failures = 0
        self.chunk_tokens = 0
        self._specs: dict[Span, dict[str, TensorSpec]] = {}
        self._sizes = _possible_sizes(model)
        self._forms: dict[Span, CacheForm] = {}
        self.head: GreatestLogits | None = None

    @property
    def hidden_size(self) -> int:
        return self.model.hidden_size

    @functools.cached_property
    def vocab_size(self) -> int | None:
        """None: the config does not say."""
        size = getattr(self.model.config.get_text_config(decoder=True), "vocab_size", None)
        return size if isinstance(size, int) else None

    def new_cache(self) -> SpanCache:
        return self.model.new_cache()

    def specs(self, blocks: Span) -> dict[str, TensorSpec]:
        """Of what enters ``blocks`` and leaves them."""
        if blocks not in self._specs:
            stack = self.model.stack
            if len(self._specs) >= _MAX_FORMS:
                self._specs.clear()
            self._specs[blocks] = {"hidden_states": stack.hidden, **stack.side_specs(blocks), **stack.carried}
        return self._specs[blocks]

    def step(
        self,
        cache: SpanCache,
        blocks: Span,
        ops: tuple[CacheOp, ...],
        tensors: RequestTensors,
        arguments: OwnerArguments,
        num_outputs: int | None = None,
    ) -> Named:
        """Apply ``ops``, then run the inputs; outputs of the last tokens, as many as wanted, on the CPU."""
        arguments = self._with_leaves(arguments, requires_grad=False)
        with self.stepping():
            for op in ops:
                apply_op(cache, op, tensors.indices)
            if tensors.past:
                cache.use(blocks)
                fill(cache, tensors.past, self.model.device, self.model.dtype)
            outputs = self.model.run(tensors.inputs, blocks, arguments, cache)
            if num_outputs is not None:
                outputs = self._last_tokens(outputs, arguments, num_outputs)
            return _answer(outputs, _float_dtype(tensors.inputs))

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """How sessions' steps run."""
        with torch.inference_mode(), attention_of_any_length(self.model.device):
            yield

    def forward(
        self,
        blocks: Span,
        tensors: RequestTensors,
        arguments: OwnerArguments,
        keep: Callable[[Graph], object] | None = None,
    ) -> Named:
        """Run the inputs; outputs in the dtype of the inputs, on the CPU.

        With ``arguments.with_grad`` it is the forward that `backward` will do, which holds no memory for the gradient.

        Args:
            keep: gets the graph for `backward_kept`, if there is room for it.
        """
        arguments = self._with_leaves(arguments, requires_grad=arguments.with_grad)
        dtype = _float_dtype(tensors.inputs)
        if keep is not None and arguments.with_grad:
            try:
                graph = Graph.run(self.model, blocks, tensors, arguments, is_counted=True)
            except RuntimeError as exc:
                if not is_out_of_memory(exc):
                    raise
            else:
                answer = _answer(_detached(graph.outputs), dtype)
                keep(graph)
                return answer
            free_unused()  # not before the exception, which holds the graph, is gone
        with torch.set_grad_enabled(arguments.with_grad), forgetting():
            inputs, past = tensors.inputs, tensors.past
            if arguments.with_grad:  # attention takes another kernel where its mask has a gradient
                inputs = {name: leaf_of(self.model, tensor) for name, tensor in inputs.items()}
                past = {name: leaf_of(self.model, tensor) for name, tensor in past.items()}
            outputs = self.model.run(inputs, blocks, arguments, given_cache(self.model, blocks, past))
            return _answer(_detached(outputs), dtype)

    def backward(self, blocks: Span, tensors: RequestTensors, arguments: OwnerArguments) -> Named:
        """Recompute the forward and return ``grad.<name>`` of each floating-point input, on the CPU.

        Block by block, where the device has no room for the whole graph.

        Raises:
            UnsupportedCallError: a gradient that came is of no output, or of another shape.
        """
        arguments = self._with_leaves(arguments, requires_grad=True)
        try:
            return Graph.run(self.model, blocks, tensors, arguments).answer(tensors.grads)
        except RuntimeError as exc:
            if not is_out_of_memory(exc):
                raise
        free_unused()
        return answer_by_block(self.model, blocks, tensors, arguments)

    def backward_kept(self, graph: Graph, grads: Named) -> Named:
        """What `backward` returns, from a graph that `forward` gave; it is used up. Raises as `backward`."""
        return graph.answer(grads)

    def _with_leaves(self, arguments: OwnerArguments, *, requires_grad: bool) -> OwnerArguments:
        if arguments.adapter is None:
            return arguments
        return replace(arguments, adapter=arguments.adapter.leaves(self.model.device, requires_grad=requires_grad))

    def _last_tokens(self, outputs: Named, arguments: OwnerArguments, wanted: int) -> Named:
        start = max(0, arguments.num_tokens - wanted)
        specs = self.model.stack.carried
        carried = {name: outputs[name] for name in specs if name in outputs}
        cut = {name: slice_tokens(tensor, specs[name], start).clone() for name, tensor in carried.items()}
        return outputs | cut  # what is recorded stays whole

    def kv_costs(self) -> dict[int, KVCost]:
        """What each block keeps in the cache, measured on two texts; nothing if the model's cache is not carried."""
        if self.model.stack.no_cache:
            return dict.fromkeys(self.model.span, KVCost(0, 0))
        short, long = self.new_cache(), self.new_cache()
        with torch.inference_mode():
            self._run_probe(PROBE_TOKENS, short)
            self._run_probe(2 * PROBE_TOKENS, long)
        blocks = [Span(block, block + 1) for block in self.model.span]
        return {block.start: _cost(short.num_bytes(block), long.num_bytes(block)) for block in blocks}

    def cache_form(self, blocks: Span) -> CacheForm:
        """What caches of ``blocks`` consist of; found when it is first asked for, by running them on little.

        Raises:
            UnsupportedCallError: something that cannot be carried to another peer.
        """
        if blocks not in self._forms:
            caches = []
            with torch.inference_mode():
                for rows, num_tokens in PROBES:
                    caches.append(self.new_cache())
                    self._run_probe(num_tokens, caches[-1], blocks=blocks, rows=rows)
            if len(self._forms) >= _MAX_FORMS:
                self._forms.clear()
            self._forms[blocks] = CacheForm(caches)
        return self._forms[blocks]

    def measure(self, clock: Callable[[], float] = time.perf_counter) -> Speeds:
        """Time prefill and decode for a moment each."""
        cache = None if self.model.stack.no_cache else self.new_cache()
        num_blocks = len(self.model.span)
        with torch.inference_mode():
            self._run_probe(PROBE_TOKENS, cache)
            prefill = _rate(lambda: self._timed(PROBE_TOKENS, None), clock)
            decode = _rate(lambda: self._timed(1, cache), clock)
        return Speeds(prefill * PROBE_TOKENS * num_blocks, decode * num_blocks)

    def workspace_bytes(self, num_tokens: int) -> int:
        """Memory for a forward of so many tokens beside weights and cache, worked out from two small ones."""
        with torch.inference_mode():
            few, twice = (
                peak_bytes(functools.partial(self._run_probe, num, None)) for num in (PROBE_TOKENS, 2 * PROBE_TOKENS)
            )
        return extrapolate(num_tokens, PROBE_TOKENS, few, twice) + SLACK_BYTES

    def _timed(self, num_tokens: int, cache: SpanCache | None) -> None:
        outputs = self._run_probe(num_tokens, cache)
        outputs["hidden_states"].sum().item()  # waits for the device

    def _run_probe(
        self, num_tokens: int, cache: SpanCache | None, *, blocks: Span | None = None, rows: int = 1
    ) -> Named:
        model = self.model
        owner = {n: self._constant(spec, num_tokens, 1, rows) for n, spec in model.stack.owner_tensors.items()}
        arguments = OwnerArguments(rows=rows, num_tokens=num_tokens, tensors=owner)
        span = blocks or model.span
        for size in self._sizes:
            try:
                with nullcontext() if cache is None else attention_of_any_length(model.device):
                    outputs = model.run(self._probe_inputs(num_tokens, size, span, rows), span, arguments, cache)
            except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, UnsupportedCallError) as exc:
                if isinstance(exc, torch.OutOfMemoryError):
                    raise
                if size == self._sizes[-1]:
                    kind, text = model.config.model_type, first_line(exc)
                    raise UnsupportedCallError(f"blocks {model.span} of '{kind}' fail on a probe: {text}") from exc
            else:
                self._sizes = [size]
                return outputs
        raise AssertionError("there is always one size to try")

    def _probe_inputs(self, num_tokens: int, size: int, span: Span, rows: int) -> Named:
        """Small constants of the shapes that the first block takes."""
        stack = self.model.stack
        specs = {"hidden_states": stack.hidden, **stack.side_specs(span), **(stack.carried if span.start else {})}
        if size == 0:  # the sizes as the tiny model of the self-test had them in relation to the hidden size
            return {name: self._constant(spec, num_tokens, 1, rows) for name, spec in specs.items()}
        opened = {
            name: replace(
                spec, dims=tuple(dim if dim in ("B", "T", "1") or spec.is_exact else "?" for dim in spec.dims)
            )
            for name, spec in specs.items()
        }
        return {name: self._constant(spec, num_tokens, size, rows) for name, spec in opened.items()}

    def random_inputs(self, span: Span, generator: torch.Generator, num_tokens: int = 1) -> dict[str, torch.Tensor]:
        """What may enter ``span``, of sizes that `kv_costs` found; what is no float stays 0."""
        return {
            name: torch.randn(tensor.shape, generator=generator).to(tensor) if tensor.is_floating_point() else tensor
            for name, tensor in self._probe_inputs(num_tokens, self._sizes[-1], span, 1).items()
        }

    def _constant(self, spec: TensorSpec, num_tokens: int, size: int, rows: int) -> torch.Tensor:
        shape = [size if dim == -1 else dim for dim in spec.shape(rows, num_tokens, self.model.hidden_size)]
        if not spec.is_float:
            return torch.zeros(shape, dtype=torch.int64, device=self.model.device)
        return torch.full(shape, 0.01, dtype=self.model.dtype, device=self.model.device)


def _cost(short_bytes: int, long_bytes: int) -> KVCost:
    """Of a block that keeps so much of `PROBE_TOKENS` tokens, and of twice as many."""
    token_bytes = max(0, -(-(long_bytes - short_bytes) // PROBE_TOKENS))
    return KVCost(max(0, short_bytes - PROBE_TOKENS * token_bytes), token_bytes)


def _detached(outputs: Named) -> Named:
    return {name: tensor.detach() for name, tensor in outputs.items()}


def attention_of_any_length(device: torch.device) -> AbstractContextManager[None]:
    """Keep cuDNN's attention out, where it is the default: it plans anew for each length of a cache that grows.

    On an H200 a step of ten Llama-70B-shaped blocks takes 4 to 6 times as long with it (docs/benchmarks.md).
    """
    return _without_cudnn() if device.type == "cuda" and torch.backends.cuda.cudnn_sdp_enabled() else nullcontext()


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """`torch.nn.attention.sdpa_kernel` does the same in 40 us."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def _possible_sizes(model: SpanModel) -> list[int]:
    """What the dimensions may be that the stack's specs leave open: every number in the config."""
    specs = {**model.stack.carried, **model.stack.side_specs(model.span)}
    if all(spec.is_exact for spec in specs.values()):
        return [0]
    numbers = {
        value
        for value in vars(model.config.get_text_config(decoder=True)).values()
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MAX_PROBE_SIZE
    }
    return [0, *sorted(numbers)]


def _float_dtype(inputs: Named) -> torch.dtype:
    return inputs["hidden_states"].dtype


def _answer(tensors: Named, dtype: torch.dtype) -> Named:
    """On the CPU, floats in the dtype that the client computes in."""
    return to_cpu(tensors, lambda name, tensor: dtype if tensor.is_floating_point() else tensor.dtype)


def apply_op(cache: SpanCache, op: CacheOp, tensors: Mapping[str, torch.Tensor]) -> None:
    """Change ``cache`` as one `CacheOp` says."""
    if op.kind == "crop":
        cache.crop(op.length)
    elif op.kind == "reset":
        cache.crop(0)
    else:
        cache.select(tensors[op.tensor])


def _rate(work: Callable[[], None], clock: Callable[[], float]) -> float:
    """Calls per second, over about `PROBE_SECONDS`."""
    work()
    began_s = clock()
    num_calls = 0
    while clock() - began_s < PROBE_SECONDS or num_calls < 3:
        work()
        num_calls += 1
    return num_calls / (clock() - began_s)
