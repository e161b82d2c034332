"""How much of the second moment the largest values hold, without keeping or sorting them (our own definition)."""

from __future__ import annotations

import numpy as np
import torch

from ..precision import widest

SHARE = 0.001  # the largest 0.1 % of the values
STEPS = 16  # bins to a factor of 2
OCTAVES = 128  # magnitudes from 2^-64 to 2^64


class LargestShare:
    """Bounds of the share of Σ x² that the largest 0.1 % of the values of each layer contribute.

    Each token brings its largest magnitude m and its sum of squares E, kept in bins of m that are 1/16 of an octave wide. At
    least: each token's largest value, from the top. At most: every token holds all of E in values of magnitude m. The two
    meet where few channels of few tokens hold everything, the case to be warned of. Sums alone are kept, so that batches,
    order and processes do not matter; nothing waits for the device.

    Args:
        num_layers: Number of layers.
    """

    def __init__(self, num_layers: int):
        self.bins: list[torch.Tensor | None] = [None] * num_layers  # [bins, 3] each: tokens, Σ m², Σ E
        self.widths = [0] * num_layers

    def update(
        self, layer: int, largest: torch.Tensor, squares: torch.Tensor, width: int, mask: torch.Tensor | None
    ) -> None:
        """Adds tokens: `largest` and `squares` are `[batch, tokens]`, `width` is the number of values of each."""
        if self.bins[layer] is None:
            self.bins[layer] = torch.zeros(STEPS * OCTAVES, 3, dtype=squares.dtype, device=squares.device)
        used = torch.isfinite(squares) if mask is None else torch.isfinite(squares) & mask
        largest, squares = torch.where(used, largest, 0).flatten(), torch.where(used, squares, 0).flatten()
        place = (largest.log2() * STEPS).floor() + STEPS * OCTAVES // 2
        place = place.clamp(0, STEPS * OCTAVES - 1).long()
        self.bins[layer].index_add_(
            0, place, torch.stack([used.flatten().to(squares.dtype), largest.square(), squares], 1)
        )
        self.widths[layer] = width

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """The share of each layer is at least, and at most: `[num_layers]` float64 each; NaN for a layer without tokens."""
        state = self.state_dict()
        found = [_bounds(*pair) for pair in zip(state["bins"].flip(1).numpy(), state["widths"].tolist(), strict=True)]
        low, high = np.array(found).T
        return low, high

    def merge(self, other: LargestShare) -> None:
        """Adds what another instance has seen."""
        for layer, theirs in enumerate(other.bins):
            if theirs is not None:
                mine = self.bins[layer]
                self.bins[layer] = theirs.clone() if mine is None else mine + theirs.to(mine.device)
                self.widths[layer] = other.widths[layer]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """`bins` `[num_layers, bins, 3]` and `widths` `[num_layers]`, on the CPU."""
        empty = torch.zeros(STEPS * OCTAVES, 3, dtype=widest(torch.device("cpu")))
        bins = torch.stack([empty if bins is None else bins.cpu().double() for bins in self.bins])
        return {"bins": bins, "widths": torch.tensor(self.widths)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.widths = state["widths"].tolist()
        self.bins = [bins.clone() if width else None for bins, width in zip(state["bins"], self.widths, strict=True)]


def _bounds(bins: np.ndarray, width: int) -> tuple[float, float]:
    """Of one layer; bins from the largest magnitude down."""
    tokens, maxima, squares = bins.T
    total = squares.sum()
    if not total > 0:
        return np.nan, np.nan
    wanted = max(1.0, SHARE * tokens.sum() * width)
    # At least: of the bin in which the values run out, its mean.
    before = np.concatenate([[0], np.cumsum(tokens)[:-1]])
    taken = np.clip(wanted - before, 0, tokens)
    low = (taken * np.divide(maxima, tokens, out=np.zeros_like(maxima), where=tokens > 0)).sum()
    # At most: E / edge² values of the upper edge of their bin.
    edges = 2.0 ** (2 * ((np.arange(len(bins), 0, -1) - STEPS * OCTAVES // 2) / STEPS))
    held = squares / edges
    before = np.concatenate([[0], np.cumsum(held)[:-1]])
    high = (np.clip(wanted - before, 0, held) * edges).sum()
    return low / total, min(1.0, high / total)
