"""Which model class stands for a model type: one rule, and the cause where there is none.

The class that an auto mapping names, in the order of TASKS (a head reads the norms' outputs, the
bare model returns them; generation first, because it has an encoder, a decoder and a head); without
one the last class of the type's own module whose forward takes this configuration.
"""

from __future__ import annotations

import functools
import importlib
import inspect

import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

WHOLE = "-whole"
TASKS = (
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "MASKED_LM",
    "CTC",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "OBJECT_DETECTION",
    "UNIVERSAL_SEGMENTATION",
    "SEMANTIC_SEGMENTATION",
    "DEPTH_ESTIMATION",
    "QUESTION_ANSWERING",
    "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLASSIFICATION",
)
LAST = ("MODEL", "BACKBONE", "PRETRAINING", "IMAGE", "TEXT_ENCODING")


class NoModel(Exception):
    """A model type has no model that could be built; the message is the cause."""

    part = "a part of another configuration, without a model of its own"
    package = "needs a package that is not installed"

    def __init__(self, category: str, detail: str) -> None:
        self.category = category
        super().__init__(detail)


def further_types() -> list[str]:
    """All model types that no causal-LM class of the installed transformers takes, sorted."""
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return sorted(name for name in CONFIG_MAPPING_NAMES if name not in causal)


def whole_models() -> list[str]:
    """Encoder-decoders whose causal LM is their decoder alone, as a whole: `bart-whole`."""
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    both = {name for task in TASKS[:2] for name in _mappings()[task] if name in causal}
    return sorted(f"{name}{WHOLE}" for name in both)


@functools.cache
def model_class(model_type: str) -> type[PreTrainedModel]:
    """The class that stands for a model type. Raises NoModel where there is none."""
    for names in _mappings().values():
        if found := names.get(model_type):
            found = found[0] if isinstance(found, (tuple, list)) else found
            if cls := getattr(transformers, found, None):
                return cls
    own = [cls for cls in _own_classes(model_type) if _takes(cls, model_type)]
    if not own:
        raise NoModel(NoModel.part, "no model class takes this configuration by itself")
    return own[-1]


@functools.cache
def _mappings() -> dict[str, dict]:
    """Task: {model type: class name}, in the order of the rule."""
    found = {
        name.removeprefix("MODEL_").removeprefix("FOR_").removesuffix("_NAMES"): names
        for name, names in vars(modeling_auto).items()
        if name.startswith("MODEL_") and name.endswith("MAPPING_NAMES")
    }
    found = {name.removesuffix("_MAPPING") or "MODEL": names for name, names in found.items()}
    found["MODEL"] = found.pop("MAPPING", found.get("MODEL", {}))
    middle = sorted(set(found) - set(TASKS) - set(LAST))
    return {task: found[task] for task in (*TASKS, *middle, *LAST) if task in found}


def _own_classes(model_type: str) -> list[type]:
    package, _, stem = CONFIG_MAPPING[model_type].__module__.rpartition(".")
    module = f"{package}.{stem.replace('configuration_', 'modeling_')}"
    try:
        members = vars(importlib.import_module(module)).values()
    except ModuleNotFoundError as error:
        if error.name == module:
            raise NoModel(NoModel.part, "its module has no modeling file of its own") from error
        raise NoModel(NoModel.package, str(error.name)) from error
    return [c for c in members if isinstance(c, type) and c.__module__ == module]


def _takes(cls: type, model_type: str) -> bool:
    """A model for exactly this configuration, with a forward of its own that needs something."""
    if not issubclass(cls, PreTrainedModel) or cls.config_class is not CONFIG_MAPPING[model_type]:
        return False
    forward = inspect.signature(cls.forward)
    return "_forward_unimplemented" not in cls.forward.__name__ and len(forward.parameters) > 1
