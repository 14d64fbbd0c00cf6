"""Of each kind of family, one or more, through the code that makes docs/families.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmark_modules import load_benchmark
from transformers.utils import logging as transformers_logging

from remote_modules.client.autograd import RemotePass
from remote_modules.errors import UnsupportedCallError
from remote_modules.testing.inline_swarm import InlineSwarm

PATH = Path(__file__).parents[2] / "benchmarks" / "survey.py"

EXACT = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi", "phi3", "olmo2", "cohere2", "granite"),
    *("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "deepseek_v4", "longcat_flash", "dbrx", "llama4_text"),
    *("gpt2", "gptj", "gpt_neo", "gpt_neox", "gpt_bigcode", "bloom", "mpt", "opt", "falcon", "codegen", "ctrl"),
    *("bert", "bart", "xglm", "xmod", "modernbert-decoder", "openai-gpt", "emu3", "git", "doge", "minicpm3"),
    *("mamba", "mamba2", "jamba", "bamba", "zamba", "falcon_h1", "nemotron_h", "lfm2", "kimi_linear", "qwen3_next"),
    *("gemma3n_text", "gemma4_text", "qwen4_exp_text", "minimax", "inkling_text", "recurrent_gemma", "xlstm"),
)
PARTLY = {"recurrent_gemma": "keeps its past in its modules", "xlstm": "KV caches of 'xlstm' models are not carried"}
REFUSED = {
    "dory": "its blocks run in the order",
    "reformer": "its blocks return a ReformerOutput",
    "xlm": "changes hidden states between blocks 0 and 1",
}


survey = load_benchmark("survey")
transformers_logging.disable_progress_bar()  # it would leave a thread


def first_and_middle(cuts: list[int]) -> list[int]:
    return sorted({cuts[0], cuts[len(cuts) // 2]}) if cuts else []


@pytest.mark.parametrize("family", EXACT)
def test_family_is_exact(family: str) -> None:
    report = survey.survey(family, choose=first_and_middle)
    assert report.status == ("partly" if family in PARTLY else "exact"), report.reason
    assert PARTLY.get(family, "") in report.reason
    measured = {mode: found for mode, found in report.modes.items() if not isinstance(found, str)}
    assert measured.keys() >= {"forward", "backward"}
    assert set(measured.values()) == {0.0}


@pytest.mark.parametrize("family", REFUSED)
def test_family_that_is_not_carried_is_refused_with_the_reason(family: str) -> None:
    report = survey.survey(family)
    assert report.status == "refused"
    assert REFUSED[family] in report.reason
    assert report.routes == []


def test_difference_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    true_call = RemotePass.__call__

    def wrong(remote: RemotePass, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        outputs = true_call(remote, inputs)
        return outputs | {"hidden_states": outputs["hidden_states"] * (1 + 2e-7)}

    monkeypatch.setattr(RemotePass, "__call__", wrong)
    report = survey.survey("llama", choose=lambda cuts: cuts[:1])
    assert report.status == "wrong"
    assert report.reason.startswith("forward by 0:1 1:4 differs by ")
    assert report.modes["forward"] > 0.0
    assert report.modes["decode"] == 0.0
    assert report.own["forward"]["again"] == 0.0


def test_model_that_would_hide_its_past_is_refused(tmp_path: Path) -> None:
    local = survey.save_tiny("recurrent_gemma", tmp_path)
    tokens = torch.arange(4, 11).reshape(1, 7)
    with InlineSwarm(tmp_path, ["0:2", "2:4"]) as swarm, torch.no_grad():
        remote = swarm.load()
        with pytest.raises(UnsupportedCallError, match="keeps its past in its modules"):
            remote(input_ids=tokens, use_cache=True)
        expected, found = (model(input_ids=tokens, use_cache=False).logits for model in (local, remote))
    assert torch.equal(found, expected)


def test_forward_with_a_gradient_takes_the_kernels_of_the_local_one(tmp_path: Path) -> None:
    """Doge gives attention a mask that has a gradient, with which another kernel runs."""
    local = survey.save_tiny("doge", tmp_path)
    tokens = survey.Texts("doge").ids
    with InlineSwarm(tmp_path, ["0:2", "2:4"]) as swarm:
        remote = swarm.load()
        with torch.no_grad():
            plain, found_plain = (model(input_ids=tokens, use_cache=False).logits for model in (local, remote))
        graded, found_graded = (model(input_ids=tokens, use_cache=False).logits for model in (local, remote))
    assert not torch.equal(plain, graded)
    assert torch.equal(found_plain, plain)
    assert torch.equal(found_graded, graded)


def test_weights_of_a_peer_require_gradients_as_those_of_a_local_model(tmp_path: Path) -> None:
    """torch.matmul rounds in another way for weights that require none, under no_grad too."""
    local = survey.save_tiny("mamba", tmp_path)
    tokens = survey.Texts("mamba").ids[:, :11]
    with InlineSwarm(tmp_path, ["0:2", "2:4"]) as swarm, torch.no_grad():
        remote = swarm.load()
        expected, found = (model(input_ids=tokens, use_cache=False).logits for model in (local, remote))
        frozen = local.requires_grad_(False)(input_ids=tokens, use_cache=False).logits
    assert torch.equal(found, expected)
    assert not torch.equal(frozen, expected)
