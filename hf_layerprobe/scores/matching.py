"""The inner loop of DOCS: each vector's best partner in another matrix, at the speed of the matrix product.

No n × n matrix exists: the product is taken tile by tile, and only its row and column maxima are kept.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from ..precision import widest

# A tile of cosines (4 MB in float32) stays in the second-level cache while its maxima are taken.
TILE = 1024
# From this many vectors on, the error of products in bfloat16 averages out below 1e-5 (measured on random weights:
# 1e-4 for one cosine, independent from vector to vector). With fewer, the best cosines are computed again in float32.
AVERAGES_OUT = 1024
# With fewer than this, one partner that the search mistakes for a nearly equal one would show, and speed does not.
SMALL = 128
SIGN = 0x7FFFFFFF


def unit_vectors(matrix: torch.Tensor, axis: str) -> torch.Tensor:
    """The vectors of a matrix as unit rows `[m, n]`, float32; vectors of zeros, which have no direction, left out.

    Args:
        matrix: `[out, in]`.
        axis: `"out"` for its rows, `"in"` for its columns.
    """
    rows = matrix.detach() if axis == "out" else matrix.detach().T
    units = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    dead = torch.empty(len(rows), dtype=torch.bool, device=rows.device)
    for start in range(0, len(rows), TILE):  # in parts: the wide copies below are larger than the result
        part = rows[start : start + TILE]
        # float64 norms: a float32 sum of squares overflows above 1e19 and loses small vectors.
        norms = torch.linalg.vector_norm(part, dim=1, keepdim=True, dtype=widest(rows.device))
        dead[start : start + TILE] = norms[:, 0] == 0
        torch.div(part, norms, out=units[start : start + TILE])
    return units[~dead] if dead.any() else units


def best_matches(X: torch.Tensor, Y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest absolute cosine of each vector of X `[m, n]` in Y `[p, n]`, and of each of Y in X: `[m]`, `[p]`."""
    vectors = min(len(X), len(Y))
    fast = vectors >= SMALL and _bfloat16_is_faster(X.device.type)
    if fast and vectors < AVERAGES_OUT:
        return _searched(X, Y)
    best_x, best_y = X.new_zeros(len(X)), X.new_zeros(len(Y))
    with _bfloat16_products(fast):
        for rows, columns, cosines in _tiles(X, Y):
            torch.maximum(best_x[rows], cosines.amax(1).view(torch.float32), out=best_x[rows])
            torch.maximum(best_y[columns], cosines.amax(0).view(torch.float32), out=best_y[columns])
    return best_x, best_y


def _searched(X: torch.Tensor, Y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Best partners found with bfloat16 products, their cosines computed in float32."""
    with _bfloat16_products(True):
        cosines = (X @ Y.T).view(torch.int32).bitwise_and_(SIGN)
    partner_x, partner_y = cosines.max(1).indices, cosines.max(0).indices
    return torch.linalg.vecdot(X, Y[partner_x]).abs_(), torch.linalg.vecdot(Y, X[partner_y]).abs_()


def _tiles(X: torch.Tensor, Y: torch.Tensor) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """(rows, columns, absolute cosines as the integers whose bits they are: those compare alike, and faster)."""
    for start in range(0, len(X), TILE):
        for other in range(0, len(Y), TILE):
            cosines = X[start : start + TILE] @ Y[other : other + TILE].T
            rows, columns = slice(start, start + TILE), slice(other, other + TILE)
            yield rows, columns, cosines.view(torch.int32).bitwise_and_(SIGN)


@contextmanager
def _bfloat16_products(wanted: bool) -> Iterator[None]:
    """Within the context, float32 products on this CPU or GPU multiply bfloat16 parts and add in float32."""
    if not wanted:
        yield
        return
    backends = [torch.backends.mkldnn.matmul, torch.backends.cuda.matmul]
    before = [backend.fp32_precision for backend in backends]
    try:
        # CUDA has no such mode with bfloat16; its tf32 is three bits more precise.
        backends[0].fp32_precision, backends[1].fp32_precision = "bf16", "tf32"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


@cache
def _bfloat16_is_faster(device: str) -> bool:
    """Whether this kind of device gains from it: a quick probe, once a process."""
    if not hasattr(torch.backends.mkldnn, "matmul") or device == "mps":
        return False
    sample = torch.randn(768, 768, device=device)
    seconds = []
    for wanted in (False, True):
        with _bfloat16_products(wanted):
            seconds.append(min(_timed(sample) for _ in range(4)))
    return seconds[1] < 0.8 * seconds[0]


def _timed(sample: torch.Tensor) -> float:
    start = time.perf_counter()
    (sample @ sample.T)[0, 0].item()  # waits for the device
    return time.perf_counter() - start
