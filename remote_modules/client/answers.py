"""Whether what a peer answered can be true: names, shapes, dtypes, finite values."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch

from remote_modules.client.call import Named
from remote_modules.errors import PeerError
from remote_modules.model.stack import StackSpec
from remote_modules.peers import PeerId, short_id
from remote_modules.plan.routing import Hop
from remote_modules.spans import Span
from remote_modules.wire.messages import CallMeta

__all__ = ["AnswerChecker"]

_HEAD = ("record.head.values", "record.head.tokens")


@dataclass(frozen=True, slots=True)
class _Doubt:
    """Values that are not finite: of which blocks, and a digest of where they are."""

    span: Span
    places: bytes


class AnswerChecker:
    """The checks of one pass.

    Values that are not finite are believed when two peers agree on them, or when a peer that nobody can stand in for
    gives them twice, in the same places, in float16: then they are the model's, as when a scaled loss overflows.
    """

    def __init__(self, stack: StackSpec, hidden_size: int) -> None:
        self._doubts: dict[PeerId, _Doubt] = {}
        self._lone: set[PeerId] = set()
        self._cleared: set[PeerId] = set()
        self._stack = stack
        self._hidden_size = hidden_size

    def check_outputs(
        self, hop: Hop, outputs: Named, like: Named, call: CallMeta, num_tokens: int | None = None
    ) -> Named:
        """What the hop's last block returned, once shapes, dtypes and values can be true, and nothing else.

        Args:
            like: what went in.
            num_tokens: how many tokens' outputs were asked for; None for all.

        Raises:
            PeerError: they cannot.
        """
        stack = self._stack
        count = call.num_tokens if num_tokens is None else num_tokens
        hidden = like["hidden_states"]
        expected = list(hidden.shape)
        if stack.hidden.time is not None:
            expected[stack.hidden.time] = count
        output = outputs.get("hidden_states")
        if output is None or list(output.shape) != expected or output.dtype != hidden.dtype:
            got = "nothing" if output is None else f"{output.dtype} {list(output.shape)}"
            raise _nonsense(hop, f"expected {hidden.dtype} {expected}, got {got}")
        for index, spec in stack.states.items():
            state = outputs.get(f"state.{index}")
            if state is not None and count and not spec.fits(state, call.rows, count, self._hidden_size):
                raise _nonsense(hop, f"state {index} is {state.dtype} {list(state.shape)}, expected {spec.dims}")
        outputs = {name: outputs[name] for name in stack.carried if name in outputs}
        self._check_finite(hop, outputs, like)
        return outputs

    def check_recorded(self, hop: Hop, recorded: Named, call: CallMeta) -> Named:
        """What was recorded of the hop's blocks, once it is what was asked for.

        Raises:
            PeerError: it is something else.
        """
        if not recorded:
            return recorded
        expected = {f"record.{kind}.{block}" for kind in call.record for block in hop.span}
        recorded = self._check_head(hop, recorded, call)
        for name, tensor in recorded.items():
            if name not in (*expected, *_HEAD) or tensor.dim() < 2:
                raise _nonsense(hop, f"'{name}', a tensor {list(tensor.shape)}, is not what was to be recorded")
        return recorded

    def _check_head(self, hop: Hop, recorded: Named, call: CallMeta) -> Named:
        """Logits, once their shape can be true; the head looks at their values."""
        values, tokens = (recorded.get(name) for name in _HEAD)
        if values is None and tokens is None:
            return recorded
        if values is None or tokens is None or not call.head_top_k or hop.span.end != self._stack.num_blocks:
            raise _nonsense(hop, "logits that were not asked for, or lack their tokens")
        shape, num_tokens = tuple(values.shape), min(call.head_tokens, call.num_tokens)
        is_right = len(shape) == 3 and shape[0] == call.rows and 0 < shape[1] <= num_tokens
        if not is_right or not 0 < shape[2] <= call.head_top_k or tokens.shape != shape or tokens.dtype != torch.int64:
            raise _nonsense(hop, f"logits {list(shape)} of tokens {tokens.dtype} {list(tokens.shape)}")
        if not values.is_floating_point() or tokens.min() < 0:
            raise _nonsense(hop, f"logits are {values.dtype}, or their tokens negative")
        return recorded

    def check_gradients(self, hop: Hop, grads: Named, inputs: Named, of_outputs: Named) -> Named:
        """Gradients by the names of ``inputs``, once they fit them.

        Args:
            of_outputs: the gradients that went in; those of a scaled loss may overflow.

        Raises:
            PeerError: they do not.
        """
        for name, tensor in inputs.items():
            if not tensor.is_floating_point():
                continue
            grad = grads.get(name)
            if grad is None or grad.shape != tensor.shape or grad.dtype != tensor.dtype:
                got = "nothing" if grad is None else f"{grad.dtype} {list(grad.shape)}"
                expected = f"{tensor.dtype} {list(tensor.shape)}"
                raise _nonsense(hop, f"expected a gradient of '{name}', {expected}, got {got}")
        grads = {name: grads[name] for name, tensor in inputs.items() if tensor.is_floating_point()}
        self._check_finite(hop, grads, inputs | of_outputs)
        return grads

    def _check_finite(self, hop: Hop, outputs: Named, like: Named) -> None:
        if all(map(_is_finite, outputs.values())):
            self._doubts = {who: doubt for who, doubt in self._doubts.items() if not _overlap(doubt.span, hop.span)}
            return
        if not all(map(_is_finite, like.values())):
            return
        doubt = _Doubt(hop.span, _places(outputs))
        before = self._doubts.get(hop.peer_id)
        others = {peer_id: other for peer_id, other in self._doubts.items() if peer_id != hop.peer_id}
        self._doubts[hop.peer_id] = doubt
        agree = {peer_id for peer_id, other in others.items() if other == doubt}
        self._cleared |= agree
        is_confirmed = agree or any(other.span != hop.span for other in others.values())
        if not (is_confirmed or (before == doubt and hop.peer_id in self._lone)):
            raise _nonsense(hop, "values are not finite")

    def ask_again(self, peer_id: PeerId) -> bool:
        """Whether the failure of a peer that nobody can stand in for is that its values are not finite: once."""
        if peer_id in self._lone or peer_id not in self._doubts:
            return False
        self._lone.add(peer_id)
        return True

    def take_cleared(self) -> set[PeerId]:
        """Peers whose values were doubted, and then confirmed by others."""
        cleared, self._cleared = self._cleared, set()
        return cleared


def _nonsense(hop: Hop, text: str) -> PeerError:
    return PeerError(
        f"peer '{short_id(hop.peer_id)}' gave a wrong answer for blocks {hop.span}: {text}", peer_id=hop.peer_id
    )


def _overlap(one: Span, other: Span) -> bool:
    return one.start < other.end and other.start < one.end


def _places(tensors: Named) -> bytes:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if tensor.is_floating_point():
            digest.update(name.encode() + b"\0" + torch.isfinite(tensor).contiguous().numpy().tobytes())
    return digest.digest()


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())
