"""The table of scores by name. A new score is one file with one `register(...)` line."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import LayerProbeError


@dataclass(frozen=True)
class Score:
    """How a registered score is computed.

    Attributes:
        name: Unique name.
        source: The paper that defines it, or "our own definition".
        higher_is_more_important: Whether a high value argues for keeping the layer.
        needs_data: If true, `make(num_layers, **options)` builds an accumulator with `compute() -> (values, details)`;
            if false, `make(stack, **options)` returns `(values, details)` at once.
        make: See `needs_data`.
    """

    name: str
    source: str
    higher_is_more_important: bool
    needs_data: bool
    make: Callable


SCORES: dict[str, Score] = {}
OURS = "our own definition"


def register(name: str, make: Callable, *, source: str, higher_is_more_important: bool, needs_data: bool) -> None:
    SCORES[name] = Score(name, source, higher_is_more_important, needs_data, make)


def get_score(name: str) -> Score:
    """Looks a score up.

    Raises:
        LayerProbeError: No such score; the message lists the names and the nearest one.
    """
    if name not in SCORES:
        near = difflib.get_close_matches(str(name), SCORES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise LayerProbeError(f"Unknown score {name!r}.{hint} Registered: {', '.join(sorted(SCORES))}.")
    return SCORES[name]
