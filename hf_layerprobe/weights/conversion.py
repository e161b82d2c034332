"""Which tensors of a checkpoint's files make up which parameter of the model.

The names in the files are often older or flatter than those of the modules: the base model's prefix is missing, a module
was renamed, each expert has its own tensor. Transformers holds those rules in its conversion mapping and applies them to
whole checkpoints; this applies the same rules to the parameters that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from ..errors import LayerProbeError


@dataclass
class Source:
    """Where the values of a parameter come from.

    Attributes:
        parameter: Its name in the model; of several that one conversion makes, the first.
        converter: Makes the parameter from the tensors; None where one tensor is the parameter.
        keys: The tensors' names in the files, each with the converter's pattern that it matched.
    """

    parameter: str
    converter: WeightConverter | None = None
    keys: list[tuple[str, str | None]] = field(default_factory=list)


def find_sources(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, Source]:
    """Parameter name → its source among the tensors `keys`, for every parameter that has one."""
    parameters = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    sources: dict[str, Source] = {}
    for key in sorted(keys, key=dot_natural_key):  # experts in the order of their numbers
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        if name not in parameters and key in parameters:  # a rule for older files that a newer name happens to match
            name, pattern = key, None
        if name not in parameters:
            continue
        converter = by_pattern[pattern] if pattern is not None else None
        source = sources.setdefault(name, Source(name, converter))
        if converter is None:
            source.keys = source.keys or [(key, None)]
            continue
        source.keys.append((key, pattern))
        for target in converter.target_patterns[1:]:
            sources.setdefault(name.replace(converter.target_patterns[0], target), source)
    # Of parameters that layers share, the files hold one.
    for name, twin in getattr(model, "all_tied_weights_keys", {}).items():
        if twin in sources and sources[twin].converter is None:
            sources.setdefault(name, sources[twin])
    return sources


def load_parameter(
    model: PreTrainedModel, name: str, source: Source, read: Callable[[str], torch.Tensor]
) -> torch.Tensor:
    """The values of the parameter `name`.

    Args:
        model: The model (on the meta device) that the conversion is for.
        name: The parameter's name.
        source: Its source.
        read: Reads a tensor of the files by name.

    Raises:
        LayerProbeError: The tensors cannot be converted.
    """
    if source.converter is None:
        return read(source.keys[0][0])
    converter = deepcopy(source.converter)
    for key, pattern in source.keys:
        converter.add_tensor(source.parameter, key, pattern, read(key))
    try:
        converted = converter.convert(source.parameter, model=model, config=model.config)
        converted = (converted[0] if isinstance(converted, tuple) else converted)[
            name
        ]  # with errors, in Transformers 5.0
    except Exception as error:  # conversions raise whatever their tensors make torch raise
        files = ", ".join(key for key, _ in source.keys[:3]) + (", …" if len(source.keys) > 3 else "")
        raise LayerProbeError(
            f"The parameter {name!r} cannot be made from the {len(source.keys)} tensors of the checkpoint that stand for "
            f"it ({files}): {type(error).__name__}: {error}. Load the model and pass the model."
        ) from error
    return converted[0] if isinstance(converted, list) else converted
