"""Families, measured: a tiny random checkpoint of each, run by every two peers, against the local model.

    python benchmarks/survey.py [TYPE ...]

Prints one line of JSON for each type of model that is named, or that comes on standard input, one a line.
`benchmarks/families.py` does all of them.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from remote_modules.errors import RemoteModulesError, UnsupportedCallError, first_line
from remote_modules.model.classes import serving_class
from remote_modules.model.kv import SpanCache
from remote_modules.model.probe import probe_stack
from remote_modules.model.shrink import tiny_config, tiny_model
from remote_modules.model.stack import StackSpec, ranges
from remote_modules.spans import Span
from remote_modules.testing.inline_swarm import InlineSwarm

__all__ = ["CACHED", "MODES", "Report", "quiet", "survey"]

CACHED = ("prefill", "chunk", "decode")
MODES = ("forward", *CACHED, "backward")
CHUNKED = (7, 3, 1, 1, 1)  # tokens of the steps with a cache
SINGLE = (7, 1, 1, 1, 1, 1, 1)  # for models that take one token at a time on top of a cache
NUM_TOKENS = sum(CHUNKED)
CODEBOOKS = {"musicgen": 4, "musicgen_melody": 4}  # rows of ids for each row of the mask
CACHES = ("cache", "past_key_values", "cache_params", "state", "mems")

_FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, ImportError)

Found = dict[str, torch.Tensor]
Run = Callable[[Any], Found]  # of a model: what it gives, by mode


@dataclass
class Report:
    """What was found for one type of model.

    Attributes:
        status: ``"exact"``, ``"partly"`` (some modes are refused), ``"refused"`` or ``"wrong"``.
        reason: of a refusal, or what is wrong.
        path, num_blocks, container, states, sides, cuts, caches: as `probe_stack` found them.
        modes: for each mode the largest difference from the local model over all routes, or why there is none.
        own: where something differs, how much the local model differs from itself: by mode and circumstance.
        routes: the peers of each run.
    """

    family: str
    status: str = "exact"
    reason: str = ""
    path: str = ""
    num_blocks: int = 0
    container: str = ""
    states: list[str] = field(default_factory=list)
    sides: list[str] = field(default_factory=list)
    cuts: str = ""
    caches: list[str] = field(default_factory=list)
    modes: dict[str, float | str] = field(default_factory=dict)
    own: dict[str, dict[str, float]] = field(default_factory=dict)
    routes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def describe(self, stack: StackSpec) -> None:
        self.path, self.num_blocks = stack.path, stack.num_blocks
        if stack.container is not None:
            self.container = f"{stack.container.__name__} of {stack.arity}"
        self.states = [f"{key} {list(stack.states[k].dims)}" for k, key in stack.state_keys.items()]
        self.sides = [f"{side.key} {list(side.spec.dims)}" + " per block" * side.is_per_block for side in stack.sides]
        self.cuts = ranges(stack.cuts)

    def note(self, mode: str, difference: float, route: str) -> None:
        so_far = self.modes.get(mode, 0.0)
        if isinstance(so_far, float):
            self.modes[mode] = max(so_far, difference)
        if difference != 0.0:
            self.blame(f"{mode} by {route} differs by {difference:.1e}")

    def refuse(self, name: str, exc: Exception) -> None:
        """A call was refused, by name."""
        modes = CACHED if name.startswith("cached") else (name,)
        self.modes.update({mode: f"refused: {first_line(exc)}" for mode in modes})
        if self.status != "wrong":
            self.status = "refused" if name == "forward" or self.status == "refused" else "partly"
            self.reason = self.reason or first_line(exc)

    def blame(self, reason: str) -> None:
        if self.status != "wrong":
            self.status, self.reason = "wrong", reason


class Texts:
    """The inputs: token ids, and a mask whose first row begins with two tokens of padding."""

    def __init__(self, family: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(4, 90, (2 * CODEBOOKS.get(family, 1), NUM_TOKENS), generator=generator)
        self.mask = torch.ones(2, NUM_TOKENS, dtype=torch.int64)
        self.mask[0, :2] = 0

    def forward(self, model: Any) -> Found:
        with torch.no_grad():
            return {"forward": model(input_ids=self.ids, attention_mask=self.mask, use_cache=False).logits}

    def cached(self, lengths: Sequence[int], is_padded: bool, model: Any) -> Found:
        """Steps on top of a KV cache."""
        found: dict[str, list[torch.Tensor]] = {}
        cache: dict[str, Any] = {}
        start = 0
        for length in lengths:
            end = start + length
            mask = {"attention_mask": self.mask[:, :end]} if is_padded else {}
            with torch.no_grad():
                output = model(input_ids=self.ids[:, start:end], use_cache=True, **mask, **cache)
            cache = {name: output[name] for name in CACHES if output.get(name) is not None}
            if not cache:
                raise NoCache("it has no cache")
            mode = "prefill" if start == 0 else "decode" if length == 1 else "chunk"
            found.setdefault(mode, []).append(output.logits)
            start = end
        return {mode: torch.cat(logits, dim=1) for mode, logits in found.items()}

    def backward_to_inputs(self, model: Any) -> Found:
        inputs = model.get_input_embeddings()(self.ids).detach().requires_grad_()
        logits = model(inputs_embeds=inputs, attention_mask=self.mask, use_cache=False).logits
        return {"backward": torch.autograd.grad(logits.square().sum(), inputs)[0]}

    def backward_to_weight(self, model: Any) -> Found:
        """For models that want token ids, or work in place on what they are given."""
        weight: torch.Tensor = model.get_input_embeddings().weight
        logits = model(input_ids=self.ids, attention_mask=self.mask, use_cache=False).logits
        return {"backward": torch.autograd.grad(logits.square().sum(), weight)[0]}


class NoCache(LookupError):
    """The local model has none."""


class Reference:
    """What the local model gives; of several ways to do a thing, the first that it can.

    Attributes:
        runs: the ways taken, by name.
        expected: what each gives.
        cannot: by mode, why there is none.
    """

    def __init__(self, local: PreTrainedModel, texts: Texts) -> None:
        self.local = local
        self.runs: dict[str, Run] = {}
        self.expected: dict[str, Found] = {}
        self.cannot: dict[str, str] = {}
        self._choose("forward", [texts.forward])
        for name, is_padded in (("cached", False), ("cached, padded", True)):
            ways = [functools.partial(texts.cached, lengths, is_padded) for lengths in (CHUNKED, SINGLE)]
            self._choose(name, ways)
        self._choose("backward", [texts.backward_to_inputs, texts.backward_to_weight])

    def _choose(self, name: str, ways: Sequence[Run]) -> None:
        failure = ""
        for run in ways:
            try:
                found = run(self.local)
            except _FAILURES as exc:
                failure = failure or first_line(exc)
                continue
            if not all(bool(torch.isfinite(tensor).all()) for tensor in found.values()):
                failure = failure or "it gives infinite numbers"
                continue
            self.runs[name], self.expected[name] = run, found
            break
        if name == "forward" and name not in self.runs:
            raise RuntimeError(f"the local model does not run: {failure}")
        if failure and not (name == "backward" and name in self.runs):
            done = self.expected.get(name, {})
            modes = CACHED if name.startswith("cached") else (name,)
            self.cannot.update({mode: failure for mode in modes if mode not in done and mode not in self.cannot})

    def own_differences(self, name: str, stack: StackSpec) -> dict[str, float]:
        """How much the local model differs from itself, by circumstance."""
        run, local = self.runs[name], self.local
        found = {"again": self._difference(name, run(local))}
        hooks = [block.register_forward_pre_hook(_moved, with_kwargs=True) for block in stack.blocks(local)]
        found["moved"] = self._difference(name, run(local))
        for hook in hooks:
            hook.remove()
        if name != "backward":
            for parameter in (parameters := list(local.parameters())):
                parameter.requires_grad_(False)
            found["frozen"] = self._difference(name, run(local))
            for parameter in parameters:
                parameter.requires_grad_(True)
        return found

    def _difference(self, name: str, found: Found) -> float:
        return max(difference(tensor, found[mode]) for mode, tensor in self.expected[name].items())


def _moved(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs of a block at another alignment of memory, as they may lie when they come from elsewhere."""
    return tuple(map(_elsewhere, args)), {name: _elsewhere(value) for name, value in kwargs.items()}


def _elsewhere(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    room = torch.cat([value.new_zeros(1), value.flatten()])
    return room[1:].view(value.shape)


def difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return float("inf")
    return float((expected - found).abs().max()) if bool(torch.isfinite(found).all()) else float("inf")


def survey(family: str, *, choose: Callable[[list[int]], list[int]] = lambda cuts: cuts) -> Report:
    """Measure one family; whatever goes wrong is in the report.

    Args:
        choose: of the legal cuts, where the second of two peers begins.
    """
    report = Report(family)
    began_s = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="families-") as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _survey(report, Path(name), choose)
        except (UnsupportedCallError, ImportError) as exc:  # some types need packages that we do not
            report.status, report.reason = "refused", first_line(exc)
        except (RemoteModulesError, *_FAILURES) as exc:
            report.blame(f"{type(exc).__name__}: {first_line(exc)}")
    report.seconds = round(time.perf_counter() - began_s, 2)
    return report


def _survey(report: Report, folder: Path, choose: Callable[[list[int]], list[int]]) -> None:
    cls, config = serving_class(tiny_config(report.family))
    stack = probe_stack(cls, config)
    report.describe(stack)
    local = save_tiny(report.family, folder)
    if not stack.no_cache:
        layers = SpanCache(config, stack, Span(0, stack.num_blocks)).layers
        report.caches = sorted({type(layer).__name__ for layer in layers})
    reference = Reference(local, Texts(report.family))
    report.modes.update({mode: f"local model cannot: {reason}" for mode, reason in reference.cannot.items()})
    if stack.hides_past and "cached" not in reference.runs:
        report.refuse("cached", UnsupportedCallError(stack.no_cache))
    end = stack.num_blocks
    cuts = choose(sorted((stack.cuts or set(range(end))) - {0, end}))
    for spans in [[f"0:{cut}", f"{cut}:{end}"] for cut in cuts] or [[f"0:{end}"]]:
        report.routes.append(" ".join(spans))
        with InlineSwarm(folder, spans) as swarm:
            _compare(report, reference, swarm.load(), report.routes[-1])
    for name, found in reference.expected.items():
        if any(report.modes.get(mode) not in (0.0, None) for mode in found) and report.status == "wrong":
            report.own[name] = reference.own_differences(name, stack)


def save_tiny(family: str, folder: Path) -> PreTrainedModel:
    """Write a tiny random checkpoint, and load it as a user would."""
    config = tiny_config(family)
    model = tiny_model(config)
    model.save_pretrained(folder)
    if type(model.config) not in AutoModelForCausalLM._model_mapping:
        config.save_pretrained(folder)  # that of the whole, as published: the text model's alone has no auto class
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder).eval()
    return loaded


def _compare(report: Report, reference: Reference, remote: PreTrainedModel, route: str) -> None:
    for name, run in reference.runs.items():
        try:
            found = run(remote)
        except UnsupportedCallError as exc:
            report.refuse(name, exc)
            continue
        except (RemoteModulesError, *_FAILURES) as exc:
            report.blame(f"{name} by {route} fails: {type(exc).__name__}: {first_line(exc)}")
            continue
        for mode, expected in reference.expected[name].items():
            report.note(mode, difference(expected, found[mode]), route)


def quiet() -> None:
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("remote_modules").setLevel(logging.ERROR)


def main() -> None:
    quiet()
    for line in sys.argv[1:] or sys.stdin:
        print(json.dumps(asdict(survey(line.strip()))), flush=True)


if __name__ == "__main__":
    main()
