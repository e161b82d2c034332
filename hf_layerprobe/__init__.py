"""Which layers of a Transformers model resemble each other, which matter, and what is left when the others go.

The public names are imported when they are first used, so that `hf-layerprobe --help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "Evaluation",
    "HubError",
    "LayerProbe",
    "LayerProbeCallback",
    "LayerProbeError",
    "LayerProbeHistory",
    "LayerScores",
    "LayerStack",
    "ProgressivePruningCallback",
    "PruneOnTrainEndCallback",
    "PruningError",
    "PruningPlan",
    "SimilarityMatrix",
    "SpeedComparison",
    "TaskComparison",
    "avss",
    "docs",
    "docs_similarity",
    "eavss",
    "evaluate_choices",
    "evaluate_metric",
    "evaluate_model",
    "evaluate_tasks",
    "find_stacks",
    "measure_speed",
    "metric_path",
    "model_card",
    "plan_pruning",
    "prune_checkpoint",
    "prune_layers",
    "push_model",
    "score_layers",
]

if TYPE_CHECKING:
    from .callbacks import (
        LayerProbeCallback,
        LayerProbeHistory,
        ProgressivePruningCallback,
        PruneOnTrainEndCallback,
    )
    from .errors import HubError, LayerProbeError, PruningError
    from .evaluation import (
        Comparison,
        Evaluation,
        SpeedComparison,
        TaskComparison,
        evaluate_choices,
        evaluate_metric,
        evaluate_model,
        evaluate_tasks,
        measure_speed,
        metric_path,
    )
    from .hub import push_model
    from .plan import PruningPlan, plan_pruning
    from .probe import LayerProbe
    from .prune import prune_layers
    from .report import model_card
    from .scores import LayerScores, SimilarityMatrix, avss, docs, docs_similarity, eavss, score_layers
    from .stacks import LayerStack, find_stacks
    from .surgery import prune_checkpoint

_HOMES = {
    "callbacks": (
        "LayerProbeCallback",
        "LayerProbeHistory",
        "ProgressivePruningCallback",
        "PruneOnTrainEndCallback",
    ),
    "errors": ("HubError", "LayerProbeError", "PruningError"),
    "evaluation": (
        "Comparison",
        "Evaluation",
        "SpeedComparison",
        "TaskComparison",
        "evaluate_choices",
        "evaluate_metric",
        "evaluate_model",
        "evaluate_tasks",
        "measure_speed",
        "metric_path",
    ),
    "hub": ("push_model",),
    "plan": ("PruningPlan", "plan_pruning"),
    "probe": ("LayerProbe",),
    "prune": ("prune_layers",),
    "report": ("model_card",),
    "scores": ("LayerScores", "SimilarityMatrix", "avss", "docs", "docs_similarity", "eavss", "score_layers"),
    "stacks": ("LayerStack", "find_stacks"),
    "surgery": ("prune_checkpoint",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
