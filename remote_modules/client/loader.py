"""`load`: a stock transformers model whose blocks are remote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from remote_modules.client.connect import connect_swarm
from remote_modules.client.remote_head import REMOTE, set_remote_head
from remote_modules.client.sequential import RemoteSequential
from remote_modules.config import ClientConfig
from remote_modules.model.classes import model_class
from remote_modules.model.head import HEADS, set_head
from remote_modules.model.loading import load_client_part, read_config
from remote_modules.model.stack import StackSpec
from remote_modules.spans import Span

__all__ = ["load"]

_HUB_OPTIONS = ("revision", "cache_dir", "token")
_HEAD_OPTIONS = ("num_labels", "id2label", "label2id", "problem_type")  # fields of the config


def load(
    model: str | Path,
    *,
    auto_class: Any = AutoModelForCausalLM,
    trackers: Sequence[str] = (),
    mdns: bool = True,
    peers: Sequence[str] = (),
    invite: str | None = None,
    config: ClientConfig | None = None,
    head: str | None = None,
    **from_pretrained_kwargs: Any,
) -> PreTrainedModel:
    """The stock class with only embeddings, norms and head in memory, and remote blocks in place.

    Args:
        model: hub id or local checkpoint folder.
        auto_class: whose class to build, such as `AutoModelForSequenceClassification`.
        trackers, mdns, peers, invite, config: as in `RemoteSequential.from_swarm`.
        head: ``"int8"`` for an LM head that reads half the memory for each token (`model.head` says what is exact);
            ``"remote"`` for one that the peers with the last blocks run (`client.remote_head`).
        from_pretrained_kwargs: ``dtype``, ``revision``, ``cache_dir``, ``token``, ``num_labels`` and what else
            `from_pretrained` takes.

    Raises:
        ValueError, TypeError: bad arguments, before any I/O.
        CheckpointError: the checkpoint cannot be read.
        UnsupportedCallError: the architecture or auto class is not carried.
    """
    if head is not None and head not in (REMOTE, *HEADS):
        raise ValueError(f"head must be one of {', '.join((REMOTE, *HEADS))}, got {head!r}")
    hub = {name: from_pretrained_kwargs.pop(name, None) for name in _HUB_OPTIONS}
    handle = connect_swarm(str(model), trackers=trackers, mdns=mdns, peers=peers, invite=invite, config=config, **hub)
    layers = RemoteSequential(handle, Span(0, handle.num_blocks))
    checkpoint = handle.checkpoint
    assert checkpoint is not None, "a model that is named has one"
    cls, model_config = model_class(read_config(checkpoint), auto_class)
    for name in [name for name in _HEAD_OPTIONS if name in from_pretrained_kwargs]:
        setattr(model_config, name, from_pretrained_kwargs.pop(name))

    def load_part(*, with_head: bool = True) -> tuple[PreTrainedModel, StackSpec]:
        return load_client_part(checkpoint, model_config, cls, with_head=with_head, **from_pretrained_kwargs)

    loaded, stack = load_part(with_head=head != REMOTE)
    if head is not None:
        try:
            if head == REMOTE:
                layers.head_results = set_remote_head(loaded, stack, lambda: load_part()[0].get_output_embeddings())
            else:
                set_head(loaded, head)
        except ValueError:
            layers.close()
            raise
    setattr(stack.owner(loaded), stack.list_name, layers)
    loaded.eval()
    return loaded
