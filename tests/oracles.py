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


def angular(states: list[list[np.ndarray]], masks: list[np.ndarray]) -> np.ndarray:
    """arXiv 2403.17887: d(i, n) between states[i] and states[i + n], `[batch, tokens, hidden]` for each batch, at the last
    token that is no padding; in units of π."""
    number = len(states)
    distances = np.zeros((number, number))
    for a in range(number):
        for b in range(number):
            angles = []
            for x, y, mask in zip(states[a], states[b], masks, strict=True):
                for row in range(len(x)):
                    last = np.flatnonzero(mask[row])[-1]
                    u, v = x[row, last].astype(np.float64), y[row, last].astype(np.float64)
                    cosine = u @ v / np.linalg.norm(u) / np.linalg.norm(v)
                    angles.append(np.arccos(np.clip(cosine, -1, 1)) / np.pi)
            distances[a, b] = np.mean(angles)
    return distances


def counted(batches: list[np.ndarray], masks: list[np.ndarray]) -> np.ndarray:
    """The tokens that are no padding, `[tokens, hidden]`."""
    return np.concatenate([x.astype(np.float64)[m.astype(bool)] for x, m in zip(batches, masks, strict=True)])


def update_norm(inputs: list[list[np.ndarray]], outputs: list[list[np.ndarray]], masks: list[np.ndarray]) -> np.ndarray:
    scores = []
    for before, after in zip(inputs, outputs, strict=True):
        x, y = counted(before, masks), counted(after, masks)
        scores.append(np.mean([np.sqrt(((b - a) ** 2).sum() / (a**2).sum()) for a, b in zip(x, y, strict=True)]))
    return np.array(scores)


def stable_rank(x: np.ndarray) -> tuple[float, float]:
    """‖X‖_F² / ‖X‖₂² of centred rows, and the entropy of the eigenvalues of their covariance."""
    x = x - x.mean(0)
    values = np.linalg.eigvalsh(x.T @ x / len(x))
    shares = values[values > 1e-15 * values[-1]] / values.sum()
    return (x**2).sum() / np.linalg.norm(x, 2) ** 2, -(shares * np.log(shares)).sum()


def local_intrinsic_dimension(points: np.ndarray) -> float:
    """arXiv 2402.18048: −[(1/T) Σ_j log(r_j / r_T)]⁻¹ with all neighbours but the farthest, averaged over the points;
    equal points are no neighbours."""
    found = []
    for i, x in enumerate(points):
        r = sorted(np.linalg.norm(x - y) for j, y in enumerate(points) if j != i)[:-1]
        r = [r_j for r_j in r if r_j > 0]
        found.append(-1 / np.mean([np.log(r_j / r[-1]) for r_j in r]))
    return np.mean(found)


def sublayer_influence(streams: list[list[np.ndarray]], outputs: list[list[np.ndarray]], masks: list) -> np.ndarray:
    """arXiv 2406.15786: 1 − mean cos(x, x + f) with x the stream that the sublayer adds its output f to."""
    return influence(
        streams, [[x + f for x, f in zip(*pair, strict=True)] for pair in zip(streams, outputs, strict=True)], masks
    )
