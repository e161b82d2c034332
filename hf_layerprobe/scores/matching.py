"""The inner loop of DOCS: each vector's best partner in another matrix, at the speed of the matrix product.

No n × n matrix exists: the product is taken tile by tile, and only its row and column maxima are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial

import torch

from . import native
from .vectors import Vectors

# Vectors in a tile of cosines (16 MB in float32; 256 MB on a GPU, which wants large products). The partner's place in the
# tile is written into the lowest bits of its cosine, as many as a place can need.
TILE, GPU_TILE = 1 << 11, 1 << 13
COPIED = 1 << 23
# Numbers in the vectors whose cosines with their partners are computed at a time.
PART = 1 << 21
# With fewer vectors, one partner that the search mistakes for a nearly equal one would show, and speed does not. Short
# vectors have many nearly equal partners.
SMALL = 128
# The bits of a non-negative float32, read as an integer, are ordered like the float itself.
SIGN = 0x7FFFFFFF


def best_matches(X: Vectors, Ys: Sequence[Vectors]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each Y: the largest absolute cosine of each vector of X in Y, and of each of Y in X: `[m]`, `[p]`, float32.

    Where the device gains from it, partners are searched with products in bfloat16, which are off by about 1e-4, and the
    cosines with the partners found are computed in float32. A partner that the search prefers by mistake is one whose
    cosine is nearly the largest.

    Args:
        X: m vectors.
        Ys: Any number of sets of p vectors of the same length, on the same device.
    """
    few = [min(len(X), X.length, len(Y)) < SMALL for Y in Ys]
    if any(few):
        return [_largest(X, Y) if small else best_matches(X, [Y])[0] for Y, small in zip(Ys, few, strict=True)]
    if X.packed is not None and all(Y.packed is not None for Y in Ys):
        return native.matches(X.packed, [Y.packed for Y in Ys])
    device = X.rows.device.type
    if device == "cuda" and "dtype_out" in torch.ops.aten.mm.overloads():
        search = partial(_search, product=_half_product, maxima=_compiled_maxima(), tile=GPU_TILE)
    elif device == "cpu" and _bfloat16_is_faster():
        search = partial(_search, product=_parts_product, maxima=_maxima_in_place, tile=TILE)
    else:
        return [_largest(X, Y) for Y in Ys]
    found = []
    for Y in Ys:
        partner_x, partner_y = search(X, Y)
        found.append((_cosines(X, Y, partner_x), _cosines(Y, X, partner_y)))
    return found


def _largest(X: Vectors, Y: Vectors) -> tuple[torch.Tensor, torch.Tensor]:
    best_x, best_y = (V.scale.new_zeros(len(V)) for V in (X, Y))
    for rows, columns, cosines in _tiles(X, Y, _product, _step(X.length, TILE)):
        bits = cosines.view(torch.int32).bitwise_and_(SIGN)
        torch.maximum(best_x[rows], bits.amax(1).view(torch.float32), out=best_x[rows])
        torch.maximum(best_y[columns], bits.amax(0).view(torch.float32), out=best_y[columns])
    return best_x, best_y


def _search(
    X: Vectors, Y: Vectors, *, product: Callable, maxima: Callable, tile: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The partner of each vector of X in Y, and of each of Y in X: `[m]`, `[p]` indices."""
    step = _step(X.length, tile)
    place = torch.arange(tile, dtype=torch.int32, device=X.rows.device)
    # Made at once: small tensors that stay, between large ones that go, keep the allocator from using a place again.
    best_x, best_y = (place.new_empty(-(-len(other) // step), len(V)) for V, other in ((X, Y), (Y, X)))
    for rows, columns, cosines in _tiles(X, Y, product, step):
        best_x[columns.start // step, rows], best_y[rows.start // step, columns] = maxima(cosines, place)
    return _unpacked(best_x, step, tile), _unpacked(best_y, step, tile)


def packed_maxima(cosines: torch.Tensor, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest absolute value of each row and of each column, and its place, in one integer: `[m]`, `[p]` int32.

    One maximum then finds both, at the speed of the value alone.

    Args:
        cosines: `[m, p]` float32.
        place: 0, 1, … for a power of two that is at least m and p.
    """
    height, width = cosines.shape
    bits = cosines.view(torch.int32).bitwise_and(SIGN & ~(len(place) - 1))
    return bits.bitwise_or(place[:width]).amax(1), bits.bitwise_or(place[:height, None]).amax(0)


def _maxima_in_place(cosines: torch.Tensor, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same without copies, which would be as large as the tile; it is overwritten."""
    height, width = cosines.shape
    keep = SIGN & ~(len(place) - 1)
    bits = cosines.view(torch.int32)
    by_row = bits.bitwise_and_(keep).bitwise_or_(place[:width]).amax(1)
    return by_row, bits.bitwise_and_(keep).bitwise_or_(place[:height, None]).amax(0)


@cache
def _compiled_maxima() -> Callable:
    """On CUDA: without copies of the tile between the steps."""
    return torch.compile(packed_maxima, dynamic=False)


def _unpacked(best: torch.Tensor, step: int, tile: int) -> torch.Tensor:
    """The partner of each vector, from the packed maxima of each tile of partners: `[tiles, m]` to `[m]`."""
    largest, where = best.max(0)
    return where * step + (largest & (tile - 1))


def _cosines(X: Vectors, Y: Vectors, partners: torch.Tensor) -> torch.Tensor:
    """Absolute cosine of each vector of X with its partner in Y, float32."""
    step = max(1, PART // X.length)
    parts = [slice(start, start + step) for start in range(0, len(X), step)]
    return torch.cat([torch.linalg.vecdot(X.units(part), Y.units(partners[part])).abs_() for part in parts])


def _tiles(X: Vectors, Y: Vectors, product: Callable, step: int) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """(rows, columns, cosines). The next tile overwrites the last."""
    buffer = X.scale.new_empty(min(step, len(X)) * min(step, len(Y)))
    some_x, some_y = (V.scale.new_empty(min(step, len(V)), V.length) for V in (X, Y))
    for start in range(0, len(X), step):
        rows = X.units(slice(start, start + step), some_x)
        for other in range(0, len(Y), step):
            columns = Y.units(slice(other, other + step), some_y)
            cosines = buffer[: len(rows) * len(columns)].view(len(rows), len(columns))
            product(rows, columns, cosines)
            yield slice(start, start + len(rows)), slice(other, other + len(columns)), cosines


def _product(rows: torch.Tensor, columns: torch.Tensor, out: torch.Tensor) -> None:
    torch.mm(rows, columns.T, out=out)


def _parts_product(rows: torch.Tensor, columns: torch.Tensor, out: torch.Tensor) -> None:
    """On a CPU: multiplies bfloat16 parts of float32 numbers and adds in float32."""
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    try:
        backend.fp32_precision = "bf16"
        _product(rows, columns, out)
    finally:
        backend.fp32_precision = before


def _half_product(rows: torch.Tensor, columns: torch.Tensor, out: torch.Tensor) -> None:
    """On a GPU: the same, of copies in bfloat16."""
    torch.mm(rows.bfloat16(), columns.bfloat16().T, out_dtype=torch.float32, out=out)


def _step(length: int, tile: int) -> int:
    """Vectors in a tile: fewer of long ones on a CPU, since a product keeps bfloat16 copies of the tile's vectors."""
    return min(tile, 1 << max(8, (COPIED * tile // TILE // length).bit_length() - 1))


@cache
def _bfloat16_is_faster() -> bool:
    """Whether this CPU gains from bfloat16 parts: a quick probe, once a process."""
    if not hasattr(torch.backends.mkldnn, "matmul"):
        return False
    sample, out = _sample(768, 768), torch.empty(768, 768)
    exact, parts = (min(_seconds(product, sample, out) for _ in range(4)) for product in (_product, _parts_product))
    return parts < 0.8 * exact


def _seconds(product: Callable, sample: torch.Tensor, out: torch.Tensor) -> float:
    start = time.perf_counter()
    product(sample, sample, out)
    return time.perf_counter() - start


def _sample(*shape: int) -> torch.Tensor:
    """Numbers of a generator of its own: who trains meanwhile must draw the same ones as without us."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@cache
def products_per_second(threads: int) -> float:
    """How many floating-point operations in products of matrices this CPU does in a second when partners are searched."""
    X = Vectors.of(_sample(1024, 512), "out")
    best_matches(X, [X])  # packs, and makes ready what is made once
    start = time.perf_counter()
    best_matches(X, [X])
    return 2 * 1024 * 1024 * 512 / (time.perf_counter() - start)
