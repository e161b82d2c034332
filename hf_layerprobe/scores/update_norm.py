"""How long a layer's update is beside the stream it is added to (our own definition)."""

from __future__ import annotations

import numpy as np
import torch

from ..activations import Resumable, TokenMean
from ..activations.moments import token_squares
from .registry import OURS, register


class UpdateNorm(Resumable):
    """Mean over tokens of ‖x_out − x_in‖ / ‖x_in‖."""

    def __init__(self, num_layers: int):
        self.lengths = TokenMean(num_layers)

    def update(self, layer: int, before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor | None) -> None:
        tiny = torch.finfo(torch.float32).tiny
        self.lengths.update(layer, (token_squares(after, before) / token_squares(before).clamp_min(tiny)).sqrt(), mask)

    def compute(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        return self.lengths.mean(), {}


register("update-norm", UpdateNorm, source=OURS, higher_is_more_important=True, needs_data=True)
