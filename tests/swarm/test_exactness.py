"""Remote equals local, to the last bit, in fp32 on the CPU: three peers, a random llama of eight blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

PROMPTS = torch.tensor([[5, 17, 3, 88, 41, 9, 60, 2, 33], [71, 4, 4, 19, 50, 23, 8, 66, 12]])
MASK = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
NUM_NEW = 12

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beam": {"do_sample": False, "num_beams": 4},
    "beam_returns": {"do_sample": False, "num_beams": 4, "num_return_sequences": 3},
    "beam_sampling": {"do_sample": True, "num_beams": 3},
    "chunked_prefill": {"do_sample": False, "prefill_chunk_size": 4},
    "no_cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize("padding", ["full", "left_padded"])
@pytest.mark.parametrize("mode", MODES)
def test_tokens_and_scores_are_equal(model: PreTrainedModel, local: PreTrainedModel, mode: str, padding: str) -> None:
    def generate(which: Any) -> Any:
        torch.manual_seed(3)
        return which.generate(
            PROMPTS,
            attention_mask=MASK if padding == "left_padded" else torch.ones_like(MASK),
            max_new_tokens=NUM_NEW,
            return_dict_in_generate=True,
            output_scores=True,
            pad_token_id=0,
            **MODES[mode],
        )

    expected, got = generate(local), generate(model)
    assert torch.equal(got.sequences, expected.sequences)
    for score, expected_score in zip(got.scores, expected.scores, strict=True):
        finite = torch.isfinite(expected_score)
        assert (score[finite] - expected_score[finite]).abs().max() == 0.0


@pytest.mark.parametrize("padding", ["full", "left_padded"])
def test_logits_of_prefill_and_decode_are_equal(model: PreTrainedModel, local: PreTrainedModel, padding: str) -> None:
    mask = MASK if padding == "left_padded" else torch.ones_like(MASK)

    def logits(which: Any) -> list[torch.Tensor]:
        outputs, cache = [], None
        with torch.no_grad():
            for start, end in ((0, 5), (5, 6), (6, 9)):
                positions = (mask[:, :end].cumsum(-1) - 1).clamp(min=0)[:, start:]
                given: dict[str, Any] = {} if cache is None else {cache[0]: cache[1]}
                output = which(
                    PROMPTS[:, start:end], attention_mask=mask[:, :end], position_ids=positions, use_cache=True, **given
                )
                name = "cache" if "cache" in output else "past_key_values"
                cache = (name, output[name])
                outputs.append(output.logits)
        return outputs

    for got, expected in zip(logits(model), logits(local), strict=True):
        assert (got - expected).abs().max() == 0.0


def test_loss_and_gradient_of_inputs_are_equal(model: PreTrainedModel, local: PreTrainedModel) -> None:
    def train(which: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        which.zero_grad()
        inputs = local.get_input_embeddings()(PROMPTS).detach().requires_grad_()
        loss = which(inputs_embeds=inputs, attention_mask=MASK, labels=PROMPTS).loss
        loss.backward()
        return loss.detach(), inputs.grad, which.lm_head.weight.grad.clone()

    for got, expected in zip(train(model), train(local), strict=True):
        assert (got - expected).abs().max() == 0.0
