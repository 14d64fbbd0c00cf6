"""Deep prompts at remote blocks; the oracle is a local model whose blocks have hooks that add the same vectors."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from remote_modules import DeepPrompts, RemoteSequential, UnsupportedCallError
from remote_modules.testing import LocalSwarm
from remote_modules.testing.inline_swarm import InlineSwarm

from .conftest import SPANS, adapted, assert_equal, crash, gradients, layers_of, logits, lora, table, train_step, whole

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

NUM_TOKENS = 4


class LocalPrompts(nn.Module):
    """What `DeepPrompts` does, by hooks on blocks that are here."""

    def __init__(self, blocks: Any, num_tokens: int = NUM_TOKENS, start: int = 0) -> None:
        super().__init__()
        size = blocks[0].hidden_size
        self.prompts = nn.ParameterList([nn.Parameter(torch.zeros(num_tokens, size)) for _ in blocks])
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(self.hook(number, start + number), with_kwargs=True)

    def hook(self, number: int, layer: int) -> Any:
        def add(block: nn.Module, args: Any, kwargs: Any) -> Any:
            cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
            position = 0 if cache is None else cache.get_seq_length(layer)
            part = self.prompts[number][position : position + args[0].shape[1]].to(args[0].dtype)
            count = len(part)
            return (torch.cat([args[0][:, :count] + part, args[0][:, count:]], dim=1), *args[1:]), kwargs

        return add


def fill(*prompts: nn.Module, seed: int = 4) -> None:
    """With the same random numbers."""
    for one in prompts:
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in one.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.3)


def frozen(model: PreTrainedModel) -> Any:
    model.requires_grad_(False)
    return model


@pytest.fixture
def pair(swarm: InlineSwarm, local: PreTrainedModel) -> tuple[Any, Any]:
    """Models with equal prompts, remote and local."""
    remote, oracle = frozen(swarm.load()), frozen(local)
    remote.prompts, oracle.prompts = DeepPrompts(remote.model.layers, NUM_TOKENS), LocalPrompts(oracle.model.layers)
    fill(remote.prompts, oracle.prompts)
    return remote, oracle


def grads(model: Any) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model.prompts.parameters()]


def loss_of(model: nn.Module, **kwargs: Any) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=table.prompt(), labels=table.prompt(), **kwargs).loss
    return loss


def test_they_begin_as_the_model_itself(swarm: InlineSwarm, local: PreTrainedModel) -> None:
    remote = swarm.load()
    DeepPrompts(remote.model.layers, NUM_TOKENS)
    assert torch.equal(logits(remote), logits(local))


def test_training_is_that_of_hooks_on_local_blocks(pair: tuple[Any, Any]) -> None:
    found: list[list[Any]] = []
    for model in pair:
        optimizer = torch.optim.AdamW(model.prompts.parameters(), lr=1e-2)
        seen: list[Any] = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            seen += [loss.detach(), *grads(model)]
            optimizer.step()
        found.append(seen)
    assert all(map(torch.equal, *found))
    assert all(grad.abs().max() > 0 for grad in grads(pair[0]))
    assert found[0][0] != found[0][5]  # the losses of two steps


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
def test_with_input_prompts_and_adapters_of_peft(swarm: InlineSwarm, local: PreTrainedModel) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=NUM_TOKENS)
    models: list[Any] = [adapted(swarm.load(), config), adapted(local, config)]
    models[0].prompts = DeepPrompts(layers_of(models[0]), NUM_TOKENS)
    models[1].prompts = LocalPrompts(layers_of(models[1]))
    fill(*(model.prompts for model in models))
    for model in models:
        loss_of(model).backward()
    assert all(map(torch.equal, grads(models[0]), grads(models[1])))
    inputs = [model.get_parameter("prompt_encoder.default.embedding.weight").grad for model in models]
    assert torch.equal(*inputs)
    assert inputs[0].abs().max() > 0
    assert torch.equal(*(table.generated(model) for model in models))


def test_with_lora_in_the_same_blocks(swarm: InlineSwarm, local: PreTrainedModel) -> None:
    models: list[Any] = [adapted(swarm.load(), lora()), adapted(local, lora())]
    models[0].prompts = DeepPrompts(layers_of(models[0]), NUM_TOKENS)
    models[1].prompts = LocalPrompts(layers_of(models[1]))
    fill(*(model.prompts for model in models))
    results = [train_step(model) for model in models]
    ours, theirs = ({n: g for n, g in found.items() if "prompt" not in n} for _, found in results)
    assert_equal((results[0][0], ours), (results[1][0], theirs))
    assert all(map(torch.equal, grads(models[0]), grads(models[1])))


def test_generation_is_that_of_the_local_model(pair: tuple[Any, Any]) -> None:
    assert torch.equal(*(table.generated(model) for model in pair))
    assert torch.equal(*(table.generated(model, num_beams=3) for model in pair))
    assert not torch.equal(logits(pair[0]), logits(frozen(copy.deepcopy(pair[0])), tokens=table.prompt() + 1))


@pytest.mark.parametrize("pieces", [(2, 1, 1, 3), (3, 4), (1, 1, 1, 1, 1), (4, 3)])
def test_only_the_first_positions_are_prompted_however_the_text_is_cut(
    pair: tuple[Any, Any], pieces: tuple[int, ...]
) -> None:
    tokens = table.prompt(num_tokens=sum(pieces))
    outputs: list[list[torch.Tensor]] = []
    for model in pair:
        cache, start, seen = DynamicCache(), 0, []
        for piece in pieces:
            seen.append(logits(model, tokens[:, start : start + piece], past_key_values=cache, use_cache=True))
            start += piece
        outputs.append(seen)
    assert all(map(torch.equal, *outputs))
    whole_text = logits(pair[0], tokens)
    torch.testing.assert_close(torch.cat(outputs[0], dim=1), whole_text, rtol=1e-4, atol=1e-4)


def test_after_going_back_the_first_positions_are_prompted_again(pair: tuple[Any, Any]) -> None:
    outputs = []
    for model in pair:
        cache = DynamicCache()
        logits(model, table.prompt(num_tokens=6), past_key_values=cache, use_cache=True)
        cache.crop(-4)
        outputs.append(logits(model, table.prompt(num_tokens=3) + 1, past_key_values=cache, use_cache=True))
    assert torch.equal(*outputs)


def test_positions_are_those_of_the_tensor_with_padding_at_the_left(pair: tuple[Any, Any]) -> None:
    tokens = table.prompt()
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    assert torch.equal(*(logits(model, tokens, attention_mask=mask) for model in pair))


def test_peers_lost_in_training(doubled: InlineSwarm, local: PreTrainedModel) -> None:
    remote, oracle = frozen(doubled.load()), frozen(local)
    remote.prompts, oracle.prompts = DeepPrompts(remote.model.layers, NUM_TOKENS), LocalPrompts(oracle.model.layers)
    fill(remote.prompts, oracle.prompts)
    losses = [loss_of(model) for model in (remote, oracle)]
    route = remote.model.layers.stats().route
    for hop in route:
        crash(doubled, hop.peer_id)
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    assert all(map(torch.equal, grads(remote), grads(oracle)))
    assert remote.model.layers.stats().reroutes == len(route) == len(SPANS)


@pytest.mark.parametrize("pieces", [(2, 3), (6, 1)])
def test_peer_lost_in_a_generation(doubled: InlineSwarm, local: PreTrainedModel, pieces: tuple[int, int]) -> None:
    """The history that is replayed holds what entered the hop, without the prompts of its own blocks."""
    remote, oracle = frozen(doubled.load()), frozen(local)
    remote.prompts, oracle.prompts = DeepPrompts(remote.model.layers, NUM_TOKENS), LocalPrompts(oracle.model.layers)
    fill(remote.prompts, oracle.prompts)
    first, second = table.prompt(num_tokens=sum(pieces)).split(pieces, dim=1)
    outputs = []
    for model in (remote, oracle):
        cache = DynamicCache()
        logits(model, first, past_key_values=cache, use_cache=True)
        if model is remote:
            crash(doubled, remote.model.layers.stats().route[1].peer_id)
        outputs.append(logits(model, second, past_key_values=cache, use_cache=True))
    assert remote.model.layers.stats().failovers >= 1
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)  # replay feeds the same tokens in other portions


def test_unchanged_prompts_travel_once(pair: tuple[Any, Any]) -> None:
    remote, _ = pair
    stats = remote.model.layers.stats
    sent = [stats().bytes_sent]
    for change in (False, False, True):
        if change:
            fill(remote.prompts, seed=5)
        logits(remote)
        sent.append(stats().bytes_sent)
    first, again, changed = (after - before for before, after in zip(sent, sent[1:], strict=False))
    size = sum(parameter.nbytes for parameter in remote.prompts.parameters())
    assert first - again > size
    assert changed - again > size


def test_slices_have_the_prompts_of_their_blocks(pair: tuple[Any, Any], swarm: InlineSwarm) -> None:
    remote, _ = pair
    layers = remote.model.layers
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    parts = layers[2:](layers[:2](hidden))
    assert torch.equal(parts, layers(hidden))
    assert not torch.equal(parts, swarm.layers()(hidden))
    some = swarm.layers()
    prompts = DeepPrompts(some[1:3], NUM_TOKENS)
    assert len(list(prompts.parameters())) == 2
    assert [name for name, _ in some.named_parameters()] == ["1.deep_prompt.weight", "2.deep_prompt.weight"]


def test_sessions_of_ones_own_have_them_too(pair: tuple[Any, Any], swarm: InlineSwarm) -> None:
    layers = pair[0].model.layers
    hidden = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
    with layers.session() as session, torch.no_grad():
        parts = [session.step(part) for part in hidden.split((3, 2, 1), dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), layers(hidden), rtol=1e-4, atol=1e-4)
    with swarm.layers().session() as session:
        assert not torch.equal(session.step(hidden[:, :3]), parts[0])


def test_copies_files_and_removal(pair: tuple[Any, Any], tmp_path: Path, checkpoint: Path) -> None:
    remote, oracle = pair
    twin = copy.deepcopy(remote)
    fresh = DeepPrompts(RemoteSequential(remote.model.layers._handle, remote.model.layers.blocks), NUM_TOKENS)
    fresh.load_state_dict(remote.prompts.state_dict())
    assert all(map(torch.equal, fresh.parameters(), remote.prompts.parameters()))
    remote.prompts.remove()
    remote.prompts.remove()
    base = logits(whole(checkpoint))
    assert torch.equal(logits(remote), base)
    assert torch.equal(logits(twin), logits(oracle))
    assert not torch.equal(logits(twin), base)
    DeepPrompts(remote.model.layers, 1)


def test_wrong_use_is_refused_by_name(pair: tuple[Any, Any]) -> None:
    layers = pair[0].model.layers
    with pytest.raises(ValueError, match="block 0 has a deep prompt already"):
        DeepPrompts(layers, 2)
    with pytest.raises(ValueError, match="num_tokens must be positive, got 0"):
        DeepPrompts(layers, 0)
    other: Any = SimpleNamespace(hidden_size=8, hidden_dims=("2", "B", "T", "1H"))
    with pytest.raises(UnsupportedCallError, match=r"need hidden states \[B, T, D\]"):
        DeepPrompts(other, 2)


def test_over_sockets_with_a_killed_peer(checkpoint: Path, local: PreTrainedModel) -> None:
    oracle: Any = frozen(local)
    oracle.prompts = LocalPrompts(oracle.model.layers)
    with LocalSwarm(checkpoint, spans=["0:2", "2:4", "2:4"], mode="thread") as swarm:
        model: Any = frozen(whole(checkpoint))
        with RemoteSequential.from_swarm(checkpoint, trackers=swarm.trackers, mdns=False) as layers:
            model.model.layers = layers
            model.prompts = DeepPrompts(layers, NUM_TOKENS)
            losses: list[list[float]] = []
            for one in (model, oracle):
                optimizer = torch.optim.AdamW(one.prompts.parameters(), lr=1e-2)
                seen = []
                for step in range(4):
                    if one is model and step == 2:
                        lost = layers.stats().route[1].peer_id
                        next(peer for peer in swarm.peers if peer.peer_id == lost).kill()
                    optimizer.zero_grad()
                    loss = loss_of(one)
                    loss.backward()
                    optimizer.step()
                    seen.append(loss.item())
                losses.append(seen)
            assert layers.stats().failovers >= 1
            assert losses[0] == losses[1]
            assert all(map(torch.equal, model.prompts.parameters(), oracle.prompts.parameters()))
            assert gradients(model).keys() != {}
