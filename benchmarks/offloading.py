"""Decoding a model whose blocks do not fit: by offloading them, against three peers that hold them.

    python benchmarks/offloading.py [--netlab] [--hidden 1024] [--blocks 16] [--rounds 5]              # a CPU
    python benchmarks/offloading.py --device cuda [--layers 80] [--blocks 8] [--shape 70b] [--rounds 5]

On a CPU: a random fp32 llama, greedy tokens after a prompt, one torch thread for each process; all arms must have the
same tokens. accelerate reads the blocks from disk for each token (`_offload_disk.py` says how the page cache is kept
out), or has them in memory, as if they fitted; three peers hold a third each, on loopback and with ``--netlab`` also in
the three networks of the Petals paper, which need root, gcc and ../shared/netlab. *Reading the disk alone* is what no
offloading from this disk exceeds. How fast the disk is against the processor decides the ratio.

On an accelerator: 80 bf16 blocks of the shape of Llama 70B, streamed from pinned host memory for each token, against
three peer processes on the same device behind links with the delays and rates of the same networks
(`_offload_device.py` says how). ``--blocks`` of the 80 have weights of their own, in both arms. A step is the blocks
alone: no embeddings and no head.

Arms take turns in random order; ratios are medians of each round's. Prints one line of JSON; markdown goes to stderr;
``--output`` keeps both. The exit status is 1 if a bar (``--device cuda --shape 70b``) is missed. ``--quick``: tiny
blocks.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _arms import Arm, RemoteArm, Sample, interleave, median_ratio
from _device_span import SHAPES
from _offload_device import STREAMED, Measured, measure_device, spans_of
from _offload_disk import DiskArm, ReadArm, disk_arm, memory_arm
from _report import Bar, machine, print_report, say, table
from suite import PROFILES, place_of
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from remote_modules import load

MIN_ROUNDS = 5
BARS = {"1g5": 45.0, "100m5": 40.0, "100m100": 9.0}  # times the streamed arm; layers of 80, shape 70b


def build_checkpoints(folder: Path, hidden_size: int, blocks: int) -> tuple[Path, Path]:
    """One model twice: what peers map stays in the page cache, so the offloading arm has files of its own."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=max(1, hidden_size // 64),
        num_key_value_heads=max(1, hidden_size // 64),
        pad_token_id=0,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    return folder / "model", Path(shutil.copytree(folder / "model", folder / "offloaded"))


def measure_disk(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Samples and figures by profile."""
    model_folder, offloaded_folder = build_checkpoints(folder, options.hidden, options.blocks)
    disk = disk_arm(offloaded_folder, folder / "scratch")
    baselines: list[Arm] = [disk, ReadArm(offloaded_folder), memory_arm(model_folder)]
    prompt = torch.randint(1, 1024, (options.prefix,), generator=torch.Generator().manual_seed(1)).tolist()
    results = {}
    for profile in options.profiles:
        say(f"== {profile}")
        disk.read_shares.clear()
        with place_of(profile, model_folder, spans_of(options.blocks, options.peers), None) as place:
            model: Any = load(model_folder, mdns=False, **place.sources)
            with closing(model.model.layers):
                arms = [*baselines, RemoteArm(f"{options.peers} peers", model)]
                samples = interleave(
                    arms, lambda arm: said(arm, arm.decode(prompt, options.steps)), options.rounds, Random(0)
                )
        results[profile] = {**figures(samples, disk.name), "read_share": read_share(disk)}
    return {"block_bytes": disk.block_bytes, "profiles": results}


def said(arm: Arm, sample: Sample) -> Sample:
    say(f"{arm.name}: {sample.token_s * 1e3:.1f} ms for each token")
    return sample


def read_share(disk: DiskArm) -> float:
    """Of the blocks' bytes, what each token truly read from the disk; median."""
    return round(statistics.median(disk.read_shares), 3)


def figures(samples: dict[str, list[Sample]], base: str) -> dict[str, Any]:
    seconds = {name: [sample.token_s for sample in found] for name, found in samples.items()}
    return {"arms": arms_of(seconds, base)}


def arms_of(seconds: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """``ratio``: steps/s to those of ``base``."""
    return {
        name: {
            "steps_per_s": round(1 / statistics.median(found), 4),
            "least": round(1 / max(found), 4),
            "most": round(1 / min(found), 4),
            "ratio": round(median_ratio(seconds[base], found), 3),
        }
        for name, found in seconds.items()
    }


def device_result(measured: Measured, block_bytes: int) -> dict[str, Any]:
    bound = statistics.median(measured.bound)
    return {
        "block_bytes": block_bytes,
        "difference": measured.difference,
        "bound_steps_per_s": round(1 / bound, 4),
        "computing_ms": {name: round(1e3 * statistics.median(found), 3) for name, found in measured.compute.items()},
        "arms": arms_of(measured.seconds, STREAMED),
    }


def bars_of(options: argparse.Namespace, result: dict[str, Any]) -> list[Bar]:
    if options.quick or options.device == "cpu" or options.shape != "70b":
        return []
    return [
        Bar(f"{profile}: peers / streamed, steps/s", result["arms"][profile]["ratio"], ">=", bar)
        for profile, bar in BARS.items()
        if profile in result["arms"]
    ]


def rows_of(arms: dict[str, dict[str, float]], *first: str) -> Iterator[tuple[object, ...]]:
    for name, found in arms.items():
        yield (*first, name, f"{found['steps_per_s']:.3f}", f"{found['least']:.3f} to {found['most']:.3f}",
               f"{found['ratio']:.2f}")  # fmt: skip


def markdown(options: argparse.Namespace, result: dict[str, Any]) -> str:
    head = ["arm", "steps/s", "of rounds", "÷ offloading"]
    if options.device == "cpu" and not options.streamed:
        rows = [row for name, found in result["profiles"].items() for row in rows_of(found["arms"], name)]
        shares = ", ".join(f"{found['read_share']:.2f} ({name})" for name, found in result["profiles"].items())
        text = f"{result['block_bytes'] / 1e9:.2f} GB of blocks; of them each token read from disk: {shares}."
        return f"{table(['profile', *head], rows)}\n\n{text}"
    computing = ", ".join(f"{ms:g} ({name})" for name, ms in result["computing_ms"].items())
    text = (
        f"{options.layers} layers of {result['block_bytes'] / 1e9:.3f} GB, {options.blocks} of them distinct. Copying "
        f"alone: {result['bound_steps_per_s']:.3f} steps/s. Peers' computing, ms a step: {computing}. "
        f"Outputs differ by {result['difference']:.2g} (relative)."
    )
    names = {name: name if name == STREAMED else f"{options.peers} peers, {name}" for name in result["arms"]}
    arms = {names[name]: found for name, found in result["arms"].items()}
    return f"{table(head, list(rows_of(arms)))}\n\n{text}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="decoding by offloading, against peers")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--streamed", action="store_true", help="the form of accelerators, also on a CPU")
    parser.add_argument("--netlab", action="store_true", help="on a CPU: the paper's three networks, too")
    parser.add_argument("--profiles", nargs="+", choices=list(PROFILES), help="networks; default: all, if there")
    parser.add_argument("--peers", type=int, default=3)
    parser.add_argument("--blocks", type=int, help="with weights of their own; default 16 on a CPU, 8 else")
    parser.add_argument("--layers", type=int, default=80, help="on an accelerator")
    parser.add_argument("--shape", choices=SHAPES, default="70b", help="on an accelerator")
    parser.add_argument("--hidden", type=int, default=1024, help="on a CPU")
    parser.add_argument("--prefix", type=int, default=32, help="tokens of the prompt on a CPU")
    parser.add_argument("--steps", type=int, help="in each round; default 4 on a CPU, 16 else")
    parser.add_argument("--streamed-steps", type=int, default=2, help="of the streamed arm in each round")
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS)
    parser.add_argument("--server-option", type=option, action="append", default=[], metavar="NAME=JSON",
                        help="of the peers on an accelerator; repeatable")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for JSON and markdown")
    parser.add_argument("--quick", action="store_true", help="tiny blocks, one round, no bars")
    options = parser.parse_args(arguments)
    is_disk = options.device == "cpu" and not options.streamed
    if options.profiles is None:
        options.profiles = list(PROFILES) if options.netlab or not is_disk else ["loopback"]
    options.steps = options.steps or (4 if is_disk else 16)
    options.blocks = options.blocks or (16 if is_disk else 8)
    if options.quick:
        vars(options).update(shape="tiny", layers=6, blocks=3 if is_disk else 2, hidden=64, prefix=8, steps=2, rounds=1)
    elif options.rounds < MIN_ROUNDS:
        parser.error(f"at least {MIN_ROUNDS} rounds, please")
    return options


def option(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, json.loads(value)


def run(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1 if options.device == "cpu" else 4)
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="offloading-") as name:
        if options.device == "cpu" and not options.streamed:
            return measure_disk(options, Path(name))
        return device_result(*measure_device(options, Path(name)))


def main() -> int:
    options = parse(None)
    result = run(options)
    text = markdown(options, result)
    asked = {name: value for name, value in vars(options).items() if name not in ("output", "server_option")}
    report = {"options": {**asked, "server_options": dict(options.server_option)}, **result}
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "offloading.json").write_text(json.dumps({**report, "machine": machine()}, indent=1), "utf-8")
        (options.output / "offloading.md").write_text(f"{text}\n\n{machine()}.\n", "utf-8")
    return print_report(report, bars_of(options, result), text)


if __name__ == "__main__":
    sys.exit(main())
