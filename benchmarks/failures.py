"""Generation while streams fail: restart with cache, no cache, and ours (the paper's Table 1), on one transport.

    python benchmarks/failures.py [--quick] [--long 1024] [--sequences 3]

A bloom of 30 blocks, hidden size 512, random weights, as 4 stages (8/7/8/7) of 2 replicas each: 8 peer processes on
loopback with one torch thread each. Greedy decoding from one token, one token a step. Each send fails with probability
p: 5 sends for each token through 4 stages (client -> 1 -> 2 -> 3 -> 4 -> client); a failure ends the connection and the
session behind it, with its KV cache. All arms use the same connections, messages and peers, and meet the same draws.

Table: steps/s, normalized to plain caching at p = 0 of the same repetition, medians. How each is measured:

* ours: whole sequences; the tokens must be those of the undisturbed run.
* restart: whole sequences where that is expected to take less than three undisturbed ones. Beyond, attempts are run and
  not their whole chain: the expected time of a sequence is (seconds of a send) x (1 - q) / (p q), q = (1 - p)^(5 t).
  Where that is more than 10^6 sequences, nothing is run and the formula alone is given.
* no cache: at sampled lengths, with and without a failure, and integrated over the sequence.

The cost of a failure: extra seconds over the same sequence at p = 0 / (failures x seconds of a step at p = 0).
Takes about 25 minutes on two quiet cores, 2 with --quick. Prints one line of JSON; markdown and progress go to stderr.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _failure_arms import Client
from _failure_runs import FIRST_TOKEN, Length, Setup
from _report import Bar, print_report, table
from transformers import BloomConfig, BloomForCausalLM
from transformers.utils import logging as transformers_logging

from remote_modules import load
from remote_modules.testing import LocalSwarm

SHORT = 128
SHORT_SEQUENCES = 6


def build_checkpoint(folder: Path, setup: Setup) -> None:
    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=256, hidden_size=setup.hidden_size, n_layer=sum(setup.stages), n_head=setup.hidden_size // 64
    )
    BloomForCausalLM(config).save_pretrained(folder)


def run(setup: Setup) -> dict[int, Length]:
    """All measurements, by length."""
    ends = list(itertools.accumulate(setup.stages))
    spans = [f"{end - size}:{end}" for end, size in zip(ends, setup.stages, strict=True)] * 2
    lengths = {}
    with tempfile.TemporaryDirectory() as name:
        build_checkpoint(Path(name), setup)
        with LocalSwarm(name, spans=spans, mode=setup.mode, num_threads=1, orphan_session_s=1.0) as swarm:
            client = Client(load(name, trackers=swarm.trackers, mdns=False))
            for session in (client.layers.session(), client.layers.session()):
                with session:
                    client.decode(session, 8, FIRST_TOKEN)
            for num_tokens, sequences in setup.lengths.items():
                length = lengths[num_tokens] = Length(client, setup, num_tokens)
                for number in range(sequences):
                    length.run_round(number)
                length.run_uncached()
            client.layers.close()
    return lengths


def bars_of(lengths: dict[int, Length]) -> list[Bar]:
    short, long = (lengths[t] for t in sorted(lengths))
    bars = [Bar(f"ours ÷ plain, p=0, t={t}", lengths[t].normalized("ours", 0.0), ">=", 0.95) for t in sorted(lengths)]
    ours, restart = long.normalized("ours", 1e-3), long.normalized("restart", 1e-3)
    assert ours is not None
    t = long.num_tokens
    bars += [
        Bar(f"ours, p=1e-3, t={t}", ours, ">=", 0.50),
        Bar(f"ours ÷ restart, p=1e-3, t={t}", ours / restart if restart else None, ">=", 16.0),
        Bar(f"ours, p=1e-2, t={t}", long.normalized("ours", 1e-2), ">=", 0.14),
        Bar("ours ÷ no cache, least", _least_over_uncached(lengths), ">=", 1.0),
        Bar(f"steps that a failure costs, t={t}", long.cost(), "<=", 40.0),
        Bar(f"steps that a failure costs, t={short.num_tokens}", short.cost(), "<=", 15.0),
        Bar("restart: largest deviation from the formula, p ≤ 1e-3", _deviation(lengths), "<=", 0.10),
    ]
    return bars


def _least_over_uncached(lengths: dict[int, Length]) -> float:
    return min(
        (length.normalized("ours", p) or 0.0) / (length.normalized("no cache", p) or 1.0)
        for length in lengths.values()
        for p in length.ours
    )


def _deviation(lengths: dict[int, Length]) -> float:
    """Of the measured slowdown from the formula with the measured steps."""
    pairs = [
        (length.restart_s(p) / length.plain_s, length.slowdown_by_steps(p))
        for length in lengths.values()
        for p in length.restart
        if p <= 1e-3 and not length.is_hopeless(p)
    ]
    return max(abs(measured / expected - 1) for measured, expected in pairs)


def document(lengths: dict[int, Length]) -> tuple[dict[str, Any], str]:
    """The result for JSON, and the table."""
    columns = [(t, p) for t in sorted(lengths) for p in lengths[t].ours]
    rows: list[list[str]] = []
    result: dict[str, Any] = {"normalized": {}}
    for arm in ("restart", "no cache", "ours"):
        values = {(t, p): lengths[t].normalized(arm, p) for t, p in columns}
        result["normalized"][arm] = {f"t={t} p={p:g}": value for (t, p), value in values.items()}
        rows.append([arm, *(_cell(lengths[t], p, values[t, p]) for t, p in columns)])
    for t, length in lengths.items():
        result[f"t={t}"] = {
            "plain_steps_per_s": round(t / length.plain_s, 2),
            "failure_cost_steps": length.cost(),
            "profile": length.profile(),
            "spread_of_ours": {f"{p:g}": [min(cell.ratios), max(cell.ratios)] for p, cell in length.ours.items()},
            "restart": {f"{p:g}": _restart(length, p) for p in length.restart},
        }
    return result, table(["arm", *(f"t={t}, p={p:g}" for t, p in columns)], rows)


def _restart(length: Length, p: float) -> dict[str, Any]:
    restart = length.restart[p]
    return {
        "formula": 1 / length.slowdown(p),
        "formula_with_measured_steps": 1 / length.slowdown_by_steps(p),
        "measured": length.normalized("restart", p),
        "ms_per_send": 1e3 * restart.seconds / restart.sends if restart.sends else None,
        "whole_sequences_s": restart.whole_s,
    }


def _cell(length: Length, p: float, value: float | None) -> str:
    if value is None:
        return f"– (formula {1 / length.slowdown(p):.0e})"
    return f"{value:.3f}" if value >= 0.01 else f"{value:.1e}"


def main() -> int:
    parser = argparse.ArgumentParser(description="generation while streams fail")
    parser.add_argument("--quick", action="store_true", help="shorter sequences, one of each; its bars are a hint only")
    parser.add_argument("--long", type=int, default=1024, help="tokens of the longer sequences")
    parser.add_argument("--sequences", type=int, default=3, help="how many of the longer ones")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if options.quick:
        setup = Setup(lengths={48: 1, 192: 1}, attempts=3, samples=3)
    else:
        setup = Setup(lengths={SHORT: SHORT_SEQUENCES, options.long: options.sequences})
    lengths = run(setup)
    result, markdown = document(lengths)
    status = print_report(result, bars_of(lengths), markdown)
    return 0 if options.quick else status


if __name__ == "__main__":
    sys.exit(main())
