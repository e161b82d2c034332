"""`evaluate_metric`: any metric of the library `evaluate`, on any task that its evaluator knows."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel

from ..errors import LayerProbeError
from ..modes import evaluating
from ..progress import progress
from .answers import TaskComparison, TaskResult
from .intervals import interval, resamples
from .models import to_measure

# Each sample computes the metric anew.
METRIC_SAMPLES = 200


def evaluate_metric(
    model: PreTrainedModel,
    data: Dataset,
    *,
    task: str,
    metric: Any,
    baseline: PreTrainedModel | None = None,
    higher_is_better: bool = True,
    **options: Any,
) -> dict[str, TaskComparison]:
    """Computes a metric of the library `evaluate` through its `evaluator`, before and after.

    Args:
        model: The model; left in the mode it was in.
        data: The rows of one split.
        task: A task of `evaluate.evaluator`, such as `"text-classification"` or `"token-classification"`.
        metric: A metric, or what `evaluate.load` takes: a name of the Hub, or the path of a script.
        baseline: The model before pruning.
        higher_is_better: False for error rates such as `wer`.
        options: What the evaluator's `compute` takes: `tokenizer`, `input_column`, `label_column`, `label_mapping`.

    Returns:
        By the metric's keys. The intervals are bootstrapped: the metric is computed anew on 200 samples of the items.

    Raises:
        LayerProbeError: An unknown task, or a metric that cannot be loaded or gives no number.
        ValueError: What the evaluator says of data or columns that it cannot use.
    """
    import evaluate

    models = to_measure(model, baseline)
    try:
        runner = evaluate.evaluator(task)
        module = evaluate.load(metric) if isinstance(metric, str) else metric
    except (ImportError, KeyError, FileNotFoundError, ConnectionError) as error:
        raise LayerProbeError(f"evaluate cannot take task {task!r} and metric {metric!r}: {error}") from error
    found = []
    for each in models:
        device = each.device.index if each.device.type != "cpu" else -1
        recorder = _Recorder(module)
        with evaluating(each):
            runner.compute(each, data, metric=recorder, device=device, **options)
        found.append(_results(task, recorder, higher_is_better))
    return {key: TaskComparison(*(results[key] for results in found)) for key in found[0]}


class _Recorder:
    """A metric that keeps what it was given."""

    def __init__(self, metric: Any):
        self.metric = metric

    def compute(self, **inputs: Any) -> dict[str, Any]:
        self.inputs = inputs
        self.values = _numbers(self.metric.compute(**inputs), self.metric)
        return self.values

    def on(self, items: np.ndarray) -> dict[str, float]:
        """The metric on some items."""
        lists = {name: [value[i] for i in items] if _per_item(value) else value for name, value in self.inputs.items()}
        return _numbers(self.metric.compute(**lists), self.metric)

    def __len__(self) -> int:
        return max(len(value) for value in self.inputs.values() if _per_item(value))


def _per_item(value: Any) -> bool:
    return hasattr(value, "__getitem__") and hasattr(value, "__len__") and not isinstance(value, (str, dict))


def _numbers(found: Any, metric: Any) -> dict[str, float]:
    found = found if isinstance(found, dict) else {getattr(metric, "name", "value"): found}
    return {key: float(value) for key, value in found.items() if isinstance(value, (int, float, np.number))}


def _results(task: str, recorder: _Recorder, higher_is_better: bool) -> dict[str, TaskResult]:
    if not recorder.values:
        raise LayerProbeError(f"The metric {recorder.metric!r} gave no number to compare.")
    items = len(recorder)
    draws = progress(resamples(items, METRIC_SAMPLES), desc="Interval", total=METRIC_SAMPLES, unit="sample")
    sampled = [recorder.on(np.repeat(np.arange(items), drawn)) for drawn in draws]
    results = {}
    for key, value in recorder.values.items():
        samples = np.array([each.get(key, np.nan) for each in sampled])
        results[key] = TaskResult(
            task, key, value, items, interval(samples), higher_is_better=higher_is_better, samples=samples
        )
    return results
