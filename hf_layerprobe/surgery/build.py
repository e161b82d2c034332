"""A new model of the same class with the kept layers, its tensors shared with the original until `own_tensors`."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import PruningError
from ..stacks import LayerStack
from ..stacks.bind import build_on_meta
from ..stacks.config_edit import edited_config
from ..stacks.taps import check_taps


def build_pruned(stack: LayerStack, keep: Sequence[int]) -> PreTrainedModel:
    """Builds the model whose layer i is the original's layer `keep[i]`.

    The model is built from the edited config on the meta device, so that everything its constructor derives from a
    layer's index or from their number is what a reload will find; then every tensor is taken from the original.

    Args:
        stack: A stack of the original model, which is not changed.
        keep: Layers to keep, 0-based, ascending.

    Returns:
        A model that shares its tensors with the original; call [`own_tensors`] before handing it out.

    Raises:
        PruningError: The new model needs a tensor that the kept layers do not have, or has no place for one.
    """
    original = stack.model
    check_taps(original.config, stack.binding, stack.num_layers, keep)
    try:
        config = edited_config(original.config, stack.binding, stack.num_layers, keep)
    except PruningError:
        raise
    except Exception as error:  # config validators raise what they like
        raise _inexpressible(stack, keep, error) from error
    if getattr(config, "quantization_config", None) is not None:
        # Only dense weights get this far (`check_prunable`): the entry says how the file they came from was stored.
        del config.quantization_config
    try:
        pruned = build_on_meta(original, config)
    except Exception as error:  # and so do constructors
        raise _inexpressible(stack, keep, error) from error
    _check_tensors(stack, keep, pruned)
    _share_tensors(stack, keep, pruned)
    if original.can_generate():
        pruned.generation_config = copy.deepcopy(original.generation_config)
    _share_modes(stack, keep, pruned)
    return pruned


def own_tensors(model: PreTrainedModel) -> None:
    """Gives a model its own copy of every tensor; tied parameters stay one."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.clone()


def _inexpressible(stack: LayerStack, keep: Sequence[int], error: Exception) -> PruningError:
    return PruningError(
        f"{type(stack.model).__name__} cannot be built with layers {list(keep)} of {stack.path!r} kept: "
        f"{type(error).__name__}: {error}"
    )


def _original_name(name: str, path: str, keep: Sequence[int]) -> str:
    """`model.layers.2.mlp…` of the pruned model → the same in the original."""
    match = re.match(rf"({re.escape(path)}\.)(\d+)(?=\.|$)", name)
    return f"{match[1]}{keep[int(match[2])]}{name[match.end() :]}" if match else name


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers by every name they have, tied ones several times."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _check_tensors(stack: LayerStack, keep: Sequence[int], pruned: PreTrainedModel) -> None:
    """Every tensor of the new model has its counterpart in the original, and none of a kept part is left over."""
    old = {name: tuple(tensor.shape) for name, tensor in _tensors(stack.model)}
    new = {_original_name(name, stack.path, keep): tuple(tensor.shape) for name, tensor in _tensors(pruned)}
    dropped = tuple(f"{stack.path}.{i}." for i in range(stack.num_layers) if i not in keep)
    problems = [f"{name} {shape} is missing in the original" for name, shape in new.items() if name not in old]
    problems += [
        f"{name} is {old[name]} in the original, {shape} in the pruned model"
        for name, shape in new.items()
        if name in old and old[name] != shape
    ]
    # What is not saved is computed from the config (a table for one kind of layer that is gone), so it may go too.
    computed = set(_unsaved_buffers(stack.model))
    problems += [
        f"{name} has no place in the pruned model"
        for name in old
        if name not in new and name not in computed and not name.startswith(dropped)
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise PruningError(
            f"Keeping layers {list(keep)} of {stack.path!r} cannot be expressed in {type(pruned).__name__}: built from "
            f"the new config, its layers are of other kinds or sizes. {'; '.join(problems[:5])}{more}."
        )


def _unsaved_buffers(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules(remove_duplicate=False):
        for name in module._non_persistent_buffers_set:
            yield f"{path}.{name}" if path else name


def _share_modes(stack: LayerStack, keep: Sequence[int], pruned: PreTrainedModel) -> None:
    modules = dict(stack.model.named_modules(remove_duplicate=False))
    for name, module in pruned.named_modules(remove_duplicate=False):
        module.training = modules[_original_name(name, stack.path, keep)].training


def _share_tensors(stack: LayerStack, keep: Sequence[int], pruned: PreTrainedModel) -> None:
    modules = dict(stack.model.named_modules(remove_duplicate=False))
    made: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for name, module in pruned.named_modules(remove_duplicate=False):
        source = modules[_original_name(name, stack.path, keep)]
        for key, parameter in module._parameters.items():
            if parameter is not None:
                old = source._parameters[key]
                if id(old) not in made:
                    made[id(old)] = nn.Parameter(old.data, requires_grad=old.requires_grad)
                module._parameters[key] = made[id(old)]
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = source._buffers[key]
        for key, value in vars(module).items():  # tensors kept as plain attributes
            if isinstance(value, torch.Tensor) and value.is_meta:
                setattr(module, key, getattr(source, key).clone())
