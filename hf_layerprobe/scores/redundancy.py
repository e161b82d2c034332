"""Redundancy of a layer from its weights: how much it resembles a neighbour (our own definition, on DOCS)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..stacks import LayerStack
from .layer_map import docs
from .registry import OURS, register


def redundancy(
    stack: LayerStack, *, kinds: Sequence[str] | None = None, axis: str = "out"
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Excess DOCS similarity to the more similar neighbour, averaged over the kinds of matrices.

    NaN for a layer that no neighbour can be compared with, in any of the kinds.
    """
    similarity = docs(stack.model, stack=stack, kinds=kinds, axis=axis)
    per_kind = {}
    for kind in similarity.kinds:
        excess = similarity.excess(kind)
        padded = np.pad(np.diagonal(excess, offset=1), 1, constant_values=np.nan)  # neighbours of layer i: i, i + 1
        per_kind[kind] = np.fmax(padded[:-1], padded[1:])
    known = np.sum([~np.isnan(values) for values in per_kind.values()], axis=0)
    values = np.nansum(list(per_kind.values()), axis=0) / np.where(known, known, np.nan)
    return values, per_kind


register(
    "docs",
    redundancy,
    source=f"{OURS}, on DOCS, arXiv 2501.16650",
    higher_is_more_important=False,
    needs_data=False,
)
