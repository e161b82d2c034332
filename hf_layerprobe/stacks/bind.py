"""Binds a stack to the config field that sets its length, by building the model on the meta device and looking.

Never by value alone: in a third of all model types several config fields hold the same number. One candidate field is
edited in a copy of the config, the copy is written out and read back as `from_pretrained` would, the model is built
from it without memory, and the binding holds when this stack has the new length, and no other list has changed but those
that one field drives together with it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import LayerProbeError, PruningError
from .config_edit import PER_LAYER_LISTS, edited_config
from .taps import nodes

COUNT_NAME = re.compile(r"layer|depth|block")

_bindings: dict[tuple[type, str, int, str], ConfigBinding] = {}


@dataclass(frozen=True)
class ConfigBinding:
    """The config field that holds a stack's length.

    Attributes:
        node: Attribute names that lead from the model's config to the node that has the field.
        field: The field in that node.
        index: For the stages of a pyramid, the entry of the field that holds the length (`depths[2]`).
        extra: What the field holds more than the stack has layers; 1 where a decoder's first layer stands elsewhere.
        siblings: Paths of other lists that the same field drives; they lose the same entries.
    """

    node: tuple[str, ...]
    field: str
    index: int | None = None
    extra: int = 0
    siblings: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        return ".".join((*self.node, self.field)) + ("" if self.index is None else f"[{self.index}]")

    def value(self, config: PreTrainedConfig, keep: Sequence[int]):
        """What the field holds when only the layers `keep` are left."""
        old = getattr(self.config_node(config), self.field)
        if isinstance(old, int):
            return len(keep) + self.extra
        if self.index is None:  # a list with an entry for each layer, whose length is the number of layers
            return [old[i] for i in keep]
        return [*old[: self.index], len(keep), *old[self.index + 1 :]]

    def config_node(self, config: PreTrainedConfig) -> PreTrainedConfig:
        for name in self.node:
            config = getattr(config, name)
        return config


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
    tried, shared, unknown = [], [], None
    # Dropping the second layer leaves the first and the last alone, which are the ones that configs treat specially.
    keep = [i for i in range(num_layers) if i != min(1, num_layers - 1)]
    lengths = _list_lengths(model, path)
    for binding in _candidates(model.config, path, num_layers):
        try:
            probe = build_on_meta(model, edited_config(model.config, binding, num_layers, keep))
        except PruningError as error:
            unknown = unknown or error
            continue
        except Exception as error:  # whatever a config validator or a constructor raises only rules this field out
            tried.append(f"{binding.path} ({type(error).__name__}: {error})")
            continue
        found = _list_lengths(probe, path)
        changed = [name for name, length in found.items() if lengths.get(name) != length]
        # Lists inside a layer move with it: with layer 1 gone, layer 1's experts are those of the old layer 2.
        outer = [name for name in changed if not any(name.startswith(f"{other}.") for other in changed)]
        if path in outer and len(outer) == 1 and found[path] == len(keep):
            return binding
        if path in outer and all((lengths.get(name), found[name]) == (num_layers, len(keep)) for name in outer):
            shared.append(replace(binding, siblings=tuple(name for name in outer if name != path)))
        tried.append(f"{binding.path} (changes {', '.join(sorted(changed)) or 'no list'})")
    if shared:
        return min(shared, key=lambda binding: len(binding.siblings))
    if unknown:
        raise unknown
    raise PruningError(
        f"No config field of {type(model).__name__} sets the length of {path!r} alone ({num_layers} layers now). "
        f"Tried: {'; '.join(tried) or f'none of its fields holds {num_layers}'}. Without one, a model with fewer layers "
        "could not be loaded again, so this stack cannot be pruned (it can still be scored)."
    )


def _candidates(config: PreTrainedConfig, path: str, num_layers: int) -> list[ConfigBinding]:
    """Fields that could set the number of layers: numbers first, outer config first; then lists; then numbers off by one."""
    numbers, lists, more = [], [], []
    for node, inner in nodes(config):
        for name, value in vars(inner).items():
            if name.startswith("_") or not COUNT_NAME.search(name):
                continue
            if type(value) is int and value == num_layers:
                numbers.append(ConfigBinding(node, name))
            elif type(value) is int and value == num_layers + 1:
                more.append(ConfigBinding(node, name, extra=1))
            elif isinstance(value, (list, tuple)) and name in PER_LAYER_LISTS and len(value) == num_layers:
                lists.append(ConfigBinding(node, name))
            elif isinstance(value, (list, tuple)) and name not in PER_LAYER_LISTS:
                lists += [
                    ConfigBinding(node, name, index=i) for i, entry in enumerate(value) if type(entry) is int
                    and entry == num_layers
                ]  # fmt: skip
    # The stage that a path names is most likely the entry of its number: one build instead of several.
    named = {int(part) for part in path.split(".") if part.isdigit()}
    lists.sort(key=lambda binding: binding.index not in named)
    return numbers + lists + more


def _list_lengths(model: nn.Module, path: str) -> dict[str, int]:
    """Lengths of all lists of modules, and of the stack, which may be a `Sequential`."""
    return {
        name: len(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) or (name == path and isinstance(module, nn.Sequential))
    }
