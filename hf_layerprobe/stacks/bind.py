"""Binds a stack to the config field that sets its length, by building the model on the meta device and looking.

Never by value alone: in a third of all model types several config fields hold the same number. One candidate field is
edited in a copy of the config, the copy is written out and read back as `from_pretrained` would, the model is built
from it without memory, and the binding holds when this stack, and no other, has the new length.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import LayerProbeError, PruningError
from .config_edit import edited_config

COUNT_NAME = re.compile(r"layer|depth|block")

_bindings: dict[tuple[type, str, int, str], ConfigBinding] = {}


@dataclass(frozen=True)
class ConfigBinding:
    """The config field that holds a stack's length.

    Attributes:
        node: Attribute names that lead from the model's config to the node that has the field.
        field: The field in that node.
    """

    node: tuple[str, ...]
    field: str

    @property
    def path(self) -> str:
        return ".".join((*self.node, self.field))


def bind(model: nn.Module, path: str, num_layers: int) -> ConfigBinding:
    """Finds the config field for the stack at `path`; the result is cached per model class and config.

    Raises:
        LayerProbeError: No field found; the message names every field that was tried and what happened.
    """
    if not isinstance(model, PreTrainedModel):
        raise LayerProbeError(
            f"{type(model).__name__} is not a transformers PreTrainedModel, so it has no config to edit. Pass the model "
            "inside it; merge a PEFT adapter first with `model.merge_and_unload()`."
        )
    key = (type(model), path, num_layers, model.config.to_json_string(use_diff=False))
    if key not in _bindings:
        _bindings[key] = _probe(model, path, num_layers)
    return _bindings[key]


def build_on_meta(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the same class from another config, without memory for its tensors."""
    with torch.device("meta"):
        return type(model)(config)


def _probe(model: PreTrainedModel, path: str, num_layers: int) -> ConfigBinding:
    tried = []
    # Dropping the second layer leaves the first and the last alone, which are the ones that configs treat specially.
    keep = [i for i in range(num_layers) if i != min(1, num_layers - 1)]
    lengths = _list_lengths(model)
    for binding in _candidates(model.config, num_layers):
        try:
            probe = build_on_meta(model, edited_config(model.config, binding, num_layers, keep))
        except PruningError:
            raise
        except Exception as error:  # whatever a config validator or a constructor raises only rules this field out
            tried.append(f"{binding.path} ({type(error).__name__}: {error})")
            continue
        found = _list_lengths(probe)
        changed = {name for name, length in found.items() if lengths.get(name) != length}
        if found.get(path) == len(keep) and all(_same_place(name, path) for name in changed):
            return binding
        tried.append(f"{binding.path} (changes {', '.join(sorted(changed)) or 'no list'})")
    raise LayerProbeError(
        f"No config field of {type(model).__name__} sets the length of {path!r} alone ({num_layers} layers now). "
        f"Tried: {'; '.join(tried) or f'none of its fields holds {num_layers}'}. Without one, a model with fewer layers "
        "could not be loaded again, so this stack cannot be pruned (it can still be scored)."
    )


def _candidates(config: PreTrainedConfig, num_layers: int, node: tuple[str, ...] = ()) -> list[ConfigBinding]:
    """Integer fields that hold the number of layers, outer config first."""
    own = [
        ConfigBinding(node, name)
        for name, value in vars(config).items()
        if type(value) is int and value == num_layers and COUNT_NAME.search(name) and not name.startswith("_")
    ]
    inner = [
        binding
        for name, value in vars(config).items()
        if isinstance(value, PreTrainedConfig)
        for binding in _candidates(value, num_layers, (*node, name))
    ]
    return own + inner


def _list_lengths(model: nn.Module) -> dict[str, int]:
    return {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}


def _same_place(name: str, path: str) -> bool:
    # Lists inside a layer move with it: with layer 1 gone, layer 1's experts are those of the old layer 2.
    return name == path or name.startswith(f"{path}.")
