"""In how many directions a layer's output varies: stable rank and entropy of its spectrum (our own definition)."""

from __future__ import annotations

import math

import numpy as np
import torch

from ..activations import TokenSample
from ..precision import widest
from .registry import OURS, register


def spectrum(sample: TokenSample) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Stable rank ‖X‖_F² / ‖X‖₂² of each layer's output on sampled tokens, centred over the tokens.

    `details["entropy"]` is that of the squared singular values over their sum, in nats: its exponential is an effective
    rank. Neither can exceed the number of sampled tokens.
    """
    ranks, entropies = np.array([_rank_and_entropy(rows) for rows in sample.states(at_least=2)[1:]]).reshape(-1, 2).T
    return ranks, {"entropy": entropies}


def _rank_and_entropy(rows: torch.Tensor) -> tuple[float, float]:
    if not torch.isfinite(rows).all():  # no singular values; the layer will be named
        return math.nan, math.nan
    rows = rows.to(widest(rows.device))
    squares = torch.linalg.svdvals(rows - rows.mean(0)).square()  # [min(tokens, hidden)], descending
    shares = squares / squares.sum()
    return (1 / shares[0]).item(), torch.special.entr(shares).sum().item()


register("stable-rank", TokenSample, read=spectrum, source=OURS, higher_is_more_important=True, needs_data=True)
