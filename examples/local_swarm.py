"""A peer is killed in the middle of a generation, which goes on with the same tokens.

    python examples/local_swarm.py

Peers are processes of their own, and the kill is a SIGKILL. Blocks 3:6 are held twice, so that there is somewhere to
go.
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteriaList

from remote_modules import ClientConfig, RemoteSequential, load
from remote_modules.model.checkpoint import built_in_path
from remote_modules.testing import LocalSwarm

ALONE = ClientConfig(peer_cache=None)  # no peers of other swarms that this machine remembers
NUM_TOKENS = 24
KILL_AT = 8


class KillOnce:
    """A stopping criterion that never stops the text, but the peer that runs block 3."""

    def __init__(self, swarm: LocalSwarm, layers: RemoteSequential, num_tokens: int) -> None:
        self.swarm = swarm
        self.layers = layers
        self.num_tokens = num_tokens

    def __call__(self, ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        if ids.shape[1] == self.num_tokens:
            hop = next(hop for hop in self.layers.stats().route if 3 in hop.span)
            victim = next(peer for peer in self.swarm.peers if peer.peer_id == hop.peer_id)
            print(f"killing peer {hop.peer_id[:6]}, process {victim.pid}, which runs blocks {hop.span}")
            victim.kill()
        return torch.zeros(len(ids), dtype=torch.bool)


def main() -> None:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(built_in_path())
    inputs = tokenizer("If the file does not exist, an exception", return_tensors="pt")
    options = {"max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS, "do_sample": False}
    local = AutoModelForCausalLM.from_pretrained(built_in_path())
    expected = local.generate(**inputs, **options)

    with LocalSwarm(built_in_path(), spans=["0:3", "3:6", "3:6", "6:8"], mode="process", num_threads=1) as swarm:
        model: Any = load(built_in_path(), trackers=swarm.trackers, mdns=False, config=ALONE)
        layers = model.model.layers
        killer = KillOnce(swarm, layers, inputs["input_ids"].shape[1] + KILL_AT)
        output = model.generate(**inputs, **options, stopping_criteria=StoppingCriteriaList([killer]))
        stats = layers.stats()
        layers.close()

    print(tokenizer.decode(output[0]))
    print(f"failovers {stats.failovers}, tokens replayed {stats.replayed_tokens}, stalled {stats.stall_seconds:.2f} s")
    print("identical to the local model:", torch.equal(output, expected))


if __name__ == "__main__":
    main()
