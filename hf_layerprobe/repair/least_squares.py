"""Weighted ridge regression from sums over tokens, so that no token is kept."""

from __future__ import annotations

import torch

# Ridge, in units of the mean diagonal of the Gram matrix: from a full fit to almost no change.
RIDGES = (0.01, 0.1, 1.0, 10.0, 100.0)


class Normal:
    """The normal equations of residual ≈ read · change, one weight a token.

    Attributes:
        gram: Σ w read readᵀ, `[in, in]`.
        cross: Σ w read residualᵀ, `[in, out]`.
        error: Σ w residual², `[out]`.
    """

    def __init__(self):
        self.gram = self.cross = self.error = 0

    def update(self, read: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
        """Adds tokens: `[tokens, in]`, `[tokens, out]`, `[tokens]`."""
        used = weight > 0
        root = weight[used].sqrt()[:, None]
        read, residual = root * read[used].float(), root * residual[used].float()
        with torch.autocast(read.device.type, enabled=False):  # bfloat16 sums have no inverse
            self.gram = self.gram + read.T @ read
            self.cross = self.cross + read.T @ residual
        self.error = self.error + residual.square().sum(0)

    def solve(self, ridge: float) -> torch.Tensor | None:
        """The change that minimises the weighted error plus `ridge` times its own size, `[in, out]`.

        The size is in units of the Gram matrix's mean diagonal; a larger ridge leaves the matrix closer to what it was.
        None where the ridge is too small for the arithmetic.
        """
        penalty = ridge * self.gram.diagonal().mean()
        factor, failed = torch.linalg.cholesky_ex(self.gram + penalty * torch.eye(len(self.gram)).to(self.gram))
        return None if failed else torch.cholesky_solve(self.cross, factor)

    def rescaling(self, written: torch.Tensor) -> torch.Tensor:
        """The change that scales each channel of what the matrix writes, one number a channel, `[in, out]`.

        Args:
            written: The matrix as it is, `[in, out]`.
        """
        with torch.autocast(written.device.type, enabled=False):
            size = (written * (self.gram @ written)).sum(0)
        return (written * self.cross).sum(0) / size.clamp_min(torch.finfo(size.dtype).tiny) * written

    def error_of(self, change: torch.Tensor) -> torch.Tensor:
        """Σ w (residual − read · change)², from the sums alone, `[out]`."""
        with torch.autocast(change.device.type, enabled=False):
            return self.error + (((self.gram @ change) - 2 * self.cross) * change).sum(0)


def best_change(fit: Normal, held_out: Normal, written: torch.Tensor) -> tuple[torch.Tensor, float]:
    """For each channel the ridge solution, the rescaling, or no change, with the least error on tokens it was not fitted to.

    Channel by channel, since a few channels of the stream are hundreds of times as large as the others: the ridge that
    suits them lets the others follow noise.

    Args:
        fit: The equations of the tokens to fit to.
        held_out: Those of the tokens to choose by.
        written: The matrix as it is, `[in, out]`.

    Returns:
        The change, `[in, out]`, and the share of the held-out error that it takes away, averaged over channels.
    """
    least = held_out.error.clone()
    found = torch.zeros_like(fit.cross)
    for change in (fit.rescaling(written), *map(fit.solve, RIDGES)):
        if change is None:
            continue
        error = held_out.error_of(change)
        better = error < least
        found[:, better], least[better] = change[:, better], error[better]
    share = 1 - least / held_out.error.clamp_min(torch.finfo(least.dtype).tiny)
    return found, share.mean().item()
