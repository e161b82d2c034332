"""When the callback has something to do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerState, TrainingArguments

from ..errors import LayerProbeError

Every = str | int | Sequence[int]


def check_every(every: Every) -> Every:
    """An interval as the other functions take it.

    Raises:
        LayerProbeError: It is none.
    """
    if every in ("eval", "epoch") or (type(every) is int and every > 0):
        return every
    if isinstance(every, (list, tuple, range, set)) and every and all(type(at) is int and at > 0 for at in every):
        return sorted(set(every))
    raise LayerProbeError(
        f"every is 'eval', 'epoch', a positive number of steps or a list of such steps, got {every!r}."
    )


def is_step(every: Every, step: int) -> bool:
    """Whether this global step is one of those asked for by number."""
    return step % every == 0 if isinstance(every, int) else not isinstance(every, str) and step in every


def ends_with_numbers(
    every: Every, step: int, args: TrainingArguments, state: TrainerState, context: Mapping[str, Any]
) -> bool:
    """Whether the step that is about to begin is one after which numbers are due, as far as that can be told before it."""
    if not isinstance(every, str):
        return is_step(every, step)
    if every == "eval" and args.eval_strategy == "steps":
        return step >= args.eval_delay and (step % state.eval_steps == 0 or step == state.max_steps)
    try:
        batches = len(context["train_dataloader"])
    except TypeError:  # a stream; its epochs end unannounced
        return step == state.max_steps
    return step % max(1, math.ceil(batches / args.gradient_accumulation_steps)) == 0 or step == state.max_steps


def never(every: Every, args: TrainingArguments, state: TrainerState) -> str | None:
    """Why this interval never comes in the training that begins, if so."""
    if every == "eval" and args.eval_strategy == "no":
        return "every='eval', and this training runs no evaluation (eval_strategy='no')"
    if isinstance(every, str):
        return None
    ahead = range(state.global_step + 1, state.max_steps + 1)
    if any(is_step(every, step) for step in ahead):
        return None
    return f"every={every!r} names no step of {state.global_step + 1} to {state.max_steps}, those of this training"
