"""A new model of the same class with the kept layers, its tensors shared with the original until `own_tensors`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import PruningError
from ..stacks import LayerStack
from ..stacks.admissible import expressible
from ..stacks.edit import StackEdit, check_tensors, tensors
from ..stacks.refusal import Refusal
from .generation import renumbered

# Whether a layer is run again in the backward pass, and how.
CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")


def build_pruned(stacks: Mapping[LayerStack, Sequence[int]]) -> PreTrainedModel:
    """Builds the model whose layer i is the original's layer `keep[i]`, for one or more stacks of one model.

    The model is built from the edited config on the meta device, so that everything its constructor derives from a
    layer's index or from their number is what a reload will find; then every tensor is taken from the original.

    Args:
        stacks: Layers to keep (0-based, ascending) for each stack; the original is not changed.

    Returns:
        A model that shares its tensors with the original; call [`own_tensors`] before handing it out.

    Raises:
        PruningError: The architecture cannot express it.
    """
    original = next(iter(stacks)).model
    edit = expressible(stacks)
    try:
        check_tensors(original, edit, has_run=True)
    except Refusal as refusal:
        raise PruningError(
            f"{type(original).__name__} is not the model that its own config describes, so it cannot be built from an edited "
            f"one: {refusal}"
        ) from refusal
    pruned = edit.model
    _share_tensors(original, edit)
    if original.can_generate():
        config = pruned.generation_config = copy.deepcopy(original.generation_config)
        config.__dict__ = renumbered(vars(config), original, edit.kept)
    _share_modes(original, edit)
    return pruned


def own_tensors(model: PreTrainedModel) -> None:
    """Gives a model its own copy of every tensor; tied parameters stay one."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.clone()


def _share_modes(original: PreTrainedModel, edit: StackEdit) -> None:
    modules = dict(original.named_modules(remove_duplicate=False))
    for name, module in edit.model.named_modules(remove_duplicate=False):
        source = modules.get(edit.source(name), original)
        module.training = source.training
        vars(module).update({key: vars(source)[key] for key in CHECKPOINTING if key in vars(source)})


def _share_tensors(original: PreTrainedModel, edit: StackEdit) -> None:
    old = dict(tensors(original))
    modules = dict(original.named_modules(remove_duplicate=False))
    made: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for path, module in edit.model.named_modules(remove_duplicate=False):
        for key, parameter in module._parameters.items():
            name = f"{path}.{key}" if path else key
            if parameter is None:
                continue
            if name in edit.computed:
                module._parameters[key] = nn.Parameter(edit.computed[name](old))
                continue
            source = old[edit.source(name)]
            if id(source) not in made:
                made[id(source)] = nn.Parameter(source.data, requires_grad=source.requires_grad)
            module._parameters[key] = made[id(source)]
        for key, buffer in module._buffers.items():
            if buffer is not None:
                name = f"{path}.{key}" if path else key
                module._buffers[key] = edit.computed[name](old) if name in edit.computed else old[edit.source(name)]
        for key, value in vars(module).items():  # tensors kept as plain attributes
            if isinstance(value, torch.Tensor) and value.is_meta:
                setattr(module, key, getattr(modules[edit.source(path)], key).clone())
