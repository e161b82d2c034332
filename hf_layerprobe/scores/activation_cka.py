"""Linear CKA between the states before and after each layer, and between any two (our own definition, after arXiv 1905.00414)."""

from __future__ import annotations

import numpy as np
import torch

from ..activations import TokenSample
from .indices import KORNBLITH, Features, cka_debiased
from .registry import OURS, register


def alignment(sample: TokenSample) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Debiased linear CKA of x_i with x_{i+1} for each layer i; `details["map"]` has all pairs of x_0 to x_L.

    The examples are sampled tokens, the features are the channels, centred over the tokens. Debiased, because with fewer
    tokens than channels plain CKA is high whatever the states hold.
    """
    # States that are not finite cannot be compared; they stay NaN, so that the layer will be named.
    states = [Features(rows.T) if torch.isfinite(rows).all() else None for rows in sample.states(at_least=4)]
    values = np.full((len(states), len(states)), np.nan)
    for i, x in enumerate(states):
        for j, y in enumerate(states[: i + 1]):
            if x is not None and y is not None:
                values[i, j] = values[j, i] = cka_debiased(x, y)
    return np.diagonal(values, offset=1).copy(), {"map": values}


register(
    "cka",
    TokenSample,
    read=alignment,
    # The paper compares layers with it, and does not say that a layer matters less for it.
    source=f"{OURS}, after debiased linear CKA, {KORNBLITH.split(';')[0]}",
    higher_is_more_important=False,
    needs_data=True,
)
