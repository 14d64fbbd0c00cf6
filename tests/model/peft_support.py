"""A model whose blocks are shadows, and a stand-in for their peer: real blocks in the same process.

As remotely, the forward pass keeps no graph, adapters go as bytes, and backward recomputes the block.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from tiny_models import load_whole, save_tiny
from torch import nn
from transformers import PreTrainedModel

from remote_modules.model.adapted import applied
from remote_modules.model.adapted_item import Batch
from remote_modules.model.adapter_reading import collect
from remote_modules.model.adapters import decode, encode
from remote_modules.model.shadow import shadow_block
from remote_modules.model.stack import find_stack, meta_skeleton

FAMILIES = ("llama", "gpt2", "gemma2", "qwen3_moe", "mixtral", "bloom", "falcon")


class Peer:
    """Runs one real block for the shadow that stands for it.

    Attributes:
        shadow: that block. A copy of the model gets a peer with the copied block, but the real one is shared.
        seed: of the dropout masks.
    """

    def __init__(self, real: nn.Module, index: int) -> None:
        self.real, self.index = real, index
        self.shadow: nn.Module | None = None
        self.seed: int | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Peer:
        twin = memo[id(self)] = Peer(self.real, self.index)
        twin.shadow, twin.seed = copy.deepcopy(self.shadow, memo), self.seed
        return twin

    def __call__(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.call(hidden, *args, **kwargs)

    def call(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        assert self.shadow is not None
        found = collect({self.index: self.shadow})
        data = encode(found.entries, found.parameters) if found else None
        parameters = found.parameters if found else ()
        outputs = _Remote.apply(self, data, args, kwargs, hidden, *parameters)  # type: ignore[no-untyped-call]
        return outputs[0] if len(outputs) == 1 else outputs

    def run(self, data: bytes | None, hidden: torch.Tensor, args: Any, kwargs: Any, grad: bool) -> tuple[Any, Any]:
        self.real.train(self.shadow.training)  # type: ignore[union-attr]
        if data is None:
            return self.real(hidden, *args, **kwargs), ()
        adapter = decode(data).leaves("cpu", requires_grad=grad)
        with applied({self.index: self.real}, adapter, Batch(seed=self.seed)):
            return self.real(hidden, *args, **kwargs), adapter.tensors


class _Remote(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, peer: Peer, data: bytes | None, args: Any, kwargs: Any, hidden: torch.Tensor, *parameters: Any
    ) -> Any:
        ctx.call = (peer, data, hidden.detach().clone(), args, kwargs)
        output, _ = peer.run(data, hidden.detach(), args, kwargs, grad=False)
        return output if isinstance(output, tuple) else (output,)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        peer, data, hidden, args, kwargs = ctx.call
        kwargs = {name: None if "past" in name or "cache" in name else value for name, value in kwargs.items()}
        with torch.enable_grad():
            leaf = hidden.requires_grad_()
            output, tensors = peer.run(data, leaf, args, kwargs, grad=True)
            output = output[0] if isinstance(output, tuple) else output
            gradients = torch.autograd.grad(output, (leaf, *tensors), grads[0], allow_unused=True)
        return (None, None, None, None, *gradients)


def local_model(folder: Path, family: str) -> PreTrainedModel:
    """Without dropout of its own, which gpt2 has."""
    changes: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    saved = save_tiny(folder / family, family, **(changes if family == "gpt2" else {}))
    model = load_whole(saved, attn_implementation="eager")
    model.config.use_cache = False
    return model


def remote_twin(model: PreTrainedModel, *, dtype: torch.dtype = torch.float32, reads: bool = True) -> PreTrainedModel:
    """A copy of ``model`` with shadow blocks, which `Peer`s with frozen copies of the real blocks run."""
    stack = find_stack(model, model.config)
    twin = copy.deepcopy(model)
    real = stack.blocks(copy.deepcopy(model)).requires_grad_(False)
    skeleton = stack.blocks(meta_skeleton(type(model), model.config))
    blocks = stack.blocks(twin)
    for index in range(len(blocks)):
        peer = Peer(real[index], index)
        read: Callable[[str], torch.Tensor] | None = real[index].get_parameter if reads else None
        peer.shadow = blocks[index] = shadow_block(
            skeleton[index], peer.call, dtype=dtype, device="cpu", read_weight=read
        )
    return twin


def adapted(model: PreTrainedModel, *configs: PeftConfig, seed: int = 7) -> PeftModel:
    """``model`` with one adapter for each config, all active, all of random values."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*keys did not match any targeted module")  # fused experts have them
        wrapped = get_peft_model(model, copy.deepcopy(configs[0]), adapter_name="a0")
        for number, config in enumerate(configs[1:], 1):
            wrapped.add_adapter(f"a{number}", copy.deepcopy(config))
        if len(configs) > 1:
            tuner: Any = wrapped.base_model
            tuner.set_adapter([f"a{number}" for number in range(len(configs))])
    with torch.no_grad():
        for _, parameter in trainable(wrapped):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    assert isinstance(wrapped, PeftModel)
    return wrapped


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def token_ids() -> torch.Tensor:
    return torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(3))


def train(model: nn.Module, steps: int = 3) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of some AdamW steps, and the gradients of the first."""
    optimizer = torch.optim.AdamW([parameter for _, parameter in trainable(model)], lr=1e-2)
    losses, first = [], {}
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=token_ids(), labels=token_ids()).loss
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            first = {name: parameter.grad.clone() for name, parameter in trainable(model) if parameter.grad is not None}
        optimizer.step()
    return losses, first
