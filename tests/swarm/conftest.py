"""A random llama of eight blocks, held by a swarm on loopback and, as the oracle, in one piece here."""

from __future__ import annotations

import copy
import functools
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from tiny_models import load_whole, save_tiny
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

from remote_modules import ClientConfig, RemoteSequential
from remote_modules.model.stack import CACHE_ARGUMENTS
from remote_modules.testing import LocalSwarm

NUM_BLOCKS = 8
HIDDEN_SIZE = 64
VOCABULARY = 96
PATIENCE_S = 20.0  # of polls; machines are busy

Connect: TypeAlias = Callable[..., RemoteSequential]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of several shards; not to be changed."""
    return save_tiny(
        tmp_path_factory.mktemp("llama"),
        num_hidden_layers=NUM_BLOCKS,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=96,
        head_dim=16,
        max_position_embeddings=16384,
        eos_token_id=None,  # else a generation ends when it likes
        shard_size="150KB",
    )


@pytest.fixture(scope="session")
def local(checkpoint: Path) -> PreTrainedModel:
    """The oracle; not to be changed."""
    return load_whole(checkpoint)


@pytest.fixture(scope="session")
def swarm(checkpoint: Path) -> Iterator[LocalSwarm]:
    """Three peers that stay up, and soon forget the sessions of tests that failed."""
    with LocalSwarm(checkpoint, spans=["0:3", "3:6", "6:8"], orphan_session_s=1.0) as swarm:
        yield swarm


@pytest.fixture
def connect(swarm: LocalSwarm, checkpoint: Path) -> Iterator[Connect]:
    """Makes clients of `swarm` (or of the trackers given), which are closed afterwards."""
    opened: list[RemoteSequential] = []

    def connect(model: object = None, **kwargs: Any) -> RemoteSequential:
        options: dict[str, Any] = {"trackers": swarm.trackers, "mdns": False, **kwargs}
        layers = RemoteSequential.from_swarm(checkpoint if model is None else model, **options)
        opened.append(layers)
        return layers

    yield connect
    for layers in opened:
        layers.close()


@pytest.fixture
def layers(connect: Connect) -> RemoteSequential:
    return connect()


@pytest.fixture
def model(local: PreTrainedModel, layers: RemoteSequential) -> PreTrainedModel:
    """A stock model with remote blocks."""
    return with_blocks(local, layers)


@pytest.fixture
def hidden() -> torch.Tensor:
    return noise(2, 7)


def with_blocks(local: PreTrainedModel, layers: nn.ModuleList) -> PreTrainedModel:
    """A copy of a stock model that has ``layers`` by plain assignment."""
    model = copy.deepcopy(local)
    model.model.layers = layers
    return model


def local_blocks(local: PreTrainedModel, first: int = 0, last: int = NUM_BLOCKS) -> PreTrainedModel:
    """The owner with some of its blocks and no norm: ``last_hidden_state`` is what leaves the last of them."""
    owner: Any = copy.deepcopy(local.model)
    owner.layers = nn.ModuleList(list(owner.layers)[first:last])
    owner.norm = nn.Identity()
    part: PreTrainedModel = owner
    return part


def run_locally(
    local: PreTrainedModel, hidden: torch.Tensor, first: int = 0, last: int = NUM_BLOCKS, **kwargs: Any
) -> torch.Tensor:
    """What leaves local block ``last - 1`` when ``hidden`` enters block ``first``."""
    output: torch.Tensor = local_blocks(local, first, last)(
        inputs_embeds=hidden, use_cache=False, **kwargs
    ).last_hidden_state
    return output


def noise(rows: int, num_tokens: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, num_tokens, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))


def prompt(num_tokens: int = 6, *, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, num_tokens), generator=torch.Generator().manual_seed(seed))


def generate(model: PreTrainedModel, tokens: torch.Tensor, num_new: int = 8, **kwargs: Any) -> torch.Tensor:
    """Greedy, unless asked otherwise."""
    options = {"max_new_tokens": num_new, "do_sample": False, "pad_token_id": 0, **kwargs}
    generator: Any = model
    output: torch.Tensor = generator.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    return output


def cached(cache: object) -> dict[str, Any]:
    """How a call of the model takes a KV cache, by the name that this release of transformers has for it."""
    parameters = inspect.signature(LlamaForCausalLM.forward).parameters
    return {next(name for name in CACHE_ARGUMENTS if name in parameters): cache}


def grad_of(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad


def assert_rebuilt(output: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal, but for the rounding of the same work done in other portions; another token or mask would differ by 1."""
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def poll(is_true: Callable[[], bool], what: str, *, patience_s: float = PATIENCE_S) -> None:
    """Wait until it holds."""
    deadline_s = time.monotonic() + patience_s
    while not is_true():
        assert time.monotonic() < deadline_s, f"not within {patience_s:.0f} s: {what}"
        time.sleep(0.01)


def banned(layers: RemoteSequential, swarms: Sequence[LocalSwarm]) -> list[str]:
    """Peers that the client of ``layers`` avoids now."""
    client = layers._handle.swarm
    router = client.router
    return [
        f"{peer.span} {peer.peer_id}"
        for swarm in swarms
        for peer in swarm.peers
        if not router.breakers.is_usable(peer.peer_id, router.instance_of(peer.peer_id), now_s=client.clock())
    ]


@contextmanager
def undisturbed(
    model: PreTrainedModel, local: PreTrainedModel, layers: RemoteSequential, swarm: LocalSwarm
) -> Iterator[None]:
    """Whatever goes wrong inside harms nobody: a running generation goes on, no peer is banned, no hop failed."""
    tokens = prompt(rows=2)
    next_logits, generated = _expected(local)
    failovers = layers.stats().failovers
    with torch.no_grad():
        first = model(tokens, use_cache=True)
        yield
        assert not banned(layers, [swarm])
        again = model(tokens[:, :1], **cached(first.past_key_values))
    assert torch.equal(again.logits, next_logits)
    assert torch.equal(generate(model, tokens, 4), generated)
    assert layers.stats().failovers == failovers


@functools.cache
def _expected(local: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = prompt(rows=2)
    with torch.no_grad():
        cache = local(tokens, use_cache=True).past_key_values
        next_logits: torch.Tensor = local(tokens[:, :1], **cached(cache)).logits
    return next_logits, generate(local, tokens, 4)


IMPATIENT = ClientConfig(pass_deadline_s=0.5)
