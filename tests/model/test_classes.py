from __future__ import annotations

from typing import Any

import pytest
from tiny_models import tiny_config
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from remote_modules.errors import UnsupportedCallError
from remote_modules.model import shrink
from remote_modules.model.classes import model_class, serving_class


@pytest.mark.parametrize(
    ("auto_class", "name"),
    [
        (AutoModelForCausalLM, "LlamaForCausalLM"),
        (AutoModelForSequenceClassification, "LlamaForSequenceClassification"),
        (AutoModelForTokenClassification, "LlamaForTokenClassification"),
        (AutoModelForQuestionAnswering, "LlamaForQuestionAnswering"),
        (AutoModel, "LlamaModel"),
    ],
)
def test_class_is_the_one_that_the_auto_class_builds(auto_class: Any, name: str) -> None:
    config = tiny_config()
    cls, own = model_class(config, auto_class)
    assert cls.__name__ == name
    assert own is config


def test_text_class_takes_the_text_config_of_a_model_with_images() -> None:
    config = shrink.tiny_config("qwen3_5")
    cls, own = model_class(config)
    assert own is config.get_text_config(decoder=True)
    assert cls.config_class is type(own)


def test_class_with_images_takes_the_whole_config() -> None:
    config = shrink.tiny_config("gemma3")
    cls, own = model_class(config)
    assert cls.__name__ == "Gemma3ForConditionalGeneration"
    assert own is config


@pytest.mark.parametrize("named", ["FunnelModel", "FunnelBaseModel"])
def test_of_several_classes_the_config_names_one(named: str) -> None:
    config = AutoConfig.for_model("funnel", architectures=[named])
    assert model_class(config, AutoModel)[0].__name__ == named


@pytest.mark.parametrize(
    ("family", "auto_class"), [("vit", AutoModelForCausalLM), ("llama", AutoModelForMaskedLM)], ids=str
)
def test_type_without_such_a_class_is_refused(family: str, auto_class: Any) -> None:
    with pytest.raises(UnsupportedCallError, match=rf"^model type '{family}' has no class for {auto_class.__name__}$"):
        model_class(AutoConfig.for_model(family), auto_class)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "LlamaForCausalLM"),
        ("bert", "BertLMHeadModel"),
        ("distilbert", "DistilBertForSequenceClassification"),
        ("t5", "T5ForSequenceClassification"),
    ],
)
def test_served_class_is_the_first_that_has_the_blocks(family: str, name: str) -> None:
    cls, _ = serving_class(AutoConfig.for_model(family))
    assert cls.__name__ == name


def test_type_that_is_no_language_model_cannot_be_served() -> None:
    with pytest.raises(UnsupportedCallError, match=r"^model type 'vit' has no language model in transformers$"):
        serving_class(AutoConfig.for_model("vit"))
