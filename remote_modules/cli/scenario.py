"""What `demo` shows: text that survives a killed peer, and a soft prompt trained through the swarm.

Everything is computed twice, by peers and by the same model in this process, to compare. Imports torch and
transformers: import it inside of a command.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from remote_modules.cli import output
from remote_modules.cli.options import Sources
from remote_modules.cli.text import Sampling, Source, StopWatch, TextModel
from remote_modules.client.stats import ClientStats
from remote_modules.errors import RemoteModulesError
from remote_modules.model.checkpoint import BUILT_IN, built_in_path
from remote_modules.peers import short_id
from remote_modules.spans import Span
from remote_modules.testing import LocalSwarm

__all__ = ["Generation", "Training", "compare_generation", "compare_training", "open_client"]

VICTIM_SPAN = Span(3, 6)
PROMPT = "The function returns a"
TRAINING_TEXT = "Peers come and go, and the sentence goes on as if nothing had happened."
NUM_PROMPT_TOKENS = 4
LEARNING_RATE = 0.05
SEED = 0
TOLERANCE = 1e-5  # of losses; requests of another shape may sum in another order


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One text, written twice.

    Attributes:
        before, after: what was written before and after the peer was killed.
        killed: the killed hop, as ``"3:6 77be10"``; empty if the text was too short for it.
    """

    before: str
    after: str
    reference_text: str
    is_identical: bool
    killed: str
    killed_pid: int
    route_before: list[str]
    stats: ClientStats
    watch: StopWatch

    @property
    def text(self) -> str:
        return self.before + self.after


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """Losses of the same steps through the swarm and in this process."""

    losses: list[float]
    losses_local: list[float]

    @property
    def is_close(self) -> bool:
        return torch.allclose(
            torch.tensor(self.losses), torch.tensor(self.losses_local), rtol=TOLERANCE, atol=TOLERANCE
        )


def open_client(swarm: LocalSwarm) -> TextModel:
    """A client that knows the swarm's tracker only."""
    torch.set_num_threads(1)
    sources = Sources(trackers=tuple(swarm.trackers), peers=(), mdns=False)
    return TextModel.open(Source(model=BUILT_IN, sources=sources, dtype="float32", wait_s=10.0))


def load_reference() -> PreTrainedModel:
    """The whole model, here, ready to evaluate."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(built_in_path(), dtype=torch.float32)
    return model


def compare_generation(swarm: LocalSwarm, client: TextModel, *, max_new_tokens: int) -> Generation:
    """Write a text through the swarm, killing a peer after a third of it, and once more here."""
    killer = _Killer(swarm, client, at_token=max(1, max_new_tokens // 3))
    sampling = Sampling(max_new_tokens=max_new_tokens)
    watch = StopWatch()
    ids = client.tokenizer(PROMPT)["input_ids"]
    # An early end would spare the victim.
    new = client.generate(
        ids, sampling, write=lambda part: None, watch=watch, on_step=killer.on_step, min_new_tokens=max_new_tokens
    )
    stats = client.stats()
    inputs = torch.tensor([ids])
    reference = (
        load_reference()
        .generate(  # type: ignore[operator]
            inputs, attention_mask=torch.ones_like(inputs), min_new_tokens=max_new_tokens, **sampling.arguments()
        )[0, len(ids) :]
        .tolist()
    )
    text = client.decode(new)
    before = client.decode(new[: killer.at_token]) if killer.killed else text
    return Generation(
        before=before,
        after=text[len(before) :],
        reference_text=client.decode(reference),
        is_identical=new == reference,
        killed=killer.killed,
        killed_pid=killer.killed_pid,
        route_before=killer.route_before,
        stats=stats,
        watch=watch,
    )


def compare_training(client: TextModel, *, num_steps: int) -> Training:
    """Tune a soft prompt for some steps through the swarm, and here."""
    ids = torch.tensor([client.tokenizer(TRAINING_TEXT)["input_ids"]])
    return Training(
        losses=_train_prompt(client.model, ids, num_steps), losses_local=_train_prompt(load_reference(), ids, num_steps)
    )


class _Killer:
    """Kills the peer of the middle hop once the text has come so far."""

    def __init__(self, swarm: LocalSwarm, client: TextModel, *, at_token: int) -> None:
        self.at_token = at_token
        self.killed = ""
        self.killed_pid = 0
        self.route_before: list[str] = []
        self._swarm = swarm
        self._client = client

    def on_step(self, num_new_tokens: int) -> None:
        if num_new_tokens != self.at_token:
            return
        route = self._client.stats().route
        self.route_before = output.describe_route(route)
        hop = next(hop for hop in route if hop.span.start in VICTIM_SPAN)
        victim = next((peer for peer in self._swarm.peers if peer.peer_id == hop.peer_id), None)
        if victim is None:
            raise RemoteModulesError(f"peer '{short_id(hop.peer_id)}' of the route is none of this demonstration's")
        self.killed, self.killed_pid = f"{hop.span} {short_id(hop.peer_id)}", victim.pid
        victim.kill()


def _train_prompt(model: PreTrainedModel, ids: torch.Tensor, num_steps: int) -> list[float]:
    """Losses of AdamW steps on a prompt ``[1, P, D]`` before the embeddings of ``ids`` ``[1, T]``, the model frozen."""
    model.requires_grad_(False)
    embeddings = model.get_input_embeddings()(ids)
    generator = torch.Generator().manual_seed(SEED)
    shape = (1, NUM_PROMPT_TOKENS, embeddings.shape[-1])
    prompt = torch.nn.Parameter(0.02 * torch.randn(shape, generator=generator))
    labels = torch.cat([torch.full((1, NUM_PROMPT_TOKENS), -100), ids], dim=1)  # -100: no loss on the prompt itself
    optimizer = torch.optim.AdamW([prompt], lr=LEARNING_RATE)
    losses = []
    for _ in range(num_steps):
        loss = model(inputs_embeds=torch.cat([prompt, embeddings], dim=1), labels=labels).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses
