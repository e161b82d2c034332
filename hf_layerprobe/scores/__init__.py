"""Scores of layers and of pairs of layers. Importing a module below registers its scores."""

from . import (  # noqa: F401
    activation_cka,
    angular,
    baselines,
    bypass,
    influence,
    intrinsic_dimension,
    redundancy,
    spectrum,
    sublayers,
    taylor,
    update_norm,
)
from .avss import avss
from .docs import chance_level, docs_similarity
from .eavss import eavss
from .layer_map import docs
from .registry import SCORES
from .results import LayerScores
from .run import score_layers
from .similarity import SimilarityMatrix

__all__ = [
    "SCORES",
    "LayerScores",
    "SimilarityMatrix",
    "avss",
    "chance_level",
    "docs",
    "docs_similarity",
    "eavss",
    "score_layers",
]
