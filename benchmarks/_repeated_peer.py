"""A peer whose blocks repeat: ``python _repeated_peer.py K`` is `testing.child`; block i has the weights of i % K.

The checkpoint holds K blocks, its config names all. So a device holds what the kernels of many blocks need, each block
with a KV cache of its own, in the memory of K; weights are still read from the device's memory for each block, if K of
them are far larger than its caches.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from remote_modules.model import loading
from remote_modules.model.pruning import prune
from remote_modules.model.stack import find_stack, meta_skeleton
from remote_modules.server import load_plan
from remote_modules.spans import Span
from remote_modules.testing import child


def repeated(distinct: int) -> Any:
    """What takes the place of `loading.load_span`."""

    def load(checkpoint: Any, config: Any, cls: Any, span: Span, *, dtype: Any, device: Any, **_: Any) -> Any:
        fewer = copy.deepcopy(config)
        fewer.num_hidden_layers = distinct
        model, stack = loading.load_span(checkpoint, fewer, cls, Span(0, distinct), dtype=dtype, device=device)
        whole = meta_skeleton(cls, config)
        whole_stack = find_stack(whole, config)
        prune(whole, whole_stack, lambda block: block is not None and block in span)
        held, blocks = stack.blocks(model), whole_stack.blocks(whole)
        shared: dict[int, Any] = {id(model.config): model.config}
        shared |= {id(parameter): parameter for parameter in model.parameters()}
        for index in span:
            block: Any = copy.deepcopy(held[index % distinct], dict(shared))
            block.self_attn.layer_idx = index
            blocks[index] = block
        setattr(stack.owner(model), stack.list_name, blocks)
        model.config.num_hidden_layers = config.num_hidden_layers
        return model, whole_stack

    return load


def main() -> int:
    load_plan.load_span = repeated(int(sys.argv[1]))  # type: ignore[attr-defined]  # it imports it
    return child.main()


if __name__ == "__main__":
    sys.exit(main())
