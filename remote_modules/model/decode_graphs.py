"""Steps of one token as captured CUDA graphs: no Python and no launch of a kernel per block.

A graph is captured for a number of rows and a limit of their lengths, and serves any sessions whose caches lie in the
arena, alone or together: where their tokens are, and how many, it reads from memory. What it runs are the calls of a
`decode_plans.Plan`, so transformers' own blocks, whose attention goes to the arena; `torch.compile` may rewrite them
first. Hidden states come from pinned memory and go back there within the graph.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from remote_modules.errors import UnsupportedCallError, first_line
from remote_modules.model.arena import Arena
from remote_modules.model.decode_attention import FIELD, Rows, attending
from remote_modules.model.decode_plans import Plan
from remote_modules.model.joined import JoinedLinears
from remote_modules.model.kv import SpanCache

__all__ = ["DecodeGraphs", "configs_of"]

logger = logging.getLogger(__name__)

ROWS = (1, 2, 4, 8, 16, 32, 64)  # others take the next larger
LENGTHS = (1024, 4096, 16384, 65536, 1 << 18)  # the kernel divides the longest among the processors
WARM_UPS = 2
COMPILE_MODE = "max-autotune-no-cudagraphs"
_MAX_RECOMPILES = 1 << 12  # of one function: each block has numbers of its own

Step = Callable[[], None]


class DecodeGraphs:
    """Graphs of one span.

    Args:
        plan: the blocks' calls in a step of one row.
        configs: of the blocks; name the attention.
        joined: linear layers of the blocks that multiply together.
        compiled: numbers of rows, of `ROWS`, whose blocks are compiled first.
        capture: makes what runs a step again from a function that does; None: by `torch.cuda.CUDAGraph`.

    Raises:
        UnsupportedCallError: the blocks take positions in a form that is not the same for all rows.
    """

    def __init__(
        self,
        plan: Plan,
        arena: Arena,
        configs: list[Any],
        *,
        hidden_size: int,
        joined: JoinedLinears,
        compiled: Collection[int] = (),
        capture: Callable[[Step], Step] | None = None,
    ) -> None:
        if any(len(shape) not in (2, 3) or shape[-1] != 1 for _, shape, _, _ in plan.positions):
            raise UnsupportedCallError("the blocks take a position that is not one for each row")
        self.arena = arena
        self._plan = plan
        self._configs = configs
        self._hidden_size = hidden_size
        self._joined = joined
        self._compiled = compiled
        self._capture = _Capture() if capture is None else capture
        self._graphs: dict[tuple[int, int], _Graph | None] = {}

    def prepare(self) -> None:
        """Capture what is needed first, for all numbers of rows, and compile; longer texts are captured when they come.

        Raises:
            UnsupportedCallError: it cannot be captured.
        """
        for rows in ROWS:
            self._graph(rows, LENGTHS[0])
            if self._graphs[rows, LENGTHS[0]] is None:
                raise UnsupportedCallError(f"steps of {rows} rows cannot be captured")

    def step(self, hidden_states: torch.Tensor, members: Sequence[tuple[SpanCache, int]]) -> torch.Tensor | None:
        """One token of each row.

        Args:
            hidden_states: ``[R, 1, H]``, of the rows of all members.
            members: caches that hold some tokens, with their rows. Layers grow by the token, `SpanCache.advance` is
                the caller's.

        Returns:
            ``[R, 1, H]`` on the CPU; None, and nothing has changed, where there is no graph for it.
        """
        starts: list[int] = []
        positions: list[int] = []
        for cache, rows in members:
            found = _starts(cache, rows)
            if found is None:
                return None
            starts += found
            positions += [cache.length] * rows
        longest = bisect_left(LENGTHS, max(positions) + 1)
        bucket = bisect_left(ROWS, len(starts))
        if bucket == len(ROWS) or longest == len(LENGTHS):
            return None
        graph = self._graph(ROWS[bucket], LENGTHS[longest])
        if graph is None:
            return None
        output = graph.run(hidden_states, starts, positions)
        for cache, _ in members:
            for layer in cache.held:
                layer.show(cache.length + 1)
        return output

    def _graph(self, rows: int, max_tokens: int) -> _Graph | None:
        key = (rows, max_tokens)
        if key not in self._graphs:
            self._graphs[key] = None
            try:
                self._graphs[key] = self._captured(rows, max_tokens)
            except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, UnsupportedCallError) as exc:
                if isinstance(exc, torch.OutOfMemoryError | torch.AcceleratorError):
                    raise
                logger.warning("steps of %d rows are not captured: %s", rows, first_line(exc), exc_info=exc)
        return self._graphs[key]

    def _captured(self, rows: int, max_tokens: int) -> _Graph:
        is_compiled = rows in self._compiled
        plan = self._plan.replaced(self._compiled_blocks) if is_compiled else self._plan
        graph = _Graph(plan, self.arena, self._configs, rows, max_tokens, self._hidden_size, self._joined)
        if is_compiled:
            import torch._dynamo

            limits = {"recompile_limit": _MAX_RECOMPILES, "accumulated_recompile_limit": _MAX_RECOMPILES}
            with torch._dynamo.config.patch(limits):
                graph.capture(self._capture)
        else:
            graph.capture(self._capture)
        return graph

    @property
    def _compiled_blocks(self) -> dict[Callable[..., Any], Callable[..., Any]]:
        return {
            call.module: torch.compile(call.module, mode=COMPILE_MODE, dynamic=False, fullgraph=True)
            for call in self._plan.blocks
        }


class _Graph:
    """A step of ``rows`` rows, each of at most ``max_tokens``."""

    def __init__(
        self,
        plan: Plan,
        arena: Arena,
        configs: list[Any],
        rows: int,
        max_tokens: int,
        hidden_size: int,
        joined: JoinedLinears,
    ) -> None:
        self._plan, self._arena, self._configs, self._joined = plan, arena, configs, joined
        self._max_tokens = max_tokens
        keys, _ = next(iter(arena.layers.values()))
        device, dtype = keys.device, keys.dtype
        is_pinned = device.type == "cuda"
        self._hidden = torch.zeros(rows, 1, hidden_size, dtype=dtype, pin_memory=is_pinned)
        self._output = torch.zeros_like(self._hidden, pin_memory=is_pinned)
        self._numbers = torch.zeros(2, rows, dtype=torch.int64, pin_memory=is_pinned)  # starts, positions
        self._numbers_array = self._numbers.numpy()
        self._device_hidden = self._hidden.to(device)
        self._device_numbers = self._numbers.to(device)
        self._starts = torch.zeros(rows + 1, dtype=torch.int32, device=device)
        self._query_starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._replay: Step | None = None
        self._device = device

    def capture(self, capture: Callable[[Step], Step]) -> None:
        rows = Rows(self._starts, self._device_numbers[1], self._query_starts, self._max_tokens)
        with torch.no_grad(), attending(self._configs, rows, self._arena.layers), self._joined.used():
            self._replay = capture(self._step)
        if self._device.type != "cuda":  # then each run attends anew
            self._replay = self._attended(self._replay, rows)

    def _attended(self, replay: Step, rows: Rows) -> Step:
        def attend() -> None:
            with attending(self._configs, rows, self._arena.layers), self._joined.used():
                replay()

        return attend

    def run(self, hidden_states: torch.Tensor, starts: list[int], positions: list[int]) -> torch.Tensor:
        assert self._replay is not None
        num = len(starts)
        self._hidden[:num].copy_(hidden_states)
        self._numbers_array[0, :num], self._numbers_array[1, :num] = starts, positions
        self._numbers_array[:, num:] = 0
        self._replay()
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return self._output[:num].clone()

    def _step(self) -> None:
        self._device_hidden.copy_(self._hidden, non_blocking=True)
        self._device_numbers.copy_(self._numbers, non_blocking=True)
        self._starts[:-1].copy_(self._device_numbers[0])
        output = self._plan.call(self._device_hidden, _Passing(), self._plan.values_at(self._positions))
        self._output.copy_(output, non_blocking=True)

    def _positions(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """``[R, 1]`` or ``[n, R, 1]``."""
        return self._device_numbers[1][:, None].to(dtype).expand(*shape[:-2], -1, -1)


class _Passing:
    """Stands for a cache whose keys and values the attention keeps."""

    def update(self, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return key, value


class _Capture:
    """By CUDA graphs that share their memory: one runs at a time, and its output is copied before it ends."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                step()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            step()
        return graph.replay


def configs_of(owner: nn.Module) -> list[Any]:
    """Those that name the attention of the blocks below ``owner``."""
    found = {id(config): config for m in owner.modules() if hasattr(config := getattr(m, "config", None), FIELD)}
    return list(found.values())


def _starts(cache: SpanCache, rows: int) -> list[int] | None:
    """Where the rows' tokens begin, with room for one more; None: not all of them in the arena."""
    region = None
    for layer in cache.held:
        layer.make_room(cache.length + 1)
        if layer.region is None or (region is not None and layer.region is not region):
            return None
        region = layer.region
    if region is None:
        return None
    capacity = region.num_tokens // rows
    return [region.start + row * capacity for row in range(rows)]
