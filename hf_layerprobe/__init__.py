"""Which layers of a Transformers model resemble each other, which matter, and what is left when the others go."""

from .callbacks import LayerProbeCallback
from .errors import LayerProbeError, PruningError
from .evaluation import Comparison, Evaluation, evaluate_model
from .plan import PruningPlan, plan_pruning
from .probe import LayerProbe
from .scores import LayerScores, SimilarityMatrix, avss, docs, docs_similarity, eavss, score_layers
from .stacks import LayerStack, find_stacks
from .surgery import prune_layers

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "Evaluation",
    "LayerProbe",
    "LayerProbeCallback",
    "LayerProbeError",
    "LayerScores",
    "LayerStack",
    "PruningError",
    "PruningPlan",
    "SimilarityMatrix",
    "avss",
    "docs",
    "docs_similarity",
    "eavss",
    "evaluate_model",
    "find_stacks",
    "plan_pruning",
    "prune_layers",
    "score_layers",
]
