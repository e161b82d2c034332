"""Slow, independent transcriptions of the indices of arXiv 1905.00414, NumPy and SciPy, float64 throughout.

Arguments are as in the paper, `[examples, features]`, unlike the library's `[vectors, coordinates]`.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np
import scipy.linalg


def centred(a: np.ndarray) -> np.ndarray:
    return a - np.ones((len(a), len(a))) @ a / len(a)


def regression(x: np.ndarray, y: np.ndarray) -> float:
    """One least-squares fit of the features of x on those of y."""
    x, y = centred(x), centred(y)
    fit, *_ = np.linalg.lstsq(y, x, rcond=None)
    return 1 - ((x - y @ fit) ** 2).sum() / (x**2).sum()


def canonical(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared canonical correlations, descending, and the canonical variables of x, by whitened covariances."""
    x, y = centred(x), centred(y)
    number = min(np.linalg.matrix_rank(x), np.linalg.matrix_rank(y))
    whiten = _inverse_root(x.T @ x)
    values, vectors = scipy.linalg.eigh(whiten @ x.T @ y @ scipy.linalg.pinvh(y.T @ y) @ y.T @ x @ whiten)
    return values[::-1][:number], x @ whiten @ vectors[:, ::-1][:, :number]


def _inverse_root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = scipy.linalg.eigh(covariance)
    keep = values > 1e-12 * values[-1]
    return vectors[:, keep] / np.sqrt(values[keep]) @ vectors[:, keep].T


def cca(x: np.ndarray, y: np.ndarray) -> float:
    return canonical(x, y)[0].mean()


def strongest(a: np.ndarray, variance: float) -> np.ndarray:
    """The projections on the principal axes that carry this share of the variance."""
    a = centred(a)
    values, axes = np.linalg.eigh(a.T @ a)
    values, axes = values[::-1], axes[:, ::-1]
    number = 1
    while values[:number].sum() < variance * values.sum():
        number += 1
    return a @ axes[:, :number]


def svcca(x: np.ndarray, y: np.ndarray, variance: float = 0.99) -> float:
    return cca(strongest(x, variance), strongest(y, variance))


def pwcca(x: np.ndarray, y: np.ndarray) -> float:
    squares, variables = canonical(x, y)
    weights = [sum(abs(h @ column) for column in centred(x).T) for h in variables.T]
    return np.average(np.sqrt(np.clip(squares, 0, 1)), weights=weights)


def hsic(x: np.ndarray, y: np.ndarray) -> float:
    """tr(K H L H) / (n - 1)²."""
    n = len(x)
    h = np.eye(n) - np.ones((n, n)) / n
    return np.trace((x @ x.T) @ h @ (y @ y.T) @ h) / (n - 1) ** 2


def cka(x: np.ndarray, y: np.ndarray) -> float:
    return hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))


def hsic_unbiased(x: np.ndarray, y: np.ndarray) -> float:
    """The U-statistic of Song et al. (2007) itself: its kernel averaged over all ordered 4-tuples of examples."""
    k, m = x @ x.T, y @ y.T
    i, j, q, r = np.array(list(permutations(range(len(x)), 4))).T
    return (k[i, j] * m[i, j] + k[i, j] * m[q, r] - 2 * k[i, j] * m[i, q]).mean()


def cka_debiased(x: np.ndarray, y: np.ndarray) -> float:
    return hsic_unbiased(x, y) / np.sqrt(hsic_unbiased(x, x) * hsic_unbiased(y, y))
