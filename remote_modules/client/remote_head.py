"""An LM head that the peers with the last blocks run: they send the greatest logits of each step along with its output.

All other logits are minus infinity here. So greedy decoding is exact, to the bits of the head where it is; so is
sampling where no more than `TOP_K` tokens are left to choose from (``top_k``, which transformers sets to 50, or a
``top_p`` that they reach), and cut to the greatest `TOP_K` otherwise. Losses are none of its business.

Where the logits are not at hand, since no such peer has the head (``serve --head``), or more were wanted than a step
brings, or gradients are, or they cannot be true, the head is loaded here, once, and run.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from remote_modules.client.call import CallArguments, Named
from remote_modules.model.stack import StackSpec

__all__ = ["REMOTE", "TOP_K", "HeadResults", "RemoteHead", "set_remote_head", "without_logits"]

logger = logging.getLogger(__name__)

REMOTE = "remote"
TOP_K = 64
MAX_TOKENS = 160  # of a step, whose logits are asked for; of longer ones, and of prompts, those of the last alone


@dataclass(frozen=True, slots=True)
class _Found:
    """The logits of the last tokens of what the blocks' owner returned."""

    hidden: torch.Tensor
    values: torch.Tensor
    tokens: torch.Tensor


class HeadResults:
    """The way of the logits from a session's step to the head; per thread, since models may be called from several.

    Args:
        top_k: of each token; 0 for none, and then nothing is done.
    """

    def __init__(self, top_k: int = 0) -> None:
        self.top_k = top_k
        self._local = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> HeadResults:
        return memo.setdefault(id(self), HeadResults(self.top_k))  # type: ignore[no-any-return]

    def asked_of(self, call: CallArguments, position: int) -> CallArguments:
        """The arguments of a step that brings logits, too: of a prompt those that `generate` looks at."""
        if not self.top_k:
            return call
        number = call.num_tokens if position and call.num_tokens <= MAX_TOKENS else 1
        return replace(call, head_tokens=number, head_top_k=self.top_k)

    def take(self, outputs: Named) -> Named:
        """Keep the logits of a step, and return the rest."""
        if self.top_k:
            self._local.step = outputs.get("record.head.values"), outputs.get("record.head.tokens")
            outputs = without_logits(outputs)
        return outputs

    def of(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The logits and tokens after ``hidden``, the last of what the owner has just returned; None: not there."""
        found: _Found | None = getattr(self._local, "found", None)
        if found is None or hidden.dim() != 3 or hidden.untyped_storage().data_ptr() != _storage(found.hidden):
            return None
        number = hidden.shape[1]
        last = found.hidden[:, found.hidden.shape[1] - number :]
        is_end = hidden.shape == last.shape and hidden.storage_offset() == last.storage_offset()
        if not is_end or hidden.stride() != last.stride() or not 0 < number <= found.values.shape[1]:
            return None
        return found.values[:, -number:], found.tokens[:, -number:]

    def before_owner(self, owner: nn.Module, args: object) -> None:
        """A forward pre-hook of the blocks' owner: the call before may have failed after its step."""
        self._local.step, self._local.found = (None, None), None

    def after_owner(self, owner: nn.Module, args: object, output: Any) -> None:
        """A forward hook of the blocks' owner: what it returns belongs to the step that it has just done."""
        values, tokens = getattr(self._local, "step", (None, None))
        self._local.step, self._local.found = (None, None), None
        if values is not None and tokens is not None and isinstance(output[0], torch.Tensor):
            self._local.found = _Found(output[0], values, tokens)


def without_logits(recorded: Named) -> Named:
    """Those of an earlier request are not of the last token, or come from a peer that failed since."""
    return {name: tensor for name, tensor in recorded.items() if not name.startswith("record.head.")}


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class RemoteHead(nn.Module):
    """Stands for the LM head.

    Attributes:
        num_local: calls for which the head was run here.
    """

    def __init__(self, results: HeadResults, *, vocab_size: int, load: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.results = results
        self.out_features = vocab_size
        self.num_local = 0
        self._load = load
        self._loaded: list[nn.Module] = []  # a list: no part of the model's own parameters

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found = None if torch.is_grad_enabled() and hidden.requires_grad else self.results.of(hidden)
        if found is None:
            return self._local(hidden)
        values, tokens = (tensor.to(hidden.device) for tensor in found)
        if not bool(values.isfinite().all()) or int(tokens.max()) >= self.out_features:
            return self._local(hidden)  # overflown, or nonsense
        shape = (*hidden.shape[:-1], self.out_features)
        logits = torch.full(shape, -torch.inf, dtype=hidden.dtype, device=hidden.device)
        return logits.scatter_(-1, tokens, values.to(hidden.dtype))

    def _local(self, hidden: torch.Tensor) -> torch.Tensor:
        if not self._loaded:
            logger.warning("logits are not at hand; loading the LM head here, do peers serve it with --head?")
            self._loaded.append(self._load())
        self.num_local += 1
        logits: torch.Tensor = self._loaded[0](hidden)
        return logits

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteHead:
        copied = RemoteHead(copy.deepcopy(self.results, memo), vocab_size=self.out_features, load=self._load)
        copied.train(self.training)
        return copied


def set_remote_head(model: PreTrainedModel, stack: StackSpec, load: Callable[[], Any]) -> HeadResults:
    """Replace the LM head of ``model``; what its remote blocks are to be given.

    Args:
        load: the head itself, if it is needed after all.

    Raises:
        ValueError: ``model`` has no linear head, or changes logits so that minus infinity does not stay what it is.
    """
    plain, config = model.get_output_embeddings(), model.config.get_text_config(decoder=True)
    if not isinstance(plain, nn.Linear):
        raise ValueError(f"head='{REMOTE}' needs a linear LM head, {type(model).__name__} has {type(plain).__name__}")
    if getattr(config, "final_logit_softcapping", None) is not None:
        raise ValueError(f"head='{REMOTE}' is not for models with a cap on logits such as '{config.model_type}'")
    results = HeadResults(TOP_K)
    size = plain.out_features
    model.set_output_embeddings(RemoteHead(results, vocab_size=size, load=load))
    stack.owner(model).register_forward_pre_hook(results.before_owner)
    stack.owner(model).register_forward_hook(results.after_owner)
    return results
