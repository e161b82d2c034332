"""Removing layers from a model that others hold on to: a Trainer, an optimizer, hooks."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import PruningError
from ..stacks import LayerStack
from ..stacks.admissible import expressible
from ..stacks.bind import build_on_meta
from ..stacks.taps import nodes
from .build import build_pruned
from .gate import differs
from .gate import verify as verify_pruned
from .prunable import check_prunable


def prune_in_place(stack: LayerStack, remove: Iterable[int], *, verify: bool = True) -> list[nn.Parameter]:
    """Removes layers from the model itself; every module and parameter that stays is the one that it was.

    What the constructor derives from a layer's position or from the number of layers is found by building the model before
    and after on the meta device, and carried over to the modules that stay.

    Args:
        stack: A stack of the model; of no use afterwards, since it describes the model as it was.
        remove: Layers to remove (0-based).
        verify: Check the pruned model as [`prune_layers`] does, and that the model then computes the same as that one.

    Returns:
        The parameters that are gone.

    Raises:
        PruningError: The kept set cannot be expressed, or needs other tensors than the kept ones; adapters, sharded or
            quantised weights; or the check failed. The model is then as it was.
    """
    model, removed = stack.model, sorted(remove)
    keep = [i for i in range(stack.num_layers) if i not in removed]
    _check(model)
    edit = expressible({stack: keep})
    if edit.computed or edit.sources:
        raise PruningError(
            f"Without layers {removed} of {stack.path!r}, {type(model).__name__} needs tensors computed from the old ones "
            f"({', '.join([*edit.computed, *edit.sources][:3])}); that makes a new model. Use prune_layers."
        )
    reference = build_on_meta(model, copy.deepcopy(model.config))
    pruned = build_pruned({stack: keep})
    if verify:
        verify_pruned({stack: removed}, pruned)
    before = list(model.parameters())
    undo: list[tuple[Any, str, Any]] = []
    lists = {path: list(model.get_submodule(path)) for path in edit.kept}
    try:
        for path, kept in edit.kept.items():
            _set_entries(model.get_submodule(path), [lists[path][i] for i in kept])
        for name, module in pruned.named_modules():
            _carry_over(reference.get_submodule(edit.source(name)), module, model.get_submodule(name), undo)
        if verify and (found := differs(pruned, model, list(pruned.get_submodule(stack.path)))):
            raise PruningError(
                f"{type(model).__name__} without layers {removed} of {stack.path!r} computes another function in place than "
                f"when built from its config ({found}). Use prune_layers."
            )
    except BaseException:
        for owner, name, value in reversed(undo):
            setattr(owner, name, value)
        for path, entries in lists.items():
            _set_entries(model.get_submodule(path), entries)
        raise
    if model.can_generate():
        model.generation_config = pruned.generation_config
    left = {id(parameter) for parameter in model.parameters()}
    return [parameter for parameter in before if id(parameter) not in left]


def _check(model: Any) -> None:
    check_prunable(model)
    if not isinstance(model, PreTrainedModel):
        raise PruningError(
            f"Layers cannot be removed from a {type(model).__name__} in place; merge its adapters first."
        )
    if any(isinstance(parameter, DTensor) or not parameter.numel() for parameter in model.parameters()):
        raise PruningError(
            f"The weights of this {type(model).__name__} are sharded; layers are removed from whole ones."
        )


def _set_entries(layers: nn.ModuleList, entries: Sequence[nn.Module]) -> None:
    layers._modules.clear()
    layers.extend(entries)


def _carry_over(old: Any, new: Any, live: Any, undo: list[tuple[Any, str, Any]]) -> None:
    """Sets plain attributes that differ between what was built for the old and for the new number of layers."""
    for name, value in vars(new).items():
        before = vars(old).get(name)
        if isinstance(value, PreTrainedConfig) and name in vars(live):  # shared by modules, or a copy of their own
            olds, news, lives = (dict(nodes(vars(each)[name])) for each in (old, new, live))
            for at in lives:
                _carry_over(olds[at], news[at], lives[at], undo)
            continue
        if (name.startswith("_") and name != "_out_indices") or not _is_plain(value) or not _is_plain(before):
            continue
        if type(value) is not type(before) or value != before:
            undo.append((live, name, getattr(live, name, None)))
            setattr(live, name, copy.deepcopy(value))


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))
