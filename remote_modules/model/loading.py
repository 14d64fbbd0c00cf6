"""Loading part of a checkpoint: the blocks of a span, or everything but the blocks.

Only public transformers API: a subclass whose ``__init__`` prunes the modules that are not wanted *before* weights
are loaded, and a temporary folder of links with an index reduced to the wanted tensors, given to `from_pretrained`.
So no tensor outside the wanted part is read or fetched, no shard that holds none of it is opened, and conversions that
transformers does while loading still happen.
"""

from __future__ import annotations

import copy
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from remote_modules.errors import CheckpointError, UnsupportedCallError, first_line
from remote_modules.model.building import building
from remote_modules.model.checkpoint import INDEX_NAME, Checkpoint
from remote_modules.model.fingerprint import block_digests
from remote_modules.model.head import GreatestLogits
from remote_modules.model.pruning import KeepBlock, UnknownArgument, head_tensors, kept_tensors, pruned_class
from remote_modules.model.quantization import (
    block_state,
    check_quantization,
    loading_options,
    quantize_experts,
    restore_block,
)
from remote_modules.model.quantized_cache import QuantizedCache
from remote_modules.model.stack import StackSpec, find_stack, meta_skeleton
from remote_modules.spans import Span

__all__ = ["load_client_part", "load_head", "load_span", "read_config"]

logger = logging.getLogger(__name__)

_LINKED = ("config.json", "generation_config.json")


def read_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The checkpoint's config.

    Raises:
        CheckpointError: unreadable, of an unknown type, or needing code from the repository (never run).
    """
    try:
        raw = json.loads((checkpoint.folder / "config.json").read_text("utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("not a JSON object")
        if "auto_map" in raw and raw.get("model_type") not in CONFIG_MAPPING:
            raise ValueError("it needs code from the repository, which is never run")
        config: PreTrainedConfig = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as exc:
        raise CheckpointError(f"config of '{checkpoint.name}' is not usable: {first_line(exc)}") from exc
    return config


def load_span(
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    cls: type[PreTrainedModel],
    span: Span,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    quantization: str = "none",
    quantized_cache: QuantizedCache | None = None,
) -> tuple[PreTrainedModel, StackSpec]:
    """The whole skeleton with the weights of ``span`` alone; other blocks, embeddings, norms and head are stubs.

    Args:
        quantization: ``"none"``, ``"int8"`` or ``"nf4"``, of the weights of linear layers and experts.
        quantized_cache: where quantized blocks are looked for first, and kept.

    Raises:
        CheckpointError: a shard or tensor of the span is missing.
        UnsupportedCallError: the class cannot be built in part.
        ValueError: the span reaches outside the model, or a package that ``quantization`` needs is not installed.
    """
    skeleton = meta_skeleton(cls, config)
    stack = find_stack(skeleton, config)
    check_span(span, stack.num_blocks, checkpoint.name)
    if quantization != "none":
        check_quantization(quantization)
        quantizer = _Quantizer(checkpoint, config, cls, stack, quantization, dtype, device)
        return quantizer.load(span, quantized_cache).eval(), stack

    def keep_block(block: int | None) -> bool:
        return block is not None and block in span

    model = _load(checkpoint, config, skeleton, stack, keep_block, dtype=dtype, device=device)
    model.requires_grad_(False)
    return model.eval(), stack


def load_client_part(
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    cls: type[PreTrainedModel],
    *,
    with_head: bool = True,
    **kwargs: Any,
) -> tuple[PreTrainedModel, StackSpec]:
    """Embeddings, norms and head; every block is a stub. ``kwargs`` are `from_pretrained`'s.

    Args:
        with_head: else the LM head is a stub, too.

    The head of a task that the checkpoint was not made for is new, as in transformers; a warning says so.

    Raises:
        CheckpointError: a shard or tensor is missing.
        UnsupportedCallError: the class cannot be built in part.
        TypeError: an unknown one in ``kwargs``.
    """
    skeleton = meta_skeleton(cls, config)
    stack = find_stack(skeleton, config)
    without = frozenset[str]() if with_head else head_tensors(skeleton)
    model = _load(checkpoint, config, skeleton, stack, lambda block: block is None, without=without, **kwargs)
    return model, stack


def load_head(
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    cls: type[PreTrainedModel],
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
) -> GreatestLogits:
    """What comes after the last block, for a peer that holds that.

    Raises:
        CheckpointError: a shard or tensor is missing.
        UnsupportedCallError: more comes after it than a norm and a linear head.
    """
    model, stack = load_client_part(checkpoint, config, cls, dtype=dtype, device=device)
    model.requires_grad_(False)
    return GreatestLogits(model.eval(), stack)


def check_span(span: Span, num_blocks: int, name: str) -> None:
    if span.end > num_blocks:
        raise ValueError(f"span {span} is outside model '{name}' of {num_blocks} blocks (0:{num_blocks})")


class _Quantizer:
    """Loads a span block by block, so that never more than one is in memory as the checkpoint has it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: PreTrainedConfig,
        cls: type[PreTrainedModel],
        stack: StackSpec,
        quantization: str,
        dtype: torch.dtype | str,
        device: torch.device | str,
    ) -> None:
        self._checkpoint, self._config, self._cls, self._stack = checkpoint, config, cls, stack
        self._quantization, self._dtype, self._device = quantization, dtype, device
        skeleton = meta_skeleton(cls, copy.deepcopy(config))
        if "eager" != skeleton.config._experts_implementation:
            skeleton.set_experts_implementation("eager")
        self._meta_blocks = stack.blocks(skeleton)

    def load(self, span: Span, cache: QuantizedCache | None) -> PreTrainedModel:
        model = self._without_blocks()
        blocks = self._stack.blocks(model)
        for index in span:
            blocks[index] = self._stored(index, cache) or self._quantized(index, cache)
        model.requires_grad_(False)
        return model

    def _without_blocks(self) -> PreTrainedModel:
        pruned: Any = pruned_class(self._cls, self._stack, lambda block: False)
        with building, _quiet_loading():
            model: PreTrainedModel = pruned.from_pretrained(
                None,
                config=self._config,
                state_dict={},
                dtype=self._dtype,
                device_map={"": self._device},
                experts_implementation="eager",
            )
        model.__class__ = self._cls
        return model

    def _stored(self, index: int, cache: QuantizedCache | None) -> nn.Module | None:
        state = cache.read(index) if cache is not None else None
        if state is None:
            return None
        block = self._meta_blocks[index]
        restore_block(block, state, self._device)
        return block

    def _quantized(self, index: int, cache: QuantizedCache | None) -> nn.Module:
        options = loading_options(self._quantization, self._meta_blocks[index], f"{self._stack.path}.{index}")
        model = _load(
            self._checkpoint,
            self._config,
            meta_skeleton(self._cls, self._config),
            self._stack,
            lambda block: block == index,
            dtype=self._dtype,
            device_map={"": self._device},
            **options,
        )
        block = self._stack.blocks(model)[index]
        quantize_experts(block, self._quantization)
        if cache is not None:
            digest = block_digests(self._checkpoint, self._stack, [index]).get(index, "")
            cache.write(index, block_state(block), digest)
        return block


def _load(
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    skeleton: PreTrainedModel,
    stack: StackSpec,
    keep_block: KeepBlock,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    without: frozenset[str] = frozenset(),
    **kwargs: Any,
) -> PreTrainedModel:
    """``skeleton``, of the class to load, is pruned by this; ``without`` these tensors of its head."""
    cls = type(skeleton)
    pruned: Any = pruned_class(
        cls, stack, keep_block, with_head=not without
    )  # Any: what from_pretrained returns varies with its options
    where = stack.blocks_of_keys(checkpoint.weight_map)
    further = kept_tensors(skeleton, stack, keep_block, with_head=not without)
    files = checkpoint.part(lambda key: key not in without and (keep_block(where.get(key)) or _is_named(key, further)))
    if not files:
        raise CheckpointError(f"checkpoint '{checkpoint.name}' has no tensor of the wanted part of {cls.__name__}")
    with _partial_folder(checkpoint, files) as folder, building, _quiet_loading():
        if str(device) != "cpu":
            kwargs["device_map"] = {"": device}
        try:
            model, info = pruned.from_pretrained(
                folder, config=config, dtype=dtype, output_loading_info=True, use_safetensors=True, **kwargs
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as exc:
            raise CheckpointError(f"weights of '{checkpoint.name}' do not load: {first_line(exc)}") from exc
        except UnknownArgument as exc:
            raise TypeError(str(exc)) from exc
        except (AttributeError, TypeError, LookupError) as exc:  # the class looks into modules that are pruned
            text = f"{cls.__name__} cannot be loaded in part: {first_line(exc)}"
            raise UnsupportedCallError(text) from exc
    new = _head_of_a_task(model)
    missing = sorted(set(info["missing_keys"]) - new)
    if missing:
        raise CheckpointError(f"checkpoint '{checkpoint.name}' lacks {len(missing)} tensors, first '{missing[0]}'")
    for name in sorted(new.intersection(info["missing_keys"])):
        logger.warning("checkpoint '%s' lacks '%s' of %s: it is new, train it", checkpoint.name, name, cls.__name__)
    loaded: PreTrainedModel = model
    loaded.__class__ = cls  # generate() decides some things by class name
    loaded.name_or_path = loaded.config.name_or_path = checkpoint.name  # peft writes it into the files of adapters
    return loaded


def _head_of_a_task(model: PreTrainedModel) -> frozenset[str]:
    """Parameters that a checkpoint of another task may lack: of the head, unless it is a language model's own."""
    language_head = model.get_output_embeddings()
    known = [f"{model.base_model_prefix}.", *(f"{n}." for n, m in model.named_modules() if m is language_head)]
    if model.base_model is model:
        return frozenset()
    return frozenset(name for name, _ in model.named_parameters() if not name.startswith(tuple(known)))


def _is_named(key: str, names: frozenset[str]) -> bool:
    """Whether a checkpoint key is one of ``names``, which may have the prefix of a base model more or less."""
    return any(key == name or name.endswith(f".{key}") or key.endswith(f".{name}") for name in names)


@contextmanager
def _partial_folder(checkpoint: Checkpoint, files: dict[Path, list[str]]) -> Iterator[Path]:
    """A folder that looks like a checkpoint of just these tensors."""
    with tempfile.TemporaryDirectory(prefix="remote-modules-") as name:
        folder = Path(name)
        for file_name in _LINKED:
            source = checkpoint.folder / file_name
            if source.exists():
                (folder / file_name).symlink_to(source.resolve())
        weight_map = {}
        for number, (path, keys) in enumerate(files.items()):
            link = f"part-{number:05d}.safetensors"  # never "model.safetensors", which would win over the index
            (folder / link).symlink_to(path.resolve())
            weight_map.update(dict.fromkeys(keys, link))
        (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), "utf-8")
        yield folder


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """transformers would report each pruned tensor as unexpected, and draw its own bar for our own part."""
    verbosity = transformers_logging.get_verbosity()
    had_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bar:
            transformers_logging.enable_progress_bar()
