"""Models other than causal language models, images, and the states of all blocks: equal to the local model's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_modules import load_benchmark
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import logging as transformers_logging

from remote_modules.client import answers
from remote_modules.errors import UnsupportedCallError
from remote_modules.model.classes import model_class
from remote_modules.model.shrink import tiny_config, tiny_model
from remote_modules.testing.inline_swarm import InlineSwarm

from .image_inputs import image_inputs

Tensors = Sequence[torch.Tensor | None]
Run = Callable[[PreTrainedModel], Tensors]


table = load_benchmark("auto_classes")
transformers_logging.disable_progress_bar()  # it would leave a thread


def save(folder: Path, family: str, auto_class: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """Write a tiny checkpoint, and load it as a user would."""
    cls, config = model_class(tiny_config(family), auto_class)
    tiny_model(config, cls=cls).save_pretrained(folder)
    loaded: PreTrainedModel = auto_class.from_pretrained(folder)
    loaded.eval()
    return loaded


def check_equal(expected: Tensors, found: Tensors) -> None:
    assert len(found) == len(expected) > 0
    for index, (a, b) in enumerate(zip(expected, found, strict=True)):
        if a is None or b is None:
            assert a is b, f"tensor {index} is only in one of them"
        else:
            assert torch.equal(a, b), f"tensor {index} differs by {(a - b).abs().max()}"


def generate(model: PreTrainedModel, inputs: dict[str, Any], **options: Any) -> Any:
    options |= {"do_sample": False, "return_dict_in_generate": True, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        return model.generate(**inputs, **options)  # type: ignore[operator]  # of the mixin's many returns


def client_gradients(model: PreTrainedModel, names: Sequence[str]) -> list[torch.Tensor | None]:
    parameters = dict(model.named_parameters())
    return [parameters[name].grad for name in names]


# classification


@pytest.mark.parametrize(
    ("task", "family"),
    [
        ("sequence classification", "llama"),
        ("sequence classification", "mixtral"),
        ("sequence classification", "bert"),
        ("sequence classification", "distilbert"),
        ("sequence classification", "deberta-v2"),
        ("token classification", "qwen3"),
        ("token classification", "roberta"),
        ("question answering", "llama"),
        ("question answering", "falcon"),
        ("image-text to text", "idefics2"),
    ],
)
def test_task_is_exact_forward_and_backward(task: str, family: str) -> None:
    row = table.measure(task, family)
    assert (row.status, row.reason) == ("exact", "")


def test_what_is_not_carried_is_refused_by_name() -> None:
    row = table.measure("token classification", "funnel")
    assert row.status == "refused"
    assert "architecture 'funnel' is not carried" in row.reason


# images


def forward_and_backward(inputs: dict[str, Any], names: Sequence[str], model: PreTrainedModel) -> Tensors:
    logits = model(**inputs, use_cache=False).logits
    model.zero_grad()
    logits.square().sum().backward()
    return [logits.detach(), *client_gradients(model, names)]


def generated(inputs: dict[str, Any], model: PreTrainedModel) -> Tensors:
    output = generate(model, inputs, max_new_tokens=4, output_logits=True)
    return [output.sequences, *output.logits]


@pytest.mark.parametrize(
    "family",
    [
        *("aya_vision", "gemma3", "glm4v", "idefics3", "internvl", "llava", "mistral3", "paligemma"),
        *("qwen2_5_vl", "qwen2_vl", "smolvlm"),
    ],
)
def test_images_are_exact_forward_backward_and_generated_from(family: str, tmp_path: Path) -> None:
    local = save(tmp_path, family, AutoModelForImageTextToText)
    inputs = image_inputs(local.config)
    with torch.no_grad():
        logits, others = (local(**image_inputs(local.config, seed=seed)).logits for seed in (0, 1))
    assert not torch.equal(logits, others), "the image is not looked at"
    with InlineSwarm(tmp_path, ["0:1", "1:4"]) as swarm:
        remote = swarm.load(AutoModelForImageTextToText)
        names = [name for name, _ in remote.named_parameters()]
        assert any("vision" in name or "visual" in name for name in names)
        for run in (partial(forward_and_backward, inputs, names), partial(generated, inputs)):
            check_equal(run(local), run(remote))


def test_features_between_blocks_are_refused_by_name(tmp_path: Path) -> None:
    local = save(tmp_path, "qwen3_vl", AutoModelForImageTextToText)
    inputs = image_inputs(local.config)
    text = {"input_ids": inputs["input_ids"][:, -8:]}
    with InlineSwarm(tmp_path, ["0:2", "2:4"]) as swarm:
        remote = swarm.load(AutoModelForImageTextToText)
        check_equal(generated(text, local), generated(text, remote))
        with pytest.raises(
            UnsupportedCallError, match="^argument 'deepstack_visual_embeds' of kind list is not carried"
        ):
            remote(**inputs)
        with pytest.raises(UnsupportedCallError, match="deepstack_visual_embeds"):
            generate(remote, inputs, max_new_tokens=2)


# states of all blocks


def texts() -> dict[str, Any]:
    ids = torch.randint(4, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def by_argument(model: PreTrainedModel) -> Tensors:
    with torch.no_grad():
        states: Tensors = model(**texts(), output_hidden_states=True, use_cache=False).hidden_states
    return states


def by_config(model: PreTrainedModel) -> Tensors:
    model.config.output_hidden_states = True
    with torch.no_grad():
        states: Tensors = model(**texts(), use_cache=False).hidden_states
    model.config.output_hidden_states = False
    return states


def by_generate(model: PreTrainedModel) -> Tensors:
    steps = generate(model, texts(), max_new_tokens=3, output_hidden_states=True).hidden_states
    return [state for step in steps for state in step]


@pytest.mark.parametrize(
    "family",
    [
        *("bert", "bloom", "falcon", "gemma3_text", "gpt2", "gpt_neo", "gpt_oss", "gptj", "llama", "mpt", "opt"),
        "qwen3_next",
    ],
)
def test_states_of_all_blocks(family: str, tmp_path: Path) -> None:
    local = save(tmp_path, family)
    expected = [run(local) for run in (by_argument, by_config, by_generate)]
    used = copy.deepcopy(local)  # it was called with output_hidden_states=True before its blocks are replaced
    cut, end = (1, 2) if family == "bloom" else (2, 4)
    with InlineSwarm(tmp_path, [f"0:{cut}", f"{cut}:{end}"]) as swarm:
        for remote in (swarm.load(), swarm.layers().attach(used)):
            for run, states in zip((by_argument, by_config, by_generate), expected, strict=True):
                check_equal(states, run(remote))


def test_selected_states(tmp_path: Path) -> None:
    local = save(tmp_path, "llama")

    def run(model: PreTrainedModel) -> Tensors:
        with torch.no_grad():
            states: Tensors = model(**texts(), output_hidden_states=[0, 2, -1]).hidden_states
        return states

    expected = run(local)
    assert [state is not None for state in expected] == [True, False, True, False, True]
    with InlineSwarm(tmp_path, ["0:2", "2:4"]) as swarm:
        check_equal(expected, run(swarm.load()))


def test_one_list_of_blocks_in_two_models(tmp_path: Path) -> None:
    first = save(tmp_path, "llama")
    expected = by_argument(first)
    second = copy.deepcopy(first)
    with InlineSwarm(tmp_path, ["0:2", "2:4"]) as swarm:
        layers = swarm.layers()
        for remote in (layers.attach(first), layers.attach(second), first, swarm.load()):
            check_equal(expected, by_argument(remote))


def test_gradient_through_states_within_spans(tmp_path: Path) -> None:
    local = save(tmp_path, "llama")

    def run(model: PreTrainedModel) -> Tensors:
        states = model(**texts(), output_hidden_states=True, use_cache=False).hidden_states
        model.zero_grad()
        (states[1].square().sum() + states[3].pow(3).sum()).backward()
        return client_gradients(model, ["model.embed_tokens.weight"])

    with InlineSwarm(tmp_path, ["0:2", "2:4"]) as swarm:
        check_equal(run(local), run(swarm.load()))


def test_overflow_in_a_gradient_is_believed(tmp_path: Path) -> None:
    """A scaled loss may overflow, which its scaler looks for; one peer for each block is enough to say so."""
    save(tmp_path, "llama")
    with InlineSwarm(tmp_path, ["0:2", "2:4"]) as swarm:
        remote = swarm.load()
        (remote(**texts(), use_cache=False).logits * torch.inf).sum().backward()
        (gradient,) = client_gradients(remote, ["model.embed_tokens.weight"])
    assert gradient is not None
    assert not bool(torch.isfinite(gradient).all())


def scaled_steps(model: Any) -> tuple[list[float], torch.Tensor]:
    """Scales of a loss scaler after each step, and an embedding trained in half precision."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    weight = model.get_input_embeddings().weight.requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, backoff_factor=2.0**-10)
    scales = []
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            logits = model(**texts(), use_cache=False).logits
            loss = logits.float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales, weight.detach().clone()


@pytest.mark.parametrize("spans", [["0:2", "2:4"], ["0:2", "2:4"] * 2])
def test_overflow_inside_of_blocks_skips_the_step_as_locally(
    spans: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peer gives the same again, or another one agrees: it is the model's, and nobody is left out for it."""
    doubted: list[bytes] = []
    local = save(tmp_path, "llama")
    places = answers._places

    def noted(tensors: Any) -> bytes:
        doubted.append(places(tensors))
        return doubted[-1]

    monkeypatch.setattr(answers, "_places", noted)
    with InlineSwarm(tmp_path, spans) as swarm:
        remote: Any = swarm.load()
        found = scaled_steps(remote)
        router = remote.model.layers._handle.swarm.router
        num_shut, began_s = router.num_shut(), swarm.io.loop.time()
    scales, weight = scaled_steps(local)
    assert scales == [2.0**20, *scales[1:]]  # the first one overflowed
    assert scales[-1] < 2.0**30
    assert found[0] == scales
    assert torch.equal(found[1], weight)
    assert len(doubted) == 2  # and confirmed at once
    assert doubted[0] == doubted[1]
    assert num_shut == 0
    assert began_s < 100.0  # nothing waited for a deadline, in virtual time


# mixtures of experts


def router_outputs(names: Sequence[str], model: PreTrainedModel) -> Tensors:
    inputs = texts()
    output = model(**inputs, labels=inputs["input_ids"], output_router_logits=True, use_cache=False)
    model.zero_grad()
    output.loss.backward()
    routers = [logits.detach() for logits in output.router_logits]
    return [output.loss.detach(), output.aux_loss.detach(), *routers, *client_gradients(model, names)]


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "olmoe", "qwen3_moe"])
def test_router_logits_auxiliary_loss_and_its_gradient(family: str, tmp_path: Path) -> None:
    local = save(tmp_path, family)
    with InlineSwarm(tmp_path, ["0:2", "2:4"]) as swarm:
        remote = swarm.load()
        names = [name for name, _ in remote.named_parameters()]
        expected = router_outputs(names, local)
        assert float(expected[1]) > 0.0  # type: ignore[arg-type]
        check_equal(expected, router_outputs(names, remote))
        check_equal(expected, router_outputs(names, swarm.layers().attach(local)))
