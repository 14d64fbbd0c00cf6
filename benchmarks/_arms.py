"""What `suite.py` compares: ways to run one model. Each decodes a prompt and answers with seconds and greedy tokens."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Protocol

import torch
from transformers import DynamicCache

from remote_modules.client.stats import HopTiming
from remote_modules.model.checkpoint import open_checkpoint
from remote_modules.model.classes import model_class
from remote_modules.model.loading import load_span, read_config
from remote_modules.model.replay import OwnerArguments, SpanModel
from remote_modules.model.stack import cache_argument
from remote_modules.spans import Span
from remote_modules.testing.pace import Pace, paced

__all__ = [
    "Arm", "ModelArm", "RemoteArm", "Sample", "StagesArm", "interleave", "median_ratio", "offloaded", "waterfall_of"
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of an arm.

    Attributes:
        prefill_s: until the first token.
        token_s: of each step after it.
        tokens: all greedy ones, or None if the arm does not tell.
    """

    prefill_s: float
    token_s: float
    tokens: tuple[int, ...] | None


class Arm(Protocol):
    """``is_paced``: its blocks take a set time, not what this machine takes."""

    name: str
    is_paced: bool

    def decode(self, prompt: Sequence[int], tokens: int) -> Sample:
        """The prompt, and ``tokens`` steps of one token."""


def greedy(step: Callable[[torch.Tensor], int], prompt: Sequence[int], tokens: int) -> Sample:
    began_s = time.perf_counter()
    output = [step(torch.tensor([list(prompt)]))]
    first_s = time.perf_counter()
    for _ in range(tokens):
        output.append(step(torch.tensor([[output[-1]]])))
    return Sample(first_s - began_s, (time.perf_counter() - first_s) / tokens, tuple(output))


@dataclass
class ModelArm:
    """A transformers model, whatever its blocks are."""

    name: str
    model: Any
    is_paced: bool = False

    def decode(self, prompt: Sequence[int], tokens: int) -> Sample:
        cache = DynamicCache(config=self.model.config)

        def step(ids: torch.Tensor) -> int:
            arguments: dict[str, Any] = {cache_argument(self.model.model) or "": cache, "use_cache": True}
            output = self.model(input_ids=ids, logits_to_keep=1, **arguments)
            return int(output.logits[0, -1].argmax())

        with torch.no_grad():
            return greedy(step, prompt, tokens)


@dataclass
class RemoteArm(ModelArm):
    """One with remote blocks.

    Attributes:
        steps: timings of the hops of decode steps; the last of each run.
    """

    steps: list[tuple[HopTiming, ...]] = field(default_factory=list)

    def decode(self, prompt: Sequence[int], tokens: int) -> Sample:
        sample = super().decode(prompt, tokens)
        self.steps += self.model.model.layers.stats().waterfall[-tokens:]
        return sample


class StagesArm:
    """The stages that the peers hold, one after the other in this process, without client and wire.

    Args:
        local: whose embeddings, norm and head are used.
        pace: of the stages, as of the peers.
    """

    def __init__(self, folder: Path, spans: Sequence[str], local: Any, pace: Pace | None = None) -> None:
        checkpoint = open_checkpoint(str(folder))
        cls, config = model_class(read_config(checkpoint))
        self.name = "stages in one process"
        self.is_paced = pace is not None
        self._pace = pace
        self._local = local
        self._stages = []
        for span in map(Span.parse, spans):
            model, stack = load_span(checkpoint, config, cls, span)
            self._stages.append(SpanModel(model, stack, span))

    def decode(self, prompt: Sequence[int], tokens: int) -> Sample:
        caches = [stage.new_cache() for stage in self._stages]
        owner = self._local.model

        def step(ids: torch.Tensor) -> int:
            tensors = {"hidden_states": owner.embed_tokens(ids)}
            arguments = OwnerArguments(rows=1, num_tokens=ids.shape[1])
            for stage, cache in zip(self._stages, caches, strict=True):
                tensors = stage.run(tensors, stage.span, arguments, cache)
            return int(self._local.lm_head(owner.norm(tensors["hidden_states"][:, -1:]))[0, -1].argmax())

        pacing: AbstractContextManager[None] = nullcontext() if self._pace is None else paced(self._pace)
        with torch.no_grad(), pacing:
            return greedy(step, prompt, tokens)


def offloaded(model: Any, folder: Path) -> ModelArm:
    """``model`` with its blocks on disk, read for each step by accelerate. The file may well be in the page cache."""
    from accelerate import disk_offload

    for number, block in enumerate(model.model.layers):
        disk_offload(block, str(folder / str(number)), execution_device=torch.device("cpu"))
    return ModelArm("accelerate disk offload", model)


def interleave(arms: Sequence[Arm], run: Callable[[Arm], Sample], rounds: int, rng: Random) -> dict[str, list[Sample]]:
    """Samples by arm: each runs once in a round, in random order; one round before warms up.

    Raises:
        SystemExit: an arm has other tokens than the first.
    """
    samples: dict[str, list[Sample]] = {arm.name: [] for arm in arms}
    expected = run(arms[0]).tokens
    for arm in arms[1:]:
        check_tokens(arm, run(arm), expected)
    for _ in range(rounds):
        for arm in rng.sample(list(arms), len(arms)):
            sample = run(arm)
            check_tokens(arm, sample, expected)
            samples[arm.name].append(sample)
    return samples


def check_tokens(arm: Arm, sample: Sample, expected: tuple[int, ...] | None) -> None:
    if sample.tokens is not None and sample.tokens != expected:
        raise SystemExit(f"'{arm.name}' decoded {sample.tokens}, the first arm {expected}")


def median_ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """Of each round's ratio: what slows the machine for a while slows both."""
    return statistics.median(one / other for one, other in zip(seconds, base, strict=True))


def waterfall_of(steps: Sequence[tuple[HopTiming, ...]], token_s: float) -> list[dict[str, Any]]:
    """Median seconds of each hop of a token, and what the client takes besides."""
    rows: list[dict[str, Any]] = [
        {
            "hop": str(timings[0].hop.span),
            **{
                name: statistics.median(getattr(timing, f"{name}_s") for timing in timings)
                for name in ("wire", "queue", "compute")
            },
        }
        for timings in zip(*steps, strict=True)
    ]
    totals = [sum(timing.total_s for timing in step) for step in steps]
    rest_s = max(0.0, token_s - statistics.median(totals)) if totals else token_s
    rows.append({"hop": "client", "wire": 0.0, "queue": 0.0, "compute": rest_s})
    return rows
