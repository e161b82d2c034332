"""What else to call a model with, so that it leaves out what nobody reads."""

from __future__ import annotations

import inspect
from collections.abc import Container
from typing import Any

from torch import nn


def without_cache(model: nn.Module) -> dict[str, Any]:
    """The argument that says so, for models that take it."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def one_logit(model: nn.Module, batch: Container[str]) -> dict[str, Any]:
    """The argument for logits at one position alone, while the layers see all; empty for batches with labels, whose loss needs all.

    Logits are the largest tensor of a pass, and their product a good part of a small model's work.
    """
    # Classifiers that take it look for the last token among what is left.
    if "labels" in batch or "logits_to_keep" in batch or not getattr(model, "can_generate", lambda: False)():
        return {}
    # Told a number of them, Gemma 4 leaves the other positions out of its last layers too.
    return kept_logits(model, slice(0, 1))


def kept_logits(model: nn.Module, kept: int | slice) -> dict[str, Any]:
    """The argument for logits at so many positions at the end, or at those in a slice; models that do not take it give all."""
    return {"logits_to_keep": kept} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
