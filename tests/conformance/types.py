"""The model types of the installed Transformers, and the class that each is tried with."""

from __future__ import annotations

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

# Where a type has several classes, the one that says most of it: a head that generates before a bare model.
PREFERRED = (
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "MASKED_LM",
    "IMAGE_TEXT_TO_TEXT",
    "CAUSAL_LM",
    "MULTIMODAL_LM",
    "IMAGE_CLASSIFICATION",
    "",
)


def model_types() -> dict[str, list[str]]:
    """Type → names of its classes, the preferred ones first, for every type that has a model."""
    names = {"": "MODEL_MAPPING_NAMES"} | {
        mapping[len("MODEL_FOR_") : -len("_MAPPING_NAMES")]: mapping
        for mapping in sorted(vars(modeling_auto))
        if mapping.startswith("MODEL_FOR_") and mapping.endswith("_MAPPING_NAMES")
    }
    order = [*(task for task in PREFERRED if task in names), *(task for task in names if task not in PREFERRED)]
    types: dict[str, list[str]] = {}
    for task in order:
        for model_type, classes in getattr(modeling_auto, names[task]).items():
            for name in [classes] if isinstance(classes, str) else classes:
                types.setdefault(model_type, []).append(name)
    return {name: list(dict.fromkeys(types[name])) for name in sorted(types)}


def classes_of(model_type: str) -> tuple[type, list[type]] | None:
    """The config class of a type and its model classes; None where Transformers names them but does not have them."""
    config = getattr(transformers, CONFIG_MAPPING_NAMES.get(model_type, ""), None)
    classes = [found for name in model_types()[model_type] if (found := getattr(transformers, name, None))]
    return config, sorted(classes, key=lambda each: not _reads(each, config))


def _reads(model_class: type, config: type | None) -> bool:
    """Whether a class reads a config as what it is: ShieldGemma 2 names one of Gemma 3, which reloads as that."""
    try:
        return model_class.config_class is config
    except ImportError:  # of a library that is not here
        return True
