"""Running a model over data once and keeping statistics of its layers, never the activations."""

from .data import batches
from .means import TokenMean
from .run import run_pass
from .sample import TokenSample
from .sites import SITES, SUBLAYERS
from .state import Resumable, Sum
from .statistics import RunningStatistics
from .stream import Accumulator, LayerStream

__all__ = [
    "SITES",
    "SUBLAYERS",
    "Accumulator",
    "LayerStream",
    "Resumable",
    "RunningStatistics",
    "Sum",
    "TokenMean",
    "TokenSample",
    "batches",
    "run_pass",
]
