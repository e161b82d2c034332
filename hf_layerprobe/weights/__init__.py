"""Naming the matrices of a layer and reading them."""

from .naming import KINDS, find_modules
from .read import layer_matrices, read_matrices

__all__ = ["KINDS", "find_modules", "layer_matrices", "read_matrices"]
