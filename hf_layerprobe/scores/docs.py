"""DOCS, the similarity of two weight matrices (arXiv 2501.16650), and the level it has by chance."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch

from ..errors import LayerProbeError
from .gumbel import gumbel_fit
from .matching import best_matches
from .vectors import Vectors

SOURCE = "DOCS, arXiv 2501.16650"
# Two vectors this close are the same direction: a cosine in float32 is off by about 1e-7.
SAME = 2e-6
# Standard error of the fitted location of m values, in units of scale / √m: √(1 + 6(1 − γ)²/π²).
LOCATION_ERROR = 1.0529


def docs_similarity(X: torch.Tensor, Y: torch.Tensor, *, axis: str = "out") -> float:
    """The DOCS index of two weight matrices (arXiv 2501.16650).

    Every vector of one matrix is matched with its most similar vector (largest absolute cosine) of the other; a Gumbel
    distribution is fitted to the two samples of best matches by maximum likelihood, and the index is the mean of the
    two locations. Which torch axis the paper's columns are was not readable, so it is a choice here.

    Args:
        X: `[out, in]` matrix, as `nn.Linear.weight`.
        Y: `[out', in]` for `axis="out"`, `[out, in']` for `axis="in"`.
        axis: `"out"` compares the rows (one vector for each output neuron), `"in"` the columns.

    Returns:
        The index in [0, 1]; exactly 1 for matrices that are equal up to order, sign and scale of the vectors. Vectors of
        zeros have no direction and are left out.

    Raises:
        LayerProbeError: Matrices that are not 2-D, not finite, all zero, or whose vectors have different lengths.
    """
    check_axis(axis)
    for name, matrix in (("X", X), ("Y", Y)):
        if not isinstance(matrix, torch.Tensor) or matrix.dim() != 2:
            found = tuple(matrix.shape) if isinstance(matrix, torch.Tensor) else type(matrix).__name__
            raise LayerProbeError(f"docs_similarity expects two [out, in] matrices; {name} is {found}.")
        if not torch.isfinite(matrix).all():
            raise LayerProbeError(f"docs_similarity: {name} holds NaN or infinite values.")
    X, Y = Vectors.of(X, axis), Vectors.of(Y, axis)
    if X.length != Y.length:
        raise LayerProbeError(
            f"docs_similarity with axis={axis!r} compares vectors of one length; X has vectors of {X.length}, "
            f"Y of {Y.length} entries."
        )
    for name, vectors in (("X", X), ("Y", Y)):
        if not len(vectors):
            raise LayerProbeError(f"docs_similarity: {name} has no vector that is not zero.")
    return docs_index(best_matches(X, [Y]))[0][0]


def chance_level(x_vectors: int, y_vectors: int, length: int) -> float:
    """The DOCS index expected of independent random matrices (our own definition).

    The best of m random directions in R^n has an absolute cosine with a Gumbel location of about the u that one random
    direction exceeds with probability 1/m; for long vectors that is Φ⁻¹(1 − 1/(2m)) / √n. It agrees with simulation to
    3 % from about 64 vectors on.
    """
    return (_exceeded_by(1 / x_vectors, length) + _exceeded_by(1 / y_vectors, length)) / 2


@lru_cache(maxsize=1024)
def _exceeded_by(share: float, length: int) -> float:
    """The absolute cosine that this share of all directions in R^n exceeds with a given one."""
    if length == 1:
        return 1.0
    # The angle θ between directions in R^n has density sin^(n−2) θ.
    angles = np.linspace(0, math.pi / 2, 20001)
    density = np.sin(angles) ** (length - 2)
    below = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(np.cos(np.interp(share, below / below[-1], angles)))


def docs_index(matches: list[tuple[torch.Tensor, torch.Tensor]]) -> list[tuple[float, float]]:
    """The index of each pair of samples of best matches, and the standard error of the two fits.

    All fits of one sample size are one batch.
    """
    if not matches:
        return []
    samples = [sample for pair in matches for sample in pair]
    locations, errors = torch.empty(2, len(samples), dtype=torch.float64)
    sizes = [sample.shape[0] for sample in samples]
    for size in set(sizes):
        positions = [position for position, found in enumerate(sizes) if found == size]
        stacked = torch.stack([samples[position] for position in positions])
        fitted, scale = (part.cpu() for part in gumbel_fit(stacked))
        # Equal up to order, sign and scale: no spread to fit a distribution to, and the index is exactly 1.
        same = (stacked.amin(-1) >= 1 - SAME).cpu()
        locations[positions] = torch.where(same, torch.ones_like(fitted), fitted).clamp(0, 1)
        errors[positions] = LOCATION_ERROR * scale / math.sqrt(size)
    means = locations.view(-1, 2).mean(1).tolist()
    return list(zip(means, (errors.view(-1, 2).norm(dim=1) / 2).tolist(), strict=True))


def check_axis(axis: str) -> None:
    if axis not in ("out", "in"):
        raise LayerProbeError(f"axis is 'out' (rows) or 'in' (columns), got {axis!r}.")
