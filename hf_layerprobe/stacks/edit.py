"""What removing layers changes: the new config, and where every tensor of the model built from it comes from."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import PruningError
from .bind import build_on_meta
from .config_edit import edited_config
from .kinds import Kind, describe_rule, layer_kinds, settings_elsewhere
from .refusal import Refusal
from .rescue import MID_POSITIONS, STATE_WEIGHTS, Compute, Rescue, mid_positions, packed, state_weights
from .rules import check_cache, check_rules
from .taps import check_taps

if TYPE_CHECKING:
    from .find import LayerStack

_references: dict[tuple[type, str], PreTrainedModel] = {}


@dataclass
class StackEdit:
    """A model with fewer layers, before any of its data has moved.

    Attributes:
        model: The model of the new config, on the meta device.
        kept: For every list that loses entries, the entries that stay (0-based, of the original), by path.
        num_layers: How many entries each of these lists had.
        sources: Names of tensors that come from elsewhere in the original than their own place.
        computed: Tensors that are computed from the original's, by their name in the new model.
    """

    model: PreTrainedModel
    kept: dict[str, tuple[int, ...]]
    num_layers: dict[str, int]
    sources: dict[str, str] = field(default_factory=dict)
    computed: dict[str, Compute] = field(default_factory=dict)

    def source(self, name: str) -> str:
        """The original's name of a module or tensor: `model.layers.2.mlp` → `model.layers.3.mlp`."""
        if name in self.sources:
            return self.sources[name]
        for path, keep in self.kept.items():
            if match := re.match(rf"({re.escape(path)}\.)(\d+)(?=\.|$)", name):
                return f"{match[1]}{keep[int(match[2])]}{name[match.end() :]}"
        return name

    def is_dropped(self, name: str) -> bool:
        """Whether a tensor of the original belongs to a layer that goes."""
        return any(
            (match := re.match(rf"{re.escape(path)}\.(\d+)\.", name)) and int(match[1]) not in keep
            for path, keep in self.kept.items()
        )


def edit_stacks(stacks: Mapping[LayerStack, Sequence[int]]) -> StackEdit:
    """Works out how one model looks with only some layers of one or more of its stacks, without touching its data.

    Args:
        stacks: Layers to keep (0-based, ascending) for each stack; all of the same model.

    Raises:
        Refusal: The architecture cannot express it.
        PruningError: The config has something whose meaning is not known, or a stack has no config field.
    """
    original = next(iter(stacks)).model
    config, kept, reference = original.config, {}, _reference(original)
    for stack, keep in stacks.items():
        check_rules(reference, stack.path, keep)
        binding = stack.binding
        if (given := kept.get(stack.path)) is not None:  # driven by the field of one before
            if given != tuple(keep):
                raise PruningError(
                    f"{binding.path} sets the length of {stack.path!r} and of {', '.join(binding.siblings)} at once, so they "
                    f"lose the same layers; got {list(given)} and {list(keep)} to keep."
                )
            continue
        check_taps(original, config, binding, stack.num_layers, keep)
        try:
            config = edited_config(config, binding, stack.num_layers, keep)
        except PruningError:
            raise
        except Exception as error:  # config validators raise what they like
            raise Refusal(_one_line(error)) from error
        kept |= {path: tuple(keep) for path in (stack.path, *binding.siblings)}
        for path in binding.siblings:
            check_rules(reference, path, keep)
    if getattr(config, "quantization_config", None) is not None:
        # Only dense weights are pruned: the entry says how the file they came from was stored.
        del config.quantization_config
    try:
        model = build_on_meta(original, config)
    except Exception as error:  # and so do constructors
        raise Refusal(_one_line(error)) from error
    edit = StackEdit(model, kept, {path: len(original.get_submodule(path)) for path in kept})
    _check_kinds(reference, edit)
    check_cache(original.config, config)
    check_tensors(reference, edit)
    return edit


def _reference(original: PreTrainedModel) -> PreTrainedModel:
    """The original as its config describes it, on the meta device: without quantised weights, adapters or runtime state."""
    key = (type(original), original.config.to_json_string(use_diff=False))
    if key not in _references:
        _references.clear()  # kept sets of one model are asked about one after another
        _references[key] = build_on_meta(original, copy.deepcopy(original.config))
    return _references[key]


def _one_line(error: Exception) -> str:
    return f"the model cannot be built: {type(error).__name__}: {' '.join(str(error).split())}".rstrip(".")


def _check_kinds(reference: PreTrainedModel, edit: StackEdit) -> None:
    """Every kept layer becomes the layer it was, and what is outside the stacks stays as it is."""
    for path, keep in edit.kept.items():
        before, now = (layer_kinds(model.get_submodule(path)) for model in (reference, edit.model))
        rescue = Rescue(path, keep, before, now)
        changed = rescue.unsolved()
        edit.sources |= rescue.sources
        edit.computed |= rescue.computed
        if changed:
            _check_producers(path, keep, changed, before)
            kinds = [tuple(kind.get(key) for key in changed) for kind in before]
            wanted = [tuple(kind.get(key) for key in changed) for kind in now]
            at = next(j for j, kind in enumerate(wanted) if kind != kinds[keep[j]])
            pairs = [
                f"{key}: {old} becomes {new}"
                for key, old, new in zip(changed, kinds[keep[at]], wanted[at], strict=True)
                if old != new
            ]
            more = f" and {len(pairs) - 3} more" if len(pairs) > 3 else ""
            raise Refusal(
                f"what a layer of {path!r} is depends on its position by a rule that no config makes fit "
                f"({describe_rule(kinds)}): layer {keep[at]}, standing at position {at}, would be another "
                f"({'; '.join(pairs[:3])}{more})",
                kinds=kinds,
                wanted=wanted,
            )
    around, after = (settings_elsewhere(model, list(edit.kept)) for model in (reference, edit.model))
    if changed := [key for key, value in around.items() if key in after and after[key] != value]:
        raise Refusal(
            f"{', '.join(f'{key} (from {around[key]} to {after[key]})' for key in changed[:3])} would change, outside the "
            "layers, with their number"
        )


def _check_producers(path: str, keep: Sequence[int], changed: list[str], before: Sequence[Kind]) -> None:
    """In words of its own: layers at the end that read the keys and values of one before."""
    for key in changed:
        if key.endswith("store_full_length_kv"):
            lost = [i for i, kind in enumerate(before) if kind.get(key) and i not in keep]
            if lost:
                raise Refusal(
                    f"the last layers of {path!r} read the keys and values of layers {lost}, which must stay",
                    needs=[{i} for i in lost],
                )


def check_tensors(original: PreTrainedModel, edit: StackEdit, *, has_run: bool = False) -> None:
    """Every tensor of the new model has its counterpart in the original, and none of a kept part is left over.

    Args:
        original: The model, or one that was built from its config.
        edit: What is to become of it.
        has_run: Buffers that are not saved may have grown since: tables of positions do, for a longer text.

    Raises:
        Refusal: Names those that have not.
    """
    old = {name: tuple(tensor.shape) for name, tensor in tensors(original)}
    new = {name: (edit.source(name), tuple(tensor.shape)) for name, tensor in tensors(edit.model)}
    problems, unsaved = [], set(_unsaved_buffers(original))
    for name, (source, shape) in new.items():
        if has_run and source in unsaved:
            continue
        if source in old and old[source] != shape:
            edit.computed |= _repacked(edit, source, shape, old[source])
        if name in edit.computed:
            continue
        if source not in old:
            problems.append(f"{source} {shape} is missing in the original")
        elif old[source] != shape:
            problems.append(f"{source} is {old[source]} in the original, {shape} in the pruned model")
    # What is not saved is computed from the config (a table for one kind of layer that is gone), so it may go too.
    used = {source for source, _ in new.values()} | unsaved
    problems += [
        f"{name} has no place in the pruned model" for name in old if name not in used and not edit.is_dropped(name)
    ]
    problems += _untied(original, edit)
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise Refusal(f"{'; '.join(problems[:5])}{more}")


def _untied(original: PreTrainedModel, edit: StackEdit) -> Iterator[str]:
    """Tensors that are one in the new model, and would have to be several."""
    old, seen = dict(tensors(original)), {}
    for name, tensor in tensors(edit.model):
        if (source := edit.source(name)) in old and name not in edit.computed:
            other, first = seen.setdefault(id(tensor), (name, old[source]))
            if first is not old[source]:
                yield f"{other} and {name} are one tensor in the pruned model, and come from two"


def _repacked(edit: StackEdit, name: str, shape: tuple[int, ...], old: tuple[int, ...]) -> dict[str, Compute]:
    """How to compute a tensor outside the stacks that has a part for each layer; nothing if it is none."""
    # Of several stacks, it belongs to the one beside it.
    for path, keep in sorted(edit.kept.items(), key=lambda item: -_shared_parts(name, item[0])):
        num_layers = edit.num_layers[path]
        if MID_POSITIONS.search(name):
            return mid_positions(name, num_layers, keep)
        if name.endswith(STATE_WEIGHTS) and (old, shape) == ((num_layers + 1,), (len(keep) + 1,)):
            return state_weights(name, num_layers, keep, getattr(edit.model.config, "do_stable_layer_norm", False))
        if compute := packed(name, shape, old, num_layers, keep):
            return {name: compute}
    return {}


def _shared_parts(one: str, other: str) -> int:
    return sum(
        1 for _ in takewhile(lambda parts: parts[0] == parts[1], zip(one.split("."), other.split("."), strict=False))
    )


def tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers by every name they have, tied ones several times."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _unsaved_buffers(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules(remove_duplicate=False):
        for name in module._non_persistent_buffers_set:
            yield f"{path}.{name}" if path else name
