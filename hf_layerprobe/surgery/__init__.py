"""Building the smaller model: a new config, a new model of the same class, the kept tensors moved, and a check."""

from .files import prune_checkpoint

__all__ = ["prune_checkpoint"]
