"""What a Trainer calls while it trains: measuring the layers, and removing some."""

from .history import LayerProbeHistory
from .layer_probe import LayerProbeCallback
from .progressive import ProgressivePruningCallback
from .train_end import PruneOnTrainEndCallback

__all__ = ["LayerProbeCallback", "LayerProbeHistory", "ProgressivePruningCallback", "PruneOnTrainEndCallback"]
