"""Bytes of adapters on the wire against the size of what an optimizer changed, as one line of JSON and a table.

    python benchmarks/adapter_traffic.py [--rank 8] [--steps 5] [--mode process|thread]

The built-in model on three peers, LoRA on all linear layers. Each step is a forward and a backward; what it sends is
compared with what the same step sends when nothing changed, so that all that describes an adapter counts too. What
came is what the peers' own metrics say. A second part switches to generation, whose requests take other connections,
and to slices, whose spans are others.
"""

from __future__ import annotations

import argparse
import urllib.request
import warnings
from typing import Any

import torch
from _report import Bar, print_report, table
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from remote_modules import ClientConfig, RemoteSequential
from remote_modules.model.checkpoint import BUILT_IN, built_in_path
from remote_modules.testing import LocalSwarm

SPANS = ("0:3", "3:5", "5:8")
MOST = 0.02
RECEIVED = "remote_modules_adapter_bytes_received"


class Client:
    """A model with LoRA in remote blocks, and counters around what it does."""

    def __init__(self, swarm: LocalSwarm, rank: int, *, is_half_frozen: bool) -> None:
        self.swarm = swarm
        model: Any = AutoModelForCausalLM.from_pretrained(built_in_path())
        config = ClientConfig(peer_cache=None)
        self.layers = RemoteSequential.from_swarm(BUILT_IN, trackers=swarm.trackers, mdns=False, config=config)
        model.model.layers = self.layers
        self.model: Any = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
        if is_half_frozen:
            for name, parameter in self.model.named_parameters():
                if "lora_A" in name:
                    parameter.requires_grad_(False)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3)

    @property
    def changed_bytes(self) -> int:
        """Of what one optimizer step changes."""
        return sum(parameter.nbytes for parameter in self.trained)

    def run_pass(self) -> None:
        tokens = torch.arange(1, 65).reshape(2, 32)
        self.optimizer.zero_grad()
        self.model(input_ids=tokens, labels=tokens).loss.backward()

    def sent_by(self, work: Any) -> int:
        before = self.layers.stats().bytes_sent
        work()
        return self.layers.stats().bytes_sent - before

    def received(self) -> list[int]:
        """Of adapters by each peer, since it started."""
        found = []
        for peer in self.swarm.peers:
            with urllib.request.urlopen(f"http://{peer.address}/metrics", timeout=10.0) as answer:
                lines = answer.read().decode().splitlines()
            found.append(int(float(next(line.split()[-1] for line in lines if line.startswith(f"{RECEIVED} ")))))
        return found


def held_bytes(client: Client) -> list[int]:
    """Of what one optimizer step changes, by peer."""
    sizes = []
    for span in SPANS:
        start, end = map(int, span.split(":"))
        blocks = list(client.layers)[start:end]
        sizes.append(sum(p.nbytes for block in blocks for p in block.parameters() if p.requires_grad))
    return sizes


def measure_training(swarm: LocalSwarm, rank: int, steps: int, *, is_half_frozen: bool) -> dict[str, Any]:
    client = Client(swarm, rank, is_half_frozen=is_half_frozen)
    with client.layers:
        client.run_pass()
        plain = client.sent_by(client.run_pass)
        assert plain == client.sent_by(client.run_pass), "passes of the same shape send the same"
        client.optimizer.step()
        client.run_pass()
        before, counted = client.received(), client.layers.stats().adapter_bytes
        sent = 0
        for _ in range(steps):
            client.optimizer.step()
            sent += client.sent_by(client.run_pass) - plain
        counted = client.layers.stats().adapter_bytes - counted
        received = [now - then for now, then in zip(client.received(), before, strict=True)]
        by_peer = [got / (steps * size) for got, size in zip(received, held_bytes(client), strict=True)]
    return {
        "changed_bytes": client.changed_bytes,
        "sent_bytes_per_step": sent / steps,
        "counted_bytes_per_step": counted / steps,
        "share_on_wire": sent / (steps * client.changed_bytes),
        "share_received_by_peer": by_peer,
    }


def measure_inference(swarm: LocalSwarm, rank: int) -> dict[str, Any]:
    client = Client(swarm, rank, is_half_frozen=False)
    tokens = torch.arange(1, 9)[None]
    hidden_size = client.model.config.hidden_size
    with client.layers, torch.no_grad():
        client.model(input_ids=tokens, use_cache=False)
        first, before = client.layers.stats(), client.received()
        for _ in range(2):
            client.model.generate(input_ids=tokens, max_new_tokens=8, pad_token_id=0)
            client.model(input_ids=tokens, use_cache=False)
        for start, end in ((0, 2), (1, 3), (3, 5), (6, 8)):
            client.layers[start:end](torch.randn(1, 4, hidden_size))
        last, after = client.layers.stats(), client.received()
    return {
        "first_use_bytes": first.adapter_bytes,
        "later_bytes": last.adapter_bytes - first.adapter_bytes,
        "later_received": sum(after) - sum(before),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what adapters cost on the wire.")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--mode", choices=("process", "thread"), default="process")
    options = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # of transformers, about what peft asks
    torch.set_num_threads(1)
    with LocalSwarm(BUILT_IN, spans=SPANS, mode=options.mode, num_threads=1) as swarm:
        result: dict[str, Any] = {
            name: measure_training(swarm, options.rank, options.steps, is_half_frozen=is_half_frozen)
            for name, is_half_frozen in (("all", False), ("half_frozen", True))
        }
        result["inference"] = measure_inference(swarm, options.rank)
    bars = [
        Bar(f"{name}: bytes per step / changed bytes", result[name]["share_on_wire"], "<=", 1.0 + MOST)
        for name in ("all", "half_frozen")
    ]
    bars.append(Bar("inference: adapter bytes after the first use", result["inference"]["later_bytes"], "<=", 0))
    rows = [
        (name, found["changed_bytes"], f"{found['sent_bytes_per_step']:.0f}", f"{found['share_on_wire']:.4f}")
        for name, found in result.items()
        if name != "inference"
    ]
    head = ("what changes", "its bytes", "bytes sent for it in a step", "ratio")
    raise SystemExit(print_report(result, bars, table(head, rows)))


if __name__ == "__main__":
    main()
