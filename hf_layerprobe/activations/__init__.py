"""Running a model over data once and keeping statistics of its layers, never the activations."""

from .data import batches
from .run import run_pass
from .statistics import RunningStatistics
from .stream import Accumulator, LayerStream

__all__ = ["Accumulator", "LayerStream", "RunningStatistics", "batches", "run_pass"]
