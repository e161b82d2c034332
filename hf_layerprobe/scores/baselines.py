"""The cheap rules that every score has to beat."""

from __future__ import annotations

import numpy as np

from ..stacks import LayerStack
from .registry import OURS, register


def last(stack: LayerStack) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Earlier layers are more important: removes from the end."""
    return np.arange(stack.num_layers, 0, -1, dtype=float), {}


def random(stack: LayerStack, *, seed: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A random order."""
    return np.random.default_rng(seed).permutation(stack.num_layers).astype(float), {}


register("last", last, source=OURS, higher_is_more_important=True, needs_data=False)
register("random", random, source=OURS, higher_is_more_important=True, needs_data=False)
