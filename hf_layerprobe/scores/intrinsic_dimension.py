"""Local intrinsic dimension of each layer's output (our own definition, after arXiv 2402.18048)."""

from __future__ import annotations

import numpy as np
import torch

from ..activations import TokenSample
from ..precision import widest
from .registry import OURS, register

# The paper gives an answer its dimension, from those to the same task; this gives a layer the mean over tokens.
SOURCE = f"{OURS}, after local intrinsic dimension, arXiv 2402.18048"


def intrinsic_dimension(sample: TokenSample) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Mean over sampled tokens of the local intrinsic dimension of each layer's output.

    For a token with distances r_1 <= … <= r_R to the other sampled tokens it is −[(1/T) Σ_j log(r_j / r_T)]⁻¹ over the T
    nearest; T = R − 1, all but one, as in the paper, which takes answers to the same task for points. `details["spread"]` is
    the standard deviation over tokens. Tokens in the very same place (distance 0) are left out as neighbours.
    """
    found = [local_dimensions(rows) for rows in sample.states(at_least=4)[1:]]
    found = [each[~torch.isinf(each)] for each in found]  # a token whose neighbours are all equally far tells nothing
    means, spreads = (np.array([float(f(each)) for each in found]) for f in (torch.mean, torch.std))
    return means, {"spread": spreads}


def local_dimensions(points: torch.Tensor) -> torch.Tensor:
    """Levina–Bickel estimate at each of the points `[n, hidden]` from all other points but the farthest: `[n]`."""
    points = points.to(widest(points.device))
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").sort(1).values[:, :-1]
    neighbours = distances > 0
    logs = torch.where(neighbours, torch.log(distances / distances[:, -1:]), 0)
    return -neighbours.sum(1) / logs.sum(1)


register("lid", TokenSample, read=intrinsic_dimension, source=SOURCE, higher_is_more_important=True, needs_data=True)
