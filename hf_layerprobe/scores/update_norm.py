"""How long a layer's update is beside the stream it is added to (our own definition)."""

from __future__ import annotations

import numpy as np
import torch

from ..activations import TokenMean
from ..precision import widest
from .registry import OURS, register


class UpdateNorm:
    """Mean over tokens of ‖x_out − x_in‖ / ‖x_in‖."""

    def __init__(self, num_layers: int):
        self.lengths = TokenMean(num_layers)

    def update(self, layer: int, before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor | None) -> None:
        # float64: the difference of two large states has few digits of its own.
        before, after = (x.to(widest(x.device)) for x in (before, after))
        stream = torch.linalg.vector_norm(before, dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        self.lengths.update(layer, torch.linalg.vector_norm(after - before, dim=-1) / stream, mask)

    def compute(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        return self.lengths.mean(), {}


register("update-norm", UpdateNorm, source=OURS, higher_is_more_important=True, needs_data=True)
