"""One rank of a DDP run: trains through a swarm and then on the local model; prints the losses of both as JSON.

    python ddp_rank.py '{"rank": 0, "store": FILE, "checkpoint": FOLDER, "trackers": […], "pids": {…}}'

Rank 0 kills the process of the peer that ran the last hop of step `KILL_AT`, between forward and backward.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from datetime import timedelta
from typing import Any

warnings.filterwarnings("ignore", category=FutureWarning)  # of peft

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from torch import distributed  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from remote_modules import load  # noqa: E402

NUM_STEPS = 30
KILL_AT = 10
BATCH = 2


def train(base: Any, rank: int, pids: dict[str, int]) -> list[float]:
    """Losses of this rank's part of each batch; no ``pids``, no kill."""
    torch.manual_seed(1 + rank)  # DDP gives all ranks the parameters of the first
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = DistributedDataParallel(get_peft_model(base, lora).train())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    data = torch.randint(3, 96, (NUM_STEPS, 2, BATCH, 12), generator=torch.Generator().manual_seed(2))
    losses = []
    for step, batch in enumerate(data[:, rank], start=1):
        loss = model(input_ids=batch, labels=batch).loss
        if pids and rank == 0 and step == KILL_AT:
            os.kill(pids[base.model.layers.stats().route[-1].peer_id], signal.SIGKILL)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    rank = int(job["rank"])
    # A file as the meeting place: no port has to be free.
    place, timeout = f"file://{job['store']}", timedelta(seconds=60)
    distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=2, timeout=timeout)
    remote: Any = load(job["checkpoint"], trackers=job["trackers"], mdns=False)
    result: dict[str, Any] = {"remote": train(remote, rank, job["pids"])}
    result["failovers"] = remote.model.layers.stats().failovers
    remote.model.layers.close()
    result["local"] = train(AutoModelForCausalLM.from_pretrained(job["checkpoint"]), rank, {})
    distributed.destroy_process_group()
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main()
