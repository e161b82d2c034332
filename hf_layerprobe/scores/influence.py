"""Block influence (ShortGPT, arXiv 2403.03853): how much a layer turns the stream."""

from __future__ import annotations

import numpy as np
import torch

from ..activations import Resumable, TokenMean
from ..activations.moments import token_squares
from .registry import register


class BlockInfluence(Resumable):
    """BI = 1 − mean over tokens of cos(x_in, x_out)."""

    def __init__(self, num_layers: int):
        self.turns = TokenMean(num_layers)

    def update(self, layer: int, before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor | None) -> None:
        turns = turned(token_squares(before), token_squares(after), token_squares(after, before))
        self.turns.update(layer, turns, mask)

    def compute(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        return self.turns.mean(), {}


def turned(x: torch.Tensor, y: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
    """1 − cos of two states from the squares of their lengths and of the length of their difference.

    Keeps its digits where 1 − cos loses them: near 0. It is 1 where a state is zero.
    """
    product = (x * y).sqrt()
    return torch.where(product == 0, 1, (difference - (x.sqrt() - y.sqrt()).square()) / (2 * product))


register(
    "influence",
    BlockInfluence,
    source="block influence, ShortGPT, arXiv 2403.03853",
    higher_is_more_important=True,
    needs_data=True,
)
