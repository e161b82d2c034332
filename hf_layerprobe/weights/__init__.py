"""Naming the matrices of a layer and reading them."""

from .naming import KINDS, find_modules
from .read import LiveWeights, layer_matrices, one_matrix, read_matrices

__all__ = ["KINDS", "LiveWeights", "find_modules", "layer_matrices", "one_matrix", "read_matrices"]
