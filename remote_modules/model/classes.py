"""Which class of transformers a config is for."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from remote_modules.errors import UnsupportedCallError

__all__ = ["model_class", "serving_class"]

_SERVABLE = (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)


def model_class(
    config: PreTrainedConfig, auto_class: Any = AutoModelForCausalLM
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class that ``auto_class`` builds from ``config``, and the (text) config that it takes.

    Raises:
        UnsupportedCallError: transformers has none.
    """
    found = _lookup(config, auto_class)
    if found is None:
        raise UnsupportedCallError(f"model type '{config.model_type}' has no class for {auto_class.__name__}")
    return found


def serving_class(config: PreTrainedConfig) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """A class that holds the blocks of ``config``: whichever head it has, the blocks are the same.

    Raises:
        UnsupportedCallError: transformers has none.
    """
    found = [pair for auto_class in _SERVABLE if (pair := _lookup(config, auto_class)) is not None]
    saved = [pair for pair in found if pair[0].__name__ in (config.architectures or ())]  # knows the names in its files
    if found:
        return (saved or found)[0]
    raise UnsupportedCallError(f"model type '{config.model_type}' has no language model in transformers")


def _lookup(config: PreTrainedConfig, auto_class: Any) -> tuple[type[PreTrainedModel], PreTrainedConfig] | None:
    mapping = auto_class._model_mapping  # no public accessor; the name is unchanged since transformers 4.0
    if type(config) not in mapping:
        return None
    found: Any = mapping[type(config)]
    if isinstance(found, tuple | list):
        named = [cls for cls in found if cls.__name__ in (config.architectures or ())]
        found = (named or found)[0]
    text = config.get_text_config(decoder=True)
    if text is not config and found.config_class is type(text) and found.config_class is not type(config):
        return found, text
    return found, config
