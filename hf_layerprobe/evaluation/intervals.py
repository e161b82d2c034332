"""95 % confidence intervals: a bootstrap over items, the same draws for every model, and Wilson's for a share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
SAMPLES = 2000

Interval = tuple[float, float]


def resamples(items: int, samples: int = SAMPLES) -> Iterator[np.ndarray]:
    """How often each item is drawn in each bootstrap sample, `[items]`.

    The draws depend on the number of items alone: what two models get from them, sample by sample, is paired.
    """
    generator = np.random.default_rng(0)
    for _ in range(samples):
        yield np.bincount(generator.integers(items, size=items), minlength=items)


def resampled_ratio(numerators: np.ndarray, denominators: np.ndarray | float = 1.0) -> np.ndarray:
    """Σ numerators / Σ denominators of each bootstrap sample, `[SAMPLES]`; a mean when the denominators are 1.

    NaN for a single item, which says nothing of how much others differ.
    """
    if len(numerators) < 2:
        return np.full(SAMPLES, np.nan)
    denominators = np.broadcast_to(denominators, numerators.shape)
    return np.array([drawn @ numerators / (drawn @ denominators) for drawn in resamples(len(numerators))])


def interval(values: np.ndarray) -> Interval:
    """The middle 95 % of bootstrap values; NaN for both ends when one of them is not finite."""
    if not np.isfinite(values).all():
        return math.nan, math.nan
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def share_interval(right: int, items: int) -> Interval:
    """Wilson's interval of a share, which stays open where every item is right or none is."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share, weight = right / items, z * z / items
    centre = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / items + weight / (4 * items))
    return max(0.0, centre - half), min(1.0, centre + half)
