"""Naming the matrices of a layer and reading them."""

from .checkpoint import Checkpoint, open_checkpoint
from .naming import KINDS, find_modules
from .read import LiveWeights, layer_matrices, one_matrix, read_matrices

__all__ = [
    "KINDS",
    "Checkpoint",
    "LiveWeights",
    "find_modules",
    "layer_matrices",
    "one_matrix",
    "open_checkpoint",
    "read_matrices",
]
