from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import NUM_BLOCKS, load_whole, save_tiny
from transformers import LlamaForSequenceClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging

from model.support import opened, opened_files
from remote_modules.errors import CheckpointError, UnsupportedCallError
from remote_modules.model.checkpoint import open_checkpoint
from remote_modules.model.loading import check_span, load_client_part, load_span, read_config
from remote_modules.model.shadow import is_shadow
from remote_modules.model.stack import StackSpec
from remote_modules.spans import Span


def span_of(folder: Path, span: str, **kwargs: Any) -> tuple[PreTrainedModel, StackSpec]:
    checkpoint, config, cls = opened(folder)
    return load_span(checkpoint, config, cls, Span.parse(span), **kwargs)


def client_of(folder: Path, **kwargs: Any) -> tuple[PreTrainedModel, StackSpec]:
    checkpoint, config, cls = opened(folder)
    return load_client_part(checkpoint, config, cls, **kwargs)


def shards_of(folder: Path, blocks: set[int | None]) -> set[str]:
    """Files that hold a tensor of these blocks; None stands for what lies outside of all."""
    checkpoint = open_checkpoint(str(folder))
    where = StackSpec(path="model.layers", num_blocks=NUM_BLOCKS).blocks_of_keys(checkpoint.weight_map)
    return set(checkpoint.shards(lambda key: where.get(key) in blocks))


def delete_shards_except(folder: Path, names: set[str]) -> int:
    others = [path for path in folder.glob("*.safetensors") if path.name not in names]
    for path in others:
        path.unlink()
    return len(others)


@pytest.fixture
def copy(llama_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_folder, tmp_path / "copy"))


# One for each kind of head, embedding, expert fusion, and key that is renamed while it is loaded.
FAMILIES = ["llama", "gemma2", "mixtral", "gpt_oss", "deepseek_v3", "gpt_neox", "gpt2", "opt", "bloom", "gemma3n_text"]
KEPT_AROUND = {"model.decoder.embed_positions.weight"}  # a span needs it: owners give blocks what it returns


@pytest.fixture(scope="module", params=FAMILIES)
def family_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp(request.param), request.param)


# Spans


@pytest.mark.parametrize("span", ["0:1", "1:3", "3:4", "0:4"])
def test_span_equals_the_whole_load_bit_for_bit(family_folder: Path, span: str) -> None:
    model, stack = span_of(family_folder, span)
    whole = load_whole(family_folder)
    weights = model.state_dict()
    where = stack.blocks_of_keys(whole.state_dict())
    expected = {
        name: tensor
        for name, tensor in whole.state_dict().items()
        if where.get(name) in Span.parse(span) or name in KEPT_AROUND
    }
    assert weights.keys() == expected.keys()
    assert expected.keys() - KEPT_AROUND
    for name, tensor in expected.items():
        assert weights[name].dtype == tensor.dtype
        assert torch.equal(weights[name], tensor), name


def test_span_is_frozen_in_eval_mode_and_of_the_stock_class(llama_folder: Path) -> None:
    model, _ = span_of(llama_folder, "1:2")
    assert type(model) is type(load_whole(llama_folder))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


def test_blocks_outside_the_span_are_stubs(llama_folder: Path) -> None:
    model, stack = span_of(llama_folder, "1:3")
    blocks = stack.blocks(model)
    assert len(blocks) == NUM_BLOCKS
    assert [is_shadow(block) for block in blocks] == [True, False, False, True]


def test_span_opens_only_its_shards(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = shards_of(llama_folder, {0})
    assert needed < shards_of(llama_folder, {0, 1, 2, 3, None})
    with opened_files(monkeypatch) as names:
        span_of(llama_folder, "0:1")
    assert names == needed


def test_span_loads_though_all_other_shards_are_gone(copy: Path) -> None:
    assert delete_shards_except(copy, shards_of(copy, {1})) > 0
    model, _ = span_of(copy, "1:2")
    assert sum(1 for _ in model.parameters()) == 9


def test_single_file_checkpoint_loads_a_span(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, shard_size="1GB")
    model, _ = span_of(folder, "2:3")
    assert {name.split(".")[2] for name, _ in model.named_parameters()} == {"2"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_converted_as_a_whole_load_does(llama_folder: Path, dtype: torch.dtype) -> None:
    model, _ = span_of(llama_folder, "1:2", dtype=dtype)
    whole = load_whole(llama_folder, dtype=dtype).state_dict()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, whole[name])


def test_dtype_is_the_checkpoints_by_default(tmp_path: Path) -> None:
    model, _ = span_of(save_tiny(tmp_path, dtype="bfloat16"), "0:2")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_missing_shard_is_named(copy: Path) -> None:
    missing = min(shards_of(copy, {2}))
    (copy / missing).unlink()
    with pytest.raises(CheckpointError, match=rf"lacks shard '{missing}' that its index names$"):
        span_of(copy, "2:3")


def drop_tensor(folder: Path, name: str) -> None:
    """Take a tensor out of its shard and of the index."""
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text("utf-8"))
    shard = folder / index["weight_map"].pop(name)
    index_path.write_text(json.dumps(index), "utf-8")
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard, metadata={"format": "pt"})


def test_missing_tensor_is_named(copy: Path) -> None:
    drop_tensor(copy, "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors, first 'model.layers.1.mlp.up_proj.weight'$"):
        span_of(copy, "0:2")
    span_of(copy, "2:4")


def test_span_without_any_tensor_is_refused(copy: Path) -> None:
    for name in [key for key in open_checkpoint(str(copy)).weight_map if "layers.3." in key]:
        drop_tensor(copy, name)
    with pytest.raises(
        CheckpointError, match=r"^checkpoint '.*' has no tensor of the wanted part of LlamaForCausalLM$"
    ):
        span_of(copy, "3:4")


def test_tensor_of_another_shape_is_refused_in_one_line(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text("utf-8"))
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}), "utf-8")
    with pytest.raises(CheckpointError, match=r"^weights of '.*' do not load: ") as caught:
        span_of(copy, "0:1")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"x" * 100])
def test_shard_of_garbage_is_refused_in_one_line(copy: Path, data: bytes) -> None:
    for name in shards_of(copy, {0}):
        (copy / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"^weights of '.*' do not load: ") as caught:
        span_of(copy, "0:1")
    assert "\n" not in str(caught.value)


def test_shard_cut_short_is_refused_in_one_line(copy: Path) -> None:
    for name in shards_of(copy, {0}):
        data = (copy / name).read_bytes()
        (copy / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"^weights of '.*' do not load: ") as caught:
        span_of(copy, "0:1")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("span", ["0:5", "4:5", "3:100"])
def test_span_outside_the_model_is_refused(llama_folder: Path, span: str) -> None:
    with pytest.raises(ValueError, match=rf"^span {span} is outside model '.*' of 4 blocks \(0:4\)$"):
        span_of(llama_folder, span)


def test_span_to_the_last_block_is_inside() -> None:
    check_span(Span(3, 4), 4, "x")


# The client's part


def test_client_part_holds_no_block_and_opens_only_its_shards(
    family_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, _, _ = opened(family_folder)
    with opened_files(monkeypatch) as names:
        model, stack = client_of(family_folder)
    whole = load_whole(family_folder)
    where = stack.blocks_of_keys(whole.state_dict())
    expected = {name: tensor for name, tensor in whole.state_dict().items() if name not in where}
    weights = model.state_dict()
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name
    assert all(is_shadow(block) for block in stack.blocks(model))
    of_blocks = stack.blocks_of_keys(checkpoint.weight_map)
    assert names == set(checkpoint.shards(lambda key: key not in of_blocks))


def test_client_part_loads_though_the_shards_of_blocks_are_gone(copy: Path) -> None:
    assert delete_shards_except(copy, shards_of(copy, {None})) > 0
    model, _ = client_of(copy)
    assert sorted(name for name, _ in model.named_parameters()) == [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
    ]


def test_tied_head_is_the_embedding(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in open_checkpoint(str(folder)).weight_map
    weights, whole = client_of(folder)[0].state_dict(keep_vars=True), load_whole(folder).state_dict()
    assert weights["lm_head.weight"] is weights["model.embed_tokens.weight"]
    assert torch.equal(weights["lm_head.weight"], whole["model.embed_tokens.weight"])


def test_untied_head_is_its_own(llama_folder: Path) -> None:
    weights = client_of(llama_folder)[0].state_dict()
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])


def test_client_part_takes_the_options_of_from_pretrained(llama_folder: Path) -> None:
    model, _ = client_of(llama_folder, dtype=torch.bfloat16, attn_implementation="eager")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"


def test_missing_head_is_named(copy: Path) -> None:
    drop_tensor(copy, "lm_head.weight")
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors, first 'lm_head.weight'$"):
        client_of(copy)


def test_head_of_another_task_is_new(llama_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint, config, _ = opened(llama_folder)
    config.num_labels = 5
    model, _ = load_client_part(checkpoint, config, LlamaForSequenceClassification)
    score = model.get_parameter("score.weight")
    assert score.shape == (5, config.hidden_size)
    assert 0 < score.std() < 2 * config.initializer_range
    assert score.requires_grad
    name = "model.embed_tokens.weight"
    assert torch.equal(model.get_parameter(name), load_whole(llama_folder).get_parameter(name))
    assert "lacks 'score.weight' of LlamaForSequenceClassification: it is new, train it" in caplog.text


WEIGHT = "mlp.up_proj.weight"


def strange_class(cls: type[PreTrainedModel], look: Callable[[Any], object]) -> type[PreTrainedModel]:
    """One that looks into its last block while it is loaded."""

    def tie_weights(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        look(self.model.layers[3])

    return type("StrangeForCausalLM", (cls,), {"tie_weights": tie_weights})


def test_class_that_looks_at_blocks_that_are_not_held_loads_in_part(llama_folder: Path) -> None:
    checkpoint, config, cls = opened(llama_folder)
    shapes = []
    strange = strange_class(cls, lambda block: shapes.append(block.mlp.up_proj.weight.shape))
    model, _ = load_span(checkpoint, config, strange, Span(0, 1))
    assert set(shapes) == {(48, 32)}
    assert {name.split(".")[2] for name, _ in model.named_parameters()} == {"0"}


@pytest.mark.parametrize(
    ("look", "reason"),
    [
        (
            lambda block: dict(block.named_parameters())[WEIGHT],
            rf"^Strange.* cannot be loaded in part: .*{WEIGHT}",
        ),
        (lambda block: block.mlp.up_proj.weight.data.mul_(2), rf"^weight '{WEIGHT}' .* cannot be changed from here"),
    ],
    ids=["lacks", "writes"],
)
def test_class_that_needs_blocks_that_are_not_held_is_refused_in_one_line(
    llama_folder: Path, look: Callable[[Any], object], reason: str
) -> None:
    checkpoint, config, cls = opened(llama_folder)
    with pytest.raises(UnsupportedCallError, match=reason) as caught:
        load_span(checkpoint, config, strange_class(cls, look), Span(0, 1))
    assert "\n" not in str(caught.value)


# The config


def write_config(folder: Path, text: str | dict[str, Any]) -> Path:
    (folder / "config.json").write_text(text if isinstance(text, str) else json.dumps(text), "utf-8")
    return folder


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"model_type": "no_such_type"}',
        '{"model_type": 3}',
        '{"model_type": "llama", "hidden_size": "large"}',
        '{"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}',
        '{"model_type": "llama", "rope_parameters": 3}',
    ],
)
def test_config_of_garbage_is_refused_in_one_line(copy: Path, text: str) -> None:
    checkpoint = open_checkpoint(str(write_config(copy, text)))
    with pytest.raises(CheckpointError, match=r"^config of '.*' is not usable: .") as caught:
        read_config(checkpoint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", [None, "remote_modules_canary"])
def test_config_needing_code_of_the_repository_is_refused_and_not_run(
    copy: Path, tmp_path: Path, model_type: str | None
) -> None:
    canary = tmp_path / "canary"
    (copy / "configuration_canary.py").write_text(
        f"open({str(canary)!r}, 'w').close()\n"
        "from transformers import LlamaConfig\n"
        "class CanaryConfig(LlamaConfig):\n"
        "    model_type = 'remote_modules_canary'\n",
        "utf-8",
    )
    known = {} if model_type is None else {"model_type": model_type}
    write_config(copy, known | {"auto_map": {"AutoConfig": "configuration_canary.CanaryConfig"}})
    with pytest.raises(CheckpointError, match=r"^config of '.*' is not usable: it needs code from the repository, "):
        read_config(open_checkpoint(str(copy)))
    assert not canary.exists()


def test_known_type_with_code_beside_it_loads_without_running_it(copy: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for name in ("configuration_canary", "modeling_canary"):
        (copy / f"{name}.py").write_text(f"open({str(canary)!r}, 'w').close()\n", "utf-8")
    config = json.loads((copy / "config.json").read_text("utf-8"))
    auto_map = {"AutoConfig": "configuration_canary.C", "AutoModelForCausalLM": "modeling_canary.M"}
    write_config(copy, config | {"auto_map": auto_map})
    model, _ = span_of(copy, "0:1")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not canary.exists()


# Leaving no trace


def test_loading_leaves_the_logging_of_transformers_as_it_was(llama_folder: Path) -> None:
    verbosity = transformers_logging.get_verbosity()
    had_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_info()
    transformers_logging.enable_progress_bar()
    try:
        span_of(llama_folder, "0:1")
        assert transformers_logging.get_verbosity() == logging.INFO
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.set_verbosity(verbosity)
        if not had_bar:
            transformers_logging.disable_progress_bar()


def test_loading_leaves_no_temporary_folder_and_prints_nothing(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    span_of(llama_folder, "0:1")
    client_of(llama_folder)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
