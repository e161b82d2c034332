"""Config fields by which another part of the model reads the output of one particular layer of a stack.

A tap goes on reading what it reads in the original with the removed layers bypassed: the output of its own layer if that
is kept, else of the kept layer before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import PruningError
from .refusal import Refusal

if TYPE_CHECKING:
    from .bind import ConfigBinding

# Field → what number it gives the output of layer 0: 1 for an index into `hidden_states`, which start with the
# embeddings, 0 for an index of a layer.
TAPS = {
    "vision_feature_layer": 1,
    "spatial_vision_layer": 1,
    "intermediate_layers_indices": 0,
    "feature_layer": 1,
    "_out_indices": 1,
    "deepstack_visual_indexes": 0,
    "insert_layer_id": 0,
    "extract_layers": 0,
    "backbone_out_indices": 0,
}
# Where a state may be read twice: others have a part of their own for each index (a merger, a stage), found by the index.
REPEATABLE = ("vision_feature_layer", "spatial_vision_layer", "intermediate_layers_indices")
# What only the heads of a model read, not the bare model (DPT).
READ_BY_NECK = ("backbone_out_indices",)
# Numbers of layers of a stack that stands beside the one that is read.
NOT_READ = frozenset(["num_global_layers"])
# Fields that pair layers of a vision tower with layers of the text model.
PAIRINGS = ("deepstack_layer_map", "spatial_target_layers")

Edits = dict[tuple[str, ...], dict[str, Any]]


def tap_edits(config: PreTrainedConfig, binding: ConfigBinding, num_layers: int, keep: Sequence[int]) -> Edits:
    """New values of the taps into a stack, by config node, as the saved file names them."""
    edits: Edits = {}
    for path, node, name in _taps(config, binding, num_layers):
        moved = _moved(getattr(node, name), TAPS[name], num_layers, keep)
        if name == "_out_indices":
            # Backbones name their stages by position, and want each at most once.
            stages, moved = node.stage_names[: len(keep) + 1], list(dict.fromkeys(moved))
            edits.setdefault(path, {}).update(
                stage_names=stages, out_indices=moved, out_features=[stages[index] for index in moved]
            )
        else:
            edits.setdefault(path, {})[name] = moved
    return edits


def check_taps(
    model: PreTrainedModel, config: PreTrainedConfig, binding: ConfigBinding, num_layers: int, keep: Sequence[int]
) -> None:
    """Refuses kept sets with which a tap could not read what it reads in the original with the others bypassed.

    Raises:
        Refusal: Names the field and the layers that have to stay.
        PruningError: The stack cannot lose any layer.
    """
    removed = [i for i in range(num_layers) if i not in keep]
    for _, node, name in _taps(config, binding, num_layers):
        if name in READ_BY_NECK and not hasattr(model, "neck"):
            continue
        value, first = getattr(node, name), TAPS[name]
        moved = _moved(value, first, num_layers, keep)
        before, after = ([each] if isinstance(each, int) else list(each) for each in (value, moved))
        lost = [old for old, new in zip(before, after, strict=True) if new < 0 <= old]
        merged = name not in REPEATABLE and len(set(after)) < len(after)
        if merged or lost:
            # Between one tap and the next, and before the first, a layer has to stay.
            ends = sorted(
                {min((old + num_layers + first if old < 0 else old) - first + 1, num_layers) for old in before}
            )
            starts = [0, *ends[:-1]] if first == 0 or ends[0] > 0 else ends
            gaps = [range(start, end) for start, end in zip(starts, ends, strict=False) if start < end]
            raise Refusal(
                f"{name.strip('_')}={value} of {type(node).__name__} reads the output of single layers, and without "
                f"layers {removed} {'two of them are the same' if merged else 'none is left before one of them'}",
                needs=gaps if merged else gaps[:1],
            )
    for path, node in nodes(config):
        is_text = bool(binding.node) and "text" in binding.node[-1]
        indexes = getattr(node, "deepstack_visual_indexes", None)
        if indexes and is_text and removed and min(removed) < len(indexes):
            raise Refusal(
                f"deepstack_visual_indexes of {type(node).__name__} adds image features after each of the first "
                f"{len(indexes)} text layers, by their position. Keep layers 0 to {len(indexes) - 1}",
                needs=[{i} for i in range(len(indexes))],
            )
        for name in PAIRINGS:
            if getattr(node, name, None) and (is_text or "vision" in binding.path):
                raise PruningError(
                    f"{'.'.join((*path, name))}={getattr(node, name)} ties layers of the vision tower to layers of the text "
                    "model by their positions; removing layers from either is not supported."
                )


def _taps(
    config: PreTrainedConfig, binding: ConfigBinding, num_layers: int
) -> Iterator[tuple[tuple[str, ...], PreTrainedConfig, str]]:
    """(path of the config node, node, field) of every tap into the stack.

    A tap stands beside the number of layers, or further out; there it is one into the vision tower.
    """
    if binding.field in NOT_READ:
        return
    in_vision = any("vision" in name for name in binding.node)
    for path, node in nodes(config):
        if path == binding.node:
            names = [] if any("vision" in name for name in _children(node)) else TAPS
        elif in_vision and path == binding.node[: len(path)]:
            names = [name for name in TAPS if name != "_out_indices"]
        else:
            continue
        for name in names:
            value = vars(node).get(name)
            if name == "_out_indices" and len(getattr(node, "stage_names", None) or ()) != num_layers + 1:
                continue  # the stages of a pyramid, not layers
            if type(value) is int or (value and isinstance(value, (list, tuple))):
                yield path, node, name


def nodes(config: PreTrainedConfig, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], PreTrainedConfig]]:
    yield path, config
    for name, child in _children(config).items():
        yield from nodes(child, (*path, name))


def _children(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    return {name: value for name, value in vars(config).items() if isinstance(value, PreTrainedConfig)}


def _moved(value: int | Sequence[int], first: int, num_layers: int, keep: Sequence[int]) -> int | list[int]:
    """A tap, or several, in the model that has only the layers `keep`; what counts from the end still does."""
    if not isinstance(value, int):
        return [_moved(each, first, num_layers, keep) for each in value]
    old = value + num_layers + first if value < 0 else value
    if old >= num_layers + first:  # no layer is there, and none may come to be there
        return len(keep) + first
    new = sum(i + first <= old for i in keep) - 1 + first
    return new - len(keep) - first if value < 0 else new
