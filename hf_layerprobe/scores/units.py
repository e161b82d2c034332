"""What stands at the rows and columns of a map: layers or experts of one model, and their vectors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import LayerProbeError
from ..stacks import resolve_stack
from ..weights import Checkpoint, LiveWeights, one_matrix, open_checkpoint
from .indices import Features
from .vectors import Vectors

# Matrices kept for the next blocks, in bytes of float32: reading one again costs little beside its products.
CACHE = 400_000_000


@dataclass(frozen=True, order=True)
class Unit:
    """A row or column of a map: a layer, or one expert of it."""

    layer: int
    expert: int | None = None

    def __str__(self) -> str:
        return str(self.layer) if self.expert is None else f"{self.layer}.{self.expert}"


class Side:
    """The units of one model or checkpoint, and their vectors."""

    def __init__(self, model, stack, kinds, layers, experts: bool, axis: str):
        self.weights = _open(model, stack, kinds)
        self.stack, self.axis, self.experts = self.weights.stack, axis, experts
        chosen = range(self.stack.num_layers) if layers is None else sorted(set(layers))
        wrong = [i for i in chosen if not 0 <= i < self.stack.num_layers]
        if wrong or not chosen:
            raise LayerProbeError(
                f"layers: {wrong} do not exist; the stack has layers 0 to {self.stack.num_layers - 1}."
            )
        # kind → units, and unit → (vectors, length of a vector) for those that have the kind
        self.units: dict[str, list[Unit]] = {}
        self.shapes: dict[tuple[str, Unit], tuple[int, int]] = {}
        for kind in self.weights.kinds:
            for layer in chosen:
                found = self._shapes(layer, kind)
                self.units.setdefault(kind, []).extend([unit for unit, _ in found] or [Unit(layer)])
                for unit, (out, into) in found:
                    self.shapes[kind, unit] = (out, into) if axis == "out" else (into, out)

    def _shapes(self, layer: int, kind: str):
        parts = self.weights.shapes(layer, kind)
        if self.experts and len(parts) > 1:
            return [(Unit(layer, expert), shape) for expert, shape in enumerate(parts)]
        joined = 1 if kind == "down" else 0
        if not parts:
            return []
        size = sum(shape[joined] for shape in parts)
        return [(Unit(layer), (parts[0][0], size) if joined else (size, parts[0][1]))]

    def load(self, kind: str, unit: Unit, index: str) -> Vectors | Features:
        """The vectors of one matrix as DOCS or one of its rivals needs them."""
        parts = self.weights.parts(unit.layer, kind)
        matrix = one_matrix(parts, kind) if unit.expert is None else parts[unit.expert]
        if index == "docs":
            return Vectors.of(matrix, self.axis)
        return Features(matrix if self.axis == "out" else matrix.T)

    @property
    def device(self) -> torch.device:
        """Where the matrices are compared; those of a checkpoint are read into memory."""
        device = next(self.stack.model.parameters()).device
        return torch.device("cpu") if device.type == "meta" else device

    def cached(self) -> int:
        """How many matrices of the largest size to keep, the one in use not counted."""
        largest = max((4 * m * n for m, n in self.shapes.values()), default=1)
        return max(0, CACHE // largest - 1)


def _open(model, stack, kinds) -> LiveWeights | Checkpoint:
    if isinstance(model, (str, Path)):
        return open_checkpoint(model, stack=stack, kinds=kinds)
    return LiveWeights(resolve_stack(model, stack), kinds)
