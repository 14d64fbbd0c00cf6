"""What the local model says: the bar for every token and gradient of a simulated run."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from remote_modules.client.adapters import CallAdapter
from remote_modules.client.call import CallArguments
from remote_modules.model.adapter_entries import Lora
from remote_modules.model.adapters import AdapterSet

from .tiny import PAD, VOCABULARY, TinyModel, call_of

RANK, SCALING = 2, 1.5
TOLERANCE = 1e-4  # of logits: the local model computes many rows at once


def positions(tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Position ids as `generate` derives them from a left-padded mask."""
    if mask is None:
        return torch.arange(tokens.shape[1]).unsqueeze(0)
    return (mask.cumsum(-1) - 1).clamp(min=0)


@dataclass(frozen=True)
class _Claim:
    """What a step said about the token after ``tokens`` ``[B, P]``."""

    label: str
    tokens: torch.Tensor
    mask: torch.Tensor | None
    logits: torch.Tensor  # [B, V]


class Oracle:
    """Collects what steps say, and compares all of it with the local model in one forward: cheap, and late."""

    def __init__(self, model: TinyModel, adapter: CallAdapter | None) -> None:
        self._model = model
        self._adapter = adapter
        self._claims: list[_Claim] = []

    def note(self, label: str, tokens: torch.Tensor, mask: torch.Tensor | None, logits: torch.Tensor) -> None:
        self._claims.append(_Claim(label, tokens.clone(), None if mask is None else mask.clone(), logits[:, -1]))

    def differences(self) -> list[str]:
        """One line for each step that the local model does not confirm."""
        if not self._claims:
            return []
        length = max(claim.tokens.shape[1] for claim in self._claims)
        rows = [_padded(claim, length) for claim in self._claims]
        tokens, mask, ids = (torch.cat([row[part] for row in rows]) for part in range(3))
        with torch.no_grad(), adapted(self._model, self._adapter):
            logits = self._model.local(tokens, attention_mask=mask, position_ids=ids, use_cache=False).logits
        found, start = [], 0
        for claim in self._claims:
            count, last = claim.tokens.shape
            expected = logits[start : start + count, last - 1]
            start += count
            is_close = torch.allclose(claim.logits, expected, rtol=TOLERANCE, atol=TOLERANCE)
            if not is_close or not torch.equal(claim.logits.argmax(-1), expected.argmax(-1)):
                found.append(f"I1: {claim.label} differs from the local model")
        return found


def _padded(claim: _Claim, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, mask and positions ``[B, length]``, padded at the right, where causal attention does not look."""
    missing = (0, length - claim.tokens.shape[1])
    mask = torch.ones_like(claim.tokens) if claim.mask is None else claim.mask
    tokens = torch.nn.functional.pad(claim.tokens, missing, value=PAD)
    ids = torch.nn.functional.pad(positions(claim.tokens, mask), missing, value=0)
    return tokens, torch.nn.functional.pad(mask, missing, value=0), ids


@functools.cache
def adapter_of(model: TinyModel) -> CallAdapter:
    """A LoRA on one layer of each block, with weights that matter."""
    generator = torch.Generator().manual_seed(5)
    entries, parameters = [], []
    for block in range(model.num_blocks):
        entries.append(Lora(block, "self_attn.q_proj", SCALING))
        shapes = (RANK, model.hidden_size), (model.hidden_size, RANK)
        parameters += [torch.randn(shape, generator=generator) * 0.3 for shape in shapes]
    return CallAdapter(AdapterSet(tuple(entries), tuple(parameters)))


@contextmanager
def adapted(
    model: TinyModel, adapter: CallAdapter | None, parameters: list[torch.Tensor] | None = None
) -> Iterator[None]:
    """The local model with ``adapter``, or with ``parameters`` in the place of its own."""
    if adapter is None:
        yield
        return
    tensors = list(adapter.adapters.parameters) if parameters is None else parameters
    handles = []
    for entry, a, b in zip(adapter.adapters.entries, tensors[::2], tensors[1::2], strict=True):

        def add(_: Any, inputs: Any, output: Any, a: torch.Tensor = a, b: torch.Tensor = b) -> Any:
            return output + (inputs[0] @ a.T) @ b.T * SCALING

        layer = model.local.model.layers[entry.block].self_attn.q_proj
        handles.append(layer.register_forward_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Lesson:
    """One training pass and what the local model makes of it.

    Attributes:
        inputs: ``[B, T, D]``.
        outputs, grad: of the blocks, and of ``inputs`` for a gradient of ones.
        adapter_grads: for each parameter of the adapter.
    """

    inputs: torch.Tensor
    call: CallArguments
    outputs: torch.Tensor
    grad: torch.Tensor
    adapter_grads: tuple[torch.Tensor, ...]


@functools.cache
def lesson_of(model: TinyModel, number: int, *, has_adapter: bool, is_ragged: bool) -> Lesson:
    """The same for the same arguments: computed once."""
    generator = torch.Generator().manual_seed(100 + number)
    tokens = torch.randint(1, VOCABULARY, (2, 5), generator=generator)
    mask = None
    if is_ragged:
        mask = torch.ones_like(tokens)
        tokens[0, 0], mask[0, 0] = PAD, 0
    inputs = model.embed(tokens)
    adapter = adapter_of(model) if has_adapter else None
    call = call_of(inputs, None if mask is None else positions(tokens, mask), mask, adapter)
    leaf = inputs.clone().requires_grad_()
    parameters = [] if adapter is None else [p.clone().requires_grad_() for p in adapter.adapters.parameters]
    with adapted(model, adapter, parameters):
        output = local_blocks(model, leaf, call)
    grads = torch.autograd.grad(output, [leaf, *parameters], torch.ones_like(output))
    return Lesson(inputs, call, output.detach(), grads[0], tuple(grads[1:]))


def local_blocks(model: TinyModel, inputs: torch.Tensor, call: CallArguments) -> torch.Tensor:
    """What the local model's blocks make of ``inputs`` ``[B, T, D]``; differentiable."""
    norm, model.local.model.norm = model.local.model.norm, torch.nn.Identity()
    try:
        mask = call.attention_mask
        assert not isinstance(mask, dict)
        output = model.local.model(
            inputs_embeds=inputs, attention_mask=mask, position_ids=call.position_ids, use_cache=False
        )
        hidden_states: torch.Tensor = output.last_hidden_state
        return hidden_states
    finally:
        model.local.model.norm = norm


def wrong_in_lesson(
    lesson: Lesson,
    outputs: torch.Tensor,
    grad: torch.Tensor,
    adapter_grads: dict[int, torch.Tensor],
    *,
    was_cut: bool = False,
) -> list[str]:
    """What differs from the local model; nothing may, by a bit, where there is no adapter and the batch went whole."""
    exact = not lesson.adapter_grads and not was_cut

    def is_equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
        return torch.equal(found, expected) if exact else torch.allclose(found, expected, rtol=1e-4, atol=1e-4)

    wrong = []
    if not is_equal(outputs, lesson.outputs):
        wrong.append("I6: forward differs from the local model")
    if not is_equal(grad, lesson.grad):
        wrong.append("I6: gradient differs from the local model")
    if sorted(adapter_grads) != list(range(len(lesson.adapter_grads))):
        wrong.append(f"I6: gradients of adapter parameters {sorted(adapter_grads)} came")
    elif not all(is_equal(adapter_grads[n], expected) for n, expected in enumerate(lesson.adapter_grads)):
        wrong.append("I6: gradient of the adapter differs from the local model")
    return wrong
