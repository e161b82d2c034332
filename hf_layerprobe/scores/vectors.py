"""The vectors of a matrix that DOCS compares."""

from __future__ import annotations

from functools import cached_property

import torch

from ..precision import widest
from . import native

# Vectors, or coordinates of them, that are converted at a time: a wide copy of a whole matrix would be larger than it.
PART = 256
# Unit vectors of matrices up to this many numbers are kept (64 MB); those of larger ones are made when needed.
KEPT = 1 << 24
# Between these norms, float32 squares of all entries that matter neither vanish nor overflow.
MODERATE = (1e-15, 1e15)


class Vectors:
    """Rows and what makes each a unit vector; the rows are those of the matrix in memory, not a copy.

    Attributes:
        rows: `[m, n]`, float32, bfloat16 or float16.
        scale: `[m]` float32, one over the norm of each row.
    """

    def __init__(self, rows: torch.Tensor, scale: torch.Tensor):
        self.rows, self.scale = rows, scale

    @classmethod
    def of(cls, matrix: torch.Tensor, axis: str) -> Vectors:
        """The vectors of a matrix; those of zeros, which have no direction, left out.

        Args:
            matrix: `[out, in]`, any floating dtype.
            axis: `"out"` for its rows, `"in"` for its columns.
        """
        rows = matrix.detach() if axis == "out" else matrix.detach().T
        norms = _norms(rows, torch.float32) if rows.dtype in native.DTYPES else None
        if norms is not None and (norms == 0).any() and not rows[norms == 0].any():  # zeros, not too small for float32
            rows, norms = rows[norms > 0], norms[norms > 0]
        if norms is None or not ((norms > MODERATE[0]) & (norms < MODERATE[1])).all():
            norms = _norms(rows, widest(rows.device))
            rows, norms = rows[norms > 0], norms[norms > 0]
            units = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
            for start in range(0, len(rows), PART):
                part = slice(start, start + PART)
                torch.div(rows[part], norms[part, None], out=units[part])
            rows, norms = units, torch.ones_like(norms)
        return cls(rows, norms.reciprocal().float())

    def __len__(self) -> int:
        return self.rows.shape[0]

    @property
    def length(self) -> int:
        """Entries of a vector."""
        return self.rows.shape[1]

    def take(self, which: torch.Tensor | slice) -> Vectors:
        """Some of the vectors, by their indices."""
        which = which if isinstance(which, slice) else which.to(self.rows.device)
        return Vectors(self.rows[which], self.scale[which])

    def units(self, which: slice | torch.Tensor, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """Some of the vectors with norm 1, float32; where they are not kept, made in the buffer if there is one."""
        if self.rows.numel() <= KEPT:
            return self._units[which]
        rows = self.rows[which]
        return torch.mul(rows, self.scale[which, None], out=None if buffer is None else buffer[: len(rows)])

    @cached_property
    def _units(self) -> torch.Tensor:
        return torch.mul(self.rows, self.scale[:, None])

    @cached_property
    def packed(self) -> native.Packed | None:
        """For the compiled search, where there is one."""
        return native.Packed(self.rows, self.scale) if native.takes(self.rows) else None


def _norms(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Norm of each row, with the squares of `dtype`: `[m]`."""
    squares = rows.new_zeros(len(rows), dtype=widest(rows.device))
    for part in rows.split(PART, 1):  # few numbers at a time are added in float32 without much rounding
        squares += torch.linalg.vector_norm(part, dim=1, dtype=dtype).to(squares.dtype).square()
    return squares.sqrt()
