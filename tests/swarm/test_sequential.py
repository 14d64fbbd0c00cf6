"""The public API as its users call it, over sockets, against the same blocks held here."""

from __future__ import annotations

import copy
import gc
import shutil
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from tiny_models import load_whole
from torch import nn
from transformers import DynamicCache, LlamaModel, PreTrainedConfig, PreTrainedModel

from remote_modules import (
    ClientConfig,
    InferenceSession,
    RemoteModulesError,
    RemoteSequential,
    SessionError,
    UnsupportedCallError,
    load,
)
from remote_modules.model.head import Int8Head
from remote_modules.testing import LocalSwarm

from .conftest import (
    HIDDEN_SIZE,
    NUM_BLOCKS,
    Connect,
    assert_rebuilt,
    cached,
    generate,
    grad_of,
    local_blocks,
    noise,
    poll,
    prompt,
    run_locally,
    with_blocks,
)

SPANS = ["0:3", "3:6", "6:8"]


def logits(model: PreTrainedModel, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    output: torch.Tensor = model(tokens, **kwargs).logits
    return output


def step_locally(owner: PreTrainedModel, cache: DynamicCache, hidden: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = owner(inputs_embeds=hidden, cache=cache, use_cache=True).last_hidden_state
    return output


def metric(swarm: LocalSwarm, name: str) -> list[float]:
    """One of the numbers under ``/metrics``, of each peer."""
    values = []
    for peer in swarm.peers:
        with urllib.request.urlopen(f"http://{peer.address}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        values += [float(line.split()[1]) for line in lines if line.startswith(f"{name} ")]
    return values


def holds_nothing(swarm: LocalSwarm) -> bool:
    return not any(metric(swarm, "remote_modules_sessions") + metric(swarm, "remote_modules_kv_bytes"))


# ------------------------------------------------------------------------------------- making and placing


def test_blocks_by_folder_config_or_model_are_the_same(
    local: PreTrainedModel, checkpoint: Path, connect: Connect, hidden: torch.Tensor
) -> None:
    expected = run_locally(local, hidden)
    config = PreTrainedConfig.from_pretrained(checkpoint)
    for model in (checkpoint, str(checkpoint), type(local.config).from_pretrained(checkpoint), local):
        layers = connect(model)
        assert torch.equal(layers(hidden), expected)
        assert len(layers) == NUM_BLOCKS
        assert layers.blocks.end == config.num_hidden_layers


def test_plain_assignment_to_a_stock_model_gives_equal_logits(
    model: PreTrainedModel, local: PreTrainedModel, layers: RemoteSequential
) -> None:
    tokens = prompt(9, rows=3)
    assert torch.equal(logits(model, tokens), logits(local, tokens))
    assert torch.equal(logits(model, tokens, use_cache=False), logits(local, tokens, use_cache=False))
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    assert torch.equal(logits(model, tokens, attention_mask=mask), logits(local, tokens, attention_mask=mask))
    positions = torch.arange(9).unsqueeze(0) * 2
    assert torch.equal(logits(model, tokens, position_ids=positions), logits(local, tokens, position_ids=positions))
    assert layers.stats().failovers == 0


def test_generate_on_an_assigned_model_gives_equal_tokens(model: PreTrainedModel, local: PreTrainedModel) -> None:
    tokens = prompt(rows=2)
    assert torch.equal(generate(model, tokens), generate(local, tokens))
    beams: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(generate(model, tokens, **beams), generate(local, tokens, **beams))


def test_attach_finds_the_list_by_itself(local: PreTrainedModel, layers: RemoteSequential) -> None:
    model = copy.deepcopy(local)
    assert layers.attach(model) is model
    assert model.model.layers is layers
    assert torch.equal(logits(model, prompt()), logits(local, prompt()))


def test_attach_to_a_model_of_another_length_is_refused(local: PreTrainedModel, layers: RemoteSequential) -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM has 8 blocks, this list has 3"):
        layers[2:5].attach(copy.deepcopy(local))


def test_load_gives_the_stock_class_without_blocks(swarm: LocalSwarm, checkpoint: Path, local: PreTrainedModel) -> None:
    model = load(checkpoint, trackers=swarm.trackers, mdns=False)
    layers = model.model.layers
    assert isinstance(layers, RemoteSequential)
    with layers:
        assert type(model) is type(local)
        assert not model.training
        assert torch.equal(logits(model, prompt()), logits(local, prompt()))
        assert torch.equal(generate(model, prompt()), generate(local, prompt()))
        whole = {name: tensor for name, tensor in local.state_dict().items() if ".layers." not in name}
        assert set(model.state_dict()) == set(whole)


def test_load_reads_the_hub_cache_that_it_is_told(
    swarm: LocalSwarm, checkpoint: Path, local: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    commit = "0" * 40
    root = tmp_path / "models--org--tiny"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    shutil.copytree(checkpoint, root / "snapshots" / commit)
    model = load("org/tiny", trackers=swarm.trackers, mdns=False, cache_dir=str(tmp_path))
    layers = model.model.layers
    assert isinstance(layers, RemoteSequential)
    with layers:
        assert torch.equal(logits(model, prompt()), logits(local, prompt()))


def test_load_passes_dtype_on(swarm: LocalSwarm, checkpoint: Path) -> None:
    model = load(checkpoint, trackers=swarm.trackers, mdns=False, dtype=torch.bfloat16)
    with model.model.layers:
        assert model.dtype is torch.bfloat16
        assert logits(model, prompt()).dtype is torch.bfloat16


def test_load_takes_a_head_with_int8_weights(swarm: LocalSwarm, checkpoint: Path) -> None:
    outputs = []
    for head in (None, "int8"):
        model = load(checkpoint, trackers=swarm.trackers, mdns=False, dtype=torch.bfloat16, head=head)
        with model.model.layers:
            outputs.append(generate(model, prompt()))
    assert isinstance(model.lm_head, Int8Head)
    assert torch.equal(*outputs)


def test_head_that_the_model_cannot_have_is_refused(swarm: LocalSwarm, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="head must be one of remote, int8, got 'int2'"):
        load(checkpoint, trackers=swarm.trackers, mdns=False, head="int2")
    with pytest.raises(ValueError, match="is for bfloat16 weights on the CPU"):
        load(checkpoint, trackers=swarm.trackers, mdns=False, dtype=torch.float32, head="int8")


def test_state_dict_has_no_block_weights(model: PreTrainedModel, layers: RemoteSequential) -> None:
    assert not [name for name in model.state_dict() if "layers" in name]
    assert not list(layers.parameters())
    assert not list(layers.buffers())


def test_unknown_keyword_is_a_type_error(swarm: LocalSwarm, checkpoint: Path, layers: RemoteSequential) -> None:
    where: dict[str, Any] = {"trackers": swarm.trackers, "mdns": False}
    with pytest.raises(TypeError, match="bogus"):
        RemoteSequential.from_swarm(checkpoint, **where, bogus=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="bogus"):
        load(checkpoint, **where, bogus=1)
    with pytest.raises(TypeError, match="bogus"):
        layers(noise(1, 2), bogus=1)
    with pytest.raises(TypeError, match="bogus"):
        ClientConfig(bogus=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="positional"):
        RemoteSequential.from_swarm(checkpoint, swarm.trackers)  # type: ignore[call-arg]


# ------------------------------------------------------------------------------------- as a list


def test_list_has_one_proxy_for_each_block(layers: RemoteSequential) -> None:
    assert len(layers) == NUM_BLOCKS
    assert [block is layers[index] for index, block in enumerate(layers)] == [True] * NUM_BLOCKS
    assert layers[-1] is layers[NUM_BLOCKS - 1]
    assert [type(block).__name__ for block in layers] == ["LlamaDecoderLayer"] * NUM_BLOCKS
    assert list(layers.parameters()) == []
    assert repr(layers).startswith("RemoteSequential(0:8 of ")
    with pytest.raises(IndexError):
        layers[NUM_BLOCKS]


def test_slice_runs_its_blocks_with_gradient(
    local: PreTrainedModel, layers: RemoteSequential, hidden: torch.Tensor
) -> None:
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    output, expected = layers[2:5](ours), run_locally(local, theirs, 2, 5)
    assert torch.equal(output, expected)
    weights = noise(*hidden.shape[:2], seed=1)
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.equal(grad_of(ours), grad_of(theirs))


def test_slices_are_contiguous_and_nest(local: PreTrainedModel, layers: RemoteSequential, hidden: torch.Tensor) -> None:
    assert layers[:] is layers
    assert str(layers[2:][1:3].blocks) == "3:5"
    assert torch.equal(layers[-2:](hidden), run_locally(local, hidden, 6, 8))
    for wrong in (slice(None, None, 2), slice(3, 3), slice(None, None, -1)):
        with pytest.raises(ValueError, match="contiguous and not empty"):
            layers[wrong]


def test_slices_share_the_connection(layers: RemoteSequential, hidden: torch.Tensor) -> None:
    layers[0:2](hidden)
    layers[5:8](hidden)
    assert layers.stats().steps == layers[1:3].stats().steps == 2


def test_iteration_outside_of_an_owner_runs_block_by_block(
    local: PreTrainedModel, layers: RemoteSequential, hidden: torch.Tensor
) -> None:
    states = hidden
    for number, block in enumerate(layers, start=1):
        states = block(states)
        assert torch.equal(states, run_locally(local, hidden, 0, number))
    assert layers.stats().steps == NUM_BLOCKS


def test_mask_and_positions_reach_blocks_called_alone(
    local: PreTrainedModel, layers: RemoteSequential, hidden: torch.Tensor
) -> None:
    mask = torch.ones(hidden.shape[:2], dtype=torch.int64)
    mask[0, :3] = 0
    positions = torch.arange(hidden.shape[1]).unsqueeze(0) + 5
    output = layers(hidden, attention_mask=mask, position_ids=positions)
    assert torch.equal(output, run_locally(local, hidden, attention_mask=mask, position_ids=positions))


@pytest.mark.parametrize(("start", "end"), [(0, 3), (2, 6), (7, 8), (1, None)])
def test_local_and_remote_blocks_mix_exactly(
    local: PreTrainedModel, connect: Connect, start: int, end: int | None
) -> None:
    model = copy.deepcopy(local)
    layers = connect(model, start=start, end=end)
    model.model.layers = layers
    tokens = prompt(rows=2)
    assert torch.equal(logits(model, tokens), logits(local, tokens))
    assert torch.equal(generate(model, tokens, num_beams=2), generate(local, tokens, num_beams=2))
    model.zero_grad()
    logits(model, tokens).sum().backward()
    reference = copy.deepcopy(local)
    logits(reference, tokens).sum().backward()
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(grad_of(parameter), grad_of(expected[name])), name


def test_part_of_a_folder_is_a_list_of_those_blocks(
    local: PreTrainedModel, connect: Connect, hidden: torch.Tensor
) -> None:
    layers = connect(start=2, end=6)
    assert len(layers) == 4
    assert str(layers.blocks) == "2:6"
    assert torch.equal(layers(hidden), run_locally(local, hidden, 2, 6))
    assert torch.equal(layers[1:3](hidden), run_locally(local, hidden, 3, 5))
    assert torch.equal(layers[0](hidden), run_locally(local, hidden, 2, 3))


# ------------------------------------------------------------------------------------- sessions


def test_session_steps_equal_a_local_cache(local: PreTrainedModel, layers: RemoteSequential) -> None:
    owner, cache = local_blocks(local), DynamicCache(config=local.config)
    with layers.session(max_tokens=16) as session:
        assert isinstance(session, InferenceSession)
        for number, num_tokens in enumerate((5, 1, 1, 3, 1)):
            chunk = noise(2, num_tokens, seed=number)
            assert torch.equal(session.step(chunk), step_locally(owner, cache, chunk))
            assert session.position == cache.get_seq_length()


def test_session_goes_on_after_a_rollback(local: PreTrainedModel, layers: RemoteSequential) -> None:
    owner, cache = local_blocks(local), DynamicCache(config=local.config)
    first, second, third = noise(2, 5), noise(2, 4, seed=1), noise(2, 2, seed=2)
    with layers.session() as session:
        for chunk in (first, second):
            session.step(chunk)
            step_locally(owner, cache, chunk)
        session.rollback(6)
        cache.crop(-3)
        assert session.position == cache.get_seq_length() == 6
        assert torch.equal(session.step(third), step_locally(owner, cache, third))
        session.rollback(0)
        assert torch.equal(session.step(third[:1]), step_locally(owner, DynamicCache(), third[:1]))


def test_full_session_says_what_to_do(layers: RemoteSequential) -> None:
    with layers.session(max_tokens=6) as session:
        session.step(noise(1, 5))
        with pytest.raises(SessionError) as caught:
            session.step(noise(1, 2))
        assert str(caught.value) == (
            "session is full: 5 of 6 tokens used, step needs 2; open a session with larger max_tokens"
        )
        session.step(noise(1, 1))
        assert session.position == 6


def test_closed_session_is_refused_and_frees_its_memory(swarm: LocalSwarm, layers: RemoteSequential) -> None:
    session = layers.session()
    session.step(noise(1, 2))
    assert all(metric(swarm, "remote_modules_kv_bytes"))
    session.close()
    session.close()
    poll(lambda: holds_nothing(swarm), "peers freed the session")
    with pytest.raises(SessionError, match="session is closed"):
        session.step(noise(1, 1))


def test_session_of_a_slice_runs_its_blocks(local: PreTrainedModel, layers: RemoteSequential) -> None:
    with layers[2:5].session() as session:
        assert torch.equal(session.step(noise(1, 4)), run_locally(local, noise(1, 4), 2, 5))
    assert [str(hop.span) for hop in layers.stats().route] == ["2:3", "3:5"]


# ------------------------------------------------------------------------------------- transformers' cache


def test_returned_cache_goes_on_in_a_second_call(model: PreTrainedModel, local: PreTrainedModel) -> None:
    tokens, more = prompt(rows=2), prompt(3, rows=2, seed=1)
    with torch.no_grad():
        ours, theirs = model(tokens, use_cache=True), local(tokens, use_cache=True)
        assert ours.past_key_values.get_seq_length() == 6
        again = model(more, **cached(ours.past_key_values))
        assert torch.equal(again.logits, logits(local, more, **cached(theirs.past_key_values)))


def test_cache_returned_in_grad_mode_goes_on_from_history(
    swarm: LocalSwarm, model: PreTrainedModel, local: PreTrainedModel
) -> None:
    model.requires_grad_(False)
    tokens, more = prompt(rows=2), prompt(3, rows=2, seed=1)
    ours, theirs = model(tokens, use_cache=True), local(tokens, use_cache=True)
    assert torch.equal(ours.logits, theirs.logits)
    assert ours.past_key_values.get_seq_length() == 6
    poll(lambda: holds_nothing(swarm), "nothing is opened: most callers drop it")
    again = model(more, **cached(ours.past_key_values))
    assert_rebuilt(again.logits, logits(local, more, **cached(theirs.past_key_values)))
    assert all(metric(swarm, "remote_modules_kv_bytes"))


def test_cache_of_a_training_call_goes_on_without_grad_only(model: PreTrainedModel, local: PreTrainedModel) -> None:
    tokens, more = prompt(rows=2), prompt(3, rows=2, seed=1)
    ours, theirs = model(tokens, use_cache=True), local(tokens, use_cache=True)
    with pytest.raises(UnsupportedCallError, match="made by a training call; go on from it under torch.no_grad"):
        model(more, **cached(ours.past_key_values))
    with torch.no_grad():
        again = model(more, **cached(ours.past_key_values))
        assert_rebuilt(again.logits, logits(local, more, **cached(theirs.past_key_values)))


def test_use_cache_false_opens_nothing(swarm: LocalSwarm, model: PreTrainedModel) -> None:
    poll(lambda: holds_nothing(swarm), "earlier sessions are gone")
    with torch.no_grad():
        assert model(prompt(), use_cache=False).past_key_values is None
    assert holds_nothing(swarm)


def test_copied_cache_forks_the_session(model: PreTrainedModel, local: PreTrainedModel) -> None:
    one, other = prompt(2, seed=1), prompt(2, seed=2)
    with torch.no_grad():
        ours, theirs = model(prompt(), use_cache=True), local(prompt(), use_cache=True)
        for _ in range(2):
            our_fork, their_fork = copy.deepcopy(ours.past_key_values), copy.deepcopy(theirs.past_key_values)
            our_logits = logits(model, one, **cached(our_fork))
            assert_rebuilt(our_logits, logits(local, one, **cached(their_fork)))
            assert ours.past_key_values.get_seq_length() == 6
        assert torch.equal(
            logits(model, other, **cached(ours.past_key_values)),
            logits(local, other, **cached(theirs.past_key_values)),
        )


def test_dropped_cache_frees_the_memory_of_peers(swarm: LocalSwarm, model: PreTrainedModel) -> None:
    poll(lambda: holds_nothing(swarm), "earlier sessions are gone")
    with torch.no_grad():
        output = model(prompt(), use_cache=True)
        fork = copy.deepcopy(output.past_key_values)
        model(prompt(1), **cached(fork))
    assert metric(swarm, "remote_modules_sessions") == [2.0, 2.0, 2.0]
    del output
    gc.collect()
    poll(lambda: metric(swarm, "remote_modules_sessions") == [1.0, 1.0, 1.0], "peers freed the first cache")
    del fork
    gc.collect()
    poll(lambda: holds_nothing(swarm), "peers freed the fork")


def test_generate_leaves_nothing_on_peers(swarm: LocalSwarm, model: PreTrainedModel) -> None:
    generate(model, prompt(rows=2))
    gc.collect()
    poll(lambda: holds_nothing(swarm), "peers freed the generation")


def test_interleaved_generations_do_not_mix(model: PreTrainedModel, local: PreTrainedModel) -> None:
    inputs = [prompt(seed=1), prompt(4, seed=2)]
    states: list[tuple[torch.Tensor, Any]] = [(tokens, None) for tokens in inputs]
    outputs = list(inputs)
    with torch.no_grad():
        for _ in range(6):
            for index, (tokens, cache) in enumerate(states):
                output = model(tokens, cache=cache, use_cache=True)
                token = output.logits[:, -1:].argmax(-1)
                states[index] = (token, output.past_key_values)
                outputs[index] = torch.cat([outputs[index], token], dim=1)
    for tokens, output in zip(inputs, outputs, strict=True):
        assert torch.equal(output, generate(local, tokens, 6))


def test_two_threads_generate_at_once(model: PreTrainedModel, local: PreTrainedModel) -> None:
    inputs = [prompt(3 + number, seed=number) for number in range(4)]
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda tokens: generate(model, tokens), inputs))
    for tokens, output in zip(inputs, outputs, strict=True):
        assert torch.equal(output, generate(local, tokens))


# ------------------------------------------------------------------------------------- copies, dtypes


def test_deepcopy_of_the_model_shares_the_swarm(
    model: PreTrainedModel, local: PreTrainedModel, layers: RemoteSequential
) -> None:
    twin = copy.deepcopy(model)
    assert twin.model.layers is not layers
    expected = generate(local, prompt())
    assert torch.equal(generate(twin, prompt()), expected)
    assert torch.equal(generate(model, prompt()), expected)
    assert twin.model.layers.stats() == layers.stats()
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert torch.equal(generate(model, prompt()), expected)


def test_deepcopy_of_mixed_blocks_copies_the_local_ones(local: PreTrainedModel, connect: Connect) -> None:
    model = copy.deepcopy(local)
    model.model.layers = connect(model, start=2, end=6)
    twin = copy.deepcopy(model)
    assert twin.model.layers[0] is not model.model.layers[0]
    assert torch.equal(logits(twin, prompt()), logits(local, prompt()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_moved_dtype_is_what_hops_take_and_give(
    model: PreTrainedModel, local: PreTrainedModel, dtype: torch.dtype
) -> None:
    moved: Any = model
    moved.to(dtype)
    output = logits(model, prompt())
    assert output.dtype is dtype
    with torch.no_grad():
        rest: Any = copy.deepcopy(local)
        rest.to(dtype)
        states = rest.model.embed_tokens(prompt())
        for first, last in ((0, 3), (3, 6), (6, 8)):
            states = run_locally(local, states.float(), first, last).to(dtype)
        expected = rest.lm_head(rest.model.norm(states))
    assert torch.equal(output, expected)


def test_peers_in_bfloat16_equal_a_local_bfloat16_model(checkpoint: Path) -> None:
    half = load_whole(checkpoint, dtype=torch.bfloat16)
    with (
        LocalSwarm(checkpoint, spans=["0:8"], dtype="bfloat16") as swarm,
        RemoteSequential.from_swarm(checkpoint, trackers=swarm.trackers, mdns=False) as layers,
    ):
        model = with_blocks(half, layers)
        assert torch.equal(logits(model, prompt(rows=2)), logits(half, prompt(rows=2)))
        assert torch.equal(generate(model, prompt(rows=2)), generate(half, prompt(rows=2)))


def test_autocast_reaches_the_peers(model: PreTrainedModel, local: PreTrainedModel) -> None:
    tokens = prompt(rows=2)
    plain = logits(local, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = logits(model, tokens), logits(local, tokens)
        with torch.no_grad():
            cached = model(tokens, use_cache=True)
    assert torch.equal(output, expected)
    assert torch.equal(cached.logits, expected)
    assert not torch.equal(expected.float(), plain)


def test_autocast_gradients_equal_the_local_ones(
    local: PreTrainedModel, layers: RemoteSequential, hidden: torch.Tensor
) -> None:
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = layers(ours), run_locally(local, theirs)
    output.sum().backward()
    expected.sum().backward()
    assert torch.equal(grad_of(ours), grad_of(theirs))


# ------------------------------------------------------------------------------------- training


def loss_of(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(tokens, labels=tokens).loss
    return loss


def test_training_steps_equal_local_ones(model: PreTrainedModel, local: PreTrainedModel) -> None:
    """Embeddings, norm and head learn here; gradients are accumulated over two batches."""
    reference = copy.deepcopy(local)
    reference.model.layers.requires_grad_(False)
    pairs = [
        (each, torch.optim.AdamW([p for p in each.parameters() if p.requires_grad])) for each in (model, reference)
    ]
    for step in range(2):
        losses = []
        for each, optimizer in pairs:
            optimizer.zero_grad()
            for batch in range(2):
                loss = loss_of(each, prompt(7, rows=2, seed=2 * step + batch))
                loss.backward()
                losses.append(loss.detach())
            optimizer.step()
        assert torch.equal(losses[0], losses[2])
        assert torch.equal(losses[1], losses[3])
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(grad_of(parameter), grad_of(expected[name])), name
        assert torch.equal(parameter, expected[name]), name


def test_two_backward_calls_are_in_flight_at_once(local: PreTrainedModel, layers: RemoteSequential) -> None:
    inputs = [noise(2, 5, seed=number).requires_grad_() for number in range(4)]
    outputs = [layers(states) for states in inputs]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda output: output.sum().backward(), outputs))
    for states in inputs:
        theirs = states.detach().clone().requires_grad_()
        run_locally(local, theirs).sum().backward()
        assert torch.equal(grad_of(states), grad_of(theirs))


def test_retained_graph_is_run_backward_twice(
    local: PreTrainedModel, layers: RemoteSequential, hidden: torch.Tensor
) -> None:
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    output, expected = layers(ours).sum(), run_locally(local, theirs).sum()
    for total in (output, expected):
        total.backward(retain_graph=True)
        total.backward(retain_graph=True)
    assert torch.equal(grad_of(ours), grad_of(theirs))


def test_inputs_changed_after_the_forward_do_not_change_gradients(
    local: PreTrainedModel, layers: RemoteSequential, hidden: torch.Tensor
) -> None:
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    output, expected = layers(ours), run_locally(local, theirs)
    with torch.no_grad():
        ours.zero_()
    output.sum().backward()
    expected.sum().backward()
    assert torch.equal(grad_of(ours), grad_of(theirs))


def test_double_backward_is_refused(layers: RemoteSequential, hidden: torch.Tensor) -> None:
    hidden.requires_grad_()
    (grad,) = torch.autograd.grad((layers(hidden) ** 2).sum(), hidden, create_graph=True)
    with pytest.raises(UnsupportedCallError, match="double backward .* through remote blocks is not carried"):
        grad.sum().backward()


def test_backward_through_a_cache_step_is_refused_by_name(model: PreTrainedModel) -> None:
    output = model(prompt(), **cached(DynamicCache()))
    with pytest.raises(UnsupportedCallError, match="KV cache is not carried; call the model without a cache to train"):
        output.logits.sum().backward()


# ------------------------------------------------------------------------------------- what is not carried


def test_unsupported_output_is_refused_by_name(model: PreTrainedModel, local: PreTrainedModel) -> None:
    with pytest.raises(UnsupportedCallError, match="output_attentions=True is not carried"):
        model(prompt(), output_attentions=True)
    assert torch.equal(logits(model, prompt()), logits(local, prompt()))


@pytest.mark.parametrize("is_in_config", [False, True])
def test_states_of_all_blocks_are_those_of_the_local_model(
    model: PreTrainedModel, local: PreTrainedModel, is_in_config: bool
) -> None:
    kwargs = {} if is_in_config else {"output_hidden_states": True}
    model.config.output_hidden_states = is_in_config
    with torch.no_grad():
        ours = model(prompt(rows=2), **kwargs)
        theirs = local(prompt(rows=2), output_hidden_states=True)
    model.config.output_hidden_states = False
    assert torch.equal(ours.logits, theirs.logits)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == NUM_BLOCKS + 1
    assert all(map(torch.equal, ours.hidden_states, theirs.hidden_states))


def test_four_dimensional_mask_reaches_the_blocks(model: PreTrainedModel, local: PreTrainedModel) -> None:
    mask = torch.zeros(1, 1, 4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), torch.finfo(torch.float32).min)
    mask[..., 3, 1] = torch.finfo(torch.float32).min
    expected = logits(local, prompt(4), attention_mask=mask)
    assert torch.equal(logits(model, prompt(4), attention_mask=mask), expected)
    assert not torch.equal(expected, logits(local, prompt(4)))


def test_locally_filled_cache_goes_on_remotely(model: PreTrainedModel, local: PreTrainedModel) -> None:
    tokens = prompt(rows=2)  # one row of one token rounds by the alignment of the weights, even locally
    with torch.no_grad():
        ours, theirs = (local(tokens, use_cache=True).past_key_values for _ in range(2))
        for step in range(2):
            token = tokens[:, step : step + 1]
            assert torch.equal(model(token, **cached(ours)).logits, local(token, **cached(theirs)).logits)


def test_cache_of_other_remote_blocks_is_refused(
    model: PreTrainedModel, local: PreTrainedModel, connect: Connect
) -> None:
    other = with_blocks(local, connect())
    with torch.no_grad():
        cache = other(prompt(), use_cache=True).past_key_values
        with pytest.raises(UnsupportedCallError, match="belongs to another set of remote blocks"):
            model(prompt(1), **cached(cache))


class Glued(LlamaModel):
    """Works between its blocks."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.embed_tokens(input_ids)
        for block in self.layers:
            states = block(states) * 1.0
        return states


def test_work_between_blocks_is_detected(local: PreTrainedModel, layers: RemoteSequential) -> None:
    config: Any = local.config
    owner = Glued(config)
    owner.layers = layers
    with pytest.raises(UnsupportedCallError, match="changes hidden states between blocks 0 and 1"):
        owner(prompt())


def test_hook_on_a_block_that_changes_its_output_is_detected(model: PreTrainedModel) -> None:
    handle = model.model.layers[3].register_forward_hook(lambda block, args, output: output + 1)
    with pytest.raises(UnsupportedCallError, match="between blocks 3 and 4"):
        model(prompt())
    handle.remove()
    model(prompt())


def test_plain_module_list_of_proxies_is_no_owner(
    local: PreTrainedModel, layers: RemoteSequential, hidden: torch.Tensor
) -> None:
    """Proxies placed elsewhere than in a transformers model run at once."""
    stack = nn.Sequential(*layers)
    assert torch.equal(stack(hidden), run_locally(local, hidden))


# ------------------------------------------------------------------------------------- stats, closing


def test_stats_tell_route_bytes_and_waterfall(layers: RemoteSequential, swarm: LocalSwarm) -> None:
    assert layers.stats().route == ()
    layers(noise(2, 5))
    with layers.session() as session:
        session.step(noise(1, 4))
        session.step(noise(1, 1))
    stats = layers.stats()
    assert stats.steps == 3
    assert (stats.failovers, stats.reroutes, stats.replayed_tokens, stats.stall_seconds) == (0, 0, 0, 0.0)
    assert [(hop.peer_id, str(hop.span)) for hop in stats.route] == [(p.peer_id, str(p.span)) for p in swarm.peers]
    assert [str(hop.span) for hop in stats.route] == SPANS
    payload = 3 * 4 * HIDDEN_SIZE * (10 + 5)
    assert payload < stats.bytes_sent < payload + 10_000
    assert payload < stats.bytes_received < payload + 10_000
    assert [[timing.num_tokens for timing in step] for step in stats.waterfall] == [[5] * 3, [4] * 3, [1] * 3]
    for step in stats.waterfall:
        assert [str(timing.hop.span) for timing in step] == SPANS
        for timing in step:
            assert timing.compute_s > 0
            assert timing.wire_s >= 0  # the answer of a direct hop may be there when its turn comes
            assert timing.queue_s + timing.compute_s + timing.wire_s == pytest.approx(timing.total_s)
    assert str(stats).startswith("steps=3 failovers=0 replayed_tokens=0 route 0:3 ")


def test_close_is_idempotent_and_later_use_is_a_typed_error(model: PreTrainedModel, layers: RemoteSequential) -> None:
    with torch.no_grad():
        cache = model(prompt(), use_cache=True).past_key_values
    session = layers.session()
    session.step(noise(1, 2))
    part = layers[2:5]
    layers.close()
    layers.close()
    part.close()
    uses: list[Any] = [
        lambda: layers(noise(1, 2)),
        lambda: part(noise(1, 2)),
        lambda: session.step(noise(1, 1)),
        lambda: model(prompt()),
        lambda: generate(model, prompt(1)),
        lambda: model(prompt(1), **cached(cache)),
    ]
    for use in uses:
        with pytest.raises(RemoteModulesError, match="closed; make new ones with from_swarm"):
            use()
    session.close()
    assert layers.stats().steps == 2


def test_closing_frees_the_sockets_of_peers(swarm: LocalSwarm, connect: Connect) -> None:
    poll(lambda: metric(swarm, "remote_modules_connections") == [0.0] * 3, "earlier clients are gone")
    layers = connect()
    layers(noise(1, 2))
    assert metric(swarm, "remote_modules_connections") == [1.0] * 3
    with layers:
        layers(noise(1, 2))
    poll(lambda: metric(swarm, "remote_modules_connections") == [0.0] * 3, "the client is gone")


def test_dropped_client_closes_its_connections(swarm: LocalSwarm, checkpoint: Path) -> None:
    poll(lambda: metric(swarm, "remote_modules_connections") == [0.0] * 3, "earlier clients are gone")
    layers = RemoteSequential.from_swarm(checkpoint, trackers=swarm.trackers, mdns=False)
    layers(noise(1, 2))
    assert metric(swarm, "remote_modules_connections") == [1.0] * 3
    del layers
    gc.collect()
    poll(lambda: metric(swarm, "remote_modules_connections") == [0.0] * 3, "the client is gone")


def test_import_has_no_side_effect() -> None:
    program = """
import sys, threading
import remote_modules
from remote_modules import ClientConfig, NoRouteError, ServerConfig, TrackerConfig
heavy = {"torch", "transformers", "aiohttp", "zeroconf", "huggingface_hub", "safetensors", "asyncio"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert threading.active_count() == 1
import remote_modules.testing
heavy = {"torch", "transformers", "zeroconf"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert threading.active_count() == 1
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
