"""What peft put into blocks is read completely or refused by name; bytes from outside are adapters or an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import safetensors.torch
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from peft.helpers import disable_input_dtype_casting
from torch import nn

from model.peft_support import adapted, local_model, remote_twin, token_ids
from remote_modules.errors import RemoteProtocolError, UnsupportedCallError
from remote_modules.model.adapter_entries import Entry, Ia3, LoHa, LoKr, Lora, Oft, ParameterLora, Prompt, RowLora
from remote_modules.model.adapter_reading import collect
from remote_modules.model.adapters import (
    Adapter,
    AdapterSet,
    content_hash,
    decode,
    decode_entries,
    encode,
    encode_entries,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

LORA: Entry = Lora(block=1, module="self_attn.q_proj", scaling=2.0)
DORA: Entry = Lora(block=1, module="mlp.up_proj", scaling=0.5, is_dora=True, dropout=0.25, cast_input=False)
EXPERTS: Entry = ParameterLora(
    block=2, module="mlp.experts", parameter="gate_up_proj", scaling=1.0, num_experts=2, is_in_out=True
)
IA3: Entry = Ia3(block=3, module="mlp.down_proj", is_feedforward=True)
LOHA: Entry = LoHa(block=4, module="mlp.up_proj", scaling=2.0, rank_dropout=0.5)
LOKR: Entry = LoKr(block=5, module="mlp.up_proj", scaling=2.0, is_w1_whole=True, is_w2_whole=False)
FACTORS: Entry = LoKr(block=5, module="mlp.gate_proj", scaling=2.0, is_w1_whole=False, is_w2_whole=True)
OFT: Entry = Oft(block=6, module="mlp.up_proj", size=3, num_inputs=6, neumann_terms=0)
SHARED: Entry = Oft(block=6, module="mlp.gate_proj", size=4, num_inputs=8, is_shared=True)
PROMPT: Entry = Prompt(block=6)
ROWS: Entry = RowLora(block=7, module="mlp.up_proj", group=2, scaling=2.0)
ENTRIES = [LORA, DORA, EXPERTS, IA3, LOHA, LOKR, FACTORS, OFT, SHARED, PROMPT, ROWS]
SHAPES = [
    *([2, 5], [7, 2]),
    *([3, 5], [7, 3], [7]),
    *([4, 5], [7, 4]),
    [1, 5],
    *([6, 2], [2, 5], [6, 2], [2, 5]),
    *([2, 3], [3, 1], [1, 4]),
    *([2, 1], [1, 3], [3, 4]),
    [2, 3],
    [1, 6],
    [3, 5],
    *([2, 5], [7, 2]),
]


def tensors() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape) for shape in SHAPES]


def model_with(tmp_path: Path, *configs: PeftConfig, family: str = "llama") -> PeftModel:
    return adapted(remote_twin(local_model(tmp_path, family)), *configs)


def blocks_of(model: PeftModel) -> dict[int, nn.Module]:
    layers: Any = model.get_submodule("base_model.model.model.layers")
    return dict(enumerate(layers))


def collected(model: PeftModel) -> AdapterSet:
    found = collect(blocks_of(model))
    assert found is not None
    return found


# --- collect --------------------------------------------------------------------------------------------------------


def test_blocks_without_adapters_have_none(tmp_path: Path) -> None:
    model = remote_twin(local_model(tmp_path, "llama"))
    assert collect(dict(enumerate(model.model.layers))) is None
    only_prompt = model_with(tmp_path, LoraConfig(target_modules=["lm_head"]))
    assert collect(blocks_of(only_prompt)) is None


def test_lora_is_read_with_its_live_parameters(tmp_path: Path) -> None:
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj"], layers_to_transform=[1, 2], lora_dropout=0.5, use_rslora=True
    )
    model = model_with(tmp_path, config)
    model.eval()
    found = collected(model)
    assert found.entries == tuple(Lora(block=block, module="self_attn.q_proj", scaling=3.0) for block in (1, 2))
    layer = blocks_of(model)[1].get_submodule("self_attn.q_proj")
    assert found.parameters[0] is layer.get_submodule("lora_A.a0").weight
    assert found.parameters[1] is layer.get_submodule("lora_B.a0").weight
    assert not found.has_dropout
    model.train()
    assert [entry.dropout for entry in collected(model).entries if isinstance(entry, Lora)] == [0.5, 0.5]
    assert collected(model).has_dropout
    with disable_input_dtype_casting(model):
        assert [entry.cast_input for entry in collected(model).entries if isinstance(entry, Lora)] == [False, False]


def test_methods_and_their_order_are_read(tmp_path: Path) -> None:
    both = model_with(tmp_path, LoraConfig(target_modules=["v_proj"], r=2), LoraConfig(target_modules=["v_proj"], r=3))
    assert [parameter.shape[0] for parameter in collected(both).parameters[:4:2]] == [2, 3]
    tuner: Any = both.base_model
    tuner.set_adapter(["a1", "a0"])
    assert [parameter.shape[0] for parameter in collected(both).parameters[:4:2]] == [3, 2]
    both.set_adapter("a1")
    assert {parameter.shape[0] for parameter in collected(both).parameters[::2]} == {3}
    dora = collected(model_with(tmp_path, LoraConfig(target_modules=["v_proj"], use_dora=True)))
    assert [list(parameter.shape) for parameter in dora.parameters[:3]] == [[8, 32], [16, 8], [16]]
    ia3 = IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"])
    entries = collected(model_with(tmp_path, ia3)).entries[:2]
    assert [(entry.module, entry.is_feedforward) for entry in entries if isinstance(entry, Ia3)] == [
        ("self_attn.v_proj", False),
        ("mlp.down_proj", True),
    ]


def test_fused_experts_are_read_by_parameter(tmp_path: Path) -> None:
    model = model_with(tmp_path, LoraConfig(r=2, target_modules="all-linear"), family="mixtral")
    found = [entry for entry in collected(model).entries if entry.block == 0 and isinstance(entry, ParameterLora)]
    assert {(entry.module, entry.parameter, entry.num_experts) for entry in found} == {
        ("mlp.experts", "gate_up_proj", 4),
        ("mlp.experts", "down_proj", 4),
        ("mlp.gate", "weight", 1),
    }


def test_updates_of_low_rank_and_rotations_are_read(tmp_path: Path) -> None:
    loha = LoHaConfig(target_modules=["q_proj"], r=2, alpha=3, rank_dropout=0.25)
    model = model_with(tmp_path, loha)
    assert collected(model.train()).entries[0] == LoHa(
        block=0, module="self_attn.q_proj", scaling=1.5, rank_dropout=0.25
    )
    assert collected(model).has_dropout
    assert not collected(model.eval()).has_dropout
    layer: Any = blocks_of(model)[0].get_submodule("self_attn.q_proj")
    assert collected(model).parameters[1] is layer.hada_w1_b["a0"]
    lokr = LoKrConfig(target_modules=["v_proj"], r=1, alpha=3, decompose_both=True, rank_dropout_scale=True)
    found = collected(model_with(tmp_path, lokr))
    assert found.entries[0] == LoKr(
        block=0, module="self_attn.v_proj", scaling=3.0, is_w1_whole=False, scales_dropout=True
    )
    assert [list(tensor.shape) for tensor in found.parameters[:4]] == [[4, 1], [1, 4], [4, 1], [1, 8]]
    oft = OFTConfig(target_modules=["v_proj"], oft_block_size=8, r=0, use_cayley_neumann=False)
    assert collected(model_with(tmp_path, oft)).entries[0] == Oft(
        block=0, module="self_attn.v_proj", size=8, num_inputs=32, neumann_terms=0
    )


def test_convolutions_are_refused_by_name(tmp_path: Path) -> None:
    model = remote_twin(local_model(tmp_path, "llama"))
    block: Any = model.model.layers[1]
    configs: list[tuple[str, PeftConfig]] = [
        ("loha", LoHaConfig(r=2, target_modules=["conv"])),
        ("lokr", LoKrConfig(r=2, target_modules=["conv"])),
        ("oft", OFTConfig(oft_block_size=4, target_modules=["conv"])),
    ]
    for kind, config in configs:
        holder: Any = nn.ModuleDict({"conv": nn.Conv1d(4, 4, 3) if kind != "oft" else nn.Conv2d(4, 4, 3)})
        block.mlp.up_proj = get_peft_model(holder, config).get_submodule("base_model.model.conv")
        with pytest.raises(UnsupportedCallError, match=rf"peft.tuners.{kind}.layer.Conv.d at 'mlp.up_proj' of block 1"):
            collect(dict(enumerate(model.model.layers)))


def test_disabled_adapters_are_none(tmp_path: Path) -> None:
    model = model_with(tmp_path, LoraConfig(target_modules=["q_proj"]))
    with model.disable_adapter():
        assert collect(blocks_of(model)) is None
    assert collect(blocks_of(model)) is not None


def test_part_of_the_blocks(tmp_path: Path) -> None:
    found = collected(model_with(tmp_path, LoraConfig(target_modules=["q_proj", "v_proj"])))
    part = found.within(1, 3)
    assert part is not None
    assert part.entries == found.entries[2:6]
    assert all(one is other for one, other in zip(part.parameters, found.parameters[4:12], strict=True))
    assert found.within(4, 9) is None


def test_version_changes_with_the_values(tmp_path: Path) -> None:
    model = model_with(tmp_path, LoraConfig(target_modules=["q_proj"]))
    before = collected(model).version
    assert collected(model).version == before
    with torch.no_grad():
        collected(model).parameters[0].add_(1)
    assert collected(model).version != before


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (LoHaConfig(target_modules=["q_proj"], module_dropout=0.1), r"module_dropout at 'self_attn.q_proj' of block 0"),
        (LoKrConfig(target_modules=["q_proj"], module_dropout=0.1), r"module_dropout at 'self_attn.q_proj' of block 0"),
        (OFTConfig(target_modules=["q_proj"], oft_block_size=4, r=0, coft=True), r"coft at 'self_attn.q_proj'"),
        (OFTConfig(target_modules=["q_proj"], oft_block_size=1, r=0), r"oft_block_size 1 at 'self_attn.q_proj'"),
        (OFTConfig(target_modules=["q_proj"], num_cayley_neumann_terms=65), r"is 65, at most 64 are carried"),
        (VeraConfig(target_modules=["q_proj"], r=4), r"peft.tuners.vera.layer.Linear at"),
        (LoraConfig(target_modules=["q_proj"], lora_bias=True), r"lora_bias at 'self_attn.q_proj' of block 0"),
    ],
    ids=["loha", "lokr", "coft", "oft_block_size", "terms", "vera", "lora_bias"],
)
@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*:UserWarning")
def test_what_is_not_carried_is_refused_by_name(config: PeftConfig, named: str, tmp_path: Path) -> None:
    model = get_peft_model(remote_twin(local_model(tmp_path, "llama")), config)
    with pytest.raises(UnsupportedCallError, match=named):
        model(input_ids=token_ids())


def test_training_a_whole_module_is_refused(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["up_proj"])
    with pytest.raises(UnsupportedCallError, match=r"'mlp.up_proj.weight' .* requires_grad must stay False"):
        get_peft_model(remote_twin(local_model(tmp_path, "llama")), config)


def test_module_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    model = remote_twin(local_model(tmp_path, "llama"))
    model.model.layers[2].mlp.up_proj = nn.Linear(32, 48)
    with pytest.raises(UnsupportedCallError, match=r"torch.nn.modules.linear.Linear at 'mlp.up_proj' of block 2"):
        model(input_ids=token_ids())


def test_merging_is_refused(tmp_path: Path) -> None:
    model = model_with(tmp_path, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UnsupportedCallError, match="cannot be changed from here"):
        model.merge_adapter()
    layer: Any = blocks_of(model)[0].get_submodule("self_attn.q_proj")
    layer.merged_adapters.append("a0")
    with pytest.raises(UnsupportedCallError, match="'self_attn.q_proj' of block 0 are merged"):
        collect(blocks_of(model))


# --- bytes ----------------------------------------------------------------------------------------------------------


def test_bytes_give_the_same_adapter() -> None:
    data = encode(ENTRIES, tensors())
    adapter = decode(data)
    assert adapter.entries == tuple(ENTRIES)
    assert all(torch.equal(one, other) for one, other in zip(adapter.tensors, tensors(), strict=True))
    assert encode(ENTRIES, tensors()) == data
    assert decode_entries(encode_entries(ENTRIES)) == ENTRIES
    assert [len(own) for _, own in adapter.items()] == [2, 3, 2, 1, 4, 3, 3, 1, 1, 1, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_of_each_tensor_is_kept(dtype: torch.dtype) -> None:
    assert decode(encode([LORA], [tensor.to(dtype) for tensor in tensors()[:2]])).tensors[0].dtype == dtype


def test_hash_is_that_of_the_content() -> None:
    data = encode(ENTRIES, tensors())
    other = encode(ENTRIES, [tensor + 1 for tensor in tensors()])
    assert content_hash(data) == content_hash(bytes(data)) != content_hash(other)
    assert len(content_hash(data)) == 64


def test_leaves_are_apart_from_what_was_decoded() -> None:
    adapter = decode(encode([LORA], tensors()[:2]))
    leaves = adapter.leaves("cpu", requires_grad=True)
    leaves.tensors[0].sum().backward()
    assert leaves.tensors[0].grad is not None
    assert not adapter.tensors[0].requires_grad


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 100, 500, -1])
def test_cut_bytes_are_refused(cut: int) -> None:
    with pytest.raises(RemoteProtocolError, match="adapter"):
        decode(encode(ENTRIES, tensors())[:cut])


def test_header_with_a_changed_byte_is_an_adapter_or_an_error_of_one_line() -> None:
    data = encode(ENTRIES, tensors())
    outcomes = set()
    for position in range(8 + int.from_bytes(data[:8], "little")):
        changed = bytearray(data)
        changed[position] ^= 0x15
        outcomes.add(outcome_of(bytes(changed)))
    assert "an adapter" in outcomes
    assert len(outcomes) > 10
    assert not [outcome for outcome in outcomes if "\n" in outcome]


def outcome_of(data: bytes) -> str:
    try:
        decode(data)
    except RemoteProtocolError as exc:
        return str(exc)
    return "an adapter"


def test_too_many_bytes_are_refused() -> None:
    data = encode(ENTRIES, tensors())
    with pytest.raises(RemoteProtocolError, match=f"has {len(data)} bytes, at most 100 are taken"):
        decode(data, max_bytes=100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": -1}, "malformed"),
        ({"block": 2**16}, "malformed"),
        ({"module": "a..b"}, "malformed"),
        ({"module": "a" * 300}, "malformed"),
        ({"module": ""}, "malformed"),
        ({"module": "a\n"}, "malformed"),
        ({"scaling": "x"}, "malformed"),
        ({"scaling": 1e999}, "malformed"),
        ({"dropout": 1.0}, "malformed"),
        ({"type": "nothing"}, "malformed"),
        ({"type": "loha"}, "unknown field"),
        ({"more": 1}, "malformed"),
    ],
)
def test_entries_out_of_bounds_are_refused(change: dict[str, Any], message: str) -> None:
    entry = msgspec.to_builtins(LORA) | change
    with pytest.raises(RemoteProtocolError, match=message):
        decode_entries(json.dumps([entry]))


@pytest.mark.parametrize(
    ("entry", "change"),
    [
        (OFT, {"size": 1}),
        (OFT, {"size": 2**24}),
        (OFT, {"num_inputs": 2**24}),
        (OFT, {"neumann_terms": 65}),
        (OFT, {"neumann_terms": -1}),
        (LOHA, {"rank_dropout": 1.0}),
        (LOHA, {"scaling": 1e999}),
        (LOKR, {"rank_dropout": -0.1}),
        (LOKR, {"is_w1_whole": 1}),
        (PROMPT, {"module": "mlp"}),
        (PROMPT, {"block": 2**16}),
        (ROWS, {"group": 0}),
        (ROWS, {"group": 256}),
        (ROWS, {"is_dora": True}),
    ],
)
def test_entries_of_other_methods_out_of_bounds_are_refused(entry: Entry, change: dict[str, Any]) -> None:
    data = json.dumps([msgspec.to_builtins(entry) | change])
    with pytest.raises(RemoteProtocolError, match="malformed|claims scaling"):
        decode_entries(data)


def test_numbers_of_entries_are_bounded() -> None:
    for entries in ([], [LORA] * 65_537):
        with pytest.raises(RemoteProtocolError, match=f"has {len(entries)} entries, expected 1 to 65536"):
            decode_entries(encode_entries(entries))
    with pytest.raises(RemoteProtocolError, match="at most 33554432 are read"):
        decode_entries(b" " * (2**25 + 1))


def test_only_so_many_adapters_are_at_one_module() -> None:
    assert len(decode_entries(encode_entries([LORA] * 16))) == 16
    with pytest.raises(RemoteProtocolError, match="adapter has 17 entries at one place, expected at most 16"):
        decode_entries(encode_entries([LORA] * 17))


def test_two_kinds_at_one_module_are_refused() -> None:
    other = Ia3(block=1, module="self_attn.q_proj", is_feedforward=False)
    with pytest.raises(RemoteProtocolError, match="'self_attn.q_proj' of block 1 are of several kinds"):
        decode_entries(encode_entries([LORA, other]))


@pytest.mark.parametrize(
    ("entry", "shapes"),
    [
        (LORA, [[2, 5], [7, 3]]),
        (LORA, [[2, 5], [7]]),
        (LORA, [[0, 5], [7, 0]]),
        (LORA, [[2, 0], [7, 2]]),
        (DORA, [[2, 5], [7, 2], [8]]),
        (ROWS, [[2, 5], [7, 3]]),
        (DORA, [[2, 5], [7, 2], [7, 1]]),
        (EXPERTS, [[3, 5], [7, 3]]),
        (IA3, [[5]]),
        (IA3, [[5, 1]]),
        (IA3, [[2, 5]]),
        (LOHA, [[6, 2], [2, 5], [6, 3], [3, 5]]),
        (LOHA, [[6, 2], [3, 5], [6, 2], [3, 5]]),
        (LOHA, [[6, 2], [2], [6, 2], [2]]),
        (LOHA, [[6, 0], [0, 5], [6, 0], [0, 5]]),
        (LOKR, [[2], [3, 1], [1, 4]]),
        (LOKR, [[2, 3], [3, 1], [2, 4]]),
        (LOKR, [[2, 3], [3, 70_000], [70_000, 4]]),
        (FACTORS, [[2, 1], [1, 3], [3, 4, 1]]),
        (OFT, [[3, 3]]),
        (OFT, [[2, 2]]),
        (OFT, [[6]]),
        (Oft(block=0, module="mlp", size=4, num_inputs=6), [[1, 6]]),
        (SHARED, [[2, 6]]),
        (PROMPT, [[5]]),
        (PROMPT, [[0, 5]]),
        (PROMPT, [[65_537, 1]]),
    ],
)
def test_shapes_that_do_not_fit_each_other_are_refused(entry: Entry, shapes: list[list[int]]) -> None:
    with pytest.raises(RemoteProtocolError, match=f"'{entry.place}' of block {entry.block} claims shapes"):
        Adapter.of([entry], [torch.ones(shape) for shape in shapes])


def test_tensors_that_do_not_belong_are_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="has 7 tensors, its 11 entries need 23"):
        Adapter.of(ENTRIES, tensors()[:7])
    data = safetensors.torch.save(
        {"0.A": torch.ones(2, 5), "0.C": torch.ones(7, 2)},
        {"remote_modules.adapter": encode_entries([LORA]).decode()},
    )
    with pytest.raises(RemoteProtocolError, match="2 tensors, expected 2 that are named by entry"):
        decode(data)
    with pytest.raises(RemoteProtocolError, match="malformed"):
        decode(safetensors.torch.save({"0.A": torch.ones(2, 5)}))


def test_values_that_are_no_numbers_are_refused() -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        wrong = tensors()
        wrong[1][0, 0] = value
        with pytest.raises(RemoteProtocolError, match="not finite"):
            Adapter.of(ENTRIES, wrong)
    with pytest.raises(RemoteProtocolError, match="has dtype torch.int64"):
        Adapter.of([LORA], [torch.ones(2, 5, dtype=torch.int64), torch.ones(7, 2, dtype=torch.int64)])
