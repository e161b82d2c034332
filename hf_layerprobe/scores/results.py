"""What a score of layers hands on: one number a layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import LayerProbeError


@dataclass
class LayerScores:
    """One number for each layer of a stack.

    Attributes:
        name: The score's registered name.
        values: One value a layer, in depth order; shape `[num_layers]`, float64.
        higher_is_more_important: Whether a high value argues for keeping the layer.
        stack: Path of the stack.
        source: The paper that defines the score, or "our own definition", also of a paper's score with other options than its
            own.
        details: Arrays behind the score, one value a layer each, unless the score says otherwise. With `distances`
            (`[num_layers + 1, num_layers + 1]`, between the states before any two layers) a score rates blocks of
            layers.
        data: What it was computed on: number of tokens, fingerprint, options; empty for scores of the weights.
        notes: What a reader of the values should know.
    """

    name: str
    values: np.ndarray
    higher_is_more_important: bool
    stack: str
    source: str
    details: dict[str, np.ndarray] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.values)

    @property
    def importance(self) -> np.ndarray:
        """The values, signed so that higher is more important."""
        return self.values if self.higher_is_more_important else -self.values

    def least_important(self, number: int) -> list[int]:
        """The `number` least important layers (0-based), ascending by index; ties go to the earlier layer.

        A score that rates blocks names the contiguous block of that many layers whose two ends are the closest.

        Raises:
            LayerProbeError: A number of layers that there are not to remove, or a value is NaN, so that there is no order.
        """
        if not 0 <= number < len(self):
            raise LayerProbeError(
                f"The number of layers that are the least important must be between 0 and {len(self) - 1} of {len(self)}; got "
                f"{number!r}."
            )
        if np.isnan(self.values).any():
            bad = np.flatnonzero(np.isnan(self.values)).tolist()
            raise LayerProbeError(f"The score {self.name!r} is NaN for layers {bad}; it cannot rank them.")
        if blocks := self.blocks(number):
            return blocks[0]
        return sorted(np.argsort(self.importance, kind="stable")[:number].tolist())

    def blocks(self, number: int) -> list[list[int]]:
        """The blocks of `number` layers that follow each other, those with the closest ends first.

        Empty for a score that rates single layers.
        """
        if "distances" not in self.details:
            return []
        starts = np.argsort(np.diagonal(self.details["distances"], offset=number), kind="stable").tolist()
        return [list(range(start, start + number)) for start in starts]

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "source": self.source,
            "stack": self.stack,
            "higher_is_more_important": self.higher_is_more_important,
            "values": self.values.tolist(),
            "details": {name: array.tolist() for name, array in self.details.items()},
            "data": self.data,
            "notes": list(self.notes),
        }
