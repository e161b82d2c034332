"""Block influence (ShortGPT, arXiv 2403.03853): how much a layer turns the stream."""

from __future__ import annotations

import numpy as np
import torch

from ..precision import widest
from .registry import register


class BlockInfluence:
    """BI = 1 − mean over tokens of cos(x_in, x_out)."""

    def __init__(self, num_layers: int):
        self.cosines = torch.zeros(num_layers, dtype=torch.float64)
        self.tokens = torch.zeros(num_layers, dtype=torch.float64)

    def update(self, layer: int, before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor | None) -> None:
        cosines = torch.cosine_similarity(before.float(), after.float(), dim=-1)  # [batch, tokens]
        if mask is not None:
            cosines = torch.where(mask, cosines, 0)
        self.cosines[layer] += cosines.sum(dtype=widest(cosines.device)).cpu()
        self.tokens[layer] += cosines.numel() if mask is None else mask.sum().cpu()

    def compute(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        return (1 - self.cosines / self.tokens).numpy(), {}


register(
    "influence",
    BlockInfluence,
    source="block influence, ShortGPT, arXiv 2403.03853",
    higher_is_more_important=True,
    needs_data=True,
)
