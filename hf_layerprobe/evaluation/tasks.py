"""`evaluate_tasks`: any task of lm-evaluation-harness, by name or defined locally."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import LayerProbeError
from ..modes import evaluating
from .answers import TaskComparison, TaskResult
from .models import to_measure

Task = str | dict[str, Any]


def evaluate_tasks(
    model: PreTrainedModel,
    tasks: Task | Sequence[Task],
    *,
    tokenizer: PreTrainedTokenizerBase,
    baseline: PreTrainedModel | None = None,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, TaskComparison]]:
    """Runs tasks of lm-evaluation-harness (`pip install lm-eval`) on a model in memory, before and after.

    The harness fetches the data sets of its own tasks from the Hub, and seeds the global random number generators.

    Args:
        model: The model; left in the mode it was in.
        tasks: Names of tasks, groups or tags of the harness, or of tasks in `include_path`; the path of a task's YAML
            file; or a task's configuration as a dict (rows in memory go in as `custom_dataset`).
        tokenizer: The tokenizer of the model, and of the baseline.
        baseline: The model before pruning.
        include_path: A folder with task definitions (YAML) of your own.
        num_fewshot: Examples in the prompt; as each task says by default.
        limit: Items of each task at most.
        batch_size: Sequences a batch.

    Returns:
        By task and by metric, as the harness names them: `found["piqa"]["acc_norm"]`.

    Raises:
        LayerProbeError: The harness is not installed, or a task is unknown to it or cannot be loaded.
    """
    models = to_measure(model, baseline)
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise LayerProbeError(
            f"evaluate_tasks runs lm-evaluation-harness, which cannot be imported ({error}): `pip install lm-eval`."
        ) from error
    tasks = [tasks] if isinstance(tasks, (str, dict)) else list(tasks)
    if not tasks:
        raise LayerProbeError("tasks= names no task.")
    # The harness reads all its thousands of definitions for a name.
    by_name = any(isinstance(task, str) and not Path(task).is_file() for task in tasks)
    manager = TaskManager(include_path=include_path, include_defaults=by_name)
    try:
        manager.load(tasks)
    except Exception as error:  # data sets that cannot be fetched or read raise what they like
        raise LayerProbeError(
            f"lm-evaluation-harness cannot load {tasks}: {type(error).__name__}: {error}. `lm-eval ls tasks` lists its "
            "names; include_path= adds a folder of your own."
        ) from error
    found = []
    for each in models:
        with evaluating(each):
            lm = HFLM(pretrained=each, tokenizer=tokenizer, batch_size=batch_size)
            found.append(
                simple_evaluate(
                    lm, tasks=tasks, task_manager=manager, num_fewshot=num_fewshot, limit=limit, bootstrap_iters=0
                )
            )
    results = [_results(each) for each in found]
    return {
        task: {metric: TaskComparison(*(each[task][metric] for each in results)) for metric in metrics}
        for task, metrics in results[0].items()
    }


def _results(found: dict[str, Any]) -> dict[str, dict[str, TaskResult]]:
    by_task: dict[str, dict[str, TaskResult]] = {}
    for task, values in found["results"].items():
        for key, value in values.items():
            name, _, filtered = key.partition(",")
            if not filtered or name.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            higher = found["higher_is_better"].get(task, {}).get(name, True) is not False
            metric = name if filtered == "none" else key
            samples = [each for each in found["samples"].get(task, ()) if each["filter"] == filtered]
            by_task.setdefault(task, {})[metric] = _result(task, name, metric, value, samples, higher)
    return by_task


def _result(task: str, name: str, metric: str, value: float, samples: list[dict], higher: bool) -> TaskResult:
    scores = [each.get(name) for each in samples]
    if scores and all(isinstance(each, (bool, int, float, np.number)) for each in scores):
        per_item = np.array(scores, dtype=float)
        if np.isclose(per_item.mean(), value):  # the harness also has metrics that are no means, such as F1
            chance = _chance(name, samples) if np.isin(per_item, (0, 1)).all() else None
            return TaskResult.mean(task, metric, per_item, chance=chance, higher_is_better=higher)
    return TaskResult(task, metric, float(value), len(samples), higher_is_better=higher)


def _chance(name: str, samples: list[dict]) -> float | None:
    """Of multiple choice, whose items have one argument a choice, and another without the prompt for mutual information."""
    choices = [len(each["arguments"]) // (2 if "acc_mutual_info" in each else 1) for each in samples]
    return float(np.mean([1 / n for n in choices])) if name.startswith("acc") and min(choices) > 1 else None
