"""What a Trainer calls while it trains: measuring the layers, and removing some."""

from .history import LayerProbeHistory
from .layer_probe import LayerProbeCallback

__all__ = ["LayerProbeCallback", "LayerProbeHistory"]
