"""Adapters as data: what peft put into shadow blocks, as records and tensors that travel.

`collect` reads them off the client's blocks, `encode` and `decode` turn them into bytes and back. What a peer does
with them is in `model.adapted`. peft is not imported, neither here nor there: its layers are known by their names.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import msgspec
import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import nn

from remote_modules.errors import RemoteProtocolError, UnsupportedCallError, first_line
from remote_modules.model.shadow import is_shadow

__all__ = [
    "Adapter",
    "AdapterSet",
    "Entry",
    "Ia3",
    "Lora",
    "ParameterLora",
    "collect",
    "content_hash",
    "decode",
    "decode_entries",
    "encode",
    "encode_entries",
]

MAX_ENTRIES = 65_536  # 1,024 blocks of 64 modules
MAX_RANK = 65_536  # of all experts of one parameter together
MAX_BYTES = 2**31
MAX_HEADER_BYTES = 2**25  # safetensors describes each tensor in about 80 bytes, msgspec each entry in about 150
CARRIED = "LoRA (with rsLoRA, DoRA and target_parameters) and IA3 on linear layers"

BlockIndex: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=2**16)]
ModulePath: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*\Z", max_length=256)]
ParameterName: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_]+\Z", max_length=64)]
Probability: TypeAlias = Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)]


class Lora(msgspec.Struct, frozen=True, tag="lora", forbid_unknown_fields=True):
    """One LoRA on one linear layer.

    Tensors: A ``[r, in]``, B ``[out, r]``, and the magnitudes ``[out]`` if it is a DoRA.

    Attributes:
        module: path of the layer in its block, such as ``"self_attn.q_proj"``.
        scaling: factor of the update: alpha / r, or alpha / sqrt(r).
        dropout: probability, 0.0 outside of training.
        cast_input: whether the layer's input is cast to the dtype of A.
    """

    block: BlockIndex
    module: ModulePath
    scaling: float
    is_dora: bool = False
    dropout: Probability = 0.0
    cast_input: bool = True

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return ("A", "B", "magnitude") if self.is_dora else ("A", "B")


class ParameterLora(msgspec.Struct, frozen=True, tag="parameter_lora", forbid_unknown_fields=True):
    """One LoRA on one parameter, such as the fused weights of all experts.

    Tensors: A ``[experts * r, in]``, B ``[out, experts * r]``.

    Attributes:
        module, parameter: path of the module in its block and the parameter's name there.
        scaling: factor of the update.
        num_experts: first size of a three-dimensional parameter, 1 for a matrix.
        is_in_out: experts are stored as ``[in, out]`` and not as ``[out, in]``.
    """

    block: BlockIndex
    module: ModulePath
    parameter: ParameterName
    scaling: float
    num_experts: Annotated[int, msgspec.Meta(ge=1, lt=2**16)]
    is_in_out: bool

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return ("A", "B")


class Ia3(msgspec.Struct, frozen=True, tag="ia3", forbid_unknown_fields=True):
    """One IA3 vector: ``[1, in]``, applied to the layer's input, if feedforward; else ``[out, 1]``, to its output."""

    block: BlockIndex
    module: ModulePath
    is_feedforward: bool

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return ("scale",)


Entry: TypeAlias = Lora | ParameterLora | Ia3


@dataclass(frozen=True, slots=True)
class AdapterSet:
    """The adapters of some blocks at the client.

    Attributes:
        entries: in the order of blocks, modules, and of peft's active adapters at each.
        parameters: the live parameters, for each entry those of its ``tensor_names``.
    """

    entries: tuple[Entry, ...]
    parameters: tuple[torch.Tensor, ...]

    @property
    def has_dropout(self) -> bool:
        """Whether a pass needs a seed."""
        return any(isinstance(entry, Lora) and entry.dropout > 0 for entry in self.entries)

    @property
    def version(self) -> tuple[tuple[int, int], ...]:
        """Equal for as long as nothing was assigned to a parameter or written in place, except through ``.data``."""
        return tuple((id(parameter), parameter._version) for parameter in self.parameters)

    def items(self) -> Iterator[tuple[Entry, Sequence[torch.Tensor]]]:
        return _with_tensors(self.entries, self.parameters)

    def within(self, start: int, end: int) -> AdapterSet | None:
        """Those of blocks ``[start, end)``, for one hop; None if there are none."""
        kept = [
            (entry, tensors)
            for entry, tensors in _with_tensors(self.entries, self.parameters)
            if start <= entry.block < end
        ]
        if not kept:
            return None
        return AdapterSet(tuple(entry for entry, _ in kept), tuple(tensor for _, tensors in kept for tensor in tensors))


@dataclass(frozen=True, slots=True)
class Adapter:
    """The adapters of some blocks at a peer; entries and tensors fit each other.

    Attributes:
        tensors: for each entry those of its ``tensor_names``.
    """

    entries: tuple[Entry, ...]
    tensors: tuple[torch.Tensor, ...]

    @staticmethod
    def of(entries: Sequence[Entry], tensors: Sequence[torch.Tensor]) -> Adapter:
        """For tensors that came from outside.

        Raises:
            RemoteProtocolError: they do not belong to these entries.
        """
        _check_entries(entries)
        count = sum(len(entry.tensor_names) for entry in entries)
        if len(tensors) != count:
            raise RemoteProtocolError(f"adapter has {len(tensors)} tensors, its {len(entries)} entries need {count}")
        for entry, own in _with_tensors(entries, tensors):
            _check_tensors(entry, own)
        if not all(math.isfinite(torch.linalg.vector_norm(tensor, math.inf)) for tensor in tensors):  # reads it once
            raise RemoteProtocolError("adapter holds values that are not finite; did the training diverge?")
        return Adapter(tuple(entries), tuple(tensors))

    def leaves(self, device: torch.device | str, *, requires_grad: bool = False) -> Adapter:
        """A copy on ``device`` whose tensors are leaves of a new graph."""
        tensors = tuple(tensor.detach().to(device).requires_grad_(requires_grad) for tensor in self.tensors)
        return Adapter(self.entries, tensors)

    def items(self) -> Iterator[tuple[Entry, Sequence[torch.Tensor]]]:
        return _with_tensors(self.entries, self.tensors)


def _with_tensors(
    entries: Sequence[Entry], tensors: Sequence[torch.Tensor]
) -> Iterator[tuple[Entry, Sequence[torch.Tensor]]]:
    position = 0
    for entry in entries:
        count = len(entry.tensor_names)
        yield entry, tensors[position : position + count]
        position += count


# --- reading them off the client's blocks ---------------------------------------------------------------------------


def collect(blocks: Mapping[int, nn.Module]) -> AdapterSet | None:
    """The active adapters of ``blocks``, shadow blocks by index; None if there are none or they are disabled.

    Raises:
        UnsupportedCallError: something in a block is not carried: the message names it.
    """
    entries: list[Entry] = []
    parameters: list[torch.Tensor] = []
    for index, block in blocks.items():
        for path, layer in _layers_of_others(block, ""):
            for entry, tensors in _read_layer(index, path, layer):
                entries.append(entry)
                parameters.extend(tensors)
    return AdapterSet(tuple(entries), tuple(parameters)) if entries else None


def _layers_of_others(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that are no shadows, by path in the block."""
    for name, child in module._modules.items():
        if child is None:
            continue
        child_path = f"{path}.{name}" if path else name
        if is_shadow(child):
            yield from _layers_of_others(child, child_path)
        else:
            yield child_path, child


def _read_layer(block: int, path: str, layer: Any) -> Iterator[tuple[Entry, list[torch.Tensor]]]:
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    read = _READERS.get(kind)
    if read is None:
        raise UnsupportedCallError(f"{kind} at '{path}' of block {block} is not carried to peers, only {CARRIED}")
    where = f"'{path}' of block {block}"
    base = layer.base_layer
    if not is_shadow(base):
        if kind != _PARAMETER_LORA or f"{type(base).__module__}.{type(base).__name__}" != kind:
            raise UnsupportedCallError(f"adapters of two methods at {where} are not carried to peers; use one of them")
        yield from _read_layer(block, path, base)
    if layer.merged_adapters:
        raise UnsupportedCallError(f"adapters at {where} are merged, but peers keep their weights; unmerge them first")
    if layer._forward_pre_hooks or layer._forward_hooks:
        raise UnsupportedCallError(
            f"hooks at {where} do not run on peers (peft's adapter_names argument makes such hooks); remove them"
        )
    if not layer.disable_adapters:
        for name in layer.active_adapters:
            yield from read(block, path, layer, name)


def _read_lora(block: int, path: str, layer: Any, name: str) -> Iterator[tuple[Entry, list[torch.Tensor]]]:
    if name not in layer.lora_A:
        return
    variant = type(layer.lora_variant[name]).__name__ if name in layer.lora_variant else None
    if variant not in (None, "DoraLinearVariant"):
        raise UnsupportedCallError(f"{variant} at '{path}' of block {block} is not carried to peers, only {CARRIED}")
    down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if up.bias is not None:
        raise UnsupportedCallError(f"lora_bias at '{path}' of block {block} is not carried to peers; leave it off")
    entry = Lora(
        block=block,
        module=path,
        scaling=float(layer.scaling[name]),
        is_dora=variant is not None,
        dropout=dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0,
        cast_input=layer.cast_input_dtype_enabled,
    )
    magnitude = [layer.lora_magnitude_vector[name].weight] if entry.is_dora else []
    yield entry, [down.weight, up.weight, *magnitude]


def _read_parameter_lora(block: int, path: str, layer: Any, name: str) -> Iterator[tuple[Entry, list[torch.Tensor]]]:
    if name in layer.lora_A:
        entry = ParameterLora(
            block=block,
            module=path,
            parameter=layer.parameter_name,
            scaling=float(layer.scaling[name]),
            num_experts=layer.num_experts,
            is_in_out=bool(getattr(layer.get_base_layer(), "is_transposed", False)),
        )
        yield entry, [layer.lora_A[name].weight, layer.lora_B[name].weight]


def _read_ia3(block: int, path: str, layer: Any, name: str) -> Iterator[tuple[Entry, list[torch.Tensor]]]:
    if name in layer.ia3_l:
        yield Ia3(block=block, module=path, is_feedforward=layer.is_feedforward), [layer.ia3_l[name]]


_PARAMETER_LORA = "peft.tuners.lora.layer.ParamWrapper"
_READERS = {
    "peft.tuners.lora.layer.Linear": _read_lora,
    _PARAMETER_LORA: _read_parameter_lora,
    "peft.tuners.ia3.layer.Linear": _read_ia3,
}


# --- as bytes -------------------------------------------------------------------------------------------------------


_encoder = msgspec.json.Encoder()
_entries_decoder = msgspec.json.Decoder(list[Entry])
_METADATA_KEY = "remote_modules.adapter"


class _Header(msgspec.Struct):
    """Of a safetensors file, without its tensors."""

    metadata: dict[str, str] = msgspec.field(name="__metadata__", default_factory=dict)


_header_decoder = msgspec.json.Decoder(_Header)


def encode_entries(entries: Sequence[Entry]) -> bytes:
    """As JSON, for a request that carries its tensors in another way."""
    return _encoder.encode(entries)


def decode_entries(data: bytes | str) -> list[Entry]:
    """Raises: RemoteProtocolError: they are none, or too many, or one of them is out of bounds."""
    if len(data) > MAX_HEADER_BYTES:
        raise RemoteProtocolError(f"adapter entries have {len(data)} bytes, at most {MAX_HEADER_BYTES} are read")
    try:
        entries = _entries_decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise RemoteProtocolError(f"adapter entries are malformed: {first_line(exc)}") from exc
    _check_entries(entries)
    return entries


def encode(entries: Sequence[Entry], tensors: Sequence[torch.Tensor]) -> bytes:
    """A safetensors file, the same bytes for the same values. Tensors are ``"<entry>.<name>"``."""
    named = {
        f"{number}.{name}": tensor.detach().to("cpu").contiguous()
        for number, (entry, own) in enumerate(_with_tensors(entries, tensors))
        for name, tensor in zip(entry.tensor_names, own, strict=True)
    }
    return safetensors_torch.save(named, {_METADATA_KEY: encode_entries(entries).decode()})


def decode(data: bytes, *, max_bytes: int = MAX_BYTES) -> Adapter:
    """What `encode` wrote, every claim of it checked.

    Raises:
        RemoteProtocolError: it is too large, malformed, or its tensors do not belong to its entries.
    """
    if len(data) > max_bytes:
        raise RemoteProtocolError(f"adapter has {len(data)} bytes, at most {max_bytes} are taken")
    header_bytes = int.from_bytes(data[:8], "little")
    if header_bytes > min(len(data) - 8, MAX_HEADER_BYTES):
        raise RemoteProtocolError(f"adapter of {len(data)} bytes claims a header of {header_bytes} bytes")
    try:
        metadata = _header_decoder.decode(data[8 : 8 + header_bytes]).metadata
        named = safetensors_torch.load(data)
    except (msgspec.MsgspecError, SafetensorError, UnicodeDecodeError, KeyError, ValueError, RuntimeError) as exc:
        raise RemoteProtocolError(f"adapter is no readable safetensors file: {first_line(exc)}") from exc
    entries = decode_entries(metadata.get(_METADATA_KEY, ""))
    names = [f"{number}.{name}" for number, entry in enumerate(entries) for name in entry.tensor_names]
    if named.keys() != set(names):
        raise RemoteProtocolError(f"adapter has {len(named)} tensors, expected {len(names)} that are named by entry")
    return Adapter.of(entries, [named[name] for name in names])


def content_hash(data: bytes) -> str:
    """SHA-256 in hexadecimal: the name of an adapter in a peer's cache."""
    return hashlib.sha256(data).hexdigest()


def _check_entries(entries: Sequence[Entry]) -> None:
    if not 0 < len(entries) <= MAX_ENTRIES:
        raise RemoteProtocolError(f"adapter has {len(entries)} entries, expected 1 to {MAX_ENTRIES}")
    kinds: dict[tuple[int, str], type] = {}
    for entry in entries:
        if not isinstance(entry, Ia3) and not math.isfinite(entry.scaling):
            raise RemoteProtocolError(f"adapter of '{entry.module}' claims scaling {entry.scaling}")
        if kinds.setdefault((entry.block, entry.module), type(entry)) is not type(entry):
            raise RemoteProtocolError(f"adapters of '{entry.module}' of block {entry.block} are of several kinds")


def _check_tensors(entry: Entry, tensors: Sequence[torch.Tensor]) -> None:
    shapes = [list(tensor.shape) for tensor in tensors]
    if isinstance(entry, Ia3):
        is_right = len(shapes[0]) == 2 and shapes[0][0 if entry.is_feedforward else 1] == 1
    else:
        is_right = all(len(shape) == 2 for shape in shapes[:2]) and 1 <= shapes[0][0] == shapes[1][1] <= MAX_RANK
        is_right = is_right and (len(shapes) == 2 or shapes[2] == shapes[1][:1])
        if isinstance(entry, ParameterLora):
            is_right = is_right and shapes[0][0] % entry.num_experts == 0
    if not is_right or not all(tensor.numel() for tensor in tensors):
        raise RemoteProtocolError(f"adapter of '{entry.module}' of block {entry.block} claims shapes {shapes}")
    if not all(tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) for tensor in tensors):
        raise RemoteProtocolError(f"adapter of '{entry.module}' has dtype {tensors[0].dtype}, expected a float of it")
