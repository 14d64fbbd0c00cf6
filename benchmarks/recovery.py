"""How long a generation stalls when a peer is killed or frozen: real processes on loopback, default settings.

    python benchmarks/recovery.py [--repeats 5]

Six processes hold the built-in model as 0:3, 3:6, 6:8, twice. For each hop and each fault, a greedy generation of 24
tokens loses the hop's peer at some token; the stall is the longest gap between two tokens. Every run must give the
local model's tokens. Prints one line of JSON for each fault: medians and the longest, in seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from remote_modules import load
from remote_modules.model.checkpoint import built_in_path
from remote_modules.testing import LocalSwarm

SPANS = ["0:3", "3:6", "6:8"]
NUM_TOKENS = 24
PROMPT = "The function returns a"


def generate(model: Any, tokens: torch.Tensor, at: int, lose: Any) -> tuple[torch.Tensor, float]:
    """Greedy tokens, and the longest gap between two of them; ``lose`` is called after token ``at``."""
    times: list[float] = []

    def note(input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        times.append(time.perf_counter())
        if len(times) == at:
            lose()
        return torch.zeros(len(input_ids), dtype=torch.bool)

    output = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=NUM_TOKENS,
        min_new_tokens=NUM_TOKENS,
        do_sample=False,
        stopping_criteria=[note],
    )
    return output, max(later - earlier for earlier, later in zip(times, times[1:], strict=False))


def measure(swarm: LocalSwarm, remote: Any, tokens: torch.Tensor, expected: torch.Tensor, fault: str, at: int) -> float:
    def lose_hop(hop: int) -> None:
        peer_id = remote.model.layers.stats().route[hop].peer_id
        peer = next(peer for peer in swarm.peers if peer.peer_id == peer_id)
        lost.append(peer)
        peer.kill() if fault == "kill" else peer.freeze()

    longest = 0.0
    for hop in range(len(SPANS)):
        lost: list[Any] = []
        before = remote.model.layers.stats().failovers
        output, gap_s = generate(remote, tokens, at, lambda hop=hop: lose_hop(hop))
        if not torch.equal(output, expected):
            raise SystemExit(f"tokens differ after a {fault} of hop {hop} at token {at}")
        if remote.model.layers.stats().failovers == before:
            raise SystemExit(f"the {fault} of hop {hop} at token {at} went unnoticed")
        longest = max(longest, gap_s)
        for peer in lost:
            peer.restart() if fault == "kill" else peer.thaw()
        time.sleep(1.5)  # bans run out, and the peer is announced again
    return longest


def main() -> None:
    parser = argparse.ArgumentParser(description="stall after a kill or a freeze")
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    local: Any = AutoModelForCausalLM.from_pretrained(built_in_path())
    tokens = AutoTokenizer.from_pretrained(built_in_path())(PROMPT, return_tensors="pt").input_ids
    expected, _ = generate(local, tokens, -1, None)
    with LocalSwarm(built_in_path(), spans=SPANS * 2, mode="process", num_threads=1) as swarm:
        remote: Any = load(built_in_path(), trackers=swarm.trackers, mdns=False)
        _, calm_s = generate(remote, tokens, -1, None)
        for fault in ("kill", "freeze"):
            stalls = [measure(swarm, remote, tokens, expected, fault, at) for at in range(2, 2 + repeats * 4, 4)]
            print(
                json.dumps(
                    {
                        "fault": fault,
                        "runs": repeats * len(SPANS),
                        "median_of_longest_stall_s": round(statistics.median(stalls), 3),
                        "longest_stall_s": round(max(stalls), 3),
                        "longest_gap_without_fault_s": round(calm_s, 3),
                        "tokens_equal": True,
                    }
                ),
                flush=True,
            )
        remote.model.layers.close()


if __name__ == "__main__":
    main()
