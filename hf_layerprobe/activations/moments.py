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

# Sums of squares of an activation, and of its difference from another, for as long as these live.
_states: WeakIdKeyDictionary = WeakIdKeyDictionary()
_differences: WeakIdKeyDictionary = WeakIdKeyDictionary()
# All sums of an activation, by the threshold.
_sums: WeakIdKeyDictionary = WeakIdKeyDictionary()


class TokenSums(NamedTuple):
    """Numbers of each token, all `[batch, tokens]`.

    Attributes:
        sums: Sum over the channels.
        squares: Sum of squares.
        small: How many are below the threshold in magnitude.
        largest: The largest magnitude.
    """

    sums: torch.Tensor
    squares: torch.Tensor
    small: torch.Tensor
    largest: torch.Tensor


def token_squares(values: torch.Tensor, minus: torch.Tensor | None = None) -> torch.Tensor:
    """Sum of squares over the channels, `[batch, tokens]` float64 (float32 on a device that has nothing wider).

    Args:
        values: `[batch, tokens, width]`; must not be written to while it lives.
        minus: `[batch, tokens, width]` to subtract first.
    """
    known = _known(values, minus)
    if known is None:
        norms = [torch.linalg.vector_norm(piece, dim=-1) for piece in _pieces(values, minus)]
        known = _remember(values, minus, norms)
    return known


def token_sums(
    values: torch.Tensor,
    minus: torch.Tensor | None = None,
    *,
    below: torch.Tensor | float,
    clip: torch.Tensor | None = None,
) -> TokenSums:
    """All numbers of each token.

    Args:
        values: `[batch, tokens, width]`; must not be written to while it lives.
        minus: `[batch, tokens, width]` to subtract first.
        below: Threshold of a small value, `[batch, tokens]`, or one number for all.
        clip: Larger magnitudes than this count as this, `[batch, tokens]`.
    """
    asked = _sums.setdefault(values, {}) if minus is None and clip is None else {}
    if isinstance(below, float) and below in asked:
        return asked[below]
    rows, limit = values.shape[:2], torch.as_tensor(below, dtype=widest(values.device), device=values.device)
    limits = _rounded_up(limit, _dtype(values, minus)).expand(rows).reshape(-1, 1)
    sums, norms, small, largest = [], [], [], []
    start = 0
    for piece in _pieces(values, minus):
        end = start + len(piece)
        if clip is not None:
            bounds = clip.reshape(-1, 1)[start:end].to(piece.dtype)
            torch.clamp(piece, -bounds, bounds, out=piece)
        sums.append(piece.sum(-1))
        norms.append(torch.linalg.vector_norm(piece, dim=-1))
        magnitudes = piece.abs_()
        largest.append(magnitudes.amax(-1))
        small.append(magnitudes.lt_(limits[start:end]).sum(-1))
        start = end
    wide = widest(values.device)
    squares = _remember(values, minus, norms) if clip is None else torch.cat(norms).to(wide).square_().view(rows)
    sums, small, largest = (torch.cat(each).to(wide).view(rows) for each in (sums, small, largest))
    found = TokenSums(sums, squares, small, largest)
    if isinstance(below, float):
        asked[below] = found
    return found


def _dtype(values: torch.Tensor, minus: torch.Tensor | None) -> torch.dtype:
    return widest(values.device) if minus is None else torch.promote_types(values.dtype, torch.float32)


def _pieces(values: torch.Tensor, minus: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """`[some tokens, width]` after subtracting, in a buffer that may be written to."""
    width = values.shape[-1]
    rows = values.flatten(0, 1)
    size = min(len(rows), max(1, PIECE.get(values.device.type, OTHERWISE) // width))
    dtype = _dtype(values, minus)
    buffer = torch.empty(size, width, dtype=dtype, device=values.device)
    others = rows.split(size) if minus is None else minus.flatten(0, 1).split(size)
    for one, other in zip(rows.split(size), others, strict=True):
        piece = buffer[: len(one)]
        if minus is None:
            piece.copy_(one)
        elif one.dtype == other.dtype == dtype:
            torch.sub(one, other, out=piece)
        else:  # half precision would be subtracted in half precision
            piece.copy_(one).sub_(other)
        yield piece


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
