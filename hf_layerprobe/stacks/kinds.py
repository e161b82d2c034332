"""What kind of layer stands where: everything about a layer that its constructor decides, as plain values to compare.

A model that saves and reloads without an error can still be another one when a constructor derives something from a layer's
position or from the number of layers. Two models on the meta device show it without any data: the original's config gives
one, the edited config the other.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

from torch import nn

# Where a layer stands, which is meant to change: mostly the slot of its cache.
INDEX = re.compile(r"(^|_)(layer|block)_?(idx|id|index|number|num)$|^idx$|^index$|^cache_key$")
# Dropout, stochastic depth and seeds of random masks, which often change with depth; without effect after training.
DROPOUT = re.compile(r"drop|prob|^seed$")

Kind = dict[str, Hashable]


def layer_kinds(layers: nn.ModuleList) -> list[Kind]:
    """For each layer: classes of its modules, shapes of its tensors, and the plain numbers and switches that they hold."""
    return [_kind(layer) for layer in layers]


def settings_elsewhere(model: nn.Module, paths: Sequence[str]) -> Kind:
    """Switches and factors (not counts) of the modules that are in none of the lists `paths`, by name."""
    prefixes = tuple(f"{path}." for path in paths)
    return {
        f"{name}.{key}" if name else key: value
        for name, module in model.named_modules()
        if not name.startswith(prefixes)
        for key, value in _scalars(module).items()
        if type(value) is not int
    }


def _kind(layer: nn.Module) -> Kind:
    kind: Kind = {}
    for name, module in layer.named_modules():
        if DROPOUT.search(name.rpartition(".")[2]):
            continue
        prefix = f"{name}." if name else ""
        kind[f"class of {name or 'the layer'}"] = type(module).__name__
        kind.update({prefix + key: value for key, value in _scalars(module).items()})
        for tensors in (module._parameters, module._buffers):
            kind.update({f"shape of {prefix}{key}": tuple(t.shape) for key, t in tensors.items() if t is not None})
    return kind


def _scalars(module: nn.Module) -> Kind:
    return {
        key: float(f"{value:.12g}") if isinstance(value, float) else value  # rounding is no difference
        for key, value in vars(module).items()
        if (value is None or isinstance(value, (bool, int, float, str)))
        and not key.startswith("_")
        and key != "training"
        and not any(pattern.search(key) for pattern in (INDEX, DROPOUT))
    }


def differing(old: Sequence[Kind], new: Sequence[Kind], num_layers: int) -> list[str]:
    """What differs between any of `num_layers` layers and the one that takes its place, by name."""
    keys: dict[str, None] = {}
    for before, after in zip(old, new, strict=True):
        if before != after:
            keys.update(dict.fromkeys(key for key in before | after if before.get(key) != after.get(key)))
    return [key for key in keys if not (_is_count(key, old, num_layers) and _is_count(key, new, len(new)))]


def _is_count(key: str, kinds: Sequence[Kind], number: int) -> bool:
    """Whether the layers that have something under this name are told the number of layers."""
    values = [kind[key] for kind in kinds if key in kind]
    return all(type(value) is int and value == number for value in values)


def describe_rule(kinds: Sequence[Hashable]) -> str:
    """In words: how the kinds of a stack's layers follow from their positions."""
    if len(set(kinds)) == 1:
        return "it follows from the number of layers"
    last = len(kinds) - 1
    if last > 1 and len(set(kinds[1:])) == 1:
        return "only layer 0 is of its kind"
    if last > 1 and len(set(kinds[:-1])) == 1:
        return "only the last layer is of its kind"
    for period in range(2, len(kinds) // 2 + 1):
        if all(kind == kinds[i % period] for i, kind in enumerate(kinds)):
            return f"it repeats every {period} layers"
    return "it follows from a layer's position"
