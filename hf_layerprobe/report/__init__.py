"""Pictures of similarities and scores, and the card of a pruned model."""

from .card import model_card, write_card
from .figures import depth_plot, difference_plot, heat_map, loss_curve, overview

__all__ = ["depth_plot", "difference_plot", "heat_map", "loss_curve", "model_card", "overview", "write_card"]
