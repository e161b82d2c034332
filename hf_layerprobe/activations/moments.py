"""Sums over the channels of each token, computed once for all accumulators of a pass, and without waiting for the device.

Activations are read in pieces that stay in a core's cache, so that several sums cost little more than reading them once.
Sums of states are taken in float64; those of updates in float32, on differences that have no large mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..precision import widest

PIECE = {"cpu": 2**17}  # values at a time; elsewhere it only bounds the memory
OTHERWISE = 2**22

# What is known of an activation, for as long as it lives: its sums of squares, those of its difference from another, its
# root mean square, and all its sums by threshold and unit.
_states: WeakIdKeyDictionary = WeakIdKeyDictionary()
_differences: WeakIdKeyDictionary = WeakIdKeyDictionary()
_rms: WeakIdKeyDictionary = WeakIdKeyDictionary()
_sums: WeakIdKeyDictionary = WeakIdKeyDictionary()


class TokenSums(NamedTuple):
    """Numbers of each token, all `[batch, tokens]`.

    Attributes:
        sums: Sum over the channels.
        squares: Sum of squares.
        small: How many are below the threshold in magnitude.
        largest: The largest magnitude.
        limited: Sum and sum of squares with limited magnitudes; `None` if no limit was given.
    """

    sums: torch.Tensor
    squares: torch.Tensor
    small: torch.Tensor
    largest: torch.Tensor
    limited: tuple[torch.Tensor, torch.Tensor] | None = None


def token_squares(values: torch.Tensor, minus: torch.Tensor | None = None) -> torch.Tensor:
    """Sum of squares over the channels, `[batch, tokens]` float64 (float32 on a device that has nothing wider).

    Args:
        values: `[batch, tokens, width]`; must not be written to while it lives.
        minus: `[batch, tokens, width]` to subtract first.
    """
    known = _known(values, minus)
    if known is None:
        norms = [torch.linalg.vector_norm(piece, dim=-1) for piece, _ in _pieces(values, minus)]
        known = _remember(values, minus, norms)
    return known


def squares_in_single(values: torch.Tensor) -> torch.Tensor:
    """As `token_squares`, of sums in float32: for what is not subtracted from anything like it."""
    norms = torch.linalg.vector_norm(values, dim=-1, dtype=_single(values))
    return norms.to(widest(values.device)).square_()


def token_rms(values: torch.Tensor) -> torch.Tensor:
    """Root mean square over the channels, `[batch, tokens]`, above 0; the same tensor each time for the same values."""
    if values not in _rms:
        tiny = torch.finfo(torch.float32).tiny
        _rms[values] = (token_squares(values) / values.shape[-1]).sqrt().clamp_min(tiny)
    return _rms[values]


def token_sums(
    values: torch.Tensor,
    minus: torch.Tensor | None = None,
    *,
    below: float,
    unit: torch.Tensor | None = None,
    clip: float | None = None,
) -> TokenSums:
    """All numbers of each token.

    Args:
        values: `[batch, tokens, width]`; must not be written to while it lives.
        minus: `[batch, tokens, width]` to subtract first.
        below: Threshold of a small value.
        unit: Of the thresholds, `[batch, tokens]` from [`token_rms`]; of `minus`, if there is one.
        clip: Limit of the magnitudes in `limited`. Ask with it first: who asks without finds the other numbers then.
    """
    known = _sums.setdefault(values, {})
    # The entry keeps the unit, and with it the meaning of its id.
    key = below, id(unit), minus is None
    if key not in known or clip not in (None, known[key][1]):
        known[key] = unit, clip, _token_sums(values, minus, below, unit, clip)
    return known[key][2]


def _token_sums(values, minus, below: float, unit: torch.Tensor | None, clip: float | None) -> TokenSums:
    rows, wide, single = values.shape[:2], widest(values.device), _single(values)
    if unit is None:
        unit = torch.ones(rows, dtype=wide, device=values.device)
    limits = _rounded_up(below * unit, single).reshape(-1, 1).split(_size(values))
    bounds = (((clip or 1) * unit).to(_dtype(values, minus))).reshape(-1, 1).split(_size(values))
    found: list[list[torch.Tensor]] = [[] for _ in range(6)]
    sums, norms, small, largest, limited, limited_norms = found
    size = _size(values), values.shape[-1]
    spare = torch.empty(size, dtype=single, device=values.device)
    other = spare if clip is None else torch.empty(size, dtype=_dtype(values, minus), device=values.device)
    for (piece, source), limit, bound in zip(_pieces(values, minus), limits, bounds, strict=True):
        sums.append(piece.sum(-1))
        norms.append(torch.linalg.vector_norm(piece, dim=-1))
        magnitudes = spare[: len(piece)]
        if clip is not None:
            within = torch.minimum(piece, bound, out=other[: len(piece)])  # clamp takes five times as long
            torch.maximum(within, -bound, out=within)
            limited.append(within.sum(-1))
            limited_norms.append(torch.linalg.vector_norm(within, dim=-1))
        if minus is not None:
            magnitudes = piece.abs_()
        elif source.dtype == single:
            torch.abs(source, out=magnitudes)
        else:
            magnitudes.copy_(source).abs_()
        largest.append(magnitudes.amax(-1))
        small.append(magnitudes.lt_(limit).sum(-1))
    squares = _remember(values, minus, norms)
    sums, small, largest = (torch.cat(each).to(wide).view(rows) for each in (sums, small, largest))
    if clip is None:
        return TokenSums(sums, squares, small, largest)
    limited, limited_norms = (torch.cat(each).to(wide).view(rows) for each in (limited, limited_norms))
    return TokenSums(sums, squares, small, largest, (limited, limited_norms.square_()))


def _single(values: torch.Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _dtype(values: torch.Tensor, minus: torch.Tensor | None) -> torch.dtype:
    return widest(values.device) if minus is None else _single(values)


def _size(values: torch.Tensor) -> int:
    """Tokens at a time."""
    size = max(1, PIECE.get(values.device.type, OTHERWISE) // values.shape[-1])
    return max(1, min(values.shape[:2].numel(), size))


def _pieces(values: torch.Tensor, minus: torch.Tensor | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`[some tokens, width]` after subtracting, in a buffer that may be written to; and before, which may not."""
    rows, size, dtype = values.flatten(0, 1), _size(values), _dtype(values, minus)
    buffer = torch.empty(size, values.shape[-1], dtype=dtype, device=values.device)
    others = rows.split(size) if minus is None else minus.flatten(0, 1).split(size)
    for one, other in zip(rows.split(size), others, strict=True):
        piece = buffer[: len(one)]
        if minus is None:
            piece.copy_(one)
        elif one.dtype == other.dtype == dtype:
            torch.sub(one, other, out=piece)
        else:  # half precision would be subtracted in half precision
            piece.copy_(one).sub_(other)
        yield piece, one


def _rounded_up(limit: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The limit in another precision, so that `x < limit` says the same of every x of that precision."""
    if limit.dtype == dtype:
        return limit
    near = limit.to(dtype)
    return torch.where(near.to(limit.dtype) < limit, torch.nextafter(near, torch.full_like(near, torch.inf)), near)


def _known(values: torch.Tensor, minus: torch.Tensor | None) -> torch.Tensor | None:
    return _states.get(values) if minus is None else _differences.get(values, {}).get(minus)


def _remember(values: torch.Tensor, minus: torch.Tensor | None, norms: list[torch.Tensor]) -> torch.Tensor:
    squares = torch.cat(norms).to(widest(values.device)).square_().view(values.shape[:2])
    if minus is None:
        _states[values] = squares
    else:
        _differences.setdefault(values, WeakIdKeyDictionary())[minus] = squares
    return squares
