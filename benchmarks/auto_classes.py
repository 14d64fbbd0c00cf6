"""Every type of model of transformers' classification, question-answering and vision-language classes, measured.

    python benchmarks/auto_classes.py [--write docs/auto_classes.md] [--only TASK[:TYPE] ...]

A tiny random checkpoint of each type is written, run by two peers in this process, and compared with the local model:
one forward of two texts, the first with left padding, and the gradient of all parameters that stay at the client.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto
from transformers.utils import logging as transformers_logging

from remote_modules.errors import CheckpointError, PeerRefused, RemoteModulesError, UnsupportedCallError, first_line
from remote_modules.model.classes import model_class, serving_class
from remote_modules.model.probe import probe_stack
from remote_modules.model.shrink import tiny_config, tiny_model
from remote_modules.testing.inline_swarm import InlineSwarm

TASKS: dict[str, tuple[Any, Any]] = {
    "sequence classification": (
        AutoModelForSequenceClassification,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    "token classification": (
        AutoModelForTokenClassification,
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    ),
    "question answering": (
        AutoModelForQuestionAnswering,
        modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    ),
    "image-text to text": (
        AutoModelForImageTextToText,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    ),
}
OUTPUTS = ("logits", "start_logits", "end_logits")
STATUSES = {
    "exact": "forward and gradient are those of the local model, bit by bit",
    "rounding": f"they are, but for rounding: at most {1e-5:.0e} of the largest value",
    "wrong": "they are not",
    "refused": "an error names the reason, and nothing is returned",
    "no reference": "the local model does not run on a tiny config and text inputs alone",
}
ROUNDING = 1e-5
BOUND = 1e4  # masked logits are -3e38
NUM_TOKENS = 9

_LOCAL_FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, ImportError)

Found = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Row:
    """What was found for one type."""

    task: str
    family: str
    status: str
    reason: str = ""
    forward: float = 0.0
    gradient: float = 0.0
    seconds: float = 0.0


def measure(task: str, family: str) -> Row:
    began_s = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="auto-classes-") as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        status, reason, forward, gradient = _measured(TASKS[task][0], family, Path(name))
    return Row(task, family, status, reason, forward, gradient, round(time.perf_counter() - began_s, 1))


def _measured(auto_class: Any, family: str, folder: Path) -> tuple[str, str, float, float]:
    try:
        local = _saved(auto_class, family, folder)
        ids, mask = _texts(local.config)
        expected = _run(local, ids, mask)
    except (RemoteModulesError, *_LOCAL_FAILURES) as exc:
        return "no reference", f"{type(exc).__name__}: {first_line(exc)}", 0.0, 0.0
    try:
        stack = probe_stack(*serving_class(local.config))
        end = stack.num_blocks
        inner = sorted((stack.cuts or set(range(end))) - {0, end})
        cut = inner[len(inner) // 2] if inner else end
        with InlineSwarm(folder, [f"0:{cut}", f"{cut}:{end}"] if inner else [f"0:{end}"]) as swarm:
            found = _run(swarm.load(auto_class), ids, mask)
    except (UnsupportedCallError, CheckpointError, PeerRefused) as exc:
        return "refused", first_line(exc), 0.0, 0.0
    except (RemoteModulesError, *_LOCAL_FAILURES) as exc:
        return "wrong", f"{type(exc).__name__}: {first_line(exc)}", 0.0, 0.0
    return _compared(expected, found)


def _saved(auto_class: Any, family: str, folder: Path) -> PreTrainedModel:
    """A tiny checkpoint of the type, as users have it: encoders are encoders."""
    config = tiny_config(family)
    changes: dict[str, Any] = {"is_decoder": False} if config.to_dict().get("is_decoder") else {}
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        changes["decoder_start_token_id"] = 0
    cls, config = model_class(tiny_config(family, **changes), auto_class)
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0
    tiny_model(config, cls=cls).save_pretrained(folder)
    loaded: PreTrainedModel = auto_class.from_pretrained(folder)
    loaded.eval()
    return loaded


def _texts(config: PreTrainedConfig) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(20, 90, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    if config.is_encoder_decoder:
        ids[:, -1] = config.eos_token_id
    elif getattr(config, "sep_token_id", None) is not None:
        ids[:, [3, 4, NUM_TOKENS - 1]] = config.sep_token_id
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return ids, mask


def _run(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> tuple[Found, Found]:
    """Outputs, and the gradients of the sum of their squares.

    Gradients take a forward of their own: torch multiplies, so rounds, in another way where they are wanted.
    """
    takes_cache = "use_cache" in inspect.signature(model.forward).parameters or hasattr(model.config, "text_config")
    inputs = {"input_ids": ids, "attention_mask": mask, **({"use_cache": False} if takes_cache else {})}
    with torch.no_grad():
        outputs = _outputs(model(**inputs))
    losses = [tensor.clamp(-BOUND, BOUND).square().sum() for tensor in _outputs(model(**inputs)).values()]
    torch.stack(losses).sum().backward()
    return outputs, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _outputs(output: Any) -> Found:
    return {name: output[name] for name in OUTPUTS if name in output}


def _compared(expected: tuple[Found, Found], found: tuple[Found, Found]) -> tuple[str, str, float, float]:
    forward, gradient = _difference(expected[0], found[0]), _difference(expected[1], found[1])
    missing = expected[0].keys() ^ found[0].keys() or found[1].keys() - expected[1].keys()
    if missing or not found[0] or not found[1]:
        return "wrong", f"expected the same outputs and gradients, differs in {sorted(missing)}", forward, gradient
    worst = max(forward, gradient)
    status = "exact" if worst == 0.0 else "rounding" if worst <= ROUNDING else "wrong"
    return status, "", forward, gradient


def _difference(expected: Found, found: Found) -> float:
    """The largest one, as a part of the largest value of all."""
    worst = 0.0
    scale = max((float(tensor.abs().max()) for tensor in expected.values()), default=0.0) or 1.0
    for name in expected.keys() & found.keys():
        if expected[name].shape != found[name].shape or not bool(torch.isfinite(found[name]).all()):
            return float("inf")
        worst = max(worst, float((expected[name] - found[name]).abs().max()) / scale)
    return worst


def table(rows: Sequence[Row], seconds: float) -> Iterator[str]:
    """The page."""
    yield "# Auto classes\n"
    yield f"Generated by `python benchmarks/auto_classes.py --write docs/auto_classes.md` in {seconds:.0f} s;"
    yield f"transformers {transformers.__version__}, torch {torch.__version__}, float32 on a CPU. Each type is a tiny"
    yield "random checkpoint of its default structure, run by two peers: a forward of two texts, the first with left"
    yield "padding, and the gradient of all parameters at the client. Image inputs, left out here, are checked"
    yield "by `tests/swarm/test_auto_classes.py`.\n"
    yield from (f"* **{status}**: {meaning}." for status, meaning in STATUSES.items())
    yield "\n| | " + " | ".join(STATUSES) + " |\n|---|" + "---|" * len(STATUSES)
    for task in TASKS:
        counts = [sum(row.task == task and row.status == status for row in rows) for status in STATUSES]
        yield f"| {task} | " + " | ".join(map(str, counts)) + " |"
    for task in TASKS:
        mine = [row for row in rows if row.task == task]
        if mine:
            yield f"\n## {task.capitalize()}\n"
            yield "Exact: " + ", ".join(row.family for row in mine if row.status == "exact") + ".\n"
            yield "| type | status | forward | gradient | reason |\n|---|---|---|---|---|"
            yield from (_line(row) for row in mine if row.status != "exact")


def _line(row: Row) -> str:
    is_measured = row.status in ("rounding", "wrong") and not row.reason
    numbers = f"{row.forward:.1e} | {row.gradient:.1e}" if is_measured else " | "
    reason = row.reason.replace("|", "\\|").replace("<", "&lt;")
    return f"| {row.family} | {row.status} | {numbers} | {reason} |"


def quiet() -> None:
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("remote_modules").setLevel(logging.ERROR)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure all types of the auto classes.")
    parser.add_argument("--write", help="the page to write")
    parser.add_argument("--only", nargs="*", help='some of them: "question answering" or "question answering:llama"')
    options = parser.parse_args()
    wanted = [(task, family) for task, (_, names) in TASKS.items() for family in names]
    if options.only:
        wanted = [(t, f) for t, f in wanted if t in options.only or f"{t}:{f}" in options.only]
    began_s = time.perf_counter()
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=quiet) as pool:
        rows = []
        for row in pool.map(measure, *zip(*wanted, strict=True), chunksize=4):
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    text = "\n".join(table(rows, time.perf_counter() - began_s)) + "\n"
    if options.write:
        Path(options.write).write_text(text, "utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
