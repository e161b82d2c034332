"""Outputs of two models of which one has fewer layers: made alike, and compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

CACHES = frozenset(["past_key_values", "cache_params", "state", "mems", "past_buckets_states", "shared_kv_states"])

# For every list of layers that lost some: how many there were, and which are left.
Kept = Sequence[tuple[int, Sequence[int]]]


def float_outputs(output, name: str = "") -> dict[str, torch.Tensor]:
    """Floating-point tensors of a model output by name, without caches and the states of single layers."""
    if isinstance(output, torch.Tensor):
        return {name or "output": output} if output.is_floating_point() else {}
    if isinstance(output, dict):
        parts = [(key, value) for key, value in output.items() if not _is_per_layer(key, value)]
    else:
        parts = list(enumerate(output)) if isinstance(output, (list, tuple)) else []
    named = [(f"{name}.{key}" if name else str(key), value) for key, value in parts]
    return {key: tensor for part, value in named for key, tensor in float_outputs(value, part).items()}


def without_removed(expected: Any, found: Any, kept: Kept) -> Any:
    """The original's output with the entries of the layers that are left, where it has one for each layer.

    DETR-like models return the predictions of every decoder layer, stacked or as a tuple, some with one before the first.
    """
    if isinstance(expected, torch.Tensor) and isinstance(found, torch.Tensor):
        return _selected(expected, found, kept)
    if isinstance(expected, dict) and isinstance(found, dict):
        return {key: without_removed(value, found.get(key), kept) for key, value in expected.items()}
    if isinstance(expected, (list, tuple)) and isinstance(found, (list, tuple)):
        for total, keep in kept:
            before = len(expected) - total
            if before >= 0 and len(found) == before + len(keep) < len(expected):
                expected = [*expected[:before], *(expected[before + i] for i in keep)]
        if len(expected) == len(found):
            return [without_removed(old, new, kept) for old, new in zip(expected, found, strict=True)]
    return expected


def difference(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], limit: float) -> str | None:
    """In words, if there is one."""
    shapes = [{name: tuple(tensor.shape) for name, tensor in outputs.items()} for outputs in (expected, found)]
    if shapes[0] != shapes[1] or not expected:
        return f"its outputs are {shapes[1] or 'none'}, the original's {shapes[0] or 'none'}"
    largest = max(largest_difference(tensor, found[name]) for name, tensor in expected.items())
    # Not `largest > limit`: it may be NaN.
    return None if largest <= limit else f"largest relative difference {largest:.2g}, allowed {limit:.0e}"


def largest_difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Largest |difference| / max(1, largest |expected|); what is infinite in both is equal."""
    if not expected.numel():
        return 0.0
    expected, found = expected.float(), found.float()
    scale = expected.masked_fill(expected.isinf(), 0).abs().max().clamp_min(1)
    return ((expected - found).masked_fill(expected == found, 0).abs().max() / scale).item()


def _selected(expected: torch.Tensor, found: torch.Tensor, kept: Kept) -> torch.Tensor:
    if expected.dim() != found.dim():
        return expected
    sizes = [
        (dim, *pair) for dim, pair in enumerate(zip(expected.shape, found.shape, strict=True)) if len(set(pair)) > 1
    ]
    for total, keep in kept:
        if len(sizes) == 1 and sizes[0][1:] == (total, len(keep)):
            return expected.index_select(sizes[0][0], torch.tensor(list(keep), device=expected.device))
    return expected


def _is_per_layer(key: str, value) -> bool:
    return key in CACHES or (
        isinstance(value, (list, tuple))
        and key.endswith(("hidden_states", "attentions", "router_logits", "intermediate_embeddings"))
    )
