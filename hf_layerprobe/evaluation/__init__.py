"""What a model is worth, before and after: predicting text, tasks, metrics, speed."""

from .answers import TaskComparison, TaskResult
from .choices import evaluate_choices
from .comparison import Comparison, Evaluation, evaluate_model
from .metrics import evaluate_metric
from .modules import metric_path
from .speed import Speed, SpeedComparison, measure_speed
from .tasks import evaluate_tasks

__all__ = [
    "Comparison",
    "Evaluation",
    "Speed",
    "SpeedComparison",
    "TaskComparison",
    "TaskResult",
    "evaluate_choices",
    "evaluate_metric",
    "evaluate_model",
    "evaluate_tasks",
    "measure_speed",
    "metric_path",
]
