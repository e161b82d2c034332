"""Two views of a layer in one: what it does to the stream, and whether a neighbour's weights look the same."""

from __future__ import annotations

import numpy as np

from .registry import OURS
from .results import LayerScores

NAME = "combined"
PARTS = ("docs", "avss-relative")


def combined(docs: LayerScores, avss: LayerScores) -> LayerScores:
    """The mean of a layer's ranks by DOCS redundancy and by relative AVSS, both from least to most important.

    Our own definition: a layer is to go if it changes the stream little and a neighbour resembles it. Ranks, since the two
    have no common unit; ties share their mean rank.

    Args:
        docs: The score `docs`.
        avss: The score `avss-relative`.
    """
    ranks = {each.name: _ranks(each.importance) for each in (docs, avss)}
    return LayerScores(
        name=NAME,
        values=np.mean(list(ranks.values()), axis=0),
        higher_is_more_important=True,
        stack=avss.stack,
        source=f"{OURS}: mean rank of {docs.name} ({docs.source}) and {avss.name} ({avss.source})",
        details={f"rank of {name}": values for name, values in ranks.items()},
        data=avss.data,
    )


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, ties sharing their mean."""
    return np.array([(values < value).sum() + ((values == value).sum() - 1) / 2 for value in values])
