"""DOCS of chosen pairs of layers in a bounded slice of time, for callers who have something better to do."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from ..activations.processes import of_first
from ..weights import LiveWeights, one_matrix
from .docs import chance_level, docs_index
from .matching import best_matches
from .vectors import Vectors

GOLDEN = (5**0.5 - 1) / 2
T = TypeVar("T")


class TimeSlice:
    """A number of seconds that starts now.

    Args:
        seconds: `None` for no end.
        together: Whether all processes have to stop at the same point, because they gather weights for each other; the
            first one's clock decides then.
    """

    def __init__(self, seconds: float | None, *, together: bool = False):
        self.start = time.perf_counter()
        self.seconds = seconds
        self.together = together

    @property
    def spent(self) -> float:
        return time.perf_counter() - self.start

    def pieces(self, pieces: Iterable[tuple[str, T]]) -> Iterator[T]:
        """Pieces of work one after the other, until the next one would not be done in time; at least one.

        Args:
            pieces: (kind, piece); a piece is expected to take as long as the last one of its kind.
        """
        took: dict[str, float] = {}
        for kind, piece in pieces:
            began = self.spent
            # One of a new kind may take as long as the longest of the others.
            if took and self._over(took.get(kind, max(took.values()))):
                return
            yield piece
            took[kind] = self.spent - began

    def _over(self, expected: float) -> bool:
        if self.seconds is None:
            return False
        over = self.spent + expected > self.seconds
        return of_first(over) if self.together else over


@dataclass
class PairMap:
    """What was compared of a layer × layer map.

    Attributes:
        values: kind → `[layers, layers]`, symmetric; NaN where nothing was compared.
        excess: kind → the same above chance, see [`SimilarityMatrix.excess`].
        compared: Pairs of matrices that were compared, of all kinds together.
        wanted: Pairs of matrices that were asked for.
    """

    values: dict[str, np.ndarray]
    excess: dict[str, np.ndarray]
    compared: int = 0
    wanted: int = 0


def docs_of_pairs(
    weights: LiveWeights, pairs: Sequence[tuple[int, int]], time_slice: TimeSlice, *, sample: int | None, seed: int = 0
) -> PairMap:
    """DOCS (arXiv 2501.16650, `axis="out"`) of pairs of layers, as many matrices as the time allows but at least one.

    The order is the same at every call and spread over the stack, so that what a short slice leaves out is not one end
    of it, and two calls with as much time compare the same pairs.

    Args:
        weights: Where the matrices are read from.
        pairs: Pairs of layers.
        time_slice: Looked at before each pair of matrices.
        sample: Match at most this many random vectors of each matrix (against all of the other); `None` for all.
        seed: Of the sample, which is the same at every call.

    Raises:
        LayerProbeError: Weights that cannot be read.
    """
    layers = weights.stack.num_layers
    result = PairMap(*({kind: np.full((layers, layers), np.nan) for kind in weights.kinds} for _ in range(2)))
    wanted = [(kind, (kind, i, j)) for i, j in spread(pairs) for kind in weights.kinds]
    result.wanted = len(wanted)
    places, chances, matches = [], [], []
    for kind, i, j in time_slice.pieces(wanted):
        result.compared += 1
        parts = [weights.parts(layer, kind) for layer in (i, j)]
        if not all(parts):
            continue
        x, y = (Vectors.of(one_matrix(part, kind), "out") for part in parts)
        if not len(x) or not len(y) or x.length != y.length:
            continue
        places.append((kind, i, j))
        chances.append(chance_level(len(x), len(y), x.length))
        matches.append(_matches(x, y, sample, seed))
    for (kind, i, j), chance, (value, _) in zip(places, chances, docs_index(matches), strict=True):
        result.values[kind][[i, j], [j, i]] = value
        result.excess[kind][[i, j], [j, i]] = (value - chance) / (1 - chance)
    return result


def spread(items: Sequence) -> list:
    """The items in an order whose every beginning is spread over all of them."""
    return [items[at] for at in sorted(range(len(items)), key=lambda at: at * GOLDEN % 1)]


def sampled_rows(number: int, sample: int | None, seed: int = 0) -> torch.Tensor | slice:
    """The rows of a matrix that are in a sample: always the same ones."""
    if sample is None or sample >= number:
        return slice(None)
    return torch.randperm(number, generator=torch.Generator().manual_seed(seed))[:sample].sort().values


def _matches(x: Vectors, y: Vectors, sample: int | None, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    if sample is None or sample >= max(len(x), len(y)):
        return best_matches(x, [y])[0]
    some, few = (vectors.take(sampled_rows(len(vectors), sample, seed)) for vectors in (x, y))
    return best_matches(some, [y])[0][0], best_matches(few, [x])[0][0]
