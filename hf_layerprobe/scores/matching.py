"""The inner loop of DOCS: each vector's best partner in another matrix, at the speed of the matrix product.

No n × n matrix exists: the product is taken tile by tile, and only its row and column maxima are kept.
"""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from ..precision import widest

# Vectors in a tile of cosines (16 MB in float32). A power of two: the partner's place in the tile is written into the
# lowest bits of its cosine.
TILE = 2048
COPIED = 1 << 23
# Vectors made to unit length at a time.
PART = 256
# With fewer vectors, one partner that the search mistakes for a nearly equal one would show, and speed does not.
SMALL = 128
# The bits of a non-negative float32, read as an integer, are ordered like the float itself.
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
    for start in range(0, len(rows), PART):  # in parts: the wide copies below are larger than the result
        part = rows[start : start + PART]
        # float64 norms: a float32 sum of squares overflows above 1e19 and loses small vectors.
        norms = torch.linalg.vector_norm(part, dim=1, keepdim=True, dtype=widest(rows.device))
        dead[start : start + PART] = norms[:, 0] == 0
        torch.div(part, norms, out=units[start : start + PART])
    return units[~dead] if dead.any() else units


def best_matches(X: torch.Tensor, Y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest absolute cosine of each vector of X `[m, n]` in Y `[p, n]`, and of each of Y in X: `[m]`, `[p]`.

    Where the device gains from it, partners are searched with products of bfloat16 parts, which are off by about 1e-4,
    and the cosines with the partners found are computed in float32. A partner that the search prefers by mistake is one
    whose cosine is nearly the largest.
    """
    if min(len(X), len(Y)) >= SMALL and _bfloat16_is_faster(X.device.type):
        with _bfloat16_products(True):
            partner_x, partner_y = _search(X, Y)
        return _cosines(X, Y, partner_x), _cosines(Y, X, partner_y)
    best_x, best_y = X.new_zeros(len(X)), X.new_zeros(len(Y))
    for rows, columns, cosines in _tiles(X, Y):
        torch.maximum(best_x[rows], cosines.amax(1).view(torch.float32), out=best_x[rows])
        torch.maximum(best_y[columns], cosines.amax(0).view(torch.float32), out=best_y[columns])
    return best_x, best_y


def _search(X: torch.Tensor, Y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The partner of each vector of X in Y, and of each of Y in X: `[m]`, `[p]` indices."""
    place = torch.arange(TILE, dtype=torch.int32, device=X.device)
    best_x: dict[int, list[torch.Tensor]] = defaultdict(list)  # first row of a tile → its maxima, tile by tile
    best_y: dict[int, list[torch.Tensor]] = defaultdict(list)
    packed = torch.empty(min(TILE, len(X)) * min(TILE, len(Y)), dtype=torch.int32, device=X.device)
    for rows, columns, cosines in _tiles(X, Y, keep=SIGN & ~(TILE - 1)):
        height, width = cosines.shape
        # Value and place in one integer: one maximum finds both, at the speed of the value alone.
        by_row = torch.bitwise_or(cosines, place[:width], out=packed[: height * width].view(height, width))
        best_x[rows.start].append(by_row.amax(1))
        best_y[columns.start].append(cosines.bitwise_or_(place[:height, None]).amax(0))
    step = _step(X.shape[1])
    return _unpacked(best_x, step), _unpacked(best_y, step)


def _unpacked(best: dict[int, list[torch.Tensor]], step: int) -> torch.Tensor:
    """Partners of all vectors from the packed maxima of each tile."""
    partners = []
    for maxima in best.values():
        largest, tile = torch.stack(maxima).max(0)
        partners.append(tile * step + (largest & (TILE - 1)))
    return torch.cat(partners)


def _cosines(X: torch.Tensor, Y: torch.Tensor, partners: torch.Tensor) -> torch.Tensor:
    """Absolute cosine of each vector of X with its partner in Y, float32."""
    if X.device.type != "cpu":
        return torch.linalg.vecdot(X, Y[partners]).abs_()
    # The product of X and Yᵀ at these places only: no copy of the partners is made.
    _hush_sparse()
    places = torch.sparse_csr_tensor(
        torch.arange(len(X) + 1), partners, X.new_zeros(len(X)), (len(X), len(Y)), check_invariants=False
    )
    return torch.sparse.sampled_addmm(places, X, Y.T, beta=0).values().abs_()


@cache
def _hush_sparse() -> None:
    """Torch says once a process that sparse tensors are in beta, to whoever makes the first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.eye(1).to_sparse_csr()


def _tiles(X: torch.Tensor, Y: torch.Tensor, keep: int = SIGN) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """(rows, columns, absolute cosines as integers: those of their bits that are in `keep`).

    The next tile overwrites the last.
    """
    step = _step(X.shape[1])
    buffer = X.new_empty(min(step, len(X)) * min(step, len(Y)))
    for start in range(0, len(X), step):
        rows = X[start : start + step]
        for other in range(0, len(Y), step):
            columns = Y[other : other + step]
            cosines = buffer[: len(rows) * len(columns)].view(len(rows), len(columns))
            torch.mm(rows, columns.T, out=cosines)
            bits = cosines.view(torch.int32).bitwise_and_(keep)
            yield slice(start, start + len(rows)), slice(other, other + len(columns)), bits


def _step(length: int) -> int:
    """Vectors in a tile: fewer of long ones, since a product keeps bfloat16 copies of the tile's vectors."""
    return min(TILE, 1 << max(8, (COPIED // length).bit_length() - 1))


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
    # Numbers of its own: who trains meanwhile must draw the same ones as without us.
    sample = torch.randn(768, 768, generator=torch.Generator().manual_seed(0)).to(device)
    seconds = []
    for wanted in (False, True):
        with _bfloat16_products(wanted):
            seconds.append(min(_timed(sample) for _ in range(4)))
    return seconds[1] < 0.8 * seconds[0]


def _timed(sample: torch.Tensor) -> float:
    start = time.perf_counter()
    (sample @ sample.T)[0, 0].item()  # waits for the device
    return time.perf_counter() - start
