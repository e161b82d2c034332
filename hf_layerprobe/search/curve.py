"""How the loss grows with the layers that go, and where that turns steep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Curve:
    """The best loss that a greedy search found for each number of layers removed.

    Attributes:
        numbers: Layers removed: 0, 1, 2, …
        losses: Mean loss of a token on the calibration text, nats.
        removed: The layers, for each number.
    """

    numbers: tuple[int, ...]
    losses: tuple[float, ...]
    removed: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, path: Sequence[dict[str, Any]]) -> Curve:
        """The curve of a plan's `path`."""
        removed = tuple(tuple(entry["remove"]) for entry in path)
        return cls(tuple(map(len, removed)), tuple(entry["loss"] for entry in path), removed)

    @property
    def knee(self) -> int:
        """The number of layers where the curve is furthest below the straight line from its first to its last point.

        The criterion of Kneedle (Satopää et al., 2011) on the values as they are. It depends on how far the curve was
        followed; 0 when the curve nowhere lies below the line, so that no number stands out.
        """
        numbers, losses = np.array(self.numbers, dtype=float), np.array(self.losses)
        line = losses[0] + (losses[-1] - losses[0]) * (numbers - numbers[0]) / max(numbers[-1] - numbers[0], 1)
        below = line - losses
        return self.numbers[int(below.argmax())] if below.max() > 0 else 0
