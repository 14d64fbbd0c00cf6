"""Batches that are cut by rows: the same numbers as the local model's, microbatch by microbatch."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from remote_modules import ClientConfig, RemoteSequential
from remote_modules.errors import LocalProtocolError, UnsupportedCallError

from .conftest import Connect, cached, grad_of, noise, prompt, run_locally, with_blocks

ROWS, NUM_TOKENS = 7, 5
SIZES = (3, 2, 2)  # seven rows of five tokens, at most sixteen tokens in a microbatch
NUM_HOPS = 3


@pytest.fixture
def layers(connect: Connect) -> RemoteSequential:
    return connect(config=ClientConfig(microbatch_tokens=16))


@pytest.fixture
def model(local: PreTrainedModel, layers: RemoteSequential) -> PreTrainedModel:
    return with_blocks(local, layers)


def num_microbatches(layers: RemoteSequential) -> int:
    """Of the last pass."""
    num_requests = len(layers.stats().waterfall[-1])
    assert num_requests % NUM_HOPS == 0
    return num_requests // NUM_HOPS


def in_parts(
    local: PreTrainedModel, inputs: torch.Tensor, sizes: Sequence[int] = SIZES, **per_row: Any
) -> torch.Tensor:
    """The local blocks, called for each microbatch."""
    parts, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        kwargs: dict[str, Any] = {name: tensor[rows] if len(tensor) > 1 else tensor for name, tensor in per_row.items()}
        parts.append(run_locally(local, inputs[rows], **kwargs))
        start += size
    joined: torch.Tensor = torch.cat(parts)
    return joined


def test_cut_batch_has_the_numbers_of_its_microbatches(local: PreTrainedModel, layers: RemoteSequential) -> None:
    ours, theirs, uncut = (noise(ROWS, NUM_TOKENS).requires_grad_() for _ in range(3))
    weights = noise(ROWS, NUM_TOKENS, seed=1)
    output, expected = layers(ours), in_parts(local, theirs)
    assert num_microbatches(layers) == len(SIZES)
    assert torch.equal(output, expected)
    for result, leaf in ((output, ours), (expected, theirs), (run_locally(local, uncut), uncut)):
        (result * weights).sum().backward()
        assert leaf.grad is not None
    assert num_microbatches(layers) == len(SIZES)
    assert torch.equal(grad_of(ours), grad_of(theirs))
    torch.testing.assert_close(grad_of(ours), grad_of(uncut))
    assert layers.stats().steps == 2


def test_small_batch_stays_one_microbatch(connect: Connect, local: PreTrainedModel) -> None:
    layers = connect()
    assert torch.equal(layers(noise(ROWS, NUM_TOKENS)), run_locally(local, noise(ROWS, NUM_TOKENS)))
    assert num_microbatches(layers) == 1


def test_ragged_masks_and_positions_are_cut_with_their_rows(local: PreTrainedModel, layers: RemoteSequential) -> None:
    mask = torch.ones(ROWS, NUM_TOKENS, dtype=torch.int64)
    for row in range(ROWS):
        mask[row, : row % 3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    calls: list[dict[str, Any]] = [
        {"attention_mask": mask, "position_ids": positions},
        {"position_ids": torch.arange(3, 8)[None]},
    ]
    for kwargs in calls:
        output = layers(noise(ROWS, NUM_TOKENS), **kwargs)
        assert num_microbatches(layers) == len(SIZES)
        expected = in_parts(local, noise(ROWS, NUM_TOKENS), **kwargs)
        assert torch.equal(output, expected)


@pytest.mark.parametrize("mask_rows", [1, ROWS])
def test_large_masks_are_cut_or_shared(local: PreTrainedModel, model: PreTrainedModel, mask_rows: int) -> None:
    lowest = torch.finfo(torch.float32).min
    mask = torch.zeros(mask_rows, 1, NUM_TOKENS, NUM_TOKENS)
    mask = mask.masked_fill(torch.ones(NUM_TOKENS, NUM_TOKENS).triu(1).bool(), lowest)
    mask[-1, ..., 3, 1] = lowest
    tokens = prompt(NUM_TOKENS, rows=ROWS)
    output = model(tokens, attention_mask=mask, use_cache=False).logits
    assert num_microbatches(model.model.layers) == len(SIZES)
    torch.testing.assert_close(output, local(tokens, attention_mask=mask, use_cache=False).logits)


def test_accumulated_gradients_equal_those_of_the_microbatches(
    local: PreTrainedModel, layers: RemoteSequential
) -> None:
    ours, theirs = (noise(ROWS, NUM_TOKENS).requires_grad_() for _ in range(2))
    for seed in range(3):
        weights = noise(ROWS, NUM_TOKENS, seed=seed)
        (layers(ours) * weights).sum().backward()
        (in_parts(local, theirs) * weights).sum().backward()
    assert torch.equal(grad_of(ours), grad_of(theirs))


def test_retained_graph_runs_backward_twice(local: PreTrainedModel, layers: RemoteSequential) -> None:
    ours, theirs = (noise(ROWS, NUM_TOKENS).requires_grad_() for _ in range(2))
    for total in (layers(ours).square().sum(), in_parts(local, theirs).square().sum()):
        total.backward(retain_graph=True)
        total.backward()
    assert torch.equal(grad_of(ours), grad_of(theirs))


def test_autocast_reaches_all_microbatches(local: PreTrainedModel, layers: RemoteSequential) -> None:
    ours, theirs = (noise(ROWS, NUM_TOKENS).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = layers(ours), in_parts(local, theirs)
    assert torch.equal(output, expected)
    output.sum().backward()
    expected.sum().backward()
    assert torch.equal(grad_of(ours), grad_of(theirs))


def test_threads_run_forwards_and_backwards_at_the_same_time(local: PreTrainedModel, layers: RemoteSequential) -> None:
    inputs = [noise(ROWS, NUM_TOKENS, seed=number).requires_grad_() for number in range(4)]

    def work(states: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = layers(states)
        output.square().sum().backward()
        return output.detach()

    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(work, inputs))
    for states, output in zip(inputs, outputs, strict=True):
        theirs = states.detach().clone().requires_grad_()
        expected = in_parts(local, theirs)
        expected.square().sum().backward()
        assert torch.equal(output, expected)
        assert torch.equal(grad_of(states), grad_of(theirs))


def test_several_backwards_are_in_flight_at_once(local: PreTrainedModel, layers: RemoteSequential) -> None:
    inputs = [noise(ROWS, NUM_TOKENS, seed=number).requires_grad_() for number in range(3)]
    totals = [layers(states).square().sum() for states in inputs]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(torch.Tensor.backward, totals))
    for states in inputs:
        theirs = states.detach().clone().requires_grad_()
        in_parts(local, theirs).square().sum().backward()
        assert torch.equal(grad_of(states), grad_of(theirs))


def test_double_backward_through_a_cut_batch_is_refused(layers: RemoteSequential) -> None:
    hidden = noise(ROWS, NUM_TOKENS).requires_grad_()
    (grad,) = torch.autograd.grad((layers(hidden) ** 2).sum(), hidden, create_graph=True)
    with pytest.raises(UnsupportedCallError, match="double backward"):
        grad.sum().backward()


def test_batch_beyond_the_limits_of_a_request_is_cut(connect: Connect, local: PreTrainedModel) -> None:
    layers = connect(config=ClientConfig(max_request_bytes=10_000, microbatch_tokens=10**6))
    states = noise(6, 10)  # 15360 bytes, and as much of gradients
    assert torch.equal(layers(states), in_parts(local, states, (3, 3)))
    assert num_microbatches(layers) == 2
    ours, theirs = states.clone().requires_grad_(), states.clone().requires_grad_()
    layers(ours).sum().backward()
    assert num_microbatches(layers) == 6
    in_parts(local, theirs, (1,) * 6).sum().backward()
    assert torch.equal(grad_of(ours), grad_of(theirs))
    with pytest.raises(LocalProtocolError, match="send fewer tokens"):
        layers(noise(2, 100))


def test_batch_beyond_what_a_peer_takes_at_once_is_cut(connect: Connect) -> None:
    layers = connect()
    assert layers(noise(9, 1000)).shape == (9, 1000, noise(1, 1).shape[-1])
    assert num_microbatches(layers) == 9


def test_large_evaluation_without_gradient_opens_no_session(
    local: PreTrainedModel, model: PreTrainedModel, layers: RemoteSequential
) -> None:
    tokens = prompt(NUM_TOKENS, rows=ROWS)
    with torch.no_grad():
        output = model(tokens)
        assert num_microbatches(layers) == len(SIZES)
        expected = local(tokens)
        torch.testing.assert_close(output.logits, expected.logits)
        again = model(tokens[:, :1], **cached(output.past_key_values))  # whoever keeps the cache goes on from it
        torch.testing.assert_close(again.logits, local(tokens[:, :1], **cached(expected.past_key_values)).logits)


def test_states_of_all_blocks_of_a_cut_batch(local: PreTrainedModel, model: PreTrainedModel) -> None:
    tokens = prompt(NUM_TOKENS, rows=ROWS)
    ours = model(tokens, output_hidden_states=True, use_cache=False)
    theirs = local(tokens, output_hidden_states=True, use_cache=False)
    assert num_microbatches(model.model.layers) == len(SIZES)
    for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(mine, other)
