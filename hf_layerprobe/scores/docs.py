"""DOCS, the similarity of two weight matrices (arXiv 2501.16650), and its layer × layer maps."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import torch
from torch import nn

from ..errors import LayerProbeError
from ..precision import widest
from ..progress import progress
from ..stacks import LayerStack, resolve_stack
from ..weights import KINDS, read_matrices
from .gumbel import gumbel_location
from .results import SimilarityMatrix

SOURCE = "DOCS, arXiv 2501.16650"
# Rows of the cosine matrix in memory at a time: the maxima are taken tile by tile, so that no n × n matrix exists.
TILE = 1024
# Two vectors this close are the same direction; float32 products of unit vectors are off by about 1e-7.
SAME = 2e-6


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
        The index in [0, 1]; exactly 1 for matrices that are equal up to order, sign and scale of the vectors. A vector
        of zeros has cosine 0 with everything.

    Raises:
        LayerProbeError: Matrices that are not 2-D, not finite, or whose vectors have different lengths.
    """
    for name, matrix in (("X", X), ("Y", Y)):
        if not isinstance(matrix, torch.Tensor) or matrix.dim() != 2:
            found = tuple(matrix.shape) if isinstance(matrix, torch.Tensor) else type(matrix).__name__
            raise LayerProbeError(f"docs_similarity expects two [out, in] matrices; {name} is {found}.")
        if not torch.isfinite(matrix).all():
            raise LayerProbeError(f"docs_similarity: {name} holds NaN or infinite values.")
    X, Y = _unit_vectors(X, axis), _unit_vectors(Y, axis)
    if X.shape[1] != Y.shape[1]:
        raise LayerProbeError(
            f"docs_similarity with axis={axis!r} compares vectors of one length; X has vectors of {X.shape[1]}, "
            f"Y of {Y.shape[1]} entries."
        )
    return _index([_best_matches(X, Y)])[0]


def chance_level(x_vectors: int, y_vectors: int, length: int) -> float:
    """The DOCS index expected of independent random matrices (our own definition).

    The best of m random directions in R^n has an absolute cosine with a Gumbel location of about
    Φ⁻¹(1 − 1/(2m)) / √n.
    """

    def location(candidates: int) -> float:
        return min(1.0, NormalDist().inv_cdf(1 - 1 / (2 * candidates)) / math.sqrt(length))

    return (location(x_vectors) + location(y_vectors)) / 2


def docs(
    model: nn.Module,
    *,
    kinds: Sequence[str] | None = None,
    axis: str = "out",
    stack: str | LayerStack | None = None,
    other: nn.Module | None = None,
) -> SimilarityMatrix:
    """Layer × layer DOCS similarity for every kind of weight matrix (arXiv 2501.16650).

    Args:
        model: The model; nothing is run, only weights are read.
        kinds: Some of q, k, v, o, gate, up, down; all that the model has by default.
        axis: `"out"` or `"in"`; see [`docs_similarity`].
        stack: Path of the stack; the main one by default.
        other: A second model (a tuned one, another checkpoint); its layers are then the columns.

    Returns:
        One matrix a kind, with the chance level of its shapes. NaN where two layers cannot be compared: one lacks that
        kind of matrix, or their vectors have different lengths.

    Raises:
        LayerProbeError: No stack, an unknown kind or axis, weights that are not in memory or not finite.
    """
    if axis not in ("out", "in"):
        raise LayerProbeError(f"axis is 'out' (rows) or 'in' (columns), got {axis!r}.")
    here = resolve_stack(model, stack)
    there = here if other is None else resolve_stack(other, here.path)
    rows, columns = _vectors(here, kinds, axis), _vectors(there, kinds, axis) if other is not None else None
    values, chance = {}, {}
    pairs = [
        (kind, i, j)
        for kind in KINDS
        if kind in rows
        for i in rows[kind]
        for j in (rows if columns is None else columns).get(kind, ())
        if columns is not None or i < j
    ]
    matches: dict[str, dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]] = defaultdict(dict)
    for kind, i, j in progress(pairs, desc="DOCS", unit="pair"):
        X, Y = rows[kind][i], (rows if columns is None else columns)[kind][j]
        if X.shape[1] == Y.shape[1]:
            matches[kind][i, j] = _best_matches(X, Y)
    for kind in rows:
        shapes = [{i: tuple(v.shape) for i, v in part[kind].items()} for part in (rows, columns or rows)]
        values[kind] = _fill(matches[kind], here.num_layers, there.num_layers, symmetric=columns is None)
        if columns is None:
            values[kind][list(rows[kind]), list(rows[kind])] = 1.0  # S(X, X) is 1 by definition
        chance[kind] = _chance(shapes[0], shapes[1], values[kind].shape)
    return SimilarityMatrix(values=values, chance=chance, axis=axis, stack=here.path, source=SOURCE)


def _vectors(stack: LayerStack, kinds: Sequence[str] | None, axis: str) -> dict[str, dict[int, torch.Tensor]]:
    """kind → layer → unit vectors [m, n]."""
    vectors: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
    for layer, kind, matrix in read_matrices(stack, kinds):
        vectors[kind][layer] = _unit_vectors(matrix, axis)
    return {kind: vectors[kind] for kind in KINDS if kind in vectors}


def _unit_vectors(matrix: torch.Tensor, axis: str) -> torch.Tensor:
    """The vectors to compare as unit rows [m, n], float32."""
    if axis not in ("out", "in"):
        raise LayerProbeError(f"axis is 'out' (rows) or 'in' (columns), got {axis!r}.")
    rows = matrix.detach() if axis == "out" else matrix.detach().T
    # float64 norms: a float32 sum of squares overflows above 1e19 and loses small vectors.
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=widest(rows.device))
    return torch.where(norms > 0, rows / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0).float().contiguous()


def _best_matches(X: torch.Tensor, Y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest absolute cosine of each vector of X [m, n] in Y [p, n], and of each of Y in X: [m], [p]."""
    best_x = X.new_empty(len(X))
    best_y = X.new_zeros(len(Y))
    for start in range(0, len(X), TILE):
        cosines = (X[start : start + TILE] @ Y.T).abs_()  # [tile, p]
        best_x[start : start + TILE] = cosines.amax(1)
        torch.maximum(best_y, cosines.amax(0), out=best_y)
    return best_x, best_y


def _index(matches: list[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    """The DOCS index of each pair of samples; all fits of one sample size in one batch."""
    samples = [sample for pair in matches for sample in pair]
    locations = torch.empty(len(samples), dtype=torch.float64)
    by_size: dict[int, list[int]] = defaultdict(list)
    for position, sample in enumerate(samples):
        by_size[len(sample)].append(position)
    for positions in by_size.values():
        stacked = torch.stack([samples[p] for p in positions])
        fitted = gumbel_location(stacked).cpu()
        # Equal up to order, sign and scale: no spread to fit a distribution to, and the index is exactly 1.
        same = (stacked.amin(-1) >= 1 - SAME).cpu()
        locations[positions] = torch.where(same, torch.ones_like(fitted), fitted).clamp(0, 1)
    return locations.view(-1, 2).mean(1).tolist()


def _fill(matches: dict, rows: int, columns: int, *, symmetric: bool) -> np.ndarray:
    values = np.full((rows, columns), np.nan)
    for (i, j), value in zip(matches, _index(list(matches.values())), strict=True):
        values[i, j] = value
        if symmetric:
            values[j, i] = value
    return values


def _chance(rows: dict[int, tuple], columns: dict[int, tuple], shape: tuple[int, int]) -> float | np.ndarray:
    if len(set(rows.values()) | set(columns.values())) == 1:
        vectors, length = next(iter(rows.values()))
        return chance_level(vectors, vectors, length)
    levels = np.full(shape, np.nan)
    for i, (x_vectors, x_length) in rows.items():
        for j, (y_vectors, y_length) in columns.items():
            if x_length == y_length:
                levels[i, j] = chance_level(x_vectors, y_vectors, x_length)
    return levels
