"""LoRA adapters as peft saves them (``adapter_config.json``, ``adapter_model.safetensors``), read without peft.

What is read is what `model.adapters.collect` would find on a `PeftModel` with the same files in eval mode, to the last
bit of each name: so a client that has that model, and a peer that has the files, know the same content.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from remote_modules.errors import CheckpointError, RemoteProtocolError, first_line
from remote_modules.model.adapted import check_fit
from remote_modules.model.adapter_content import part_digest
from remote_modules.model.adapter_entries import Lora
from remote_modules.model.adapters import Adapter
from remote_modules.model.hub import fetch_files

__all__ = ["AdapterFiles", "FrozenAdapter", "open_adapter"]

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"

# Fields of the config that say nothing about the numbers, or that are read here. Of others, only "off" is known.
_KNOWN = {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
_KNOWN |= {"inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out"}
_KNOWN |= {"use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern"}
_KNOWN |= {"megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying", "eva_config"}
_INITS = (True, False, "gaussian", "orthogonal", "eva")  # others change the weights of the model, too
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<path>.+)\.(?P<tensor>lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?")


class FrozenAdapter(Adapter):
    """One that no client trains: nobody gets gradients of its tensors. It may have no entries."""

    __slots__ = ()

    def leaves(self, device: torch.device | str, *, requires_grad: bool = False) -> Adapter:
        return FrozenAdapter(self.entries, tuple(tensor.to(device) for tensor in self.tensors))


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """A LoRA adapter for all blocks of a model.

    Attributes:
        source: what the user called it.
        modules: what each adapted module has, by block and path in the block.
        digest: of all of it, 32 hexadecimal digits; the same wherever the same adapter is read.
    """

    source: str
    modules: Mapping[tuple[int, str], _Module]
    digest: str

    def of_blocks(self, blocks: Mapping[int, nn.Module]) -> FrozenAdapter:
        """What belongs to ``blocks``, real blocks by index, in the order of their modules.

        Raises:
            CheckpointError, UnsupportedCallError: it does not fit them.
        """
        entries: list[Lora] = []
        tensors: list[torch.Tensor] = []
        for index, block in blocks.items():
            paths = dict.fromkeys(path for path, _ in block.named_modules())
            unknown = [path for number, path in self.modules if number == index and path not in paths]
            if unknown:
                raise CheckpointError(f"adapter '{self.source}' has '{unknown[0]}', which block {index} does not have")
            for path in paths:
                if (found := self.modules.get((index, path))) is not None:
                    entries.append(found.entry)
                    tensors += found.tensors
        if not entries:
            return FrozenAdapter((), ())
        try:
            whole = Adapter.of(entries, tensors)
        except RemoteProtocolError as exc:
            raise CheckpointError(f"adapter '{self.source}' is not usable: {first_line(exc)}") from exc
        check_fit(blocks, whole)
        return FrozenAdapter(whole.entries, whole.tensors)


@dataclass(frozen=True, slots=True)
class _Module:
    entry: Lora
    tensors: tuple[torch.Tensor, ...]


def open_adapter(
    source: str, list_path: str, *, cache_dir: str | None = None, token: str | None = None
) -> AdapterFiles:
    """Read an adapter.

    Args:
        source: a folder, or a hub id.
        list_path: of the model's list of blocks, such as ``"model.layers"``.

    Raises:
        CheckpointError: it cannot be had, is not a LoRA of linear layers in blocks, or not in safetensors format.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or source.startswith((".", "~")):
            raise CheckpointError(f"adapter folder {source} does not exist")
        folder = fetch_files(source, (CONFIG_NAME, WEIGHTS_NAME), cache_dir=cache_dir, token=token)
    config = _read_config(source, folder)
    if not (folder / WEIGHTS_NAME).is_file():
        hint = "; it has pickled weights, which are never loaded" if (folder / "adapter_model.bin").exists() else ""
        raise CheckpointError(f"adapter '{source}' has no {WEIGHTS_NAME}{hint}")
    try:
        tensors = load_file(folder / WEIGHTS_NAME)
    except (SafetensorError, OSError, ValueError) as exc:
        raise CheckpointError(f"adapter '{source}' has no readable {WEIGHTS_NAME}: {first_line(exc)}") from exc
    modules = _modules(source, config, tensors, list_path)
    return AdapterFiles(source, modules, _digest(modules))


def _read_config(source: str, folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG_NAME).read_text("utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is no object")
    except FileNotFoundError as exc:
        raise CheckpointError(f"adapter '{source}' has no {CONFIG_NAME}; save it with save_pretrained") from exc
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"adapter '{source}' has no readable {CONFIG_NAME}: {first_line(exc)}") from exc
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"adapter '{source}' is of type {config.get('peft_type')!r}, only LORA can be preloaded")
    if config.get("bias", "none") != "none" or config.get("init_lora_weights", True) not in _INITS:
        wrong = "bias" if config.get("bias", "none") != "none" else "init_lora_weights"
        text = f"{wrong}={config[wrong]!r}, which changes weights of the model"
        raise CheckpointError(f"adapter '{source}' has {text}; peers keep theirs")
    rest = {name: value for name, value in config.items() if name not in {*_KNOWN, "bias", "init_lora_weights"}}
    on = [name for name, value in rest.items() if value]
    if on:
        raise CheckpointError(f"adapter '{source}' has {on[0]}={rest[on[0]]!r}, which cannot be preloaded")
    return config


def _modules(
    source: str, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], list_path: str
) -> dict[tuple[int, str], _Module]:
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(f"adapter '{source}' has a tensor '{key}', which is no LoRA of a linear layer")
        single = tensor.dtype in (torch.float16, torch.bfloat16)  # peft computes these in float32
        found.setdefault(match["path"], {})[match["tensor"]] = tensor.float() if single else tensor
    scaling = _scalings(source, config)
    wanted = ["lora_A", "lora_B", *(["lora_magnitude_vector"] if config.get("use_dora") else [])]
    modules = {}
    for path, own in found.items():
        if own.keys() != set(wanted) or own["lora_A"].dim() != 2:
            raise CheckpointError(f"adapter '{source}' has {sorted(own)} at '{path}', expected matrices {wanted}")
        block, module = _place(source, path, list_path)
        rank = own["lora_A"].shape[0]
        entry = Lora(block, module, scaling(path, rank), is_dora=bool(config.get("use_dora")))
        modules[block, module] = _Module(entry, tuple(own[name] for name in wanted))
    if not modules:
        raise CheckpointError(f"adapter '{source}' is empty")
    return modules


def _place(source: str, path: str, list_path: str) -> tuple[int, str]:
    """Block and path in the block of a module; text models may be a part of larger ones."""
    owner, _, name = list_path.rpartition(".")
    match = re.fullmatch(rf"(?P<owner>(?:.+\.)?){re.escape(name)}\.(?P<block>\d{{1,4}})\.(?P<module>[\w.]+)", path)
    is_other = match is None or re.search(r"vision|audio|encoder", match["owner"]) and match["owner"] != f"{owner}."
    if match is None or is_other:
        text = f"changes '{path}', which is in no block of '{list_path}': peers hold blocks only"
        raise CheckpointError(f"adapter '{source}' {text}")
    return int(match["block"]), match["module"]


def _scalings(source: str, config: Mapping[str, Any]) -> Callable[[str, int], float]:
    """The factor of the update by the path of a module and its rank."""
    alpha, patterns = config.get("lora_alpha", 8), config.get("alpha_pattern") or {}
    numbers = [alpha, *patterns.values()] if isinstance(patterns, dict) else [None]
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        raise CheckpointError(f"adapter '{source}' has lora_alpha={alpha!r} and alpha_pattern={patterns!r}")
    if any(set(pattern) & set("*+?{") for pattern in patterns):
        raise CheckpointError(f"adapter '{source}' has an alpha_pattern with repetitions, which are not read")
    try:
        compiled = [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in patterns.items()]
    except re.error as exc:
        raise CheckpointError(f"adapter '{source}' has an unreadable alpha_pattern: {first_line(exc)}") from exc

    def scaling(path: str, rank: int) -> float:
        own = next((value for pattern, value in compiled if pattern.match(path)), alpha)
        return float(own / math.sqrt(rank) if config.get("use_rslora") else own / rank)

    return scaling


def _digest(modules: Mapping[tuple[int, str], _Module]) -> str:
    digest = hashlib.sha256()
    for key in sorted(modules):
        entry, tensors = modules[key].entry, modules[key].tensors
        digest.update(f"{entry.block} {entry.module} {entry.scaling!r} {entry.is_dora}".encode())
        for tensor in tensors:
            digest.update(part_digest(tensor))
    return digest.hexdigest()[:32]
