"""What scores hand on: one number a layer, or one a pair of layers."""

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
        source: The paper that defines the score, or "our own definition".
        details: Arrays behind the score, one value a layer each.
        data: What it was computed on: number of tokens, fingerprint, options; empty for scores of the weights.
    """

    name: str
    values: np.ndarray
    higher_is_more_important: bool
    stack: str
    source: str
    details: dict[str, np.ndarray] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def importance(self) -> np.ndarray:
        """The values, signed so that higher is more important."""
        return self.values if self.higher_is_more_important else -self.values

    def least_important(self, number: int) -> list[int]:
        """The `number` least important layers (0-based), ascending by index; ties go to the earlier layer.

        Raises:
            LayerProbeError: A value is NaN, so that there is no order.
        """
        if np.isnan(self.values).any():
            bad = np.flatnonzero(np.isnan(self.values)).tolist()
            raise LayerProbeError(f"The score {self.name!r} is NaN for layers {bad}; it cannot rank them.")
        return sorted(np.argsort(self.importance, kind="stable")[:number].tolist())

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "source": self.source,
            "stack": self.stack,
            "higher_is_more_important": self.higher_is_more_important,
            "values": self.values.tolist(),
            "details": {name: array.tolist() for name, array in self.details.items()},
            "data": self.data,
        }


@dataclass
class SimilarityMatrix:
    """Layer × layer similarity, one matrix for each kind of weight.

    Attributes:
        values: kind → `[rows, columns]` float64 array; NaN where two layers cannot be compared.
        chance: kind → the value expected of independent random weights of the same shapes: one number where all layers
            have one shape, else an array like `values`.
        axis: Which vectors were compared, `"out"` (one for each output neuron) or `"in"`.
        stack: Path of the stack.
        source: Where the index is defined.
    """

    values: dict[str, np.ndarray]
    chance: dict[str, float | np.ndarray]
    axis: str
    stack: str
    source: str

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.values)

    def __getitem__(self, kind: str) -> np.ndarray:
        if kind not in self.values:
            raise KeyError(f"no kind {kind!r} here; computed: {', '.join(self.values)}")
        return self.values[kind]

    def excess(self, kind: str) -> np.ndarray:
        """Similarity above chance, `(S − chance) / (1 − chance)`: 0 at chance, 1 when identical (our own definition)."""
        chance = self.chance[kind]
        return (self[kind] - chance) / (1 - chance)

    def mean_neighbour(self, kind: str) -> float:
        """Mean similarity of adjacent layers."""
        return float(np.nanmean(np.diagonal(self[kind], offset=1)))

    def to_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "stack": self.stack,
            "axis": self.axis,
            "values": {kind: matrix.tolist() for kind, matrix in self.values.items()},
            "chance": {kind: np.asarray(level).tolist() for kind, level in self.chance.items()},
            "excess": {kind: self.excess(kind).tolist() for kind in self.kinds},
        }
