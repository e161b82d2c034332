"""Naming the matrices of a layer and reading them."""

from .checkpoint import Checkpoint, open_checkpoint
from .naming import KINDS, find_modules
from .read import READERS, LiveWeights, layer_matrices, one_matrix, read_matrices
from .whole import is_sharded

__all__ = [
    "KINDS",
    "READERS",
    "Checkpoint",
    "LiveWeights",
    "find_modules",
    "is_sharded",
    "layer_matrices",
    "one_matrix",
    "open_checkpoint",
    "read_matrices",
]
