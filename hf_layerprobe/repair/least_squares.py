"""Weighted ridge regression from sums over tokens, so that no token is kept."""

from __future__ import annotations

import torch

# Ridge, in units of the mean diagonal of the Gram matrix: from a full fit to almost no change.
RIDGES = (0.01, 0.1, 1.0, 10.0)


class Normal:
    """The normal equations of residual ≈ read · change, one weight a token.

    Attributes:
        gram: Σ w read readᵀ, `[in, in]`.
        cross: Σ w read residualᵀ, `[in, out]`.
        error: Σ w ‖residual‖².
        weight: Σ w.
    """

    def __init__(self):
        self.gram = self.cross = self.error = self.weight = 0

    def update(self, read: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
        """Adds tokens: `[tokens, in]`, `[tokens, out]`, `[tokens]`."""
        used = weight > 0
        root = weight[used].sqrt()[:, None]
        read, residual = root * read[used].float(), root * residual[used].float()
        with torch.autocast(read.device.type, enabled=False):  # bfloat16 sums have no inverse
            self.gram = self.gram + read.T @ read
            self.cross = self.cross + read.T @ residual
        self.error = self.error + residual.square().sum().item()
        self.weight = self.weight + weight.sum().item()

    def solve(self, ridge: float) -> torch.Tensor | None:
        """The change that minimises the weighted error plus `ridge` times its own size, `[in, out]`.

        The size is in units of the Gram matrix's mean diagonal; a larger ridge leaves the matrix closer to what it was.
        None where the ridge is too small for the arithmetic.
        """
        penalty = ridge * self.gram.diagonal().mean()
        factor, failed = torch.linalg.cholesky_ex(self.gram + penalty * torch.eye(len(self.gram)).to(self.gram))
        return None if failed else torch.cholesky_solve(self.cross, factor)

    def error_of(self, change: torch.Tensor) -> float:
        """Σ w ‖residual − read · change‖², from the sums alone."""
        with torch.autocast(change.device.type, enabled=False):
            return self.error + (((self.gram @ change) - 2 * self.cross) * change).sum().item()


def best_change(fit: Normal, held_out: Normal) -> tuple[torch.Tensor | None, float]:
    """The ridge solution with the least error on tokens that it was not fitted to.

    Returns:
        The change, or None when no change is best, and the share of the held-out error that it takes away.
    """
    found, least = None, held_out.error
    for ridge in RIDGES:
        change = fit.solve(ridge)
        error = least if change is None else held_out.error_of(change)
        if error < least:
            found, least = change, error
    return found, 1 - least / held_out.error if held_out.error else 0.0
