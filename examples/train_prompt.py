"""Soft-prompt tuning through a swarm, in plain PyTorch, compared with the same steps on the local model.

    python examples/train_prompt.py [--steps N]

The trained tensor and the optimizer live here; peers hold frozen blocks, recompute them in backward, and keep nothing.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from remote_modules import load
from remote_modules.model.checkpoint import built_in_path
from remote_modules.testing import LocalSwarm

TEXT = "Peers come and go, and the sentence goes on as if nothing had happened."
NUM_PROMPT_TOKENS = 8


def train(model: PreTrainedModel, ids: torch.Tensor, num_steps: int) -> list[float]:
    """Losses of ``num_steps`` steps on a prompt ``[1, P, D]`` in front of ``ids`` ``[1, T]``."""
    model.requires_grad_(False)
    embeddings = model.get_input_embeddings()(ids)
    torch.manual_seed(0)
    prompt = torch.nn.Parameter(0.02 * torch.randn(1, NUM_PROMPT_TOKENS, embeddings.shape[-1]))
    labels = torch.cat([torch.full((1, NUM_PROMPT_TOKENS), -100), ids], dim=1)  # -100: no loss on the prompt itself
    optimizer = torch.optim.AdamW([prompt], lr=0.05)
    losses = []
    for _ in range(num_steps):
        loss = model(inputs_embeds=torch.cat([prompt, embeddings], dim=1), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description="soft-prompt tuning through a swarm")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    ids = AutoTokenizer.from_pretrained(built_in_path())(TEXT, return_tensors="pt")["input_ids"]
    local_losses = train(AutoModelForCausalLM.from_pretrained(built_in_path()), ids, options.steps)
    with LocalSwarm("pydoc-2m", spans=["0:4", "4:8"]) as swarm:
        model = load("pydoc-2m", trackers=swarm.trackers, mdns=False)
        losses = train(model, ids, options.steps)
        model.model.layers.close()
    for number, (loss, local_loss) in enumerate(zip(losses, local_losses, strict=True), start=1):
        print(f"step {number}: loss {loss:.6f}, local {local_loss:.6f}, difference {abs(loss - local_loss):.1e}")


if __name__ == "__main__":
    main()
