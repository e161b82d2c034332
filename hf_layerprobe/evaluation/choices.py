"""`evaluate_choices`: multiple choice and classification by the likelihood of each answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..activations.data import check_positive, longest
from ..activations.text import token_ids
from ..errors import LayerProbeError
from ..scores.loss import check_causal
from .answers import TaskComparison, TaskResult
from .likelihood import Request, first_token, losses
from .models import to_measure

Row = Mapping[str, Any]


def evaluate_choices(
    model: PreTrainedModel,
    data: Dataset | Iterable[Row],
    *,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Callable[[Row], str],
    choices: str | Sequence[str] | Callable[[Row], Sequence[str]],
    answer: str | Callable[[Row], Any],
    per_byte: bool = False,
    baseline: PreTrainedModel | TaskResult | None = None,
    name: str = "choices",
    max_length: int = 512,
    batch_size: int = 8,
) -> TaskComparison:
    """Measures how often a causal language model finds the right answer the most likely one, before and after.

    The likelihood of each choice after the prompt, as lm-evaluation-harness computes it: prompt and choice are tokenised
    together, spaces at the prompt's end count as the choice's, and what is too long is cut on the left. Classification is
    the same with fixed choices.

    Args:
        model: A causal language model; left in the mode it was in.
        data: A `datasets.Dataset` or rows (mappings).
        tokenizer: The tokenizer of the model, and of the baseline.
        prompt: A template that names columns, `"Question: {question}\\nAnswer:"`, or a function of the row.
        choices: The continuations, usually with a space in front: fixed ones, `[" negative", " positive"]`, the name of a
            column that holds a list, or a function of the row.
        answer: The column of the right choice, or a function of the row: its index (0-based), a truth value (False is the
            first), or its text.
        per_byte: Compare likelihoods per UTF-8 byte of the choice, which does not favour short ones (`acc_bytes` of
            lm-evaluation-harness); for choices of one length, or labels, take the plain one.
        baseline: The model before pruning, or its result on the same data (`TaskComparison.after`).
        name: What the task is called in the result.
        max_length: Tokens a prompt with its choice; no more than the positions that the model has.
        batch_size: Sequences a batch.

    Returns:
        Accuracy of the model as `.after` and of the baseline as `.before`, with intervals, the chance level, and the
        retained shares.

    Raises:
        LayerProbeError: No rows, a column that is missing, choices or answers of an unknown form, a choice that is empty
            or longer than `max_length`, a baseline's result on other data, or a model that does not predict the next token.
    """
    if tokenizer is None:
        raise LayerProbeError("evaluate_choices measures on text, so it needs tokenizer=.")
    check_positive(max_length=max_length, batch_size=batch_size)
    models = to_measure(model, baseline, TaskResult)
    max_length = min(longest(each, max_length) for each in models)
    items = [_item(row, number, prompt, choices, answer) for number, row in enumerate(_rows(data))]
    if not items:
        raise LayerProbeError("The data has no row to evaluate on.")
    metric = "acc_bytes" if per_byte else "acc"
    known = [baseline] if isinstance(baseline, TaskResult) else []
    about = hashlib.sha256(json.dumps(items).encode()).hexdigest()
    if any((each.task, each.metric, each.data) != (name, metric, about) for each in known):
        raise LayerProbeError(
            f"The baseline is {baseline.metric} of {baseline.task!r} on {baseline.items} items, and this is {metric} of "
            f"{name!r} on {len(items)}, or on others; evaluate it on the same."
        )
    for each in models:
        check_causal(each)
    requests = [_request(tokenizer, context, each, max_length) for context, options, _ in items for each in options]
    sizes = np.array([len(each.encode()) if per_byte else 1 for _, options, _ in items for each in options])
    ends = np.cumsum([len(options) for _, options, _ in items])[:-1]
    right = np.array([index for _, _, index in items])
    chance = float(np.mean([1 / len(options) for _, options, _ in items]))
    results = []
    for each in models:
        found = losses(each, requests, batch_size=batch_size, desc=name) / sizes
        if np.isnan(found).any():
            raise LayerProbeError(
                f"{type(each).__name__} gives {int(np.isnan(found).sum())} of {len(found)} choices no likelihood (NaN). Run it in "
                "float32 or bfloat16."
            )
        chosen = np.array([np.argmin(group) for group in np.split(found, ends)])
        correct = (chosen == right).astype(float)
        results.append(TaskResult.mean(name, metric, correct, chance=chance, data=about))
    return TaskComparison(*results, *known)


def _rows(data: Any) -> Iterable[Row]:
    if isinstance(data, (str, Mapping)) or not isinstance(data, Iterable):
        raise LayerProbeError(
            f"data is a {type(data).__name__}; expected a data set or a list of rows (mappings of column to value)."
        )
    return data


def _item(row: Row, number: int, prompt, choices, answer) -> tuple[str, list[str], int]:
    """(context, choices, index of the right one)."""
    if not isinstance(row, Mapping):
        raise LayerProbeError(f"Row {number} is a {type(row).__name__}; expected a mapping of column to value.")
    try:
        context = prompt(row) if callable(prompt) else prompt.format_map(row)
        options = choices(row) if callable(choices) else row[choices] if isinstance(choices, str) else choices
        right = answer(row) if callable(answer) else row[answer]
    except (KeyError, IndexError, AttributeError, ValueError) as error:
        raise LayerProbeError(
            f"Row {number} does not fit: {type(error).__name__}: {error}. It has the columns {', '.join(map(str, row))}."
        ) from error
    if not isinstance(context, str):
        raise LayerProbeError(f"Row {number}: the prompt is a {type(context).__name__}; expected text.")
    if isinstance(options, str) or not isinstance(options, Iterable):
        raise LayerProbeError(f"Row {number}: the choices are {options!r}; expected a list of texts.")
    options = list(options)
    if len(options) < 2 or not all(isinstance(each, str) and each for each in options):
        raise LayerProbeError(
            f"Row {number}: the choices are {options!r}; expected at least two texts that are not empty."
        )
    return context, options, _index(right, options, number)


def _index(right: Any, options: list[str], number: int) -> int:
    if isinstance(right, (Integral, np.bool_)) and 0 <= int(right) < len(options):
        return int(right)
    matching = [i for i, each in enumerate(options) if isinstance(right, str) and each.strip() == right.strip()]
    if len(matching) != 1:
        raise LayerProbeError(
            f"Row {number}: the answer {right!r} is none of the choices {options} (or two), nor an index of one, 0 to "
            f"{len(options) - 1}."
        )
    return matching[0]


def _request(tokenizer, context: str, choice: str, max_length: int) -> Request:
    """What is read, cut on the left, and the choice's tokens at its end."""
    bare = context.rstrip()
    whole = _ids(tokenizer, context + choice)
    before = _ids(tokenizer, bare) if bare else []
    if not before:  # a choice has to follow on something
        before = [first_token(tokenizer)]
        whole = before + whole if whole[:1] != before else whole
    wanted = whole[len(before) :]
    if not wanted or len(wanted) > max_length:
        raise LayerProbeError(
            f"The choice {choice!r} has {len(wanted)} tokens after its prompt; expected 1 to max_length={max_length}."
        )
    return whole[:-1][-max_length:], wanted


def _ids(tokenizer, text: str) -> list[int]:
    """The text's tokens; a BOS that it begins with, as chat templates write it, is not put there twice."""
    ids = token_ids(tokenizer, text)
    start = tokenizer.bos_token_id
    return ids[1:] if start is not None and ids[:2] == [start, start] else ids
