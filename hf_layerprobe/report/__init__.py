"""Pictures of similarities and scores."""

from .figures import depth_plot, heat_map, overview

__all__ = ["depth_plot", "heat_map", "overview"]
