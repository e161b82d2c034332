"""What a similarity says beyond its value: how structured a map is, what chance gives, where depth falls apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..errors import LayerProbeError
from .docs import docs_similarity


def gini(matrix: np.ndarray) -> float:
    """Gini coefficient of a heat map: half the mean absolute difference of two entries over their mean.

    0 where all entries are equal, towards 1 where few entries hold everything. The DOCS paper (arXiv 2501.16650)
    measures with it how structured a heat map is; which entries it takes was not readable, so that is our own
    definition: a square symmetric map counts without its diagonal, any other with all entries. NaN is left out.

    Args:
        matrix: Any shape, such as a layer × layer map; no negative entries.

    Returns:
        The coefficient in [0, 1); 0 for entries that are all 0.

    Raises:
        LayerProbeError: Negative or infinite entries, for which it is not defined, or none left.
    """
    entries = np.asarray(matrix, dtype=np.float64)
    square = entries.ndim == 2 and entries.shape[0] == entries.shape[1]
    if square and np.allclose(entries, entries.T, equal_nan=True):
        entries = entries[~np.eye(len(entries), dtype=bool)]
    entries = np.sort(entries[~np.isnan(entries)])
    if not len(entries):
        raise LayerProbeError("gini: the map has no entries besides its diagonal and NaN.")
    if entries[0] < 0 or np.isinf(entries[-1]):
        raise LayerProbeError(
            f"gini is defined for finite entries >= 0, found {entries[0]:.3g} to {entries[-1]:.3g}; "
            "take the similarity itself and not its excess over chance."
        )
    # Of N sorted entries the k-th (from 0) is the larger one in k pairs and the smaller one in N − 1 − k.
    number, total = len(entries), entries.sum()
    ranks = 2 * np.arange(number) - number + 1
    return float(max(0.0, (ranks * entries).sum() / (number * total))) if total else 0.0


@dataclass(frozen=True)
class ChanceTest:
    """A DOCS index beside what chance gives.

    Attributes:
        similarity: The DOCS index of the two matrices.
        p_value: Share of the values at least as high, itself among them.
        chance: Mean of the values under chance.
        interval: Central 95 % of the values under chance.
        resamples: Number of values under chance.
    """

    similarity: float
    p_value: float
    chance: float
    interval: tuple[float, float]
    resamples: int


def docs_p_value(
    X: torch.Tensor, Y: torch.Tensor, *, axis: str = "out", resamples: int = 200, seed: int = 0
) -> ChanceTest:
    """Permutation test of a DOCS index (our own definition): are the two matrices more alike than chance has it?

    Chance is Y with its coordinates in random order, one order for all of its vectors. That breaks every relation with
    X but keeps each vector's entries and all angles inside Y; the test is then exact wherever coordinates are
    exchangeable, also for vectors that resemble each other. (An order of its own for each vector would compare with
    independent vectors, and tell little about X as soon as those of Y are correlated.) A low p-value says that some
    relation exists, be it a few coordinates that are large in both.

    Args:
        X: `[out, in]` matrix.
        Y: `[out', in]` for `axis="out"`, `[out, in']` for `axis="in"`.
        axis: Which vectors are compared; see `docs_similarity`.
        resamples: Number of random orders, each the cost of one `docs_similarity`. No p-value is below
            1 / (resamples + 1).
        seed: Of the random orders, which are the same on every device.

    Returns:
        The test's result; the observed pairing counts as one of the random ones, so that p is never 0.

    Raises:
        LayerProbeError: Fewer than one resample, or matrices that `docs_similarity` refuses.
    """
    if resamples < 1:
        raise LayerProbeError(f"docs_p_value needs at least one resample, got {resamples}.")
    similarity = docs_similarity(X, Y, axis=axis)
    generator = torch.Generator().manual_seed(seed)
    dim = 1 if axis == "out" else 0
    values = np.empty(resamples)
    for i in range(resamples):
        order = torch.randperm(Y.shape[dim], generator=generator).to(Y.device)
        values[i] = docs_similarity(X, Y.index_select(dim, order), axis=axis)
    low, high = np.quantile(values, [0.025, 0.975])
    return ChanceTest(
        similarity=similarity,
        p_value=float((1 + (values >= similarity).sum()) / (1 + resamples)),
        chance=float(values.mean()),
        interval=(float(low), float(high)),
        resamples=resamples,
    )


def depth_segments(matrix: np.ndarray, number: int | None = None) -> list[range]:
    """Cuts the layers into contiguous segments of similar layers (our own definition).

    Of all ways to cut, the one with the largest sum, over the pairs of layers that share a segment, of their similarity
    above the mean of all pairs. It is found exactly, by dynamic programming. Without `number` that sum also decides how
    many segments there are, the fewest where several numbers tie. The scale of the map and a constant added to it are of
    no importance, nor is its diagonal. A map of pure noise is cut as well.

    Args:
        matrix: `[layers, layers]`, higher is more similar. A map that is not symmetric counts as the mean of both
            directions.
        number: How many segments; chosen as above by default.

    Returns:
        The segments in depth order, each a range of layer indices.

    Raises:
        LayerProbeError: Not square, not finite off the diagonal, or a number that cannot be had.
    """
    values = np.asarray(matrix, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or not len(values):
        raise LayerProbeError(f"depth_segments expects a layer × layer map, got the shape {values.shape}.")
    layers = len(values)
    if number is not None and not 1 <= number <= layers:
        raise LayerProbeError(f"{layers} layers make 1 to {layers} segments, not {number}.")
    pairs = ~np.eye(layers, dtype=bool)
    if not np.isfinite(values[pairs]).all():
        raise LayerProbeError("depth_segments: the map has NaN or infinite entries; leave those layers out.")
    if layers == 1:
        return [range(1)]
    above = np.where(pairs, values - values[pairs].mean(), 0)
    # corner[a, b] sums above[:a, :b], so that the gain of any segment is four look-ups.
    corner = np.zeros((layers + 1, layers + 1))
    corner[1:, 1:] = above.cumsum(0).cumsum(1)

    # best[k, b]: the largest sum for the first b layers in k segments, the last of which starts at start[k, b].
    best = np.full((layers + 1, layers + 1), -np.inf)
    start = np.zeros((layers + 1, layers + 1), dtype=int)
    best[0, 0] = 0
    for k in range(1, layers + 1):
        for b in range(k, layers + 1):
            a = np.arange(b)
            sums = best[k - 1, a] + corner[b, b] - corner[a, b] - corner[b, a] + corner[a, a]
            start[k, b] = sums.argmax()
            best[k, b] = sums.max()
    if number is None:
        rounding = 1e-12 * np.abs(values[pairs]).sum()
        number = 1 + int((best[1:, layers] >= best[1:, layers].max() - rounding).argmax())
    segments, end = [], layers
    for k in range(number, 0, -1):
        segments.append(range(int(start[k, end]), end))
        end = segments[-1].start
    return segments[::-1]
