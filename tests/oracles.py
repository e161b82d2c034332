"""Slow, independent transcriptions of every formula in NumPy and SciPy, float64 throughout."""

from __future__ import annotations

import numpy as np
from scipy.stats import gumbel_r


def docs(x: np.ndarray, y: np.ndarray, axis: str = "out") -> float:
    """DOCS (arXiv 2501.16650): columns are compared, so the rows of torch's [out, in] are transposed for "out"."""
    x, y = (m.astype(np.float64).T if axis == "out" else m.astype(np.float64) for m in (x, y))
    cosines = np.abs((x / np.linalg.norm(x, axis=0)).T @ (y / np.linalg.norm(y, axis=0)))
    u_x, _ = gumbel_r.fit(cosines.max(axis=1))
    u_y, _ = gumbel_r.fit(cosines.max(axis=0))
    return (u_x + u_y) / 2


def avss(variance: list[float], sparsity: list[float]) -> np.ndarray:
    """AVSS (arXiv 2411.02117): each divided by its sum over layers, then the ratio."""
    variance, sparsity = np.array(variance), np.array(sparsity)
    return (variance / variance.sum()) / (sparsity / sparsity.sum())


def published(outputs: list[list[np.ndarray]], masks: list[np.ndarray], eps: float) -> np.ndarray:
    """outputs[layer][batch] is [batch, tokens, hidden], masks[batch] is [batch, tokens]."""
    variance, sparsity = [], []
    for batches in outputs:
        a = np.concatenate([b.astype(np.float64)[m.astype(bool)].ravel() for b, m in zip(batches, masks, strict=True)])
        variance.append(((a - a.mean()) ** 2).mean())
        sparsity.append(max((np.abs(a) < eps).mean(), 1 / a.size))
    return avss(variance, sparsity)


def relative(
    inputs: list[list[np.ndarray]], outputs: list[list[np.ndarray]], masks: list[np.ndarray], eps: float
) -> np.ndarray:
    updates = []
    for before, after in zip(inputs, outputs, strict=True):
        pairs = [(x.astype(np.float64), y.astype(np.float64)) for x, y in zip(before, after, strict=True)]
        updates.append([(y - x) / np.sqrt((x**2).mean(-1, keepdims=True)) for x, y in pairs])
    return published(updates, masks, eps)


def released(outputs: list[list[np.ndarray]], eps: float = 1e-5) -> np.ndarray:
    """The authors' code: padding counts, batches are averaged without weights, no division by sums over layers."""
    scores = []
    for batches in outputs:
        batches = [b.astype(np.float64) for b in batches]
        variance = np.mean([b.mean(axis=1).var(axis=1, ddof=1).mean() for b in batches])
        sparsity = np.mean([(np.abs(b) < eps).mean() for b in batches])
        scores.append(variance / max(sparsity, 1 / sum(b.size for b in batches)))
    return np.array(scores)


def influence(inputs: list[list[np.ndarray]], outputs: list[list[np.ndarray]], masks: list[np.ndarray]) -> np.ndarray:
    """Block influence (arXiv 2403.03853)."""
    scores = []
    for before, after in zip(inputs, outputs, strict=True):
        cosines = []
        for x, y, mask in zip(before, after, masks, strict=True):
            x, y = x.astype(np.float64)[mask.astype(bool)], y.astype(np.float64)[mask.astype(bool)]
            cosines += list((x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1))
        scores.append(1 - np.mean(cosines))
    return np.array(scores)
