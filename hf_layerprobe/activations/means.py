"""The mean over tokens of one number a token, for each layer."""

from __future__ import annotations

import numpy as np
import torch

from ..precision import widest


class TokenMean:
    """Sums and counts for each layer, in float64; nothing here waits for the device.

    Args:
        num_layers: Number of layers.
    """

    def __init__(self, num_layers: int):
        self.sums: list[torch.Tensor | float] = [0.0] * num_layers
        self.tokens: list[torch.Tensor | int] = [0] * num_layers

    def update(self, layer: int, values: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Adds `[batch, tokens]` values; `mask` is true for those that count."""
        if mask is not None:  # padding may hold anything, and NaN times zero is NaN
            values = torch.where(mask, values, 0)
        self.sums[layer] = self.sums[layer] + values.sum(dtype=widest(values.device))
        self.tokens[layer] = self.tokens[layer] + (values.numel() if mask is None else mask.sum())

    def mean(self) -> np.ndarray:
        """`[num_layers]` float64; NaN for a layer that saw no token."""
        sums, tokens = (np.array([float(number) for number in numbers]) for numbers in (self.sums, self.tokens))
        return np.divide(sums, tokens, out=np.full_like(sums, np.nan), where=tokens > 0)
