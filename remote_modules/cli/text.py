"""A model whose blocks are remote, with its tokenizer: what `generate`, `chat` and `demo` write text with.

Imports torch and transformers: import it inside of a command.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel, StoppingCriteriaList, TextStreamer

from remote_modules.cli import output
from remote_modules.cli.lookup import ModelName, wait_for_cover
from remote_modules.cli.options import Sources
from remote_modules.client.loader import load
from remote_modules.client.sequential import RemoteSequential
from remote_modules.client.stats import ClientStats
from remote_modules.config import ClientConfig
from remote_modules.model.checkpoint import BUILT_IN, built_in_path
from remote_modules.model.fingerprint import model_key
from remote_modules.peers import short_id

__all__ = ["Sampling", "Source", "StopWatch", "TextModel", "read_tokenizer", "summary_rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Which model, from where.

    Attributes:
        hub: those of revision, cache_dir and token that are set.
    """

    model: str
    sources: Sources
    dtype: str = "auto"
    wait_s: float = 0.0
    hub: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def with_hub(cls, *, revision: str | None, cache_dir: object, token: str | None, **fields: Any) -> Source:
        given = {"revision": revision, "cache_dir": cache_dir, "token": token}
        return cls(hub={name: str(value) for name, value in given.items() if value is not None}, **fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen; greedy unless a temperature above 0 or a ``top_p`` is given."""

    max_new_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None

    def arguments(self) -> dict[str, Any]:
        """As `generate` takes them."""
        is_greedy = self.temperature == 0 or (self.temperature is None and self.top_p is None)
        arguments: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": not is_greedy}
        if not is_greedy:
            arguments["temperature"] = 1.0 if self.temperature is None else self.temperature
            arguments["top_p"] = 1.0 if self.top_p is None else self.top_p
        return arguments


@dataclass(slots=True)
class StopWatch:
    """When the tokens of one answer came."""

    began_s: float = field(default_factory=time.perf_counter)
    first_s: float | None = None
    last_s: float = 0.0
    num_tokens: int = 0

    def tick(self) -> None:
        """One more token is there."""
        self.last_s = time.perf_counter()
        self.first_s = self.first_s or self.last_s
        self.num_tokens += 1

    @property
    def total_s(self) -> float:
        return max(0.0, self.last_s - self.began_s)

    @property
    def first_token_s(self) -> float:
        return 0.0 if self.first_s is None else self.first_s - self.began_s

    @property
    def tokens_per_s(self) -> float:
        """Of decoding, once the first token is out; of everything, for a single token."""
        if self.first_s is None or self.total_s == 0:
            return 0.0
        if self.num_tokens == 1:
            return 1 / self.total_s
        return (self.num_tokens - 1) / (self.last_s - self.first_s)


class TextModel:
    """A context manager: left by Ctrl-C it closes nothing, for peers notice by themselves and nobody wants to wait."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.layers = next(module for module in model.modules() if isinstance(module, RemoteSequential))

    @classmethod
    def open(cls, source: Source) -> TextModel:
        """Load the client's part and wait until peers cover the rest.

        Raises:
            ValueError: bad arguments.
            RemoteModulesError: no such model, or no peers for it.
        """
        sources = source.sources
        if source.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be one of auto, float32, bfloat16, float16, got {source.dtype!r}")
        model = load(
            source.model,
            trackers=sources.trackers,
            mdns=sources.mdns,
            peers=sources.peers,
            config=ClientConfig(),
            dtype=source.dtype,
            **source.hub,
        )
        text = cls(model, read_tokenizer(source.model, source.hub))
        name = ModelName(name=source.model, key=model_key(model.config), num_blocks=len(text.layers))
        try:
            wait_for_cover(sources, name, wait_s=source.wait_s)
        except BaseException:
            text.layers.close()
            raise
        return text

    def generate(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        *,
        write: Callable[[str], None],
        watch: StopWatch | None = None,
        cache: DynamicCache | None = None,
        on_step: Callable[[int], None] | None = None,
        **options: Any,
    ) -> list[int]:
        """Go on from ``ids``; the new ids.

        Args:
            write: gets the text as it comes.
            watch: ticks with each token.
            cache: keys and values of the first of ``ids``, if any; grows.
            on_step: called with the number of new tokens, after each.
            options: further arguments of transformers' `generate`.
        """
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        if cache is not None:
            options[_cache_argument(self.model)] = cache
        if on_step is not None:
            options["stopping_criteria"] = StoppingCriteriaList([_Watcher(len(ids), on_step)])
        inputs = torch.tensor([list(ids)])
        result = self.model.generate(  # type: ignore[operator]
            inputs,
            attention_mask=torch.ones_like(inputs),
            streamer=_Streamer(self.tokenizer, write, watch or StopWatch()),
            **sampling.arguments(),
            **options,
        )
        new: list[int] = result[0, len(ids) :].tolist()
        return new

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def stats(self) -> ClientStats:
        return self.layers.stats()

    def __enter__(self) -> TextModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            self.layers.close()


class _Streamer(TextStreamer):
    """transformers' own, writing elsewhere than to ``print``."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None], watch: StopWatch) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write
        self._watch = watch
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self._has_prompt:
            self._watch.tick()
        self._has_prompt = True
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)


class _Watcher:
    """A stopping criterion that never stops."""

    def __init__(self, num_prompt_tokens: int, on_step: Callable[[int], None]) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._on_step = on_step

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        self._on_step(input_ids.shape[1] - self._num_prompt_tokens)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def read_tokenizer(model: str, hub: Mapping[str, str] | None = None) -> Any:
    """The tokenizer of a hub id, folder or the built-in model."""
    return AutoTokenizer.from_pretrained(built_in_path() if model == BUILT_IN else model, **(hub or {}))


def summary_rows(stats: ClientStats, watch: StopWatch) -> dict[str, str]:
    """Route, speed and failovers of an answer, for people."""
    rows = {
        "route": " => ".join(output.describe_route(stats.route)),
        "speed": f"{watch.tokens_per_s:.1f} tokens/s ({watch.num_tokens} tokens in {watch.total_s:.2f} s, "
        f"the first after {watch.first_token_s:.2f} s)",
    }
    if slowest := _slowest(stats):
        rows["slowest"] = slowest
    if stats.failovers:
        rows["failovers"] = (
            f"{stats.failovers} ({stats.replayed_tokens} tokens replayed, stalled {stats.stall_seconds:.2f} s)"
        )
    return rows


def _slowest(stats: ClientStats) -> str:
    """Which hop took most of the latest steps' time, and on what."""
    if len(stats.route) < 2 or not stats.waterfall:
        return ""
    timings = [timing for step in stats.waterfall for timing in step if timing.num_tokens == 1]
    by_hop = {hop: [timing for timing in timings if timing.hop == hop] for hop in stats.route}
    means = {hop: sum(timing.total_s for timing in own) / len(own) for hop, own in by_hop.items() if own}
    if not means:
        return ""
    hop = max(means, key=lambda hop: means[hop])
    own = by_hop[hop]
    compute_s = sum(timing.compute_s for timing in own) / len(own)
    queue_s = sum(timing.queue_s for timing in own) / len(own)
    return (
        f"{hop.span} {short_id(hop.peer_id)}: {1e3 * means[hop]:.1f} ms a token "
        f"(compute {1e3 * compute_s:.1f}, queue {1e3 * queue_s:.1f}, network {1e3 * _wire_s(own):.1f})"
    )


def _wire_s(timings: Sequence[Any]) -> float:
    return float(sum(timing.wire_s for timing in timings)) / len(timings)


def _cache_argument(model: PreTrainedModel) -> str:
    """How this transformers release names the cache in a call of `generate`: 5.24 renamed it."""
    prepare: Callable[..., object] = model.prepare_inputs_for_generation  # type: ignore[assignment]
    names = inspect.signature(prepare).parameters
    return "cache" if "cache" in names else "past_key_values"
