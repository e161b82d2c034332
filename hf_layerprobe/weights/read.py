"""Reads the matrices of a live model as [out, in] tensors, whatever way the layer stores them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from ..errors import LayerProbeError
from ..stacks import LayerStack
from .naming import KINDS, MLP_KINDS, NamedWeight, find_modules


def read_matrices(stack: LayerStack, kinds: Sequence[str] | None = None) -> Iterator[tuple[int, str, torch.Tensor]]:
    """Yields `(layer, kind, matrix)` in depth order; layers that lack a kind are passed over.

    Args:
        stack: The layers to read.
        kinds: Some of `KINDS`; all that the model has by default.

    Raises:
        LayerProbeError: An unknown kind, one that no layer has, weights that are not in memory or not finite.
    """
    wanted = tuple(kinds) if kinds is not None else KINDS
    unknown = [kind for kind in wanted if kind not in KINDS]
    if unknown or not wanted:
        raise LayerProbeError(f"Unknown matrix kinds {unknown}; the kinds are {', '.join(KINDS)}.")
    present = {kind for layer in stack.layers for weight in find_modules(layer) for kind in weight.kinds}
    missing = [kind for kind in wanted if kind not in present]
    if missing and (kinds is not None or not present):
        raise LayerProbeError(
            f"The layers of {stack.path!r} ({type(stack.layers[0]).__name__}) have no matrix known as "
            f"{', '.join(missing)}; known there: {', '.join(k for k in KINDS if k in present) or 'none'}."
        )
    config = getattr(stack.model, "config", None)
    for index, layer in enumerate(stack.layers):
        for kind, matrix in layer_matrices(layer, config, wanted).items():
            where = f"the {kind} matrix of layer {index} ({stack.path})"
            if matrix.is_meta:
                raise LayerProbeError(
                    f"Cannot read {where}: it is on the meta device (offloaded, or built without weights). Load the "
                    "model into memory first."
                )
            if not matrix.is_floating_point():
                raise LayerProbeError(f"Cannot read {where}: it is quantised ({matrix.dtype}); load it dequantised.")
            if not torch.isfinite(matrix).all():
                raise LayerProbeError(f"Cannot use {where}: it holds NaN or infinite values.")
            yield index, kind, matrix


def layer_matrices(
    layer: nn.Module, config: PreTrainedConfig | None = None, kinds: Sequence[str] = KINDS
) -> dict[str, torch.Tensor]:
    """The matrices of one layer, kind → [out, in].

    A layer with several MLPs (experts, shared experts) is read as the one wide MLP it sums to: gate and up have a row,
    and down a column, for each neuron of each expert (our own convention).
    """
    parts: dict[str, list[torch.Tensor]] = defaultdict(list)
    for weight in find_modules(layer):
        if any(kind in kinds for kind in weight.kinds):
            for kind, matrix in zip(weight.kinds, _split(weight, config), strict=True):
                parts[kind].append(matrix)
    matrices = {}
    for kind in KINDS:
        if kind not in parts or kind not in kinds:
            continue
        if len(parts[kind]) > 1 and kind not in MLP_KINDS:
            raise LayerProbeError(
                f"{type(layer).__name__} holds {len(parts[kind])} matrices that could be its {kind}; which one to "
                "compare is not known for this architecture."
            )
        matrices[kind] = parts[kind][0] if len(parts[kind]) == 1 else torch.cat(parts[kind], 1 if kind == "down" else 0)
    return matrices


def _split(weight: NamedWeight, config: PreTrainedConfig | None) -> list[torch.Tensor]:
    """The [out, in] matrices inside one parameter, in the order of `weight.kinds`."""
    tensor = getattr(weight.owner, weight.parameter).detach()
    if weight.packing == "experts":
        return _split_experts(weight, tensor)
    if isinstance(weight.owner, Conv1D):  # stored as [in, out]
        tensor = tensor.T
    if len(weight.kinds) == 1:
        return [tensor]
    if len(weight.kinds) == 2:
        return list(tensor.chunk(2))
    if weight.packing == "heads":
        return _split_by_head(tensor, config)
    rows = tensor.shape[0]
    heads = getattr(config, "num_attention_heads", None)
    groups = getattr(config, "num_key_value_heads", None)
    if heads and groups and groups != heads:
        unit = rows // (heads + 2 * groups)
        return list(tensor.split([heads * unit, groups * unit, groups * unit]))
    return list(tensor.chunk(3))


def _split_by_head(tensor: torch.Tensor, config: PreTrainedConfig | None) -> list[torch.Tensor]:
    """Fused `query_key_value`: [heads, 3, head_dim] rows (GPT-NeoX, BLOOM), or Falcon's two grouped forms."""
    heads = config.num_attention_heads
    if getattr(config, "new_decoder_architecture", False):
        groups, queries = config.num_kv_heads, heads // config.num_kv_heads
    elif getattr(config, "multi_query", False):
        groups, queries = 1, heads
    else:
        groups, queries = heads, 1
    blocks = tensor.view(groups, queries + 2, -1, tensor.shape[1])  # [groups, q… k v, head_dim, in]
    return [blocks[:, part].flatten(0, -2) for part in (slice(0, queries), queries, queries + 1)]


def _split_experts(weight: NamedWeight, tensor: torch.Tensor) -> list[torch.Tensor]:
    """Stacked experts [experts, out, in] as one wide MLP."""
    if getattr(weight.owner, "is_transposed", False):  # stored as [experts, in, out] with interleaved gate and up
        raise LayerProbeError(
            f"{type(weight.owner).__name__} stores its experts transposed; reading them is not supported."
        )
    if weight.kinds == ("down",):
        return [tensor.permute(1, 0, 2).flatten(1)]  # [out, experts * in]
    return [part.flatten(0, 1) for part in tensor.chunk(len(weight.kinds), dim=1)]
