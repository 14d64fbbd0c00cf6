"""Caches that begin with given keys and values, as prefix tuning makes them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from remote_modules import RemoteSequential, UnsupportedCallError
from remote_modules.model.stack import find_stack
from remote_modules.spans import Span
from remote_modules.testing.inline_swarm import InlineSwarm

from .conftest import SPANS, adapted, assert_equal, crash, gradients, layers_of, table, train_step, whole

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

NUM_BLOCKS = 4
LENGTH = 5


def prefix(*, rows: int = 2, heads: int = 2, lengths: tuple[int, ...] = (LENGTH,) * NUM_BLOCKS) -> DynamicCache:
    """Random keys and values, the same each time."""
    generator = torch.Generator().manual_seed(0)
    cache = DynamicCache()
    for index, length in enumerate(lengths):
        if length:
            keys, values = (torch.randn(rows, heads, length, 8, generator=generator) for _ in "kv")
            cache.update(keys.requires_grad_(), values.requires_grad_(), index)
    return cache


def config() -> PrefixTuningConfig:
    return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)


def mask(num_tokens: int, rows: int = 2) -> torch.Tensor:
    whole_mask = torch.ones(rows, LENGTH + num_tokens, dtype=torch.int64)
    whole_mask[0, LENGTH : LENGTH + 2] = 0  # padding after the prefix
    return whole_mask


def continued(model: PreTrainedModel, cache: DynamicCache, *pieces: int, hook: Any = None) -> list[torch.Tensor]:
    """Logits of successive pieces of a text after ``cache``; ``hook`` is called between them."""
    outputs, start = [], 0
    tokens = table.prompt(num_tokens=sum(pieces))
    with torch.no_grad():
        for number, piece in enumerate(pieces):
            if number and hook is not None:
                hook(model, cache)
            end = start + piece
            output = model(tokens[:, start:end], attention_mask=mask(end), past_key_values=cache, use_cache=True)
            outputs.append(output.logits)
            start = end
    return outputs


def test_generation_goes_on_from_given_keys(swarm: InlineSwarm, local: PreTrainedModel) -> None:
    remote = swarm.load()
    theirs = continued(local, prefix(), 6, 1, 1, 3)
    assert all(map(torch.equal, continued(remote, prefix(), 6, 1, 1, 3), theirs))
    without = local(table.prompt(num_tokens=11)[:, :6]).logits
    assert not torch.equal(theirs[0], without)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beams", "sampling"])
def test_generate_of_transformers(swarm: InlineSwarm, local: PreTrainedModel, options: dict[str, Any]) -> None:
    outputs = []
    for model in (swarm.load(), local):
        torch.manual_seed(0)
        beams = options.get("num_beams", 1)
        tokens: Any = torch.cat([torch.zeros(2, LENGTH, dtype=torch.int64), table.prompt(num_tokens=6)], dim=1)
        given = prefix()
        given.batch_repeat_interleave(beams)
        generator: Any = model
        options = {"do_sample": False, **options}
        outputs.append(
            generator.generate(tokens, attention_mask=mask(6), past_key_values=given, max_new_tokens=6, **options)
        )
    assert torch.equal(*outputs)


def test_operations_between_steps(swarm: InlineSwarm, local: PreTrainedModel) -> None:
    def reorder(model: PreTrainedModel, cache: Any) -> None:
        cache.crop(-1)
        cache.reorder_cache(torch.tensor([1, 1]))
        model(table.prompt(num_tokens=1), attention_mask=mask(cache.get_seq_length() - LENGTH + 1), cache=cache)

    ours, theirs = (continued(model, prefix(), 6, 1, 2, hook=reorder) for model in (swarm.load(), local))
    assert all(map(torch.equal, ours, theirs))


def test_cropped_to_and_into_the_given_keys(swarm: InlineSwarm, local: PreTrainedModel) -> None:
    outputs = []
    for model in (swarm.load(), local):
        cache = prefix()
        lengths = []
        with torch.no_grad():
            for removed in (0, -4, -2):
                cache.crop(removed)
                logits = model(table.prompt(num_tokens=4), past_key_values=cache).logits
                outputs.append(logits)
                lengths.append(cache.get_seq_length())
                if removed == -4:
                    cache.crop(-4)
        assert lengths == [LENGTH + 4, LENGTH + 4, LENGTH + 2]
    assert all(map(torch.equal, outputs[:3], outputs[3:]))


def test_copied_cache_goes_its_own_way(swarm: InlineSwarm, local: PreTrainedModel) -> None:
    outputs = []
    for model in (swarm.load(), local):
        cache = prefix()
        layer: Any
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        with torch.no_grad():
            model(table.prompt(), past_key_values=cache)
            fork = copy.deepcopy(cache)
            first = model(table.prompt()[:, :2], past_key_values=fork).logits
            second = model(table.prompt()[:, 4:6], past_key_values=cache).logits
        outputs.append((first, second))
    torch.testing.assert_close(outputs[0][0], outputs[1][0], rtol=1e-5, atol=1e-5)  # built anew, in other portions
    assert torch.equal(outputs[0][1], outputs[1][1])


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_replacement_of_a_lost_peer_gets_them_too(doubled: InlineSwarm, local: PreTrainedModel, victim: int) -> None:
    layers: Any = None

    def kill(model: Any, cache: DynamicCache) -> None:
        crash(doubled, model.model.layers.stats().route[victim].peer_id)

    remote: Any = doubled.load()
    layers = remote.model.layers
    ours, theirs = continued(remote, prefix(), 1, 1, hook=kill), continued(local, prefix(), 1, 1)
    assert layers.stats().reroutes == 1
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_gradients_of_given_keys(swarm: InlineSwarm, local: PreTrainedModel) -> None:
    outputs = []
    for model in (swarm.load(), local):
        cache = prefix()
        layers: Any = cache.layers
        leaves = [states for layer in layers for states in (layer.keys, layer.values)]
        for leaf in leaves:
            leaf.retain_grad()
        loss: Any = model(table.prompt(), past_key_values=cache, labels=table.prompt()).loss
        loss.backward()
        outputs.append([leaf.grad for leaf in leaves])
    assert all(grad.abs().max() > 0 for grad in outputs[1])
    assert all(map(torch.equal, *outputs))


def test_peers_lost_between_forward_and_backward(doubled: InlineSwarm, local: PreTrainedModel) -> None:
    remote, oracle = adapted(doubled.load(), config()).train(), adapted(local, config()).train()
    expected = train_step(oracle)
    loss = remote(input_ids=table.prompt(), labels=table.prompt()).loss
    layers = layers_of(remote)
    for hop in layers.stats().route:
        crash(doubled, hop.peer_id)
    loss.backward()
    assert_equal((loss.item(), gradients(remote)), expected)
    assert layers.stats().reroutes == len(SPANS)


@pytest.mark.parametrize("blocks", ["0:2", "1:3", "2:4"])
def test_prefix_of_local_and_remote_blocks(
    swarm: InlineSwarm, local: PreTrainedModel, checkpoint: Path, blocks: str
) -> None:
    model: Any = whole(checkpoint)
    own = find_stack(model, model.config).blocks(model)
    model.model.layers = RemoteSequential(swarm.layers()._handle, Span.parse(blocks), local=copy.deepcopy(own))
    remote, oracle = adapted(model, config()).train(), adapted(local, config()).train()
    assert_equal(train_step(remote), train_step(oracle))
    assert all(map(torch.equal, continued(model, prefix(), 4, 1), continued(local, prefix(), 4, 1)))


def test_keys_made_by_a_local_model_go_on_remotely(swarm: InlineSwarm, local: PreTrainedModel) -> None:
    outputs = []
    for model in (swarm.load(), local):
        with torch.no_grad():
            cache = local(table.prompt(), use_cache=True).past_key_values
            outputs.append(model(table.prompt()[:, :3], past_key_values=cache).logits)
    assert torch.equal(*outputs)


def test_training_goes_on_only_without_gradients(swarm: InlineSwarm) -> None:
    remote = swarm.load()
    output: Any = remote(table.prompt(), past_key_values=prefix())
    with pytest.raises(UnsupportedCallError, match="made by a training call; go on from it under torch.no_grad"):
        remote(table.prompt()[:, :1], past_key_values=output.past_key_values)
    with torch.no_grad():
        remote(table.prompt()[:, :1], past_key_values=output.past_key_values)


@pytest.mark.parametrize("grad", [False, True])
def test_keys_of_another_shape_are_refused_by_name(swarm: InlineSwarm, grad: bool) -> None:
    expected = r"the KV cache begins with keys or values of \[2, 1, 5, 8\], but the blocks make \[2, 2, 9, 8\]"
    with torch.set_grad_enabled(grad), pytest.raises(Exception, match=expected):
        swarm.load()(table.prompt(), past_key_values=prefix(heads=1))


@pytest.mark.parametrize("lengths", [(5, 5, 5, 4), (0, 5, 5, 5), (5, 5, 0, 5)])
def test_uneven_caches_are_refused(swarm: InlineSwarm, lengths: tuple[int, ...]) -> None:
    with torch.no_grad(), pytest.raises(UnsupportedCallError, match="the KV cache"):
        swarm.load()(table.prompt(), past_key_values=prefix(lengths=lengths))


def test_keys_beyond_a_sliding_window_are_refused(tmp_path: Path) -> None:
    folder = table.save_family(tmp_path, "gemma2")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad(), InlineSwarm(folder, ["0:4"]) as swarm:
        cache = model(table.prompt(), use_cache=True).past_key_values
        with pytest.raises(UnsupportedCallError, match="or beyond a sliding window; start with an empty one"):
            swarm.load()(table.prompt()[:, :1], past_key_values=cache)
