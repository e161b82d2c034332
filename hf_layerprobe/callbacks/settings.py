"""What the callback's arguments may be, and that no two callbacks have the same ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging

from ..errors import LayerProbeError
from ..scores.registry import SCORES, Score, get_score
from ..scores.run import ALIASES

logger = logging.get_logger(__name__)
OF_WEIGHTS = ("docs", "drift")


def activation_scores(names: Sequence[str]) -> dict[str, Score]:
    """Those that are computed from activations, by the name that was asked for.

    Raises:
        LayerProbeError: No names, unknown ones, or scores that training does not change.
    """
    if not names:
        raise LayerProbeError("LayerProbeCallback got no scores; pass some, for example scores=('avss', 'docs').")
    found = {name: get_score(ALIASES.get(name, name)) for name in names if name not in OF_WEIGHTS}
    unsuitable = [name for name, score in found.items() if not score.streams]
    if unsuitable:
        useful = ", ".join(sorted([*ALIASES, *OF_WEIGHTS, *(n for n, s in SCORES.items() if s.streams)]))
        raise LayerProbeError(
            f"LayerProbeCallback cannot log {', '.join(unsuitable)}: a fixed order of the layers, which training "
            f"does not change, or measured by runs of the model's own. Scores that can be logged: {useful}."
        )
    return found


def check_choice(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Refuses what is not one of a few words.

    Raises:
        LayerProbeError: The message names them.
    """
    if value not in allowed:
        raise LayerProbeError(f"{name} is {' or '.join(map(repr, allowed))}, got {value!r}.")


def check_number(name: str, value: Any, least: int) -> None:
    """Refuses what is neither a number from `least` up nor `None`.

    Raises:
        LayerProbeError: It is neither.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value < least):
        raise LayerProbeError(f"{name} is a number from {least} up, or None; got {value!r}.")


def drop_twins(callback: TrainerCallback, callbacks: list[TrainerCallback]) -> None:
    """Takes later copies of a callback, with the same arguments, out of the Trainer's list, which is being gone through."""
    kind = type(callback)
    first = next(at for at, other in enumerate(callbacks) if other is callback)
    for at in range(len(callbacks) - 1, first, -1):
        other = callbacks[at]
        if type(other) is kind and all(getattr(other, f.name) == getattr(callback, f.name) for f in fields(kind)):
            logger.warning(f"{kind.__name__} was added twice with the same settings; the second one is taken out.")
            del callbacks[at]
