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
        self.tokens: list[torch.Tensor | float] = [0.0] * num_layers

    def update(self, layer: int, values: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Adds `[batch, tokens]` values; `mask` is true for those that count."""
        if mask is not None:  # padding may hold anything, and NaN times zero is NaN
            values = torch.where(mask, values, 0)
        self.sums[layer] = self.sums[layer] + values.sum(dtype=widest(values.device))
        self.tokens[layer] = self.tokens[layer] + (values.numel() if mask is None else mask.sum())

    def mean(self) -> np.ndarray:
        """`[num_layers]` float64; NaN for a layer that saw no token."""
        sums, tokens = (numbers.numpy() for numbers in self.state_dict().values())
        return np.divide(sums, tokens, out=np.full_like(sums, np.nan), where=tokens > 0)

    def merge(self, other: TokenMean) -> None:
        """Adds what another instance has seen."""
        for layer, (sums, tokens) in enumerate(zip(*other.state_dict().values(), strict=True)):
            self.sums[layer], self.tokens[layer] = self.sums[layer] + sums.item(), self.tokens[layer] + tokens.item()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """`sums` and `tokens`, `[num_layers]` float64 on the CPU."""
        here = {"sums": self.sums, "tokens": self.tokens}
        return {
            name: torch.tensor([float(number) for number in numbers], dtype=torch.float64)
            for name, numbers in here.items()
        }

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.sums, self.tokens = state["sums"].tolist(), state["tokens"].tolist()
