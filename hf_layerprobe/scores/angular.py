"""Angular distance between the states before any two layers (arXiv 2403.17887)."""

from __future__ import annotations

import math

import numpy as np
import torch

from ..activations import Resumable, Sum
from ..precision import widest
from .registry import register


class AngularDistance(Resumable):
    """d(i, n) = mean over sequences of arccos(cos(x_i, x_{i+n})) / π, at the last token that counts of each sequence.

    All block lengths n at once: the distance between every two of the states x_0 to x_L, where x_i enters layer i and x_L
    leaves the last one. A layer's own number is d(i, 1); of a block of n layers, the one with the smallest d(i, n) goes.
    Only the last tokens of one batch are kept.
    """

    def __init__(self, num_layers: int):
        self.num_layers = num_layers
        self.angles = Sum()  # [L + 1, L + 1], over sequences, in units of π
        self.sequences = Sum()
        self._states: list[torch.Tensor] = []  # [batch, hidden] each, of the batch that is on its way

    def update(self, layer: int, before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor | None) -> None:
        if layer == 0:
            self._states = []
            self._choose(before, mask)
        self._keep(before)
        if layer == self.num_layers - 1:
            self._keep(after)
            self._measure()

    def compute(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        distances = torch.as_tensor(self.angles.value / self.sequences.value).cpu().numpy()
        return np.diagonal(distances, offset=1).copy(), {"distances": distances}

    def _choose(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> None:
        counted = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device) if mask is None else mask
        place = torch.arange(hidden.shape[1], device=hidden.device)
        self._last = torch.where(counted, place, -1).amax(1)  # [batch]; -1 for a row of padding

    def _keep(self, hidden: torch.Tensor) -> None:
        last = self._last.to(hidden.device).clamp(min=0)[:, None, None].expand(-1, 1, hidden.shape[-1])
        state = hidden.gather(1, last)[:, 0]
        self._states.append(state.to(widest(state.device)))

    def _measure(self) -> None:
        device = self._last.device
        states = torch.stack([state.to(device) for state in self._states], 1)  # [batch, L + 1, hidden]
        units = states / torch.linalg.vector_norm(states, dim=-1, keepdim=True)
        # The angle from both norms, 2 atan2(‖a − b‖, ‖a + b‖), keeps its digits where arccos loses them: near 0 and π.
        # State by state: all pairs at once would be the largest tensor of the pass.
        between, across = (
            torch.stack([torch.linalg.vector_norm(units + s * one, dim=-1) for one in units.split(1, dim=1)], 1)
            for s in (-1, 1)
        )
        angles = 2 * torch.atan2(between, across) / math.pi
        counted = self._last >= 0
        angles = torch.where(counted[:, None, None], angles, 0).sum(0)
        self.angles.add(angles)
        self.sequences.add(counted.sum())
        self._states = []


register(
    "angular",
    AngularDistance,
    source="angular distance, arXiv 2403.17887",
    higher_is_more_important=True,
    needs_data=True,
)
