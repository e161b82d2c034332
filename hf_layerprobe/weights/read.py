"""Reads the matrices of a live model as [out, in] tensors, whatever way the layer stores them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from ..errors import LayerProbeError
from ..stacks import LayerStack
from .naming import KINDS, MLP_KINDS, OTHER_PACKING, NamedWeight, find_modules
from .whole import base, merged, outline

Read = Callable[[NamedWeight], torch.Tensor]
# Whole numbers of the size of a value, in bytes.
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
READERS: dict[str, Read] = {"merged": merged, "base": base}


class LiveWeights:
    """The matrices of a model in memory, by layer and kind.

    Args:
        stack: The layers to read.
        kinds: Some of `KINDS`; all that the model has and that can be read by default.
        adapters: In a PEFT model, `"merged"` reads what it computes with, each matrix with its active adapters merged
            into a copy; `"base"` reads the weights below them.

    Attributes:
        notes: What the model has but is left out, and why.

    Raises:
        LayerProbeError: An unknown kind, or one that no layer has.
    """

    def __init__(self, stack: LayerStack, kinds: Sequence[str] | None = None, *, adapters: str = "merged"):
        self.stack = stack
        self._read = READERS[adapters]
        self.config = getattr(stack.owner, "config", None)
        self.kinds, self.notes = present_kinds(stack, kinds)

    def parts(self, layer: int, kind: str) -> list[torch.Tensor]:
        """The matrices of that kind in one layer, `[out, in]` each: several for a mixture of experts, none if it has none.

        Raises:
            LayerProbeError: Weights that are not in memory, quantised, or not finite.
        """
        parts = matrix_parts(self.stack.layers[layer], self.config, kind, self._read)
        for part in parts:
            check_readable(part, f"the {kind} matrix of layer {layer} ({self.stack.path})")
        return parts

    def shapes(self, layer: int, kind: str) -> list[tuple[int, int]]:
        """The shapes of `parts`, without reading."""
        return [tuple(part.shape) for part in matrix_parts(self.stack.layers[layer], self.config, kind, outline)]

    def fingerprint(self) -> str:
        """SHA-256 of the model's class and config and of every matrix, by the sum of each row.

        Raises:
            LayerProbeError: Weights that cannot be read.
        """
        digest = hashlib.sha256(type(self.stack.model).__name__.encode())
        digest.update(self.config.to_json_string().encode() if self.config is not None else b"")
        for layer in range(self.stack.num_layers):
            for kind in self.kinds:
                for part in self.parts(layer, kind):
                    # As whole numbers: their sum is the same in any order, on any number of threads, and as fast as reading.
                    bits = part.view(BITS[part.element_size()])
                    digest.update(f"{layer} {kind} {tuple(part.shape)}".encode())
                    digest.update(bits.sum(1, dtype=bits.dtype).cpu().numpy().tobytes())
        return digest.hexdigest()


def read_matrices(stack: LayerStack, kinds: Sequence[str] | None = None) -> Iterator[tuple[int, str, torch.Tensor]]:
    """Yields `(layer, kind, matrix)` in depth order; layers that lack a kind are passed over.

    Args:
        stack: The layers to read.
        kinds: Some of `KINDS`; all that the model has and that can be read by default.

    Raises:
        LayerProbeError: An unknown kind, one that no layer has, weights that are not in memory or not finite.
    """
    weights = LiveWeights(stack, kinds)
    for layer in range(stack.num_layers):
        for kind in weights.kinds:
            if parts := weights.parts(layer, kind):
                yield layer, kind, one_matrix(parts, kind)


def present_kinds(stack: LayerStack, kinds: Sequence[str] | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The kinds to read, in the order of `KINDS`, and a note on each that is left out because it cannot be.

    Args:
        stack: The layers.
        kinds: The kinds that are asked for, a name or several (`"qkvo"` is four); None leaves out what cannot be read.

    Raises:
        LayerProbeError: An unknown kind, one that no layer has, or none that can be read.
    """
    wanted = KINDS if kinds is None else (kinds,) if kinds in KINDS else tuple(kinds)
    unknown = [kind for kind in wanted if kind not in KINDS]
    if unknown or not wanted:
        named = repr(kinds) if isinstance(kinds, str) else unknown
        raise LayerProbeError(f"Unknown matrix kinds {named}; the kinds are {', '.join(KINDS)}.")
    present = {kind for layer in stack.layers for weight in find_modules(layer) for kind in weight.kinds}
    missing = [kind for kind in wanted if kind not in present]
    if missing and (kinds is not None or not present):
        raise LayerProbeError(
            f"The layers of {stack.path!r} ({type(stack.layers[0]).__name__}) have no matrix known as "
            f"{', '.join(missing)}; known there: {', '.join(k for k in KINDS if k in present) or 'none'}."
        )
    found = tuple(kind for kind in KINDS if kind in wanted and kind in present)
    unreadable: dict[str, LayerProbeError] = {}
    for kind in found if kinds is None else ():
        try:
            for layer in stack.layers:
                matrix_parts(layer, getattr(stack.owner, "config", None), kind, outline)
        except LayerProbeError as error:
            unreadable[kind] = error
    if unreadable.keys() == set(found):
        raise unreadable[found[0]]
    notes = tuple(f"{kind} is left out: {error}" for kind, error in unreadable.items())
    return tuple(kind for kind in found if kind not in unreadable), notes


def check_readable(matrix: torch.Tensor, where: str) -> None:
    """Refuses a matrix that cannot be compared.

    Raises:
        LayerProbeError: On the meta device, quantised, or not finite.
    """
    if matrix.is_meta:
        raise LayerProbeError(
            f"Cannot read {where}: it is on the meta device (offloaded, or built without weights). Load the model into "
            "memory first."
        )
    if not matrix.is_floating_point() or matrix.element_size() < 2:  # 8-bit floats mean nothing without their scales
        raise LayerProbeError(f"Cannot read {where}: it is quantised ({matrix.dtype}); load it dequantised.")
    # Both ends are finite just when all values are: NaN wins in either. One pass, and nothing as large as the matrix.
    if not torch.isfinite(torch.stack(torch.aminmax(matrix))).all():
        raise LayerProbeError(f"Cannot use {where}: it holds NaN or infinite values.")


def layer_matrices(layer: nn.Module, config: PreTrainedConfig | None = None) -> dict[str, torch.Tensor]:
    """The matrices of one layer, kind → [out, in]; a mixture of experts as one wide MLP, see [`one_matrix`]."""
    parts = {kind: matrix_parts(layer, config, kind) for kind in KINDS}
    return {kind: one_matrix(found, kind) for kind, found in parts.items() if found}


def matrix_parts(
    layer: nn.Module, config: PreTrainedConfig | None, kind: str, read: Read = merged
) -> list[torch.Tensor]:
    """The matrices of one kind in a layer: one for each expert of a mixture, shared experts last or first as stored.

    Args:
        layer: The layer.
        config: Its model's config.
        kind: One of `KINDS`.
        read: What gives the tensor of a named weight.

    Raises:
        LayerProbeError: Several attention matrices of that kind, or weights that cannot be read.
    """
    weights = find_modules(layer)
    parts = [
        part
        for weight in weights
        if kind in weight.kinds
        for part in _split(weight, read(weight), config)[weight.kinds.index(kind)]
    ]
    if len(parts) > 1 and kind not in MLP_KINDS:
        raise LayerProbeError(
            f"{type(layer).__name__} holds {len(parts)} matrices that could be its {kind}; which one to compare is not "
            "known for this architecture."
        )
    return [_without_gate(part, weights, config) for part in parts] if kind == "q" else parts


def one_matrix(parts: list[torch.Tensor], kind: str) -> torch.Tensor:
    """Several MLPs (experts, shared experts) as the one wide MLP they sum to (our own convention).

    Gate and up have a row, and down a column, for each neuron of each expert.
    """
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1 if kind == "down" else 0)


def _split(weight: NamedWeight, tensor: torch.Tensor, config: PreTrainedConfig | None) -> list[list[torch.Tensor]]:
    """The [out, in] matrices inside one parameter, a list for each of `weight.kinds`."""
    if weight.packing == "experts":
        return _split_experts(weight, tensor, config)
    if isinstance(weight.owner, Conv1D):  # stored as [in, out]
        tensor = tensor.T
    if len(weight.kinds) < 3:
        return [[part] for part in tensor.chunk(len(weight.kinds))]
    packing = OTHER_PACKING.get(getattr(config, "model_type", ""), weight.packing)
    if packing == "heads":
        return _split_by_head(tensor, config)
    heads = getattr(config, "num_attention_heads", 1)
    groups = getattr(config, "num_key_value_heads", None) or heads
    if packing != "rows" or len(tensor) % (heads + 2 * groups):
        raise LayerProbeError(
            f"How {getattr(config, 'model_type', 'this model')} packs query, key and value into {len(tensor)} rows is not "
            f"known ({heads} heads, {groups} key-value heads by its config); choose other kinds."
        )
    unit = len(tensor) // (heads + 2 * groups)
    return [[part] for part in tensor.split([heads * unit, groups * unit, groups * unit])]


def _without_gate(
    projection: torch.Tensor, weights: list[NamedWeight], config: PreTrainedConfig | None
) -> torch.Tensor:
    """The queries alone of a projection that also gives a gate on the attention's output, `[heads, 2, head_dim]` rows (Qwen3.5).

    It does where it has twice as many rows as the output projection reads, and for each head twice as many as a key has:
    as queries they would fit no key.
    """
    shapes = {weight.kinds[0]: outline(weight).shape for weight in weights if weight.kinds in (("k",), ("o",))}
    heads = getattr(config, "num_attention_heads", None)
    if len(shapes) < 2 or len(projection) != 2 * shapes["o"][1] or not isinstance(heads, int):
        return projection
    groups = getattr(config, "num_key_value_heads", None) or heads
    if len(projection) * groups != 2 * shapes["k"][0] * heads:
        return projection
    return projection.unflatten(0, (heads, 2, -1))[:, 0].flatten(0, 1)


def _split_by_head(tensor: torch.Tensor, config: PreTrainedConfig | None) -> list[list[torch.Tensor]]:
    """Fused `query_key_value`: [heads, 3, head_dim] rows (GPT-NeoX, BLOOM), or Falcon's two grouped forms."""
    heads = config.num_attention_heads
    if getattr(config, "new_decoder_architecture", False):
        groups, queries = config.num_kv_heads, heads // config.num_kv_heads
    elif getattr(config, "multi_query", False):
        groups, queries = 1, heads
    else:
        groups, queries = heads, 1
    blocks = tensor.view(groups, queries + 2, -1, tensor.shape[1])  # [groups, q… k v, head_dim, in]
    return [[blocks[:, part].flatten(0, -2)] for part in (slice(0, queries), queries, queries + 1)]


def _split_experts(
    weight: NamedWeight, tensor: torch.Tensor, config: PreTrainedConfig | None
) -> list[list[torch.Tensor]]:
    """Stacked experts [experts, out, in], gate above up."""
    hidden = getattr(config, "hidden_size", None)
    stream = tensor.shape[1] if weight.kinds == ("down",) else tensor.shape[2]
    # Some classes store [experts, in, out]; by their shape alone they cannot be told from others when out equals in.
    other_way = getattr(weight.owner, "is_transposed", False) or "llama4" in getattr(config, "model_type", "")
    if other_way or hidden not in (None, stream):
        raise LayerProbeError(
            f"{type(weight.owner).__name__} stores its experts transposed; reading them is not supported. Choose other kinds."
        )
    return [list(part) for part in tensor.chunk(len(weight.kinds), dim=1)]
