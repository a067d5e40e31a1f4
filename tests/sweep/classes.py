"""Which text model classes there are: asked of transformers, so that a new release brings its own rows."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sweep.sizes import VARIANTS

Use = Literal["decoder", "encoder"]
# A config with one of these parts belongs to a model that does more than text.
_OTHER_PARTS = re.compile(r"vision|audio|text|vq|speech|encoder|depth|backbone|assistant")
_TEXT_TOWERS = re.compile(r"TextModel$|TextTransformer$|TextEncoderModel$|EncoderTextModel$")
# What the argument is called that takes the cache, before and since transformers 5.24.
CACHES = {"past_key_values", "cache"}
_OTHER_OUTPUTS = re.compile(r"music|speech")
_OTHER_INPUTS = re.compile(r"pixel|visual|speech|audio|video|bbox|image|input_features|xpath")
# Tasks whose models read text alone; decoders among them are found by their own table.
_ENCODER_TABLES = (
    "MASKED_LM",
    "TEXT_ENCODING",
    "TOKEN_CLASSIFICATION",
    "QUESTION_ANSWERING",
    "MULTIPLE_CHOICE",
    "SEQUENCE_CLASSIFICATION",
)


@dataclass(frozen=True)
class Family:
    """One model class and the config it is built from.

    Attributes:
        name: The config's `model_type`; with `:decoder` where an encoder's layers serve as a decoder.
        use: Whether it writes text or reads it.
        model: The class that is built.
        part: `"encoder"` where only the encoder of the built model is used.
        settings: What differs from the class as it is by default, for a variant of it.
    """

    name: str
    use: Use
    model: type[PreTrainedModel]
    part: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)

    @property
    def config(self) -> type[transformers.PretrainedConfig]:
        """The config class of the model class."""
        return self.model.config_class


@lru_cache
def families() -> dict[str, Family]:
    """All text model classes, by name; a class that serves several model types comes once."""
    found: dict[str, Family] = {}
    for family in (*_decoders(), *_encoders(), *_text_towers()):
        same = [f for f in found.values() if f.model is family.model and f.use == family.use]
        if not same and family.name not in found:
            found[family.name] = family
    return found


def variants() -> dict[str, Family]:
    """Classes under settings that change what they compute, by names of their own."""
    found = {}
    for name, (base, settings) in VARIANTS.items():
        if base not in families():
            continue
        family = replace(families()[base], name=name, settings=settings)
        if name.endswith(":bidirectional"):
            model = _table("", prefix="MODEL")[base]
            family = replace(family, use="encoder", model=model)
        found[name] = family
    return found


def _decoders() -> list[Family]:
    found = []
    masked = {CONFIG_MAPPING[name] for name in _table("MASKED_LM")}
    for model in _table("CAUSAL_LM").values():
        config = model.config_class
        if _is_of_two(config) or _is_of_many(config) or model.__name__.endswith("ForConditionalGeneration"):
            continue
        if model.main_input_name != "input_ids" or _OTHER_OUTPUTS.search(config.model_type):
            continue
        found.append(Family(config.model_type + ":decoder" * (config in masked), "decoder", model))
    return found


def _encoders() -> list[Family]:
    causal = {model.config_class for model in _table("CAUSAL_LM").values()}
    masked = {CONFIG_MAPPING[name] for name in _table("MASKED_LM")}
    found = []
    base = _table("", prefix="MODEL")
    for table in _ENCODER_TABLES:
        for name, model in _table(table).items():
            config = CONFIG_MAPPING[name]
            if _is_of_two(config) or _is_of_many(config) or (config in causal and config not in masked):
                continue
            model = model if table == "TEXT_ENCODING" else base.get(name)
            if model is not None and model.main_input_name == "input_ids" and not _reads_more(model):
                found.append(Family(config.model_type, "encoder" if config in masked else _use(model), model))
    for name, model in _table("SEQ_TO_SEQ_CAUSAL_LM").items():
        config = CONFIG_MAPPING[name]
        if _is_of_many(config) and not name.startswith("t5gemma"):
            continue
        alone = getattr(transformers, base.get(name, model).__name__.replace("Model", "EncoderModel"), None)
        if _is_model(alone):
            found.append(Family(config.model_type, "encoder", alone))
        elif name in base and base[name].main_input_name == "input_ids" and not _reads_more(base[name]):
            found.append(Family(config.model_type, "encoder", base[name], part="encoder"))
    return found


def _text_towers() -> list[Family]:
    """The text models inside models of several kinds of input, where they have a class of their own."""
    covered = {model.config_class for model in _table("CAUSAL_LM").values()}
    found = []
    for name in dir(transformers):
        if not _TEXT_TOWERS.search(name):
            continue
        model = getattr(transformers, name)
        if not _is_model(model) or model.config_class in covered or _is_of_two(model.config_class):
            continue
        if model.main_input_name != "input_ids" or _OTHER_OUTPUTS.search(model.config_class.model_type):
            continue
        if not _is_of_many(model.config_class):
            found.append(Family(model.config_class.model_type, _use(model), model))
    return found


def _table(task: str, prefix: str = "MODEL_FOR") -> dict[str, type[PreTrainedModel]]:
    names = getattr(auto, f"{prefix}_{task}_MAPPING_NAMES" if task else f"{prefix}_MAPPING_NAMES")
    found = {}
    for name, model in names.items():
        model = getattr(transformers, model if isinstance(model, str) else model[0], None)
        if name in CONFIG_MAPPING and _is_model(model):
            found[name] = model
    return found


def _use(model: type[PreTrainedModel]) -> Use:
    """A model that takes a cache writes."""
    return "decoder" if CACHES & set(inspect.signature(model.forward).parameters) else "encoder"


def _is_model(model: object) -> bool:
    """Whether it is a model class, and not what stands for one whose requirements are not installed."""
    return inspect.isclass(model) and issubclass(model, PreTrainedModel) and "config_class" in dir(model)


def _is_of_two(config: type[transformers.PretrainedConfig] | None) -> bool:
    """Whether it is an encoder-decoder model's."""
    return config is None or bool(_default(config, "is_encoder_decoder"))


def _default(config: type[transformers.PretrainedConfig], name: str) -> object:
    parameter = inspect.signature(config.__init__).parameters.get(name)
    if parameter is not None and parameter.default is not inspect.Parameter.empty:
        return parameter.default
    return getattr(config, name, None)


def _is_of_many(config: type[transformers.PretrainedConfig]) -> bool:
    return any(_OTHER_PARTS.search(part) for part in config.sub_configs)


def _reads_more(model: type[PreTrainedModel]) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return any(_OTHER_INPUTS.search(name) for name in parameters)
