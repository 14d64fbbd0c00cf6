"""The LM head with int8 weights, for clients whose CPU reads them for each token.

The product of one row is limited by memory: int8 weights are half the bytes of bf16. Its logits are used to find the
few rows of the vocabulary that can be the greatest; those are computed again with the weights themselves, to the same
bits as in the product of all (checked once on this machine; if it is not so, all products are plain).

What is exact: the logits of these rows, and which one is the greatest, ties included. All others are less than the
greatest and off by at most a bound, so sampling from them differs a little from sampling with the plain head.

The bound of row j: ``|(w_j - s_j q_j) x| <= |w_j - s_j q_j| |x|`` (Cauchy-Schwarz; the first norm is known beforehand),
and what two sums in float32, of K terms in any order, and the rounding of the results can add. Where the bound cannot
tell, and for anything but one token without a gradient, the plain product is computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from remote_modules.errors import UnsupportedCallError
from remote_modules.model.stack import StackSpec

__all__ = ["HEADS", "GreatestLogits", "Int8Head", "set_head"]

HEADS = ("int8",)
SHORTLIST = 128  # rows that are computed again
ROWS_AT_ONCE = 4096  # of float32 copies while it is made
_MAX_CODE = 127
_DTYPE = torch.bfloat16  # torch's int8 product takes three times as long as the plain one in float32, six in float16
_ROUNDING = 2.0**-6  # of two results and their sum, relative
_UNIT = 2.0**-24  # of float32
_NORM_SLACK = 1.001  # norms are sums in float32, too


class Int8Head(nn.Linear):
    """Stands for ``plain``, whose weights it shares.

    Attributes:
        num_full: products that were computed plainly although one row was asked for.
    """

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=plain.bias is not None, device="meta")
        self.weight, self.bias = plain.weight, plain.bias
        self.train(plain.training)
        self.num_full = 0
        self._codes, self._scales, self._slopes = _quantized(plain.weight.detach())
        self._is_exact = _rows_stand_alone(plain)
        self._seen = _version(self.weight)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.numel() != self.in_features or not self._applies(input):
            return super().forward(input)
        row = input.reshape(1, -1)
        logits = self._by_codes(row)
        if logits is None:
            self.num_full += 1
            return super().forward(input)
        return logits.reshape(*input.shape[:-1], -1)

    def _applies(self, row: torch.Tensor) -> bool:
        if torch.is_grad_enabled() and (row.requires_grad or self.weight.requires_grad):
            return False
        is_plain = row.dtype == self.weight.dtype and not torch.is_autocast_enabled("cpu")
        return self._is_exact and is_plain and _version(self.weight) == self._seen

    def _by_codes(self, row: torch.Tensor) -> torch.Tensor | None:
        """Logits ``[1, V]``, or None if the greatest cannot be told."""
        logits = torch._weight_int8pack_mm(row, self._codes, self._scales)
        bound = self._slopes * (row.float().norm() * _NORM_SLACK)
        upper = logits[0].float()
        upper = upper + bound + upper.abs() * _ROUNDING
        if self.bias is not None:
            logits = logits + self.bias
            upper = upper + self.bias.float() + logits[0].float().abs() * _ROUNDING
        highest, rows = upper.topk(min(SHORTLIST + 1, len(upper)))
        rows = rows[:SHORTLIST]
        exact = functional.linear(row, self.weight[rows], None if self.bias is None else self.bias[rows])
        is_told = len(highest) <= SHORTLIST or bool(highest[-1] < exact.max())
        if not is_told:  # also where anything is not a number
            return None
        logits[0, rows] = exact[0]
        return logits


def set_head(model: PreTrainedModel, head: str) -> None:
    """Replace the LM head of ``model``.

    Raises:
        ValueError: no such head, or ``model`` has no linear head in bfloat16 on the CPU.
    """
    if head not in HEADS:
        raise ValueError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
    plain = model.get_output_embeddings()
    if not isinstance(plain, nn.Linear):
        raise ValueError(f"head='{head}' needs a linear LM head, {type(model).__name__} has {type(plain).__name__}")
    weight = plain.weight
    if weight.device.type != "cpu" or weight.dtype != _DTYPE:
        raise ValueError(f"head='{head}' is for bfloat16 weights on the CPU, got {weight.dtype} on {weight.device}")
    model.set_output_embeddings(Int8Head(plain))


class GreatestLogits:
    """What comes after the last block: a norm and the LM head.

    Args:
        model: without its blocks, which are taken out of it.

    Raises:
        UnsupportedCallError: more comes after them.
    """

    def __init__(self, model: PreTrainedModel, stack: StackSpec) -> None:
        owner: Any = stack.owner(model)
        setattr(owner, stack.list_name, nn.ModuleList())
        head, kind = model.get_output_embeddings(), model.config.model_type
        norms = [module for module in owner.children() if _has_weights(module) and not isinstance(module, nn.Embedding)]
        if not isinstance(head, nn.Linear) or len(norms) != 1 or (stack.hidden.batch, stack.hidden.time) != (0, 1):
            raise UnsupportedCallError(f"a '{kind}' has no norm and linear head after its blocks; leave its head off")
        self.head, self.norm, self.device, self.dtype = head, norms[0], head.weight.device, head.weight.dtype
        dice = torch.Generator().manual_seed(0)
        probe = torch.randn(1, 2, head.in_features, generator=dice).to(self.device, self.dtype)
        with torch.no_grad():
            if not torch.equal(owner(inputs_embeds=probe, use_cache=False)[0], self.norm(probe)):
                raise UnsupportedCallError(f"a '{kind}' does more than a norm after its blocks; leave its head off")

    def top(self, hidden: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The greatest logits after each of ``hidden`` ``[B, n, D]``, and their tokens: ``[B, n, k]``."""
        with torch.inference_mode():
            logits = self.head(self.norm(hidden.to(self.device, self.dtype)))
            values, tokens = logits.topk(min(top_k, logits.shape[-1]))
        return values, tokens


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes ``[V, K]``, scales ``[V]`` in bfloat16, and the error of a logit for each unit of ``|x|``."""
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight), dtype=weight.dtype)
    slopes = torch.empty(len(weight), dtype=torch.float32)
    for start in range(0, len(weight), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        exact = weight[part].float()
        scale = (exact.abs().amax(1) / _MAX_CODE).to(weight.dtype)
        scale[scale == 0] = 1
        scales[part] = scale
        rounded = (exact / scale.float()[:, None]).round_().clamp_(-_MAX_CODE, _MAX_CODE)
        codes[part] = rounded.to(torch.int8)
        residual = exact.sub(rounded.mul_(scale.float()[:, None]))
        sums = 2 * weight.shape[1] * _UNIT * (exact.norm(dim=1) + rounded.norm(dim=1))
        slopes[part] = (residual.norm(dim=1) + sums) * _NORM_SLACK
    return codes, scales, slopes


def _rows_stand_alone(plain: nn.Linear) -> bool:
    """Whether this machine's product of some rows has the bits that these rows have in the product of all."""
    with torch.no_grad():
        row = torch.randn(1, plain.in_features, generator=torch.Generator().manual_seed(0)).to(plain.weight.dtype)
        rows = torch.linspace(0, plain.out_features - 1, min(SHORTLIST, plain.out_features)).long()
        return torch.equal(functional.linear(row, plain.weight[rows]), functional.linear(row, plain.weight)[:, rows])


def _version(weight: torch.Tensor) -> tuple[int, int]:
    """Differs once the weights were written to or replaced."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version
