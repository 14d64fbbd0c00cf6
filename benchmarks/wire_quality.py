"""The coded wires: perplexity, gradients, training and bytes against plain tensors, and the speed of the codecs.

    python benchmarks/wire_quality.py [--quick] [--steps 60] [--only-codec | --only-outliers]

The built-in model in float32 on three peers (0:3, 3:6, 6:8) and on eight (a block each: nine times through the codec),
in this process without sockets; text is this project's documentation, which the model was not trained on.

* perplexity: of windows of the text, the last fifth of it.
* gradients: of a LoRA adapter and of the embeddings, relative to those over plain tensors, worst and mean of batches.
* training: the loss on the last fifth of the text after LoRA steps on the rest.
* bytes: of all that a client sends and receives in a pass without adapter, headers included, for each token.
* outliers: perplexity of the model with outlier channels (`_outlier_model`); bytes of a token's frames and the error of
  ordinary channels, of tensors (`_wire_bytes`).
* codec: megabytes of the plain tensor encoded and decoded in a second of processor time, best of several rounds.

Prints one line of JSON; markdown and progress go to stderr. Takes about 2 minutes on a quiet core.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _lora import Task, adapted, relative, token_ids, train
from _outlier_model import channel_ratio, save_outlier_model
from _report import Bar, print_report, say, table
from _wire_bytes import ordinary_error, token_share
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from remote_modules.config import ClientConfig
from remote_modules.model.checkpoint import built_in_path
from remote_modules.testing.inline_swarm import InlineSwarm
from remote_modules.wire import codecs

CUTS = {"3 peers": ("0:3", "3:6", "6:8"), "8 peers": tuple(f"{block}:{block + 1}" for block in range(8))}
WIRES = ("compute", "int8")
WIDE_CODECS = ("int8o", "int4o")
HIDDEN_SIZES = (1024, 2048, 4096, 5120, 8192)
MOST_CHANGE = {"int8": 0.005, "int4": 0.01}
SPEED_SHAPE = (2048, 4096)
MAX_PERPLEXITY_RATIO = 1.01
MAX_GRADIENT_ERROR = 0.05


@dataclass(slots=True)
class Quality:
    """Of one wire and one way to cut the model."""

    perplexity: float
    gradients: list[dict[str, torch.Tensor]]
    forward_bytes: float
    backward_bytes: float


class Runs:
    """The text, and what is done with it.

    Args:
        windows: of the text, of which perplexity is taken.
        batches: of which gradients are taken.
    """

    def __init__(self, *, windows: int, batches: int) -> None:
        ids = token_ids()
        cut = len(ids) * 4 // 5
        self.train_ids, self.test_ids = ids[:cut], ids[cut:]
        self.windows = windows
        self._batches = batches
        self._task = Task()

    def quality(self, spans: Sequence[str], wire: str) -> Quality:
        with InlineSwarm(built_in_path(), spans, config=ClientConfig(wire=wire)) as swarm:
            model: Any = adapted(swarm.load(), self._task)
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():  # half of a fresh adapter is zero, and so are the gradients of the rest
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
            layers = model.get_base_model().model.layers
            gradients = [self._gradients(model, self._task.batch(self.test_ids, n)) for n in range(self._batches)]
            with model.disable_adapter():
                forward_bytes, backward_bytes = self._bytes(model, layers)
                with torch.no_grad():
                    losses = [float(_loss(model, window)) for window in self._windows()]
        return Quality(math.exp(sum(losses) / len(losses)), gradients, forward_bytes, backward_bytes)

    def trained(self, wire: str, steps: int) -> float:
        """The loss on other text after so many steps; 0 for none."""
        task = replace(self._task, steps=steps)
        with InlineSwarm(built_in_path(), CUTS["3 peers"], config=ClientConfig(wire=wire)) as swarm:
            model = adapted(swarm.load(), task)
            if steps:
                train(model, task, self.train_ids)
            with torch.no_grad():
                losses = [float(_loss(model, window)) for window in self._windows()]
        return sum(losses) / len(losses)

    def _bytes(self, model: Any, layers: Any) -> tuple[float, float]:
        """Moved for each token of a forward and of its backward."""
        batch = self._task.batch(self.test_ids, 0)
        embedded = model.get_input_embeddings()(batch).detach().requires_grad_()
        moved = [_moved(layers)]
        loss = model(inputs_embeds=embedded, labels=batch, use_cache=False).loss
        moved.append(_moved(layers))
        loss.backward()
        moved.append(_moved(layers))
        return (moved[1] - moved[0]) / batch.numel(), (moved[2] - moved[1]) / batch.numel()

    def _windows(self) -> list[torch.Tensor]:
        task = replace(self._task, seed=99, num_tokens=128)
        return [task.batch(self.test_ids, number) for number in range(self.windows)]

    def _gradients(self, model: Any, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        embedded = model.get_input_embeddings()(batch).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=batch, use_cache=False).loss.backward()
        of_adapter = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        assert embedded.grad is not None
        return {"embeddings": embedded.grad, **of_adapter}

    def outlier_perplexity(self, folder: Path, spans: Sequence[str], wire: str) -> float:
        with InlineSwarm(folder, spans, config=ClientConfig(wire=wire)) as swarm, torch.no_grad():
            model = swarm.load()
            losses = [float(_loss(model, window)) for window in self._windows()]
        return math.exp(sum(losses) / len(losses))

    def channel_ratios(self, folder: Path) -> list[float]:
        """At each boundary between blocks."""
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            states = model(self._windows()[0], output_hidden_states=True, use_cache=False).hidden_states
        return [channel_ratio(state) for state in states[1:-1]]


def _loss(model: Any, batch: torch.Tensor) -> Any:
    return model(input_ids=batch, labels=batch, use_cache=False).loss


def _moved(layers: Any) -> int:
    stats = layers.stats()
    return int(stats.bytes_sent + stats.bytes_received)


def gradient_errors(ours: Quality, theirs: Quality, name: str) -> list[float]:
    """Of each batch: of the embeddings, or of all else as one vector."""

    def chosen(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: grad for key, grad in gradients.items() if (key == "embeddings") == (name == "embeddings")}

    return [relative(chosen(x), chosen(y)) for x, y in zip(ours.gradients, theirs.gradients, strict=True)]


def megabytes_per_s(codec: str, dtype: torch.dtype, rounds: int) -> tuple[float, float]:
    """Encoding and decoding, of plain bytes."""
    tensor = torch.randn(SPEED_SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    parts = codecs.encode(codec, tensor)
    assert parts is not None
    data = torch.cat(parts)
    works: tuple[Callable[[], object], ...] = (
        lambda: codecs.encode(codec, tensor),
        lambda: codecs.decode(codec, data, SPEED_SHAPE, dtype),
    )
    best = []
    for work in works:
        times = []
        for _ in range(rounds):
            began_s = time.thread_time()
            work()
            times.append(time.thread_time() - began_s)
        best.append(tensor.nbytes / min(times) / 1e6)
    return best[0], best[1]


def codec_speeds(rounds: int) -> dict[str, tuple[float, float]]:
    pairs = [(codec, name) for codec in WIDE_CODECS for name in ("float32", "bfloat16")]
    return {f"{codec} of {name}": megabytes_per_s(codec, getattr(torch, name), rounds) for codec, name in pairs}


def speed_text(speeds: dict[str, tuple[float, float]]) -> str:
    parts = [f"{name} {encode:.0f} encoded, {decode:.0f} decoded" for name, (encode, decode) in speeds.items()]
    return f"Codecs, MB of plain tensor for a second of one core: {'; '.join(parts)}."


def main() -> int:
    parser = argparse.ArgumentParser(description="what coded wires cost and save")
    parser.add_argument("--quick", action="store_true", help="fewer windows and batches, 5 steps")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--only-codec", action="store_true", help="its speed alone")
    parser.add_argument("--only-outliers", action="store_true", help="outlier channels, bytes of one token")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if options.only_codec:
        speeds = codec_speeds(30)
        return print_report({"codec_mb_per_s": speeds}, [], speed_text(speeds))
    if options.only_outliers:
        return outlier_report(Runs(windows=4 if options.quick else 16, batches=0), options.steps or 60)
    steps = options.steps or (5 if options.quick else 60)
    return report(Runs(windows=2 if options.quick else 16, batches=2 if options.quick else 8), steps, options.quick)


def outlier_report(runs: Runs, steps: int) -> int:
    rows: list[tuple[str, ...]] = []
    bars: list[Bar] = []
    result: dict[str, Any] = {"windows": runs.windows, "steps": steps}
    with TemporaryDirectory() as name:
        folder = Path(name)
        say(f"the model with outlier channels: {steps} steps")
        save_outlier_model(folder, runs.train_ids, steps)
        result["channel_ratios"] = runs.channel_ratios(folder)
        for cut, spans in CUTS.items():
            found = {wire: runs.outlier_perplexity(folder, spans, wire) for wire in ("compute", *MOST_CHANGE)}
            result[cut] = found
            changes = {wire: found[wire] / found["compute"] - 1 for wire in MOST_CHANGE}
            rows += [(cut, w, f"{p:.3f}", f"{100 * changes.get(w, 0.0):+.2f} %") for w, p in found.items()]
            bars += [Bar(f"{cut}: change of perplexity, {w}", changes[w], "<=", MOST_CHANGE[w]) for w in changes]
    shares = {codec: {size: token_share(size, codec) for size in HIDDEN_SIZES} for codec in WIDE_CODECS}
    errors = {codec: ordinary_error(codec) for codec in WIDE_CODECS}
    bars += [
        Bar(f"bytes of a token of {HIDDEN_SIZES[-1]}, int8o", shares["int8o"][HIDDEN_SIZES[-1]], "<=", 0.52),
        Bar("error of ordinary channels, int8o", errors["int8o"], "<=", 0.01),
    ]
    least = next((size for size in range(64, 65_536, 64) if token_share(size, "int8o") <= 0.52), None)
    result |= {"token_shares": shares, "ordinary_errors": errors, "least_size": least}
    of_tokens = [(codec, *(f"{share:.4f}" for share in found.values())) for codec, found in shares.items()]
    text = (
        f"{table(('cut', 'wire', 'perplexity', 'change'), rows)}\n\n"
        f"{table(('codec', *map(str, HIDDEN_SIZES)), of_tokens)}\n\n"
        f"Least hidden size with 0.52: {least}. Errors of ordinary channels: {errors}."
    )
    return print_report(result, bars, text)


def report(runs: Runs, steps: int, is_quick: bool) -> int:
    bars: list[Bar] = []
    rows: list[tuple[str, ...]] = []
    result: dict[str, Any] = {"windows": runs.windows, "steps": steps, "cuts": {}}
    for name, spans in CUTS.items():
        say(f"{name}: perplexity and gradients")
        found = {wire: runs.quality(spans, wire) for wire in WIRES}
        plain, coded = found["compute"], found["int8"]
        of_embeddings, of_adapter = (gradient_errors(coded, plain, which) for which in ("embeddings", "adapter"))
        ratio = coded.perplexity / plain.perplexity
        for wire, one in found.items():
            errors = [_share(errors) if wire == "int8" else "0" for errors in (of_adapter, of_embeddings)]
            moved = (f"{one.forward_bytes:.0f}", f"{one.backward_bytes:.0f}")
            rows.append((name, wire, f"{one.perplexity:.3f}", *errors, *moved))
        result["cuts"][name] = {
            "perplexity": {wire: one.perplexity for wire, one in found.items()},
            "adapter_gradient_error": of_adapter,
            "embedding_gradient_error": of_embeddings,
            "forward_bytes_per_token": {wire: one.forward_bytes for wire, one in found.items()},
            "backward_bytes_per_token": {wire: one.backward_bytes for wire, one in found.items()},
        }
        bars += [
            Bar(f"{name}: perplexity, int8 / plain", ratio, "<=", MAX_PERPLEXITY_RATIO),
            Bar(f"{name}: worst error of an adapter's gradient", max(of_adapter), "<=", MAX_GRADIENT_ERROR),
        ]
    say(f"training, {steps} steps")
    before = runs.trained("compute", 0)
    after = {wire: runs.trained(wire, steps) for wire in WIRES}
    bars.append(Bar("training: loss on other text, int8 - plain", after["int8"] - after["compute"], "<=", 0.01))
    speeds = codec_speeds(5 if is_quick else 30)
    result |= {"loss_before": before, "loss_after": after, "codec_mb_per_s": speeds}
    errors_of = ("error of the adapter's gradient", "of the embeddings'")
    head = ("cut", "wire", "perplexity", *errors_of, "bytes a token, forward", "backward")
    text = f"Loss on other text: {before:.4f}; after {steps} LoRA steps " + ", ".join(
        f"{loss:.4f} ({wire})" for wire, loss in after.items()
    )
    return print_report(result, bars, f"{table(head, rows)}\n\n{text}. {speed_text(speeds)}")


def _share(errors: list[float]) -> str:
    return f"{100 * sum(errors) / len(errors):.2f} % (worst {100 * max(errors):.2f} %)"


if __name__ == "__main__":
    sys.exit(main())
