"""Evaluation mode, or a model's own precision, for a while; what was before is restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Within the context, the models are in evaluation mode; after it, each of their modules is in the mode it was in.

    `model.train(model.training)` does not do that: it gives every module the mode of the outermost one, and so thaws a
    layer that its owner had frozen in evaluation mode.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def in_own_precision(model: nn.Module) -> Iterator[None]:
    """Within the context, a model that accelerate has prepared for mixed precision computes as it is, without autocast."""
    wrapped = vars(model).pop("forward", None) if "_original_forward" in vars(model) else None
    try:
        yield
    finally:
        if wrapped is not None:
            model.forward = wrapped
